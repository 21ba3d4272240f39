"""Three workers, Kafka away for three minutes while 50,000 records arrive; and a Kafka that comes and goes for two.

One round after another with growing pauses, no attempt used, no dead letter, no worker that grows; it ends by itself,
slowly at first.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from confluent_kafka import Consumer, TopicPartition

from kafka_delivery import EnqueueError, Record, circuit, send
from kafka_delivery.record import uuid7
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import current
from kafka_delivery_worker import counts
from kafka_delivery_worker.breaker.rules import Rules
from kafka_delivery_worker.breaker.store import CircuitStore, Transition
from servers import RealKafka, RealRedis, wait_until
from stack import Stack, Worker, message_id, stack

TOPIC = "orders"
OUTAGE_S = 180
ARRIVE = 50_000
FLAP_S = 5
FLAPS = 12


AS_BY_DEFAULT = {"RESET_TIMEOUT_S": 5, "RESET_TIMEOUT_MAX_S": 60, "RAMP_S": 10}


class Fleet(NamedTuple):
    system: Stack
    kafka: RealKafka
    workers: list[Worker]


@contextmanager
def fleet(directory: Path) -> Iterator[Fleet]:
    with (
        RealKafka(directory / "kafka") as kafka,
        RealRedis(directory / "redis") as redis,
        stack(redis.url, kafka, RETRY_JITTER="true", **AS_BY_DEFAULT) as system,
    ):
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        workers = [system.worker(ready=False) for _ in range(3)]
        for worker in workers:
            worker.wait_ready()
        yield Fleet(system, kafka, workers)


def history() -> list[Transition]:
    """Transitions of the cluster's circuit, the oldest first."""
    s = current()
    store = CircuitStore(RedisClient(s), s.cluster, Rules.of(s), "reader")
    return [one for one in reversed(store.history(1000)) if one.scope == "cluster"]


def rss_mb(worker: Worker) -> float:
    status = Path(f"/proc/{worker.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def arrived(kafka: RealKafka) -> Callable[[], int]:
    """How many records are in the topic now."""
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": "counter"})

    def count() -> int:
        return sum(consumer.get_watermark_offsets(TopicPartition(TOPIC, n), timeout=5)[1] for n in range(4))

    return count


@pytest.mark.real
@pytest.mark.timeout(900)
def test_three_minutes(tmp_path: Path) -> None:
    with fleet(tmp_path) as (system, kafka, workers):
        accepted: set[str] = set(send.bulk([Record(TOPIC, "x" * 200) for _ in range(3_000)]))
        system.wait_empty(60)
        kafka.kill()
        began = time.monotonic()
        grown = {worker.pid: 0.0 for worker in workers}
        before: dict[int, float] = {}
        while (passed := time.monotonic() - began) < OUTAGE_S:
            due = int(ARRIVE * min(1.0, passed / (OUTAGE_S - 10))) - (len(accepted) - 3_000)
            if due > 0:
                accepted |= set(send.bulk([Record(TOPIC, "x" * 200) for _ in range(due)]))
            if passed > 20 and not before:  # it is open, and what was in flight is in flight
                before = {worker.pid: rss_mb(worker) for worker in workers}
            if before:
                grown = {w.pid: max(grown[w.pid], rss_mb(w) - before[w.pid]) for w in workers}
            time.sleep(0.25)
        waiting = system.redis.llen("kafka-delivery")
        trips = circuit().trips
        kafka.start()
        back = time.monotonic()
        count = arrived(kafka)
        start = count()
        wait_until(lambda: count() > start, 120, "a first delivery")
        first = time.monotonic() - back
        wait_until(lambda: circuit().state == "closed", 120, "the circuit to close")
        closed, ramp = time.monotonic(), []
        while time.monotonic() - closed < current().ramp_s + 1:
            ramp.append(count())
            time.sleep(1)
        system.wait_empty(300)
        drained = time.monotonic() - back
        delivered = Counter(message_id(record) for record in system.read(TOPIC))
        dead, parked = system.ids(f"{TOPIC}-dlq"), system.parked()
        steps = history()
        counted = counts.read(system.redis)[TOPIC]

    rate = [later - earlier for earlier, later in pairwise(ramp)]
    print(  # noqa: T201  # what the run is for
        f"\naccepted {len(accepted)}, {waiting} waiting when Kafka came back; delivered {len(delivered)}, lost "
        f"{len(accepted - set(delivered))}, duplicates {delivered.total() - len(delivered)}, dead-lettered "
        f"{len(dead)}, parked {len(parked)}\nrounds {trips}; {[f'{s.before} > {s.after}' for s in steps]}\n"
        f"first delivery {first:.1f} s after the broker was up, empty after {drained:.0f} s, "
        f"sends in each second after it closed {rate}\nworkers grew by at most {max(grown.values()):.1f} MB; {counted}"
    )
    assert set(delivered) == accepted
    assert dead == []
    assert parked == []
    assert counted.get("retried", 0) == 0
    assert max(grown.values()) < 40
    opened = [step for step in steps if step.after == "open"]
    assert [step.trips for step in opened] == list(range(1, len(opened) + 1)), "one transition for each round"
    assert trips <= len(opened) <= trips + 1, "one more may fail while the broker starts"
    assert len(opened) <= 7
    assert first <= 5 + current().reset_timeout_max_s * 1.1, "the longest wait, and what workers add to be apart"
    assert rate[0] < max(rate) / 4, "the broker is not flooded at once"


@pytest.mark.real
@pytest.mark.timeout(600)
def test_a_kafka_that_comes_and_goes(tmp_path: Path) -> None:
    with fleet(tmp_path) as (system, kafka, _):
        accepted: list[str] = []
        stop = threading.Event()

        def load() -> None:
            while not stop.wait(0.01):
                message_id = uuid7()
                while True:
                    try:
                        accepted.append(send.delay(TOPIC, "x" * 200, message_id=message_id).id)
                        break
                    except EnqueueError:
                        continue  # as an application should: the same record, the same id

        sender = threading.Thread(target=load)
        sender.start()
        time.sleep(3)
        for _ in range(FLAPS):
            kafka.kill()
            time.sleep(FLAP_S)
            kafka.start()
            time.sleep(FLAP_S)
        stop.set()
        sender.join()
        system.wait_empty(240)
        delivered = Counter(message_id(record) for record in system.read(TOPIC))
        dead, parked = system.ids(f"{TOPIC}-dlq"), system.parked()
        trips = [step for step in history() if step.after == "open"]
        counted = counts.read(system.redis)[TOPIC]

    print(  # noqa: T201
        f"\n{FLAPS} times {FLAP_S} s down and up: accepted {len(accepted)}, delivered {len(delivered)}, duplicates "
        f"{delivered.total() - len(delivered)}, dead-lettered {len(dead)}, parked {len(parked)}; opened {len(trips)} "
        f"times, rounds {[step.trips for step in trips]}; {counted}"
    )
    assert set(delivered) == set(accepted)
    assert dead == []
    assert parked == []
    assert counted.get("retried", 0) == 0
    assert len(trips) <= FLAPS
