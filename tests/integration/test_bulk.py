"""Many sends in few writes, and a large batch in several messages, each of a bounded size."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kafka_delivery import BulkEnqueueError, InvalidRecordError, Record, send, send_many
from stack import Stack


def test_a_bulk_is_many_single_sends(delivery: Stack) -> None:
    ids = send.bulk([Record("orders", f"v{n}", key="k", message_id=f"m{n}") for n in range(1200)])
    assert ids == [f"m{n}" for n in range(1200)]
    assert delivery.redis.llen("kafka-delivery") == 1200


def test_a_bulk_with_one_bad_record_queues_nothing(delivery: Stack) -> None:
    with pytest.raises(InvalidRecordError, match=r"records\[1\]\.topic"):
        send.bulk([Record("orders", "x"), {"topic": "no topic!", "value": "x"}])
    assert delivery.redis.llen("kafka-delivery") == 0


def test_a_bulk_that_fails_on_its_way_says_what_is_queued(delivery: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    from redis.exceptions import TimeoutError as RedisTimeoutError

    from kafka_delivery import delivery as module

    written: list[int] = []

    def write(queue: str, envelopes: list[str]) -> None:
        if written:
            raise RedisTimeoutError("hung")
        written.append(len(envelopes))

    monkeypatch.setattr(module, "write", write)
    with pytest.raises(BulkEnqueueError) as caught:
        send.bulk([Record("orders", "x", message_id=f"m{n}") for n in range(1200)])
    assert caught.value.accepted == [f"m{n}" for n in range(500)]
    assert caught.value.unknown == [f"m{n}" for n in range(500, 1000)]
    assert caught.value.unsent == [f"m{n}" for n in range(1000, 1200)]


@pytest.mark.parametrize(
    "shape",
    [
        {"topic": "t" * 240, "value": "x"},
        {"topic": "t" * 240, "value": '"' * 1_000},
        {"topic": "t", "value": "x", "headers": [("h" * 100, b"\xff" * 100)] * 5},
    ],
    ids=["long topics", "quotes", "headers"],
)
def test_the_size_of_a_message_counts_all_that_is_in_it(delivery: Stack, shape: dict[str, Any]) -> None:
    send_many.delay([shape] * 3_000)
    messages = delivery.redis.lrange("kafka-delivery", 0, -1)
    delivery.redis.delete("kafka-delivery")
    assert 800_000 < max(map(len, messages)) < 1_000_000


def test_a_large_batch_goes_in_messages_under_a_megabyte(delivery: Stack) -> None:
    send_many.delay([Record("orders", b"\xff" * 100_000, message_id=f"m{n}") for n in range(20)])
    messages = delivery.redis.lrange("kafka-delivery", 0, -1)
    assert len(messages) > 1
    assert max(map(len, messages)) < 1_000_000
    assert {json.loads(message)["headers"]["task"] for message in messages} == {"kafka_delivery.send_many"}
