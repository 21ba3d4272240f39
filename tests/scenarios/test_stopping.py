"""A worker that is told to stop is gone soon: what is in flight may finish, for a bounded time; the rest goes back to
its queue, no attempt used, for the next worker.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from kafka_delivery import send
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka
from servers import wait_until
from stack import Stack, Worker, stack
from watching import ALONE, emptied, looks, outage_after_the_first_answer

TOPIC = "stopping"
PROMPT_S = 60
"""What a stop may take on a machine that is busy with other tests; prefork alone takes 2 s on an idle one. A worker
that waited for what it must not wait for would take longer than this in each test."""

POOLS: dict[str, tuple[str, ...]] = {
    "in-flight": (),
    "threads": ("-P", "threads"),
    "prefork": ("-P", "prefork", "-c", "4"),
    "solo": ("-P", "solo"),
}


@pytest.fixture
def system(redis_url: str) -> Iterator[Stack]:
    """Without a worker yet. Few records in flight at a time, so that there is a backlog."""
    changes = {"MAX_IN_FLIGHT": 20, "CONCURRENCY": 20, "LINGER_MS": 0, "SHUTDOWN_TIMEOUT_S": 1}
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, **changes) as system:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield system


def mock(system: Stack) -> MockKafka:
    assert isinstance(system.kafka, MockKafka)
    return system.kafka


def queued(system: Stack) -> dict[str, dict[str, Any]]:
    """What lies in the queue, or waits for its time, by task id: Celery's headers."""
    raw: list[Any] = [*system.redis.lrange("kafka-delivery", 0, -1)]
    for key in system.redis.scan_iter("kafka-delivery:delayed:1:*"):
        raw += system.redis.zrange(key, 0, -1)
    headers = [json.loads(message)["headers"] for message in raw]
    assert len({header["id"] for header in headers}) == len(headers), "a message is in the queue twice"
    return {header["id"]: header for header in headers}


def held(system: Stack) -> int:
    """Messages that a worker has taken, with either transport."""
    leased = sum(system.redis.hlen(key) for key in system.redis.scan_iter("kafka-delivery:held:1:*"))
    return int(leased + system.redis.hlen("unacked"))


def busy_worker_while_kafka_is_down(system: Stack, pool: str, **changes: Any) -> tuple[Worker, set[str]]:
    """A worker with records in librdkafka's hands that go nowhere, and all ids that were sent."""
    ids = {send.delay(TOPIC, str(n)).id for n in range(50)}
    if pool == "in-flight":
        with outage_after_the_first_answer(system, mock(system)):
            worker = system.worker(*ALONE, *POOLS[pool], **changes)
    else:  # they make their clients for their first records
        mock(system).down()
        worker = system.worker(*ALONE, *POOLS[pool], **changes)
    wait_until(lambda: "producer.error" in worker.log and held(system) > 0, 60, "the worker to meet the outage")
    return worker, ids


def assert_all_queued_unharmed(system: Stack, ids: set[str]) -> None:
    left = queued(system)
    assert set(left) == ids
    assert {header["retries"] for header in left.values()} == {0}
    assert held(system) == 0
    assert system.parked() == []


def assert_next_worker_delivers(system: Stack, ids: set[str]) -> None:
    mock(system).up()
    system.worker(*ALONE)
    system.wait_for(TOPIC, ids)
    system.wait_empty()
    assert system.read(f"{TOPIC}-dlq") == []
    assert system.parked() == []


@pytest.mark.parametrize("pool", POOLS)
def test_with_a_backlog(system: Stack, pool: str) -> None:
    mock(system).delay(-1, 1_000)
    ids = set(send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(2_000)]))  # a hundred seconds' worth and more
    worker = system.worker(*ALONE, *POOLS[pool], SHUTDOWN_TIMEOUT_S=60)  # what is in flight arrives
    wait_until(lambda: counts.read(system.redis).get(TOPIC, {}).get("delivered", 0) > 3, 60, "the first deliveries")

    took = worker.stop(120)

    mock(system).delay(-1, 0)
    assert worker.process.returncode == 0
    assert took < PROMPT_S
    assert held(system) == 0
    left = queued(system)
    delivered = system.ids(TOPIC)
    assert set(left) | set(delivered) == ids
    assert left, "no backlog was left"
    assert set(left) & set(delivered) == set(), "delivered, and queued again"
    assert_next_worker_delivers(system, ids)
    assert [record for record, times in Counter(system.ids(TOPIC)).items() if times > 1] == []


@pytest.mark.parametrize("pool", [pytest.param("in-flight", marks=pytest.mark.smoke), *list(POOLS)[1:]])
def test_while_kafka_is_down(system: Stack, pool: str) -> None:
    worker, ids = busy_worker_while_kafka_is_down(system, pool)

    took = worker.stop(120)

    assert worker.process.returncode == 0
    assert took < PROMPT_S, "a report may take two minutes"
    assert_all_queued_unharmed(system, ids)
    if pool == "in-flight":  # to the next worker it is all the same who put it back
        assert_next_worker_delivers(system, ids)
        assert max(Counter(system.ids(TOPIC)).values()) == 1


@pytest.mark.parametrize("pool", ["in-flight", "prefork"])
def test_the_second_signal_hurries(system: Stack, pool: str) -> None:
    worker, ids = busy_worker_while_kafka_is_down(system, pool, SHUTDOWN_TIMEOUT_S=150)
    worker.signal(signal.SIGTERM)
    wait_until(lambda: "Warm shutdown" in worker.log, 60, "the worker to be told")
    with looks(system.redis) as looked:
        looked.reports(2)  # it waits, and would for long
    assert worker.process.poll() is None

    took = worker.stop(120)

    assert took < PROMPT_S
    assert_all_queued_unharmed(system, ids)
