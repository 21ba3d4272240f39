"""For any record: what goes on the wire comes back the same, and its size is never less than what Kafka would count.

And for any garbage that is found on the wire: it is refused as an invalid record, and with nothing else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from confluent_kafka import KafkaException, Producer
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from kombu.utils.json import dumps, loads

from examples import examples
from kafka_delivery import Record, settings
from kafka_delivery.base import Refused, batch_from, record_from
from kafka_delivery.dead_letters import dead_letter
from kafka_delivery.errors import InvalidRecordError
from kafka_delivery.record import MAX_TIMESTAMP_MS
from kafka_delivery.settings import Settings

quick = profile(max_examples=examples(100), suppress_health_check=[HealthCheck.too_slow])
few = profile(quick, max_examples=examples(25))

CLUSTER = "default"
SAYS_SO = "__type__"

text = st.text(max_size=60)
data = st.binary(max_size=200) | text
any_text = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates too
scalars = st.none() | st.booleans() | st.integers() | st.floats() | any_text
json_values = st.recursive(
    scalars | st.sampled_from([1, CLUSTER, "orders", ["YWJj"], [], [["a", "b"]], {SAYS_SO: "x", "__value__": 1}]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(any_text, inner, max_size=5),
    max_leaves=15,
)
user_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(text, inner, max_size=4)
        | inner.map(lambda value: {SAYS_SO: "datetime", "__value__": value})
    ),
    max_leaves=10,
)
zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
header_names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40)
records = st.builds(
    Record,
    topic=st.from_regex(r"[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,244}", fullmatch=True),
    value=st.none() | data | st.lists(user_json, max_size=3) | st.dictionaries(text, user_json, max_size=3),
    key=st.none() | data,
    headers=st.lists(st.tuples(header_names, st.none() | data), max_size=5),
    partition=st.none() | st.integers(0, 2**31 - 1),
    timestamp=st.none()
    | st.integers(1, MAX_TIMESTAMP_MS)
    | st.datetimes(datetime(1970, 1, 3), datetime(9999, 12, 30), timezones=zones),
    message_id=st.none() | st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=200),
)


@pytest.fixture(autouse=True, scope="module")
def default_settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        chosen = Settings()
        patch.setattr(settings, "current", lambda: chosen)
        yield


def through_the_queue(wire: list[Any]) -> Any:
    return loads(dumps(wire))


def objects_in(value: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects_in(part)


@quick
@given(records)
def test_a_record_comes_off_the_wire_as_it_went_on(record: Record) -> None:
    arrived = Record.from_wire(through_the_queue(record.to_wire(CLUSTER)), CLUSTER)
    assert arrived == record
    assert arrived.kafka_headers == record.kafka_headers
    assert arrived.size == record.size


@quick
@given(st.binary(max_size=300))
def test_any_bytes_survive_as_value_key_and_header(raw: bytes) -> None:
    record = Record("orders", raw, raw, [("h", raw)])
    arrived = Record.from_wire(through_the_queue(record.to_wire(CLUSTER)), CLUSTER)
    assert (arrived.value_bytes, arrived.key_bytes, arrived.header_pairs) == (raw, raw, [("h", raw)])


@quick
@given(records)
def test_nothing_on_the_wire_is_an_object_that_a_decoder_could_interpret(record: Record) -> None:
    wire = record.to_wire(CLUSTER)
    assert not list(objects_in(wire))
    assert json.loads(dumps(wire)) == wire == through_the_queue(wire)


@few
@given(records, st.integers(0, 1_000))
def test_librdkafka_with_the_size_as_its_limit_takes_the_record(record: Record, length: int) -> None:
    # 1,000 is the smallest limit that librdkafka allows.
    padded = Record(
        record.topic,
        (record.value_bytes or b"") + b"x" * (1_000 + length),
        record.key_bytes,
        record.header_pairs,
        message_id=record.id,
    )
    _produce(padded, limit=padded.size)


def test_librdkafka_refuses_what_is_larger_than_its_limit() -> None:
    """The test above would pass on a limit that nobody enforces."""
    record = Record("orders", b"x" * 2_000)
    with pytest.raises(KafkaException, match="MSG_SIZE_TOO_LARGE"):
        _produce(record, limit=1_500)


def _produce(record: Record, limit: int) -> None:
    producer = Producer({"test.mock.num.brokers": 1, "message.max.bytes": limit, "log_level": 0})
    producer.produce(
        record.topic,
        record.value_bytes,
        record.key_bytes,
        headers=[*record.kafka_headers],
        timestamp=record.timestamp_ms,
    )
    producer.purge()
    producer.flush(5)


@quick
@given(records, st.sampled_from([0, 100, 9_000, 900_000]))
def test_a_broker_counts_no_more_than_the_size(record: Record, length: int) -> None:
    padded = Record(
        record.topic,
        (record.value_bytes or b"") + b"x" * length,
        record.key_bytes,
        record.header_pairs,
        message_id=record.id,
    )
    assert batch_bytes(padded) <= padded.size


@quick
@given(records)
def test_its_size_is_no_more_than_what_a_broker_counts_and_a_little(record: Record) -> None:
    """A bound that is far too high would refuse records that Kafka takes."""
    assert record.size <= batch_bytes(record) + 100 + 20 * len(record.header_pairs)


def batch_bytes(record: Record) -> int:
    """Bytes of a batch of this one record, as `max.message.bytes` counts it: Kafka's record format v2."""
    body = 1 + 1 + 1 + _sized(record.key_bytes) + _sized(record.value_bytes) + _varint(len(record.kafka_headers))
    for name, value in record.kafka_headers:
        body += _sized(name.encode()) + _sized(value)
    return 61 + _varint(body) + body


def _sized(part: bytes | None) -> int:
    return _varint(-1) if part is None else _varint(len(part)) + len(part)


def _varint(number: int) -> int:
    zigzag = number * 2 if number >= 0 else -number * 2 - 1
    return max(1, -(-zigzag.bit_length() // 7))


# --- garbage


def accepted(make: functools.partial[Any]) -> Any:
    """What `make` returns, or None if it is refused in the one way in which it may be."""
    try:
        return make()
    except InvalidRecordError as error:
        refused = error
    assert refused.field
    assert str(refused)
    return None


@quick
@given(st.lists(json_values, max_size=12))
def test_a_malformed_wire_is_an_invalid_record_and_nothing_else(wire: list[Any]) -> None:
    accepted(functools.partial(Record.from_wire, wire, CLUSTER))


@quick
@given(records, st.integers(0, 8), json_values)
def test_a_wire_with_one_bad_part_is_valid_or_an_invalid_record(record: Record, place: int, part: Any) -> None:
    wire = record.to_wire(CLUSTER)
    wire[place] = part
    found = accepted(functools.partial(Record.from_wire, wire, CLUSTER))
    if found is not None:
        assert Record.from_wire(through_the_queue(found.to_wire(CLUSTER)), CLUSTER) == found


@quick
@given(records, st.data())
def test_a_wire_of_another_length_is_refused(record: Record, draw: st.DataObject) -> None:
    wire = record.to_wire(CLUSTER)
    short = wire[: draw.draw(st.integers(0, len(wire) - 1))]
    for other in (short, [*wire, None]):
        with pytest.raises(InvalidRecordError) as caught:
            Record.from_wire(other, CLUSTER)
        assert caught.value.field == "record"


@pytest.mark.parametrize("version", [0, 2, -1, None, "1", [], {}, 1.5])
def test_a_wire_of_another_version_says_what_to_do(version: Any) -> None:
    wire = [version, *Record("orders", None).to_wire(CLUSTER)[1:]]
    with pytest.raises(InvalidRecordError, match="this worker knows 1: update it"):
        Record.from_wire(wire, CLUSTER)


def test_a_wire_for_another_cluster_is_refused() -> None:
    with pytest.raises(InvalidRecordError, match="for cluster 'blue'; this worker serves 'default'"):
        Record.from_wire(Record("orders", None).to_wire("blue"), CLUSTER)


@quick
@given(st.lists(json_values, max_size=8), st.dictionaries(any_text | st.just("topic"), json_values, max_size=4))
def test_a_malformed_call_is_an_invalid_record_and_nothing_else(args: list[Any], kwargs: dict[str, Any]) -> None:
    accepted(functools.partial(record_from, args, kwargs, "the-task-id"))
    accepted(functools.partial(dead_letter.letter, args, kwargs, "the-task-id"))
    for member in accepted(functools.partial(batch_from, args, kwargs, "the-task-id")) or ():
        assert isinstance(member, Record | Refused)
        assert member.id


@quick
@given(st.lists(json_values, max_size=6))
def test_a_batch_keeps_every_member_whatever_it_is(members: list[Any]) -> None:
    found = batch_from((members,), {}, "batch")
    assert len(found) == len(members)
    assert [one.member for one in found if isinstance(one, Refused)] == [
        member for member, one in zip(members, found, strict=True) if isinstance(one, Refused)
    ]


def test_a_batch_that_is_delivered_again_is_the_same_batch() -> None:
    members = [{"topic": "a", "value": 1}, {"topic": "b", "value": "", "message_id": "mine"}, {"topic": "no topic!"}]
    assert [one.id for one in batch_from((members,), {}, "batch")] == ["batch.0", "mine", "batch.2"]


def test_a_member_whose_message_id_is_none_is_a_member_without_one() -> None:
    (one,) = batch_from(([{"topic": "a", "value": "", "message_id": None}],), {}, "batch")
    assert one.id == "batch.0"


def test_datetimes_of_any_zone_mean_the_same_moment() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
    for hours in (-12, -3.5, 0, 5.75, 14):
        local = moment.astimezone(timezone(timedelta(hours=hours)))
        assert Record("orders", None, timestamp=local).timestamp_ms == 1767323045678
