"""A dead letter read back is the record that it was, whoever wrote it, and however often it has been here."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import TIMESTAMP_CREATE_TIME, TIMESTAMP_NOT_AVAILABLE
from hypothesis import given, settings
from hypothesis import strategies as st

from kafka_delivery import Record
from kafka_delivery.dead_letters import reason
from kafka_delivery.record import is_message_id
from kafka_delivery_worker.dead_letter import DeadLetter, Origin, read
from kafka_delivery_worker.dead_letter_headers import PRESETS

NOW = 1_767_323_045_678
FAILED_AT = "2026-01-02T03:04:06.000+00:00"
WHY = reason("RejectedError", 10, "too large [MSG_SIZE_TOO_LARGE] (topic orders, message id-1)", 2, FAILED_AT, 1)

NAMES = [
    "original-topic", "error-message", "error-class", "error-code", "timestamp", "retry-count", "message-id",
    "record-timestamp", "original-timestamp", "original-record-timestamp", "__connect.errors.record.timestamp",
    "redrive-count", "original-", "original-original-topic", "topic",
    "kafka_dlt-original-topic", "kafka_dlt-exception-message", "kafka_dlt-exception-fqcn",
    "__connect.errors.topic", "__connect.errors.exception.message", "x-original-topic", "x-mine",
]  # fmt: skip
"""Headers that a record may have of its own, and that look like somebody's."""


class Message:
    """A consumed message."""

    def __init__(
        self, headers: Any, *, key: bytes | None = b"k", value: bytes | None = b"v", offset: int = 7, at: Any = None
    ) -> None:
        self._headers, self._key, self._value, self._offset = headers, key, value, offset
        self._at = (TIMESTAMP_CREATE_TIME, NOW) if at is None else at

    def headers(self) -> Any:
        return (
            None if self._headers is None else [(n, v.encode() if isinstance(v, str) else v) for n, v in self._headers]
        )

    def topic(self) -> str:
        return "orders-dlq"

    def partition(self) -> int:
        return 3

    def offset(self) -> int:
        return self._offset

    def key(self) -> bytes | None:
        return self._key

    def value(self) -> bytes | None:
        return self._value

    def timestamp(self) -> tuple[int, int]:
        return self._at


def written(preset: str, record: Record, why: dict[str, Any] = WHY) -> Message:
    headers = PRESETS[preset](record, why)
    return Message(
        headers, key=record.key_bytes, value=record.value_bytes, at=(TIMESTAMP_CREATE_TIME, NOW + 86_400_000)
    )


values = st.one_of(st.none(), st.binary(max_size=20))
own_headers = st.lists(st.tuples(st.sampled_from(NAMES) | st.text("ab-", min_size=1, max_size=5), values), max_size=8)


@pytest.mark.parametrize("preset", PRESETS)
@settings(deadline=None)
@given(own_headers, values, values)
def test_what_a_preset_writes_is_read_back_as_it_was(
    preset: str, headers: list[tuple[str, bytes | None]], key: bytes | None, value: bytes | None
) -> None:
    record = Record("orders", value, key, headers, timestamp=NOW, message_id="id-1")

    letter = read(written(preset, record))

    assert letter.record("orders") == record
    assert (letter.topic, letter.redrive_count, letter.error_class, letter.error_code) == (
        "orders", 1, "RejectedError", 10,
    )  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_a_record_that_fails_again_and_again_gathers_nothing(preset: str) -> None:
    headers = [(name, b"mine") for name in NAMES] * 2
    record = Record("orders", b"\x00", None, headers, timestamp=NOW, message_id="id-1")
    first = written(preset, record).headers()

    for _ in range(5):
        record = read(written(preset, record)).record("orders")

    assert written(preset, record).headers() == first


@pytest.mark.parametrize("preset", PRESETS)
def test_one_that_was_never_redriven_has_no_word_of_it(preset: str) -> None:
    record = Record("orders", "v", headers=[("redrive-count", "5")], message_id="id-1", timestamp=NOW)
    letter = read(written(preset, record, WHY | {"redrive_count": 0}))
    assert letter.redrive_count == 0
    assert letter.headers == [("redrive-count", b"5")]


def test_ours_says_when_and_how_often() -> None:
    letter = read(written("ours", Record("orders", "v", message_id="id-1", timestamp=NOW)))
    assert letter.origin is Origin.OURS
    assert letter.at_ms == NOW - 678 + 1000
    assert letter.timestamp_ms == NOW
    assert letter.retry_count == 2
    assert letter.place == "3:7"


SPRING = [
    ("a", b"1"),
    ("kafka_dlt-original-topic", "orders"),
    ("kafka_dlt-original-partition", struct.pack(">i", 2)),
    ("kafka_dlt-original-offset", struct.pack(">q", 5)),
    ("kafka_dlt-original-timestamp", struct.pack(">q", NOW - 1)),
    ("kafka_dlt-original-timestamp-type", "CreateTime"),
    ("kafka_dlt-original-consumer-group", "billing"),
    ("kafka_dlt-exception-fqcn", "org.springframework.kafka.listener.ListenerExecutionFailedException"),
    ("kafka_dlt-exception-cause-fqcn", "java.lang.IllegalStateException"),
    ("kafka_dlt-exception-message", "Listener failed"),
    ("kafka_dlt-exception-stacktrace", "at ..."),
    ("retry_topic-attempts", struct.pack(">i", 4)),
    ("a", None),
]
"""As Spring Kafka's DeadLetterPublishingRecoverer writes them, among the record's own."""


def test_spring_kafkas() -> None:
    letter = read(Message(SPRING))

    assert letter.origin is Origin.SPRING
    assert (letter.topic, letter.error_class) == ("orders", "java.lang.IllegalStateException")
    assert (letter.error_message, letter.error_code, letter.retry_count) == ("Listener failed", None, 3)
    assert letter.timestamp_ms == NOW - 1
    assert letter.at_ms == NOW
    assert letter.headers == [("a", b"1"), ("a", None)]


def test_spring_kafkas_that_failed_in_a_retry_topic_knows_its_first_topic_and_its_last_error() -> None:
    again = [("kafka_dlt-original-topic", "orders-retry-0"), ("kafka_dlt-exception-message", "Listener failed again")]
    letter = read(Message(SPRING + again))
    assert (letter.topic, letter.error_message) == ("orders", "Listener failed again")
    assert letter.headers == [("a", b"1"), ("a", None)]


def test_spring_cloud_streams() -> None:
    headers = [
        ("x-mine", "own"),
        ("x-original-topic", "orders"),
        ("x-original-partition", struct.pack(">i", 2)),
        ("x-original-offset", struct.pack(">q", 5)),
        ("x-original-timestamp", struct.pack(">q", NOW - 1)),
        ("x-original-timestamp-type", "CreateTime"),
        ("x-exception-fqcn", "java.lang.IllegalStateException"),
        ("x-exception-message", "no"),
        ("x-exception-stacktrace", "at ..."),
    ]
    letter = read(Message(headers))
    assert (letter.origin, letter.topic, letter.error_class) == (
        Origin.SPRING, "orders", "java.lang.IllegalStateException",
    )  # fmt: skip
    assert letter.headers == [("x-mine", b"own")]
    assert letter.timestamp_ms == NOW - 1


CONNECT = [
    ("a", b"1"),
    ("__connect.errors.topic", "orders"),
    ("__connect.errors.partition", "2"),
    ("__connect.errors.offset", "5"),
    ("__connect.errors.connector.name", "sink"),
    ("__connect.errors.task.id", "0"),
    ("__connect.errors.stage", "VALUE_CONVERTER"),
    ("__connect.errors.class.name", "org.apache.kafka.connect.json.JsonConverter"),
    ("__connect.errors.exception.class.name", "org.apache.kafka.connect.errors.DataException"),
    ("__connect.errors.exception.message", "not JSON"),
    ("__connect.errors.exception.stacktrace", "at ..."),
]


def test_kafka_connects() -> None:
    letter = read(Message(CONNECT))
    assert (letter.origin, letter.topic) == (Origin.CONNECT, "orders")
    assert letter.error_class == "org.apache.kafka.connect.errors.DataException"
    assert letter.error_message == "not JSON"
    assert letter.headers == [("a", b"1")]
    assert letter.at_ms == NOW


def test_a_record_of_ours_that_a_consumer_gave_up_keeps_its_id_and_its_redrives() -> None:
    ours = [("message-id", b"id-1"), ("redrive-count", b"2"), ("redrive-count", b"mine")]
    for theirs in (SPRING, CONNECT):
        letter = read(Message(ours + theirs))
        assert (letter.message_id, letter.redrive_count) == ("id-1", 2)
        assert letter.headers[0] == ("redrive-count", b"mine")


@pytest.mark.parametrize("headers", [None, [], [("a", b"1"), ("a", None)]], ids=str)
def test_without_a_sign_of_anybody(headers: Any) -> None:
    letter = read(Message(headers))
    assert (letter.origin, letter.topic, letter.error_class, letter.error_code) == (Origin.UNKNOWN, None, "", None)
    assert letter.headers == (headers or [])
    assert is_message_id(letter.message_id)
    assert letter.message_id == read(Message(headers)).message_id
    assert letter.message_id != read(Message(headers, offset=8)).message_id


@pytest.mark.parametrize(
    ("name", "value", "attribute", "found"),
    [
        ("original-topic", b"a b", "topic", None),
        ("original-topic", b"\xff", "topic", None),
        ("original-topic", None, "topic", None),
        ("error-code", b"ten", "error_code", None),
        ("error-code", b"-185", "error_code", -185),
        ("error-code", "\u0661\u0660".encode(), "error_code", None),
        ("error-message", b"\xff", "error_message", "\ufffd"),
        ("retry-count", b"-1", "retry_count", 0),
        ("redrive-count", b"9" * 50, "redrive_count", 0),
        ("timestamp", b"yesterday", "at_ms", NOW),
        ("timestamp", b"2026-01-02T03:04:05", "at_ms", NOW),
        ("timestamp", b"0001-01-01T00:00:00+14:00", "at_ms", NOW),
        ("timestamp", b"9999-12-31T23:59:59-14:00", "at_ms", NOW),
    ],
)
def test_nonsense_says_nothing_and_fails_nothing(name: str, value: bytes | None, attribute: str, found: Any) -> None:
    headers = dict(PRESETS["ours"](Record("orders", "v", message_id="id-1"), WHY)) | {name: value}
    assert getattr(read(Message(headers.items())), attribute) == found


@pytest.mark.parametrize("message_id", [b"", b"\xff", b"x" * 201, None, b"a\nb"])
def test_an_id_that_cannot_be_one_is_made_up(message_id: bytes | None) -> None:
    headers = dict(PRESETS["ours"](Record("orders", "v", message_id="id-1"), WHY)) | {"message-id": message_id}
    assert is_message_id(read(Message(headers.items())).message_id)


@pytest.mark.parametrize(
    "at", [(TIMESTAMP_NOT_AVAILABLE, 0), (TIMESTAMP_CREATE_TIME, -1), (TIMESTAMP_CREATE_TIME, 2**60)]
)
def test_a_time_that_is_none(at: tuple[int, int]) -> None:
    letter = read(Message([], at=at))
    assert (letter.timestamp_ms, letter.at_ms) == (None, 0)


def test_headers_that_cannot_be_read_are_a_reason_not_to_send_it() -> None:
    class Broken(Message):
        def headers(self) -> Any:
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    assert "UTF-8" in read(Broken([])).problem


def test_its_repr_shows_no_payload() -> None:
    shown = repr(read(Message([("h", b"secret")], key=b"secret", value=b"secret")))
    assert "secret" not in shown
    assert isinstance(json.dumps(shown), str)


def test_size() -> None:
    sizes: Callable[[DeadLetter], int] = lambda letter: letter.size  # noqa: E731
    assert [sizes(read(Message([], key=key, value=value))) for key, value in ((b"ab", b"c"), (None, None))] == [3, 0]
