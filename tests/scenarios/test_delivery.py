"""A send that returned is in Kafka soon after, as it was given: bytes, key, headers, partition, timestamp, id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from kafka_delivery import Record, send, send_many
from kafka_delivery_worker.parking import Parked
from servers import KafkaLike, wait_until
from stack import Stack, message_id, stack
from watching import ALONE, emptied

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def delivery(redis_url: str, kafka: KafkaLike) -> Iterator[Stack]:
    """One worker; a topic of its own keeps each test apart."""
    with stack(emptied(redis_url), kafka, TOPIC_PROPAGATION_MS=300) as system:
        system.worker(*ALONE)
        yield system


def test_a_record_arrives_as_it_was_given(delivery: Stack, topic: str) -> None:
    headers: list[tuple[str, str | bytes | None]]
    headers = [("a", "1"), ("b", b"\x00\xff"), ("a", None), ("message-id", "not mine")]
    moment = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
    sent = send.delay(topic, b"\x00\xffbytes", key="k\u00e9y", headers=headers, partition=2, timestamp=moment)

    (record,) = delivery.wait_for(topic, {sent.id})

    assert record.value == b"\x00\xffbytes"
    assert record.key == "k\u00e9y".encode()
    assert record.partition == 2
    assert record.timestamp == 1767323045678
    assert record.headers == [
        ("message-id", sent.id.encode()),
        ("a", b"1"),
        ("b", b"\x00\xff"),
        ("a", None),
        ("message-id", b"not mine"),
    ]


def test_every_kind_of_value_arrives(delivery: Stack, topic: str) -> None:
    values = {
        "text": "gr\u00fc\u00dfe",
        "empty": "",
        "json": {"__type__": "x", "__value__": 1, "n": [1, None, True, "\u00e4"]},
        "list": [1, 2],
        "tombstone": None,
        "zeros": b"\0" * 1000,
    }
    for name, value in values.items():
        send.delay(topic, value, key=name, message_id=name)

    got = {record.key.decode(): record.value for record in delivery.wait_for(topic, set(values)) if record.key}

    assert got["text"] == "gr\u00fc\u00dfe".encode()
    assert got["empty"] == b""
    assert json.loads(got["json"] or b"") == values["json"]
    assert got["list"] == b"[1,2]"
    assert got["tombstone"] is None
    assert got["zeros"] == b"\0" * 1000


def test_a_wanted_result_says_where_the_record_is(delivery: Stack, topic: str) -> None:
    result = send.apply_async((topic, "x"), ignore_result=False)
    place = result.get(timeout=60)
    (record,) = delivery.read(topic)
    assert place["topic"] == topic
    assert (place["partition"], place["offset"]) == (record.partition, record.offset)
    assert place["message_id"] == result.id == message_id(record)


def test_each_record_of_a_batch_has_its_own_fate(delivery: Stack, topic: str) -> None:
    good = Record(topic, "good")
    bad = Record(f"{topic}-missing", "bad")
    fates = send_many.apply_async(
        ([good, bad, {"topic": topic, "value": {"n": 1}, "message_id": "mine"}],), ignore_result=False
    ).get(timeout=60)

    assert [fate["outcome"] for fate in fates] == ["delivered", "retried", "delivered"]
    assert [fate["message_id"] for fate in fates] == [good.id, bad.id, "mine"]
    parked = wait_parked(delivery, {bad.id})[bad.id]  # its topic is missing, and its dead-letter topic too
    assert (parked.topic, parked.error_code) == (f"{topic}-missing", 3)
    delivery.wait_empty()
    assert sorted(delivery.ids(topic)) == sorted([good.id, "mine"])


def test_sends_by_name_are_treated_the_same(delivery: Stack, topic: str) -> None:
    """A chain, beat or another service calls the task by its name with plain arguments."""
    by_name = send.app.send_task
    by_name("kafka_delivery.send", (topic, {"n": 1}), {"key": "k"}, task_id="plain", queue="kafka-delivery")
    by_name("kafka_delivery.send", ("no topic!", "x"), task_id="bad", queue="kafka-delivery")
    by_name("kafka_delivery.send", (), task_id="empty", queue="kafka-delivery")
    by_name(
        "kafka_delivery.send_many",
        ([{"topic": topic, "value": "v"}, {"topic": "no topic!"}],),
        task_id="batch",
        queue="kafka-delivery",
    )

    delivery.wait_for(topic, {"plain", "batch.0"})
    parked = wait_parked(delivery, {"bad", "empty", "batch.1"})

    assert not {"plain", "batch.0"} & {item.id for item in delivery.parked()}
    assert {item.kind for item in parked.values()} == {"invalid"}
    assert "not a topic name" in parked["bad"].error_message


def wait_parked(delivery: Stack, ids: set[str]) -> dict[str, Parked]:
    """Wait until these are parked; return them by their ids."""

    def found() -> dict[str, Parked]:
        return {item.id: item for item in delivery.parked() if item.id in ids}

    wait_until(lambda: found().keys() == ids, 60, f"{ids} in the parking store")
    return found()
