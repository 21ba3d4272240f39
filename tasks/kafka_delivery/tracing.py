"""A trace that starts in the web request goes on in the consumer: its context travels in the record's headers.

Only the context in which a record was sent counts. What a worker does with it, or a command, happens in spans of their
own, which say nothing about who sent it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from . import settings
from .errors import InvalidRecordError
from .record import Record

_passed_on: ContextVar[bool] = ContextVar("kafka_delivery_passed_on", default=False)


@contextmanager
def passed_on() -> Iterator[None]:
    """In this block records are sent on behalf of those who sent them first: no context is added."""
    token = _passed_on.set(True)
    try:
        yield
    finally:
        _passed_on.reset(token)


def traced(record: Record) -> Record:
    """`record` with the headers of the current OpenTelemetry context, where there is one and it has none yet.

    Taken when the record is queued, so that the trace begins where the record was sent, not where it was delivered.
    The headers are W3C's, whatever the application's propagators are: a consumer may be anybody's. Baggage may hold
    what a consumer must not see, so a setting has to ask for it.
    """
    if "opentelemetry.trace" not in sys.modules:  # nobody traces in this process; do not load it for nothing
        return record
    if _passed_on.get():
        return record
    names = {name for name, _ in record.header_pairs}
    if not names.isdisjoint(("traceparent", "tracestate")):
        return record
    trace = _trace_context()
    baggage = _baggage() if settings.current().trace_baggage and "baggage" not in names else {}
    for context in (trace | baggage, trace):
        if not context:
            continue
        try:
            return replace(record, headers=[*record.header_pairs, *context.items()])
        except InvalidRecordError:
            continue  # no room left: the record goes before its trace, and that before baggage
    return record


def _trace_context() -> dict[str, str]:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found)
    return found


def _baggage() -> dict[str, str]:
    from opentelemetry.baggage.propagation import W3CBaggagePropagator

    found: dict[str, str] = {}
    W3CBaggagePropagator().inject(found)
    return found
