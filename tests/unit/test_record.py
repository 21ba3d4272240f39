"""A record that could not be delivered is refused where it is made, by the name of its field and without its data.

What passes is frozen, and stays what the caller gave: no worker and no dead letter finds anything to object to.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any

import pytest

from kafka_delivery import Record, settings
from kafka_delivery.base import batch_from
from kafka_delivery.delivery import Write
from kafka_delivery.errors import InvalidRecordError
from kafka_delivery.names import TOPIC_MAX_LENGTH
from kafka_delivery.record import MAX_TIMESTAMP_MS, uuid7
from kafka_delivery.settings import Settings
from kafka_delivery_worker.producer import Outgoing

CARD = "4111-1111-1111-1111"
ID = "a" * 36

Configure = Callable[..., Settings]


@pytest.fixture(autouse=True)
def configure(monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Settings for one test: the defaults, whatever the environment says, until it is called with others."""

    def use(**changes: Any) -> Settings:
        chosen = Settings(**changes)
        monkeypatch.setattr(settings, "current", lambda: chosen)
        return chosen

    use()
    return use


def refusal(**fields: Any) -> InvalidRecordError:
    with pytest.raises(InvalidRecordError) as caught:
        Record(**{"topic": "orders", "value": None, **fields})
    return caught.value


class TestTopic:
    @pytest.mark.parametrize("topic", ["a", "orders", "A.b_c-9", "...", "-", "x" * 245])
    def test_takes_what_kafka_takes(self, topic: str) -> None:
        assert Record(topic, None).topic == topic

    @pytest.mark.parametrize(
        "topic",
        ["", ".", "..", "a b", "a/b", "a:b", "ü", "a\n", "\n", "a\0", "\ud800", "x" * 250, None, 1, b"orders", ["a"]],
    )
    def test_refuses_what_kafka_refuses(self, topic: Any) -> None:
        assert refusal(topic=topic).field == "topic"

    def test_shows_the_beginning_of_a_bad_name_only(self) -> None:
        assert "é" * 60 in str(refusal(topic="é" * 61))
        assert "é" * 61 not in str(refusal(topic="é" * 61))

    def test_leaves_room_for_its_dead_letter_topic(self) -> None:
        assert Record("x" * (TOPIC_MAX_LENGTH - len("-dlq")), None).id
        error = refusal(topic="x" * (TOPIC_MAX_LENGTH - len("-dlq") + 1))
        assert error.field == "topic"
        assert "KAFKA_DELIVERY_DEAD_LETTER_TOPICS" in error.problem

    def test_leaves_room_for_the_suffix_that_is_set(self, configure: Configure) -> None:
        configure(dead_letter_suffix=".dead")
        assert Record("x" * 244, None).id
        assert "250 characters" in refusal(topic="x" * 245).problem

    def test_needs_no_room_where_its_dead_letters_go_elsewhere(self, configure: Configure) -> None:
        configure(dead_letter_topics={"x" * TOPIC_MAX_LENGTH: "dead"})
        assert Record("x" * TOPIC_MAX_LENGTH, None).id
        assert refusal(topic="y" * TOPIC_MAX_LENGTH).field == "topic"


class TestValue:
    @pytest.mark.parametrize(
        ("value", "sent"),
        [
            (None, None),
            (b"", b""),
            (b"\x00\xff", b"\x00\xff"),
            ("", b""),
            ("grüße \U0001f600", "grüße \U0001f600".encode()),
            (bytearray(b"ab"), b"ab"),
            (memoryview(b"abcd")[::2], b"ac"),
            ({"a": [1, None, "ü"]}, '{"a":[1,null,"ü"]}'.encode()),
            ([], b"[]"),
            (("a", 1), b'["a",1]'),
            ({"__type__": "x", "__value__": 1}, b'{"__type__":"x","__value__":1}'),
        ],
    )
    def test_becomes_these_bytes(self, value: Any, sent: bytes | None) -> None:
        assert Record("orders", value).value_bytes == sent

    def test_may_be_a_dataclass(self) -> None:
        @dataclasses.dataclass
        class Order:
            total: int

        assert Record("orders", Order(9)).value_bytes == b'{"total":9}'

    @pytest.mark.parametrize("value", [1, 1.5, True, {1}, object(), datetime.now(UTC), uuid.uuid4(), dict, iter([])])
    def test_of_another_kind_is_refused_by_its_type(self, value: Any) -> None:
        error = refusal(value=value)
        assert error.field == "value"
        assert type(value).__name__ in error.problem

    def test_with_a_lone_surrogate_is_refused(self) -> None:
        assert refusal(value=f"{CARD}\ud800").field == "value"
        assert refusal(value=[f"{CARD}\ud800"]).field == "value"

    def test_cannot_be_forgotten(self) -> None:
        """A record without one is a tombstone: a compacted topic would lose what it has under the key."""
        with pytest.raises(TypeError, match="value"):
            Record("orders")  # type: ignore[call-arg]

    def test_is_a_copy_of_what_may_change(self) -> None:
        buffer = bytearray(b"before")
        record = Record("orders", buffer, buffer, [("h", buffer)])
        buffer[:] = b"after!"
        assert (record.value_bytes, record.key_bytes, record.header_pairs) == (b"before", b"before", [("h", b"before")])


class TestKey:
    @pytest.mark.parametrize(
        ("key", "sent"), [(None, None), (b"\xff", b"\xff"), ("", b""), ("ü", b"\xc3\xbc"), (bytearray(b"k"), b"k")]
    )
    def test_becomes_these_bytes(self, key: Any, sent: bytes | None) -> None:
        assert Record("orders", None, key=key).key_bytes == sent

    @pytest.mark.parametrize("key", [1, 4.2, True, ["k"], {"k": 1}, ("k",), uuid.uuid4(), object()])
    def test_of_another_kind_is_refused_by_its_type(self, key: Any) -> None:
        error = refusal(key=key)
        assert error.field == "key"
        assert type(key).__name__ in error.problem

    def test_with_a_lone_surrogate_is_refused(self) -> None:
        assert refusal(key="\udfff").field == "key"


class TestHeaders:
    @pytest.mark.parametrize(
        "headers",
        [
            [("a", "1"), ("b", b"\xff"), ("a", None)],
            (("a", "1"), ["b", bytearray(b"\xff")], ("a", None)),
            iter([("a", b"1"), ("b", memoryview(b"\xff")), ("a", None)]),
        ],
    )
    def test_keep_their_order_and_repeats(self, headers: Any) -> None:
        assert Record("orders", None, headers=headers).header_pairs == [("a", b"1"), ("b", b"\xff"), ("a", None)]

    def test_may_be_a_mapping(self) -> None:
        assert Record("orders", None, headers={"z": "1", "a": None}).header_pairs == [("z", b"1"), ("a", None)]

    @pytest.mark.parametrize("headers", [None, [], {}, ()])
    def test_may_be_missing(self, headers: Any) -> None:
        assert Record("orders", None, headers=headers).header_pairs == []

    @pytest.mark.parametrize(
        "headers",
        [
            "ab",
            b"ab",
            "",
            b"",
            5,
            ["ab"],
            [("a",)],
            [("a", "b", "c")],
            [None],
            [{"a": "b"}],
            [(1, "b")],
            [(b"a", "b")],
            [(None, "b")],
            [("", "b")],
            [("a\0b", "b")],
            [("\ud800", "b")],
            [("a", "\ud800")],
            [("a", 1)],
            [("a", True)],
            [("a", ["b"])],
            {"a": {"b": "c"}},
        ],
    )
    def test_of_another_kind_are_refused(self, headers: Any) -> None:
        assert refusal(headers=headers).field == "headers"

    def test_are_refused_by_their_place(self) -> None:
        assert "number 1 " in refusal(headers=[("a", "b"), ("c", 1)]).problem
        assert "number 2 " in refusal(headers=[("a", "b"), ("c", "d"), (1, "e")]).problem

    def test_go_to_kafka_after_the_message_id(self) -> None:
        record = Record("orders", None, headers=[("message-id", "mine"), ("a", "b")], message_id="real")
        assert record.kafka_headers == [("message-id", b"real"), ("message-id", b"mine"), ("a", b"b")]

    def test_are_handed_out_as_copies(self) -> None:
        record = Record("orders", None, headers={"a": "b"})
        record.header_pairs.clear()
        record.kafka_headers.clear()
        assert record.header_pairs == [("a", b"b")]
        assert record.kafka_headers[1:] == [("a", b"b")]


class TestPartition:
    @pytest.mark.parametrize("partition", [None, 0, 1, 2**31 - 1])
    def test_takes(self, partition: int | None) -> None:
        assert Record("orders", None, partition=partition).partition == partition

    @pytest.mark.parametrize("partition", [-1, 2**31, True, False, 1.0, "1", [1]])
    def test_refuses(self, partition: Any) -> None:
        assert refusal(partition=partition).field == "partition"


class TestTimestamp:
    def test_is_the_moment_of_the_call_by_default(self) -> None:
        before = time.time_ns() // 1_000_000
        made = Record("orders", None).timestamp_ms
        assert before <= made <= time.time_ns() // 1_000_000

    @pytest.mark.parametrize(
        ("timestamp", "ms"),
        [
            (1, 1),
            (MAX_TIMESTAMP_MS, MAX_TIMESTAMP_MS),
            (datetime(2026, 1, 2, 3, 4, 5, 678999, tzinfo=UTC), 1767323045678),
            (datetime(2026, 1, 2, 8, 49, 5, 678000, tzinfo=timezone(timedelta(hours=5, minutes=45))), 1767323045678),
            (datetime(1970, 1, 1, 0, 0, 0, 1000, tzinfo=UTC), 1),
            (datetime(9999, 12, 31, 23, 59, 59, 999000, tzinfo=UTC), MAX_TIMESTAMP_MS),
        ],
    )
    def test_is_milliseconds_since_the_epoch(self, timestamp: datetime | int, ms: int) -> None:
        assert Record("orders", None, timestamp=timestamp).timestamp_ms == ms

    @pytest.mark.parametrize("ms", [548585174096, 1096259157860, 2148384231542, 70359678131704])
    def test_of_a_datetime_is_exact(self, ms: int) -> None:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
        assert Record("orders", None, timestamp=moment).timestamp_ms == ms

    @pytest.mark.parametrize(
        "timestamp",
        [
            0,  # librdkafka takes it for "now"
            -1,
            MAX_TIMESTAMP_MS + 1,
            True,
            1.5,
            "2026-01-02",
            datetime(2026, 1, 2),
            datetime(1970, 1, 1, tzinfo=UTC),
            datetime(1969, 12, 31, tzinfo=UTC),
            datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
            datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
        ],
    )
    def test_refuses(self, timestamp: Any) -> None:
        assert refusal(timestamp=timestamp).field == "timestamp"

    def test_without_a_time_zone_says_what_is_missing(self) -> None:
        assert "no time zone" in refusal(timestamp=datetime(2026, 1, 2)).problem


class TestMessageId:
    @pytest.mark.parametrize("message_id", ["x", "x" * 200, "order 42/~", "{}'\""])
    def test_takes(self, message_id: str) -> None:
        assert Record("orders", None, message_id=message_id).id == message_id

    def test_may_be_a_uuid(self) -> None:
        given = uuid.uuid4()
        assert Record("orders", None, message_id=given).id == str(given)

    @pytest.mark.parametrize("message_id", ["", "x" * 201, "ü", "a\nb", "a\tb", "a\0", "\x7f", "\ud800", 1, b"x", True])
    def test_refuses(self, message_id: Any) -> None:
        error = refusal(message_id=message_id)
        assert error.field == "message_id"
        assert error.message_id is None

    def test_is_new_for_every_record(self) -> None:
        first, second = Record("orders", None), Record("orders", None)
        assert first.id != second.id
        assert uuid.UUID(first.id).version == 7

    def test_is_in_the_error_of_a_record_that_has_one(self) -> None:
        assert refusal(value=1, message_id="mine").message_id == "mine"
        assert uuid.UUID(refusal(value=1).message_id or "").version == 7


class TestSize:
    def test_at_the_limit_passes_and_one_byte_more_does_not(self, configure: Configure) -> None:
        headers = {"name": "ü", "empty": None}
        limit = Record("orders", b"v" * 100, "kü", headers, message_id=ID).size
        configure(max_record_bytes=limit)
        assert Record("orders", b"v" * 100, "kü", headers, message_id=ID).size == limit
        error = refusal(value=b"v" * 101, key="kü", headers=headers, message_id=ID)
        assert error.field == "record"
        assert f"{limit + 1} bytes" in error.problem
        assert f"KAFKA_DELIVERY_MAX_RECORD_BYTES={limit}" in error.problem

    @pytest.mark.parametrize(
        "fields",
        [
            {"value": b"v" * 200},
            {"value": "ü" * 100},
            {"value": {"a": "b" * 200}},
            {"key": b"k" * 200},
            {"headers": {"n" * 200: None}},
            {"headers": {"n": b"h" * 200}},
            {"headers": [("n", None)] * 20},
            {"message_id": "m" * 200},
        ],
    )
    def test_counts_every_part(self, fields: dict[str, Any], configure: Configure) -> None:
        configure(max_record_bytes=250)
        assert Record("orders", None, message_id="m").size < 250
        assert refusal(**{"message_id": "m", **fields}).field == "record"

    def test_counts_bytes_and_not_characters(self) -> None:
        wide = Record("orders", "ü" * 100, "ü" * 100, {"ü" * 100: "ü" * 100}).size
        assert wide == Record("orders", "u" * 100, "u" * 100, {"u" * 100: "u" * 100}).size + 400

    def test_counts_each_header_with_the_prefix_of_a_dead_letter(self) -> None:
        bare = Record("orders", None, message_id=ID).size
        assert Record("orders", None, headers={"name": b"12345"}, message_id=ID).size >= bare + len("original-name") + 5


@pytest.mark.parametrize(
    "fields",
    [
        {"value": CARD + "\ud800"},
        {"value": [CARD, {1}]},
        {"value": {CARD: object()}},
        {"value": {(CARD,): 1}},
        {"value": [CARD, float("nan")]},
        {"value": {CARD}},
        {"key": [CARD]},
        {"key": CARD + "\ud800"},
        {"headers": [(CARD, 1)]},
        {"headers": [("name", [CARD])]},
        {"headers": [("name", CARD + "\ud800")]},
        {"headers": [CARD]},
        {"headers": CARD},
        {"headers": {"": CARD}},
        {"value": CARD * 100_000, "key": CARD, "headers": {"name": CARD}},
        {"value": CARD, "key": CARD, "headers": {"name": CARD}, "timestamp": 0},
        {"value": CARD, "key": CARD, "headers": {"name": CARD}, "partition": -1},
    ],
)
def test_no_error_quotes_the_users_data(fields: dict[str, Any]) -> None:
    error = refusal(**fields)
    assert CARD not in "".join(_texts(error))


def test_no_error_quotes_what_the_users_own_code_says() -> None:
    class Rows(dict[str, Any]):
        def items(self) -> Any:
            raise ValueError(f"cannot decrypt {CARD}")

    assert CARD not in str(refusal(value=Rows(a=1)))


def _texts(error: BaseException | None) -> Iterator[str]:
    """All that a traceback of `error` would show."""
    while error is not None:
        yield from (str(error), repr(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_what_is_made_of_it_shows_no_payload_either() -> None:
    """Error reporters show the variables of a function that failed."""
    bad = {"topic": "orders", "value": "SECRET", "key": "SECRET", "partition": -1}
    (refused,) = batch_from(([bad],), {}, None)
    good = Record("orders", "SECRET", "SECRET", {"h": "SECRET"})
    for shown in (refused, Outgoing.of(good), Write(1, partial(print, "SECRET"))):
        assert "SECRET" not in repr(shown)


def test_its_repr_shows_neither_payload_nor_key_nor_header() -> None:
    record = Record("orders", CARD, CARD, {"name": CARD, CARD: "x"}, message_id="mine")
    assert CARD not in f"{record!r} {record}"
    assert repr(record) == f"Record(topic='orders', message_id='mine', size={record.size})"


class TestFrozen:
    @pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Record)])
    def test_no_field_can_be_set(self, field: str) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(Record("orders", None), field, "other")

    def test_no_field_can_be_added(self) -> None:
        with pytest.raises((AttributeError, TypeError)):
            Record("orders", None).note = 1  # type: ignore[attr-defined]

    @pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
    def test_a_copy_is_the_same_record(self, through: Callable[[Record], Record]) -> None:
        record = Record("orders", {"a": 1}, "k", [("h", "1"), ("h", None)], 3)
        assert through(record) == record
        assert hash(through(record)) == hash(record)

    def test_a_changed_copy_is_validated_and_keeps_its_id(self) -> None:
        record = Record("orders", {"a": 1}, headers={"h": "1"})
        moved = dataclasses.replace(record, topic="others")
        assert (moved.id, moved.value_bytes, moved.header_pairs) == (record.id, record.value_bytes, record.header_pairs)
        with pytest.raises(InvalidRecordError):
            dataclasses.replace(record, topic="no topic!")


class TestUuid7:
    def test_is_of_the_version_and_variant_that_it_says(self) -> None:
        for made in (uuid.UUID(uuid7()) for _ in range(200)):
            assert made.version == 7
            assert made.variant == uuid.RFC_4122

    def test_begins_with_the_time(self) -> None:
        before = time.time_ns() // 1_000_000
        made = uuid.UUID(uuid7()).int >> 80
        assert before <= made <= time.time_ns() // 1_000_000

    def test_is_sorted_by_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter(range(1_767_323_045_678, 1_767_323_045_678 + 1_000))
        monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 1_000_000)
        made = [uuid7() for _ in range(1_000)]
        assert sorted(made) == made

    def test_is_unique_over_threads(self) -> None:
        made: list[str] = []
        together = threading.Barrier(8)

        def make() -> None:
            together.wait()
            made.extend([uuid7() for _ in range(2_000)])

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(made)) == len(made) == 16_000
