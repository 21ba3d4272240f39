"""A record: what a caller wants to be in Kafka. Validated when it is made, frozen from then on.

What a record is made of stays what it was: bytes in, the same bytes out. Its `repr` shows no payload, key or header.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from . import settings
from .encoding import to_json
from .errors import InvalidRecordError
from .names import MESSAGE_ID, TOPIC_MAX_LENGTH, WIRE_VERSION, DeadLetterHeaders, is_topic_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
else:
    DataclassInstance = object

Bytes = bytes | bytearray | memoryview
HeaderValue = str | Bytes | None
Headers = Mapping[str, HeaderValue] | Iterable[tuple[str, HeaderValue]]
Key = str | Bytes | None
Value = str | Bytes | Mapping[str, Any] | list[Any] | tuple[Any, ...] | DataclassInstance | None
"""To a type checker. Of mappings only a `dict` is taken; but to a checker a `TypedDict` is a mapping and no `dict`."""

MAX_MESSAGE_ID = 200
"""Characters. The id is part of Redis keys, log lines and a Kafka header."""

MAX_TIMESTAMP_MS = 253_402_300_799_999
"""The last millisecond of the year 9999, where Python's datetimes and most consumers end."""

RECORD_OVERHEAD = 100
"""Bytes that Kafka's record format (v2) and its batch add at most to a record's key, value and headers."""

HEADER_OVERHEAD = 10 + len(DeadLetterHeaders.OWN_PREFIX)
"""Bytes that a header costs besides its name and value, when a dead letter has prefixed it: two varints, the prefix."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_TEXT = bytes({9, 10, 13, *range(32, 127)})


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """One record for one topic.

    Args:
        topic: 1 to 249 of ``a-z A-Z 0-9 . _ -``, with room for the name of its dead-letter topic.
        value: `bytes`; `str` (sent as UTF-8); a `dict`, `list` or dataclass (sent as JSON); or None, a tombstone.
        key: `bytes`, `str` (UTF-8) or None. Records of one key go to one partition, where Java puts them (murmur2).
        headers: a mapping or an iterable of (name, value) pairs, value `str`, `bytes` or None. Order and repeats
            are kept.
        partition: a partition number, or None to let the key decide.
        timestamp: an aware `datetime`, or milliseconds since the epoch; by default the moment of this call.
        message_id: the record's id for its whole life; by default a new UUIDv7. Give one to repeat a send safely.

    Raises:
        InvalidRecordError: naming the field; the record would be refused later otherwise.
    """

    topic: str
    value: Value
    key: Key = None
    headers: Headers | None = None
    partition: int | None = None
    timestamp: datetime | int | None = None
    message_id: str | uuid.UUID | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # frozen for everyone else
        set_field(self, "message_id", _message_id(self.message_id))
        try:
            set_field(self, "topic", _topic(self.topic))
            set_field(self, "value", _value(self.value))
            set_field(self, "key", _key(self.key))
            set_field(self, "headers", _headers(self.headers))
            set_field(self, "partition", _partition(self.partition))
            set_field(self, "timestamp", _timestamp(self.timestamp))
            self._check_size()
        except InvalidRecordError as error:
            raise InvalidRecordError(error.field, error.problem, self.id) from error.__cause__

    def _check_size(self) -> None:
        limit = settings.current().max_record_bytes
        if self.size > limit:
            raise InvalidRecordError(
                "record",
                f"{self.size} bytes with key, headers and overhead, more than KAFKA_DELIVERY_MAX_RECORD_BYTES={limit}",
            )

    # What the fields are once the record is made; the annotations above are what a caller may give.
    @property
    def id(self) -> str:
        """The message id."""
        return self.message_id  # type: ignore[return-value]

    @property
    def value_bytes(self) -> bytes | None:
        """The value as Kafka gets it."""
        return self.value  # type: ignore[return-value]

    @property
    def key_bytes(self) -> bytes | None:
        """The key as Kafka gets it."""
        return self.key  # type: ignore[return-value]

    @property
    def header_pairs(self) -> list[tuple[str, bytes | None]]:
        """The caller's own headers, in order, as Kafka gets them; a new list at each call."""
        return list(self.headers)  # type: ignore[arg-type]

    @property
    def timestamp_ms(self) -> int:
        """Milliseconds since the epoch."""
        return self.timestamp  # type: ignore[return-value]

    @property
    def kafka_headers(self) -> list[tuple[str, bytes | None]]:
        """Headers as they go to Kafka: the message id first, so that no header of the caller's passes for it."""
        return [(MESSAGE_ID, self.id.encode()), *self.header_pairs]

    @property
    def size(self) -> int:
        """Upper bound of its bytes in Kafka, with room for the prefixes of a dead letter."""
        size = RECORD_OVERHEAD + len(MESSAGE_ID) + len(self.id)
        size += len(self.value_bytes or b"") + len(self.key_bytes or b"")
        for name, value in self.header_pairs:
            size += HEADER_OVERHEAD + len(name.encode()) + len(value or b"")
        return size

    def __repr__(self) -> str:
        return f"Record(topic={self.topic!r}, message_id={self.message_id!r}, size={self.size})"

    # -- on the wire between caller and worker
    def to_wire(self, cluster: str) -> list[Any]:
        """The record as JSON can carry it: versioned, and opaque to whatever interprets JSON objects on the way.

        Bytes travel as text where they are plain ASCII text, else as base64 in a list of one; so a `dict` of the
        user's is never seen, and never interpreted, by kombu's JSON hooks.
        """
        return [
            WIRE_VERSION,
            cluster,
            self.topic,
            _pack(self.value_bytes),
            _pack(self.key_bytes),
            [[name, _pack(value)] for name, value in self.header_pairs],
            self.partition,
            self.timestamp_ms,
            self.id,
        ]

    @classmethod
    def from_wire(cls, wire: list[Any], cluster: str) -> Record:
        """The record of `to_wire`, validated again: what is in a queue may be anybody's.

        Raises:
            InvalidRecordError: it is of a newer version, for another cluster, malformed or invalid.
        """
        if not wire or wire[0] != WIRE_VERSION:
            version = wire[0] if wire and isinstance(wire[0], int) and 0 <= wire[0] <= 1_000_000 else "unknown"
            raise InvalidRecordError("record", f"wire version {version}, this worker knows {WIRE_VERSION}: update it")
        try:
            _, record_cluster, topic, value, key, headers, partition, timestamp, message_id = wire
            fields = (
                topic,
                unpack(value),
                unpack(key),
                [(name, unpack(packed)) for name, packed in headers],
                partition,
                timestamp,
                message_id,
            )
        except (ValueError, TypeError) as error:
            raise InvalidRecordError("record", "malformed on the wire") from error
        if record_cluster != cluster:
            raise InvalidRecordError(
                "record", f"for cluster {str(record_cluster)[:60]!r}; this worker serves {cluster!r}"
            )
        return cls(*fields)


def uuid7() -> str:
    """A UUIDv7 (RFC 9562): unique, and sorted by time, so that indexes and eyes find it."""
    return str(_uuid7(time.time_ns() // 1_000_000, int.from_bytes(os.urandom(10))))


def _uuid7(milliseconds: int, low: int) -> uuid.UUID:
    value = milliseconds << 80 | low
    value = value & ~(0xF000 << 64) | 0x7000 << 64
    value = value & ~(0xC000 << 48) | 0x8000 << 48
    return uuid.UUID(int=value)


def made_at_ms(message_id: str) -> int | None:
    """When an id was made (ms since the epoch), which for one of ours is when the send was called; None if unknown.

    The record's own timestamp does not say: it may be its caller's, as the time of an event long ago.
    """
    if len(message_id) != 36 or message_id[14] != "7":
        return None
    try:
        return int(message_id[:8] + message_id[9:13], 16)
    except ValueError:
        return None


def member_id(batch_id: str, position: int) -> str:
    """The id of a batch's member that has none of its own: the same whenever the same batch is sent again.

    A UUIDv7 of the batch's time where the batch's id is one, else that id and the position.
    """
    try:
        batch = uuid.UUID(batch_id)
    except ValueError:
        return f"{batch_id}.{position}"
    low = int.from_bytes(hashlib.sha256(f"{batch_id}.{position}".encode()).digest()[:10])
    return str(_uuid7(batch.int >> 80, low))


def is_message_id(message_id: Any) -> bool:
    """Whether it can be the id of a record."""
    return (
        isinstance(message_id, str)
        and 0 < len(message_id) <= MAX_MESSAGE_ID
        and message_id.isascii()
        and message_id.isprintable()
    )


def _message_id(message_id: Any) -> str:
    if message_id is None:
        return uuid7()
    if isinstance(message_id, uuid.UUID):
        return str(message_id)
    if not isinstance(message_id, str):
        raise InvalidRecordError("message_id", f"must be str or UUID, not {type(message_id).__name__}")
    if not is_message_id(message_id):
        raise InvalidRecordError("message_id", f"must be 1 to {MAX_MESSAGE_ID} printable ASCII characters")
    return message_id


def _topic(topic: Any) -> str:
    if not isinstance(topic, str):
        raise InvalidRecordError("topic", f"must be str, not {type(topic).__name__}")
    if not is_topic_name(topic):
        raise InvalidRecordError(
            "topic", f"{topic[:60]!r} is not a topic name: 1 to {TOPIC_MAX_LENGTH} of a-z A-Z 0-9 . _ -"
        )
    dead_letters = settings.current().dead_letter_topic(topic)
    if len(dead_letters) > TOPIC_MAX_LENGTH:
        raise InvalidRecordError(
            "topic",
            f"leaves no room for the name of its dead-letter topic: {len(dead_letters)} characters of "
            f"{TOPIC_MAX_LENGTH}; shorten it or name one in KAFKA_DELIVERY_DEAD_LETTER_TOPICS",
        )
    return topic


def _value(value: Any) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return _utf8("value", value)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    return to_json(value)


def _key(key: Any) -> bytes | None:
    if key is None or isinstance(key, bytes):
        return key
    if isinstance(key, str):
        return _utf8("key", key)
    if isinstance(key, bytearray | memoryview):
        return bytes(key)
    raise InvalidRecordError("key", f"must be bytes, str or None, not {type(key).__name__}; str(...) it yourself")


def _headers(headers: Any) -> tuple[tuple[str, bytes | None], ...]:
    if headers is None:
        return ()
    if isinstance(headers, str | bytes):
        raise InvalidRecordError("headers", f"must be a mapping or pairs, not {type(headers).__name__}")
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    try:
        pairs = list(pairs)
    except TypeError as error:
        raise InvalidRecordError("headers", f"must be a mapping or pairs, not {type(headers).__name__}") from error
    return tuple(_header(position, pair) for position, pair in enumerate(pairs))


def _header(position: int, pair: Any) -> tuple[str, bytes | None]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InvalidRecordError("headers", f"number {position} must be a pair of name and value")
    name, value = pair
    if not isinstance(name, str):
        raise InvalidRecordError("headers", f"the name of number {position} must be str, not {type(name).__name__}")
    if not name or "\0" in name:
        raise InvalidRecordError("headers", f"the name of number {position} is empty or has a NUL: librdkafka cuts it")
    _utf8("headers", name)
    if isinstance(value, str):
        return name, _utf8("headers", value)
    if value is None or isinstance(value, bytes):
        return name, value
    if isinstance(value, bytearray | memoryview):
        return name, bytes(value)
    raise InvalidRecordError(
        "headers", f"the value of number {position} must be str, bytes or None, not {type(value).__name__}"
    )


def _partition(partition: Any) -> int | None:
    if partition is None:
        return None
    if type(partition) is not int:
        raise InvalidRecordError("partition", f"must be int or None, not {type(partition).__name__}")
    if not 0 <= partition < 2**31:
        raise InvalidRecordError("partition", f"{partition} is not a partition number: 0 to 2147483647")
    return partition


def _timestamp(timestamp: Any) -> int:
    if timestamp is None:
        return time.time_ns() // 1_000_000
    if isinstance(timestamp, datetime):
        if timestamp.utcoffset() is None:
            raise InvalidRecordError("timestamp", "the datetime has no time zone: it could mean any of 38 moments")
        timestamp = (timestamp - _EPOCH) // timedelta(milliseconds=1)  # exact, which a float is not
    if type(timestamp) is not int:
        raise InvalidRecordError("timestamp", f"must be a datetime or int (ms), not {type(timestamp).__name__}")
    if not 1 <= timestamp <= MAX_TIMESTAMP_MS:
        # 0 would be sent as "now": that is what librdkafka's produce() takes it for.
        raise InvalidRecordError("timestamp", f"{timestamp} is not in 1 to {MAX_TIMESTAMP_MS} ms since the epoch")
    return timestamp


def _utf8(field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        problem = f"is not valid Unicode at character {error.start}: a lone surrogate has no UTF-8"
        raise InvalidRecordError(field, problem) from None  # the cause would quote the text


def _pack(data: bytes | None) -> str | list[str] | None:
    if data is None:
        return None
    if not data.translate(None, _TEXT):
        return data.decode("ascii")
    return [b64encode(data).decode("ascii")]


def unpack(packed: Any) -> bytes | None:
    """Bytes as `Record.to_wire` packed them."""
    if packed is None:
        return None
    if isinstance(packed, str):
        return packed.encode("ascii")
    (encoded,) = packed
    return b64decode(encoded, validate=True)
