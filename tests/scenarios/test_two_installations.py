"""Two installations on one Redis: staging and production, or two teams. No record reaches the Kafka of the other one.

With the same name of a cluster the second one refuses to work. With names of their own both work, side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from kafka_delivery import names, send
from kafka_delivery_worker.embedded import MockKafka, Valkey
from servers import wait_until
from stack import Stack, stack

TOPIC = "orders"
RECORDS = 400


@pytest.fixture
def kafkas() -> Iterator[tuple[MockKafka, MockKafka]]:
    with MockKafka(1) as ours, MockKafka(1) as theirs:
        for kafka in (ours, theirs):
            kafka.create_topic(TOPIC, 1)
            kafka.create_topic(f"{TOPIC}-dlq", 1)
        yield ours, theirs


@pytest.fixture
def system(kafkas: tuple[MockKafka, MockKafka]) -> Iterator[Stack]:
    with Valkey() as valkey, stack(valkey.url, kafkas[0]) as system:
        yield system


def ids_in(kafka: MockKafka, system: Stack) -> list[str]:
    system.kafka, before = kafka, system.kafka
    try:
        return system.ids(TOPIC)
    finally:
        system.kafka = before


def unserved(system: Stack) -> list[str]:
    return [one["cluster"] for one in json.loads(system.command("status", "--json").stdout)["unserved"]]


def paused(system: Stack) -> list[str]:
    return [one["why"] for one in json.loads(system.command("status", "--json").stdout)["paused"]]


def test_a_worker_of_another_kafka_refuses_to_start_and_with_a_name_of_its_own_it_works(
    system: Stack, kafkas: tuple[MockKafka, MockKafka]
) -> None:
    ours, theirs = kafkas
    first = system.worker()
    second = system.worker(ready=False, BOOTSTRAP_SERVERS=theirs.bootstrap_servers)
    sent = [send.delay(TOPIC, str(n)).id for n in range(RECORDS)]
    assert second.process.wait(60) == 1
    last = second.log.splitlines()[-1]
    assert last.startswith(f"kafka-delivery: the Kafka at {theirs.bootstrap_servers} is ")
    assert "KAFKA_DELIVERY_CLUSTER" in last
    assert "Traceback" not in second.log
    assert " ready." not in second.log
    system.wait_empty()
    assert sorted(ids_in(ours, system)) == sorted(sent)
    assert ids_in(theirs, system) == []

    with stack(system.settings["REDIS_URL"], theirs, CLUSTER="theirs") as other:
        worker = other.worker()
        own = [send.delay(TOPIC, str(n)).id for n in range(RECORDS)]
        other.wait_empty()
        worker.stop()
        first.stop()
        # Of the time before the name had queues of its own.
        own.append(send.apply_async((TOPIC, "old"), queue=names.QUEUE).id)
        # The worker that refused may be taken for alive for some seconds.
        wait_until(lambda: unserved(other) == [names.DEFAULT_CLUSTER], 60, "the message to be named")
        other.worker("-Q", f"kafka-delivery.theirs,kafka-delivery-dlq.theirs,{names.QUEUE},{names.DEAD_LETTER_QUEUE}")
        other.wait_empty()
    assert sorted(ids_in(ours, system)) == sorted(sent)
    assert sorted(ids_in(theirs, system)) == sorted(own)
    assert system.parked() == []


def test_a_kafka_that_was_away_when_workers_started_is_compared_before_it_gets_a_record(
    system: Stack, kafkas: tuple[MockKafka, MockKafka]
) -> None:
    """The workers start in an outage, and another Kafka comes up where theirs should be."""
    _, theirs = kafkas
    system.worker().stop()
    remembered = system.redis.hget(names.CLUSTERS, names.DEFAULT_CLUSTER)
    theirs.down()
    one = system.worker(BOOTSTRAP_SERVERS=theirs.bootstrap_servers)
    prefork = system.worker("-P", "prefork", "-c", "1", BOOTSTRAP_SERVERS=theirs.bootstrap_servers)
    sent = {send.delay(TOPIC, str(n)).id for n in range(50)}
    wait_until(lambda: "circuit.open" in one.log + prefork.log, 60, "the outage to be noticed")
    assert paused(system) == []  # an outage of Kafka is no fault of a process

    theirs.up()
    wait_until(lambda: "stands for the Kafka" in one.log, 60, "the answer")
    wait_until(lambda: any("stands for the Kafka" in why for why in paused(system)), 60, "status to say so")
    wait_until(lambda: "stands for the Kafka" in prefork.log, 60, "a child to ask")
    assert ids_in(theirs, system) == []
    assert system.waiting >= len(sent)

    prefork.stop()
    here = next(word for word in one.log.partition(f"the Kafka at {theirs.bootstrap_servers} is ")[2].split(","))
    system.redis.hset(names.CLUSTERS, names.DEFAULT_CLUSTER, here)  # what `doctor --adopt-kafka` does
    system.wait_empty()
    assert sorted(ids_in(theirs, system)) == sorted(sent)
    assert remembered != here.encode()
