"""Many sends in few writes, and a large batch in several messages: each record keeps its own id, fate and result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kafka_delivery import Record, send, send_many
from kafka_delivery.delivery import BatchResult
from servers import KafkaLike
from stack import Stack, message_id, stack
from watching import ALONE, emptied


@pytest.fixture(scope="module")
def system(redis_url: str, kafka: KafkaLike) -> Iterator[Stack]:
    with stack(emptied(redis_url), kafka) as system:
        system.worker(*ALONE)
        yield system


def test_a_bulk_is_many_single_sends(system: Stack, topic: str) -> None:
    ids = send.bulk([Record(topic, f"v{n}", key="k", message_id=f"m{n}") for n in range(1200)])
    arrived = system.wait_for(topic, set(ids), timeout=60)
    assert [record.value for record in arrived if record.key == b"k"] == [f"v{n}".encode() for n in range(1200)]


def test_the_records_of_a_batch_keep_their_order(system: Stack, topic: str) -> None:
    send_many.delay([Record(topic, f"v{n}", key="k", message_id=f"m{n}") for n in range(500)])
    arrived = system.wait_for(topic, {f"m{n}" for n in range(500)})
    assert [record.value for record in arrived] == [f"v{n}".encode() for n in range(500)]


def test_each_record_of_a_large_batch_has_its_own_fate(system: Stack, topic: str) -> None:
    """It goes in several messages, each under a megabyte."""
    records = [Record(topic, b"\xff" * 100_000, message_id=f"m{n}") for n in range(20)]
    result = send_many.apply_async((records,), ignore_result=False)

    assert isinstance(result, BatchResult)
    fates = result.get(timeout=60)
    assert [fate["message_id"] for fate in fates] == [f"m{n}" for n in range(20)]
    assert {fate["outcome"] for fate in fates} == {"delivered"}
    assert {message_id(record) for record in system.read(topic)} == {f"m{n}" for n in range(20)}
