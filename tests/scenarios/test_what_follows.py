"""What is to follow a send (`link`, `link_error`, the next step of a chain, a group, a chord's body) is queued although
Redis refuses it when the record has just been delivered. Accounts are by message id, read by an independent consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import chain, chord, group
from confluent_kafka import KafkaError

from kafka_delivery import send
from kafka_delivery_worker.embedded import MockKafka
from servers import RealRedis, have_real_redis, missing, wait_until
from stack import Stack, Worker, stack
from watching import ALONE

pytestmark = [pytest.mark.real, pytest.mark.long]

TOPIC = "followed"
FINAL = KafkaError.POLICY_VIOLATION
POOLS: dict[str, tuple[str, ...]] = {
    "in-flight": (),
    "threads": ("-P", "threads"),
    "prefork": ("-P", "prefork", "-c", "2"),
    "solo": ("-P", "solo"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    """A Redis of this file's own that loses nothing when it is killed."""
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path_factory.mktemp("redis"), options={"appendfsync": "always"}) as server:
        yield server


@pytest.fixture(scope="module", params=list(POOLS))
def system(request: pytest.FixtureRequest, server: RealRedis) -> Iterator[Stack]:
    """One worker, of one pool."""
    with MockKafka() as kafka, stack(server.url, kafka, LEASE_S=5, WORKER_SOCKET_TIMEOUT_S=3) as system:
        system.redis.flushall()
        kafka.create_topic(TOPIC, 1)
        kafka.create_topic(f"{TOPIC}-dlq", 1)
        system.worker(*ALONE, *POOLS[request.param])
        sent = send.delay(TOPIC, "warm")
        system.wait_for(TOPIC, {sent.id})
        system.wait_empty()
        yield system


def full(system: Stack, server: RealRedis) -> Callable[[], object]:
    system.redis.config_set("maxmemory", 1)
    return lambda: system.redis.config_set("maxmemory", 0)


def read_only(system: Stack, server: RealRedis) -> Callable[[], object]:
    system.redis.replicaof("127.0.0.1", 1)
    return lambda: system.redis.replicaof("NO", "ONE")


def without_replicas(system: Stack, server: RealRedis) -> Callable[[], object]:
    system.redis.config_set("min-replicas-to-write", 1)
    return lambda: system.redis.config_set("min-replicas-to-write", 0)


def killed(system: Stack, server: RealRedis) -> Callable[[], object]:
    server.kill()
    return server.start


REFUSALS = [full, read_only, without_replicas, killed]


def step(name: str) -> Any:
    return send.si(TOPIC, name).set(task_id=name)


def link(tag: str) -> set[str]:
    step(f"{tag}-1").apply_async(link=step(f"{tag}-2"))
    return {f"{tag}-1", f"{tag}-2"}


def links(tag: str) -> set[str]:
    step(f"{tag}-1").apply_async(link=[step(f"{tag}-2"), step(f"{tag}-3"), group(step(f"{tag}-4"), step(f"{tag}-5"))])
    return {f"{tag}-{n}" for n in range(1, 6)}


def steps(tag: str) -> set[str]:
    chain(step(f"{tag}-1"), step(f"{tag}-2"), step(f"{tag}-3")).apply_async()
    return {f"{tag}-{n}" for n in range(1, 4)}


def group_in_chain(tag: str) -> set[str]:
    chain(step(f"{tag}-1"), group(step(f"{tag}-2"), step(f"{tag}-3")), step(f"{tag}-4")).apply_async()
    return {f"{tag}-{n}" for n in range(1, 5)}


def parts(tag: str) -> set[str]:
    chord([step(f"{tag}-1"), step(f"{tag}-2")], step(f"{tag}-3")).apply_async()
    return {f"{tag}-{n}" for n in range(1, 4)}


def wanted(tag: str) -> set[str]:
    step(f"{tag}-1").apply_async(link=step(f"{tag}-2"), ignore_result=False)
    return {f"{tag}-1", f"{tag}-2"}


FOLLOWERS = [link, links, steps, group_in_chain, parts, wanted]


def mock(system: Stack) -> MockKafka:
    assert isinstance(system.kafka, MockKafka)
    return system.kafka


def held(system: Stack) -> int:
    """Messages that workers have taken."""
    return sum(int(system.redis.hlen(key)) for key in system.redis.scan_iter("kafka-delivery:held:1:*"))


def working(system: Stack) -> Worker:
    """The worker; started again, as a supervisor does, if it has ended."""
    worker = system.workers[-1]
    if worker.process.poll() is not None:
        worker = system.worker(*worker.process.args[5:])  # type: ignore[index]
    return worker


def met(worker: Worker) -> int:
    """How often a worker has met a refusal: at the end of a task, or before, when it asked for messages.

    In the in-flight pool the event loop collects reports. While it connects anew, no task ends.
    """
    log = worker.log
    return sum(log.count(text) for text in ("it goes back", "Cannot connect", "lease.not_renewed"))


def refused_meanwhile(
    system: Stack,
    server: RealRedis,
    refuse: Callable[[Stack, RealRedis], Callable[[], object]],
    begin: Callable[[], Any],
) -> Any:
    """Begin, let Redis refuse while Kafka has the first record, and lift that when a worker has met it."""
    worker = working(system)
    before = met(worker)
    mock(system).delay(-1, 2_000)
    begun = begin()
    wait_until(lambda: held(system) > 0, 60, "the first record to be taken")
    lift = refuse(system, server)
    try:
        mock(system).delay(-1, 0)
        wait_until(lambda: met(worker) > before or worker.process.poll() is not None, 60, "the refusal")
    finally:
        lift()
    working(system)
    return begun


def check(system: Stack, refuse: Any, server: RealRedis, follows: Callable[[str], set[str]]) -> None:
    tag = f"{follows.__name__}-{refuse.__name__}"
    ids = refused_meanwhile(system, server, refuse, lambda: follows(tag))
    system.wait_for(TOPIC, ids)
    system.wait_empty()
    assert not ids & set(system.ids(f"{TOPIC}-dlq"))
    assert system.parked() == []


@pytest.mark.parametrize("system", ["in-flight"], indirect=True)
@pytest.mark.parametrize("refuse", REFUSALS)
@pytest.mark.parametrize("follows", FOLLOWERS)
def test_what_follows_a_delivery(system: Stack, server: RealRedis, refuse: Any, follows: Any) -> None:
    check(system, refuse, server, follows)


@pytest.mark.parametrize("system", ["in-flight", "prefork"], indirect=True)
@pytest.mark.parametrize("refuse", REFUSALS)
def test_what_follows_a_refusal(system: Stack, server: RealRedis, refuse: Any) -> None:
    """The record is a dead letter and its errback is called. Or Redis refused the hand-over already: then Kafka takes
    the repeat, and what is linked is called.
    """
    record, told, linked = (f"{name}-{refuse.__name__}" for name in ("dead", "told", "linked"))
    mock(system).fail_next(FINAL)
    refused_meanwhile(
        system, server, refuse, lambda: step(record).apply_async(link_error=step(told), link=step(linked))
    )

    def accounted() -> bool:
        there, dead = set(system.ids(TOPIC)), set(system.ids(f"{TOPIC}-dlq"))
        return {record, linked} <= there or (record in dead and told in there)

    wait_until(accounted, 60, "the account")
    system.wait_empty()
    assert system.parked() == []


@pytest.mark.parametrize("system", ["threads", "prefork", "solo"], indirect=True)
@pytest.mark.parametrize("refuse", [full, killed])
@pytest.mark.parametrize("follows", [link, parts])
def test_in_other_pools(system: Stack, server: RealRedis, refuse: Any, follows: Any) -> None:
    check(system, refuse, server, follows)
