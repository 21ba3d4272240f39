"""The headers of a dead letter: what failed and why, in our words or in those of Spring Kafka or Kafka Connect.

One function per preset. The message id comes first in each, since consumers drop duplicates by it. A tool of the Java
world reads the *last* header of a name (`Headers.lastHeader`), so theirs come after the record's own, which keep their
names there; a header of the record's own cannot pass for one of theirs, and none is lost: without the last of each
name, and the first ``message-id``, what is left is the record's own. `dead_letter` reads them back.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from kafka_delivery.names import MESSAGE_ID, REDRIVE_COUNT, ConnectHeaders, DeadLetterHeaders, SpringHeaders
from kafka_delivery.record import Record

Pairs = list[tuple[str, str | bytes | None]]


def ours(record: Record, why: dict[str, Any]) -> Pairs:
    """Ours come first, and a reader takes the first of a name; the record's own have a prefix."""
    names = DeadLetterHeaders
    code = why["error_code"]
    return [
        (names.ORIGINAL_TOPIC, record.topic.encode()),
        (names.ERROR_MESSAGE, why["error_message"].encode()),
        (names.ERROR_CLASS, why["error_class"].encode()),
        (names.ERROR_CODE, b"" if code is None else str(code).encode()),
        (names.TIMESTAMP, why["failed_at"].encode()),
        (names.RETRY_COUNT, str(why["retry_count"]).encode()),
        (names.MESSAGE_ID, record.id.encode()),
        (names.RECORD_TIMESTAMP, str(record.timestamp_ms).encode()),
        *_redrives(why),
        *((names.OWN_PREFIX + name, value) for name, value in record.header_pairs),
    ]


def spring(record: Record, why: dict[str, Any]) -> Pairs:
    """As Spring Kafka's `DeadLetterPublishingRecoverer` writes them: numbers are big-endian, as Java's ByteBuffer.

    There is no offset, consumer group or stack trace: the record was never in its topic. The partition is there only
    if the caller chose one.
    """
    names = SpringHeaders
    headers: Pairs = [(MESSAGE_ID, record.id.encode()), *record.header_pairs]
    headers.append((names.ORIGINAL_TOPIC, record.topic.encode()))
    if record.partition is not None:
        headers.append((names.ORIGINAL_PARTITION, struct.pack(">i", record.partition)))
    return [
        *headers,
        (names.ORIGINAL_TIMESTAMP, struct.pack(">q", record.timestamp_ms)),
        (names.ORIGINAL_TIMESTAMP_TYPE, b"CreateTime"),
        (names.EXCEPTION_FQCN, why["error_class"].encode()),
        (names.EXCEPTION_MESSAGE, why["error_message"].encode()),
        *_redrives(why),
    ]


def connect(record: Record, why: dict[str, Any]) -> Pairs:
    """As Kafka Connect's `DeadLetterQueueReporter` writes them: numbers are text.

    There is no offset, connector, task, class or stack trace here, and a partition only if the caller chose one.
    """
    names = ConnectHeaders
    headers: Pairs = [(MESSAGE_ID, record.id.encode()), *record.header_pairs]
    headers.append((names.TOPIC, record.topic.encode()))
    if record.partition is not None:
        headers.append((names.PARTITION, str(record.partition).encode()))
    return [
        *headers,
        (names.RECORD_TIMESTAMP, str(record.timestamp_ms).encode()),
        (names.STAGE, b"KAFKA_PRODUCE"),
        (names.EXCEPTION_CLASS, why["error_class"].encode()),
        (names.EXCEPTION_MESSAGE, why["error_message"].encode()),
        *_redrives(why),
    ]


def _redrives(why: dict[str, Any]) -> Pairs:
    """How often the record was sent again from here, where it was; among ours, where no header of its own can be."""
    return [(REDRIVE_COUNT, str(why["redrive_count"]).encode())] if why.get("redrive_count") else []


PRESETS: dict[str, Callable[[Record, dict[str, Any]], Pairs]] = {"ours": ours, "spring": spring, "connect": connect}
"""By the value of the setting `dead_letter_headers`."""
