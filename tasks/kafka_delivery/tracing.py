"""A trace that starts in the web request goes on in the consumer: its context travels in the record's headers."""

from __future__ import annotations

import sys
from dataclasses import replace

from .errors import InvalidRecordError
from .record import Record


def traced(record: Record) -> Record:
    """`record` with the headers of the current OpenTelemetry context, where there is one and it has none yet.

    Taken when the record is queued, so that the trace begins where the record was sent, not where it was delivered;
    a retry finds the headers there and leaves them.
    """
    if "opentelemetry.trace" not in sys.modules:  # nobody traces in this process; do not load it for nothing
        return record
    from opentelemetry import propagate

    context: dict[str, str] = {}
    propagate.inject(context)
    names = {name for name, _ in record.header_pairs}
    if not context or not names.isdisjoint(context):
        return record
    try:
        return replace(record, headers=[*record.header_pairs, *context.items()])
    except InvalidRecordError:
        return record  # no room left: the record goes before its trace
