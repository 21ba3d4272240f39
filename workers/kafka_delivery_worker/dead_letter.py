"""A dead letter as it lies in its topic, read back to the record that it was.

Three writers are understood: this project, Spring Kafka (``kafka_dlt-*``, and the ``x-*`` of Spring Cloud Stream) and
Kafka Connect (``__connect.errors.*``); and this project in the words of the other two, see `dead_letter_headers`. They
leave the record's own headers as they were and add theirs; ours come first, and the record's own follow, prefixed. What
nobody signed is a record without a known topic.
"""

from __future__ import annotations

import enum
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE

from kafka_delivery.names import MESSAGE_ID, REDRIVE_COUNT, ConnectHeaders, SpringHeaders, is_topic_name
from kafka_delivery.names import DeadLetterHeaders as Ours
from kafka_delivery.record import MAX_TIMESTAMP_MS, Record, is_message_id

from .classify import code_of

Headers = Sequence[tuple[str, bytes | None]]

SPRING, CONNECT = "kafka_dlt-", "__connect.errors."

SPRING_OFFSET, SPRING_STREAM_OFFSET, CONNECT_OFFSET = (
    SPRING + "original-offset",
    "x-original-offset",
    CONNECT + "offset",
)
"""What only those tools know, and always say: a letter in their words without it is ours."""

SPRING_STREAM_TOPIC = "x-original-topic"
SPRING_STREAM_HEADERS = re.compile(r"x-(original-(topic|partition|offset|timestamp|timestamp-type)|exception-\w+)")
"""Of Spring Cloud Stream's Kafka binder; ``x-`` alone would be anybody's."""

SPRING_RETRY = "retry_topic-"
"""Of Spring's non-blocking retries: it counts there how often it has tried."""

_IDS = uuid.UUID("6f1f6c0e-3a43-5d0e-9d5c-0b0a6f5f1d21")
"""Namespace of the ids that records without one are given: the same at each reading."""


class Origin(enum.StrEnum):
    """Who wrote a dead letter."""

    OURS = "kafka-delivery"
    SPRING = "spring"
    CONNECT = "connect"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One dead letter. Its `repr` shows no payload, key or header.

    Attributes:
        partition, offset: its place in the dead-letter topic; -1 where it is parked instead.
        parked_id, parked_at_ms: how and when it was parked, if it was.
        origin: who wrote it.
        topic: where the record was meant to go; None where that is not said.
        key, value, headers: the record's own; headers in order, repeats kept, without what a writer added.
        timestamp_ms: the record's time; None where it has none.
        message_id: its id; of a record that came without one, made from its place.
        error_class, error_code, error_message: why; "" and None where that is not said.
        at_ms: when it failed, in milliseconds since the epoch; 0 where nothing is known.
        retry_count: attempts that were used up.
        redrive_count: how often it was sent again from a dead-letter topic.
        problem: why it cannot be sent again as it was, or "".
    """

    partition: int
    offset: int
    origin: Origin
    topic: str | None
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int | None
    message_id: str
    error_class: str = ""
    error_code: int | None = None
    error_message: str = ""
    at_ms: int = 0
    retry_count: int = 0
    redrive_count: int = 0
    parked_id: str = ""
    parked_at_ms: int = 0
    problem: str = ""

    def __repr__(self) -> str:
        return f"DeadLetter({self.place}, topic={self.topic!r}, message_id={self.message_id!r}, origin={self.origin})"

    @property
    def place(self) -> str:
        """``partition:offset``, as commands take it."""
        return f"{self.partition}:{self.offset}"

    @property
    def size(self) -> int:
        """Bytes of key and value."""
        return len(self.key or b"") + len(self.value or b"")

    def record(self, topic: str) -> Record:
        """The record as it was, for `topic`.

        Raises:
            InvalidRecordError: it cannot be sent; the text says which part of it.
        """
        return Record(
            topic,
            self.value,
            self.key,
            self.headers,
            timestamp=self.timestamp_ms,
            message_id=self.message_id,
        )


def read(message: Any) -> DeadLetter:
    """The dead letter of a consumed `confluent_kafka.Message`."""
    problem = ""
    try:
        headers: Headers = message.headers() or []
    except UnicodeDecodeError:
        headers, problem = (
            [],
            "a header has a name that is not UTF-8, which no client but librdkafka's C interface reads",
        )
    found = _reader(headers)(headers)
    kind, timestamp = message.timestamp()
    timestamp_ms = None if kind == TIMESTAMP_NOT_AVAILABLE else _time(timestamp)
    place = f"{message.topic()}/{message.partition()}/{message.offset()}/{timestamp}"
    found["message_id"] = found["message_id"] or str(uuid.uuid5(_IDS, place))
    found["at_ms"] = found.get("at_ms") or timestamp_ms or 0
    found["timestamp_ms"] = found.get("timestamp_ms") or timestamp_ms
    return DeadLetter(
        partition=message.partition(),
        offset=message.offset(),
        key=message.key(),
        value=message.value(),
        problem=problem,
        **found,
    )


# -- one reader for each writer
def _ours(headers: Headers) -> dict[str, Any]:
    """Of all but the first, those with the prefix are the record's own, and those without are ours."""
    said: dict[str, bytes | None] = {}
    own: list[tuple[str, bytes | None]] = []
    for place, (name, value) in enumerate(headers):
        if place and name.startswith(Ours.OWN_PREFIX):
            own.append((name.removeprefix(Ours.OWN_PREFIX), value))
        else:
            said.setdefault(name, value)
    return {
        "origin": Origin.OURS,
        "topic": _topic(said.get(Ours.ORIGINAL_TOPIC)),
        "headers": own,
        "message_id": _id(said.get(Ours.MESSAGE_ID)),
        "error_class": _text(said.get(Ours.ERROR_CLASS)),
        "error_code": _number(said.get(Ours.ERROR_CODE)),
        "error_message": _text(said.get(Ours.ERROR_MESSAGE)),
        "at_ms": _moment(_text(said.get(Ours.TIMESTAMP))),
        "timestamp_ms": _millis(said.get(Ours.RECORD_TIMESTAMP)),
        "retry_count": _count(said.get(Ours.RETRY_COUNT)),
        "redrive_count": _count(said.get(Ours.REDRIVE_COUNT)),
    }


def _spring(headers: Headers) -> dict[str, Any]:
    """Numbers are big-endian there. A record that failed twice has its origin first, and its last error last."""
    found = _split(headers, SPRING_OFFSET, lambda name: name.startswith((SPRING, SPRING_RETRY)))
    attempts = _big_endian(found.last.get(SPRING_RETRY + "attempts"))
    message = _text(found.last.get(SpringHeaders.EXCEPTION_MESSAGE))
    return found.own | {
        "origin": Origin.SPRING,
        "topic": _topic(found.first.get(SpringHeaders.ORIGINAL_TOPIC)),
        "error_class": _text(found.last.get(SPRING + "exception-cause-fqcn"))
        or _text(found.last.get(SpringHeaders.EXCEPTION_FQCN)),
        "error_code": _named(message),
        "error_message": message,
        "timestamp_ms": _time(_big_endian(found.first.get(SpringHeaders.ORIGINAL_TIMESTAMP))),
        "retry_count": max(0, (attempts or 1) - 1),
    }


def _spring_stream(headers: Headers) -> dict[str, Any]:
    found = _split(headers, SPRING_STREAM_OFFSET, lambda name: SPRING_STREAM_HEADERS.fullmatch(name) is not None)
    return found.own | {
        "origin": Origin.SPRING,
        "topic": _topic(found.first.get(SPRING_STREAM_TOPIC)),
        "error_class": _text(found.last.get("x-exception-fqcn")),
        "error_message": _text(found.last.get("x-exception-message")),
        "timestamp_ms": _time(_big_endian(found.first.get("x-original-timestamp"))),
    }


def _connect(headers: Headers) -> dict[str, Any]:
    """All are text there."""
    found = _split(headers, CONNECT_OFFSET, lambda name: name.startswith(CONNECT))
    message = _text(found.last.get(ConnectHeaders.EXCEPTION_MESSAGE))
    return found.own | {
        "origin": Origin.CONNECT,
        "topic": _topic(found.first.get(ConnectHeaders.TOPIC)),
        "error_class": _text(found.last.get(ConnectHeaders.EXCEPTION_CLASS)),
        "error_code": _named(message),
        "error_message": message,
        "timestamp_ms": _millis(found.last.get(ConnectHeaders.RECORD_TIMESTAMP)),
    }


def _unknown(headers: Headers) -> dict[str, Any]:
    return _split(headers, "", lambda _: False).own | {"origin": Origin.UNKNOWN, "topic": None}


_SIGNS: dict[str, Callable[[Headers], dict[str, Any]]] = {
    SpringHeaders.ORIGINAL_TOPIC: _spring,
    ConnectHeaders.TOPIC: _connect,
    SPRING_STREAM_TOPIC: _spring_stream,
}
"""The header by which a tool's letters are known, and how they are read."""


def _reader(headers: Headers) -> Callable[[Headers], dict[str, Any]]:
    """Ours sign first. The others sign last: what has several signs was signed by one, and had the rest before."""
    names = [name for name, _ in headers]
    if names and names[0] == Ours.ORIGINAL_TOPIC and Ours.ERROR_CLASS in names:
        return _ours
    return next((_SIGNS[name] for name in reversed(names) if name in _SIGNS), _unknown)


@dataclass(frozen=True, slots=True)
class _Split:
    first: dict[str, bytes | None]
    last: dict[str, bytes | None]
    own: dict[str, Any]


def _split(headers: Headers, offset: str, theirs: Callable[[str], bool]) -> _Split:
    """What a tool added, the first and the last of each name, and the record's own.

    A record that we had sent has its id first, and then how often it was redriven. A letter that we wrote in the tool's
    words has only the last of each name from us, and how often it was redriven at the end.
    """
    by_the_tool = any(name == offset for name, _ in headers)
    own = list(headers)
    message_id = _id(own[0][1]) if own and own[0][0] == MESSAGE_ID else None
    if message_id is not None:
        own = own[1:]
    redrives = 0
    place = 0 if by_the_tool or not any(theirs(name) for name, _ in own) else -1
    if own and message_id is not None and own[place][0] == REDRIVE_COUNT and (redrives := _count(own[place][1])):
        own.pop(place)
    added: list[tuple[str, bytes | None]] = []
    last_of = {name: place for place, (name, _) in enumerate(own) if theirs(name)}
    kept = []
    for place, (name, value) in enumerate(own):
        if name in last_of and (by_the_tool or place == last_of[name]):
            added.append((name, value))
        else:
            kept.append((name, value))
    known = {"headers": kept, "message_id": message_id, "redrive_count": redrives}
    return _Split(dict(reversed(added)), dict(added), known)


# -- what a header's value says; whatever a stranger wrote, it says nothing or something
def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


def _topic(value: bytes | None) -> str | None:
    name = _text(value)
    return name if is_topic_name(name) else None


def _id(value: bytes | None) -> str | None:
    text = _text(value)
    return text if is_message_id(text) else None


def _number(value: bytes | None) -> int | None:
    text = _text(value)
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else None


def _millis(value: bytes | None) -> int | None:
    text = _text(value)
    return _time(int(text)) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _count(value: bytes | None) -> int:
    return max(0, _number(value) or 0)


def _named(message: str) -> int | None:
    """The code whose name an error of ours has in its text."""
    named = re.search(r"\[(_?[A-Z][A-Z_]+)\]", message)
    return code_of(named[1]) if named else None


def _big_endian(value: bytes | None) -> int | None:
    return int.from_bytes(value, signed=True) if value and len(value) in (1, 4, 8) else None


def _time(number: int | None) -> int | None:
    return number if number is not None and 1 <= number <= MAX_TIMESTAMP_MS else None


def _moment(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return None if moment.tzinfo is None else _time(int(moment.timestamp() * 1000))
