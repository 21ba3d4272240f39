"""A cluster loses some of its brokers: with enough replicas left nobody notices; a topic with too few waits alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kafka_delivery import circuit
from kafka_delivery_worker import counts
from servers import AnotherBroker, RealKafka, have_real_kafka, missing, wait_until
from stack import Stack, stack
from watching import ALONE, emptied, load, opened

pytestmark = [pytest.mark.long, pytest.mark.real]


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[RealKafka]:
    if not have_real_kafka():
        missing("java, and Maven or TEST_KAFKA_LIB")
    with RealKafka(tmp_path / "1") as kafka:
        yield kafka


def all_arrived(system: Stack, topic: str, accepted: list[str]) -> bool:
    """Whether all that was accepted arrived, and none of it was counted as an attempt that failed."""
    system.wait_for(topic, set(accepted), 90)
    system.wait_empty()
    for worker in system.workers:
        worker.stop()
    outcomes = counts.read(system.redis)[topic]
    return outcomes["delivered"] == len(accepted) and set(outcomes) <= {"delivered", "deferred"}


def test_one_of_three_dies(kafka: RealKafka, tmp_path: Path, redis_url: str) -> None:
    with AnotherBroker(tmp_path / "2", kafka, 2) as second, AnotherBroker(tmp_path / "3", kafka, 3):
        for topic in ("orders", "orders-dlq"):
            kafka.create_topic(topic, replicas=3, min_insync_replicas=2)
        with stack(emptied(redis_url), kafka) as system:
            system.worker(*ALONE)
            with load("orders") as accepted:
                wait_until(lambda: len(accepted) > 50, 60, "some load")
                second.kill()
                killed = len(accepted)
                system.wait_for("orders", set(accepted), 60)
                wait_until(lambda: len(accepted) > killed + 200, 60, "some load without it")
                system.wait_for("orders", set(accepted), 60)
                second.start()
                back = len(accepted)
                wait_until(lambda: len(accepted) > back + 100, 60, "some load after it has come back")
            assert all_arrived(system, "orders", accepted)
            assert system.read("orders-dlq") == []
            assert system.parked() == []


def test_a_topic_with_too_few_replicas_holds_up_no_other(kafka: RealKafka, tmp_path: Path, redis_url: str) -> None:
    """NOT_ENOUGH_REPLICAS: librdkafka tries again for two minutes and says nothing; its records fill the room."""
    kafka.create_topic("payments")  # of the broker that stays
    kafka.create_topic("orders-dlq")
    changes = {"STALL_S": 5, "REQUEST_TIMEOUT_MS": 3_000, "MAX_IN_FLIGHT": 100}
    with AnotherBroker(tmp_path / "2", kafka) as second, stack(emptied(redis_url), kafka, **changes) as system:
        kafka.create_topic("orders", replicas=2, min_insync_replicas=2)
        system.worker(*ALONE)
        with load("orders") as orders, load("payments") as payments:
            wait_until(lambda: min(len(orders), len(payments)) > 50, 60, "some load")
            second.kill()
            wait_until(alone("orders"), 60, "the topic's circuit to be the only one that is open")
            assert "while others arrive" in (opened(system, "orders") or "")
            system.wait_for("payments", set(payments), 30)
            since, waits = len(payments), time.monotonic()
            wait_until(lambda: len(payments) > since + 300, 60, "some load meanwhile")
            system.wait_for("payments", set(payments), 30)
            assert circuit("orders").state != "closed", f"it was well after {time.monotonic() - waits:.1f} s"
            second.start()
        assert all_arrived(system, "orders", orders)
        assert set(payments) <= set(system.ids("payments"))
        assert counts.read(system.redis)["payments"]["delivered"] == len(payments)
        assert system.read("orders-dlq") == []
        assert system.parked() == []


def alone(topic: str) -> Callable[[], bool]:
    return lambda: circuit().state == "closed" and circuit(topic).state == "open"
