"""Redis may refuse connections, refuse writes, be read-only or be killed: workers go on by themselves, and no record is
lost over it. Accounts are by message id: each is in its topic, in its dead-letter topic, or parked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from confluent_kafka import KafkaError

from kafka_delivery import EnqueueError, send
from kafka_delivery_worker.embedded import MockKafka
from servers import RealRedis, have_real_redis, missing, wait_until
from stack import Stack, Worker, stack
from watching import ALONE, looks

pytestmark = pytest.mark.real

TOPIC = "refused"
PASSING = KafkaError.FENCED_LEADER_EPOCH
FINAL = KafkaError.POLICY_VIOLATION


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    """A Redis of this file's own that loses nothing when it is killed."""
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path_factory.mktemp("redis"), options={"appendfsync": "always"}) as server:
        yield server


@pytest.fixture
def system(server: RealRedis) -> Iterator[Stack]:
    changes = {"LEASE_S": 5, "WORKER_SOCKET_TIMEOUT_S": 3}
    with MockKafka() as kafka, stack(server.url, kafka, **changes) as system:
        system.redis.flushall()
        kafka.create_topic(TOPIC, 8)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield system


def mock(system: Stack) -> MockKafka:
    assert isinstance(system.kafka, MockKafka)
    return system.kafka


def warm(system: Stack) -> None:
    """One record through: the worker has all the connections that it needs while nothing goes wrong."""
    sent = send.delay(TOPIC, "warm")
    system.wait_for(TOPIC, {sent.id})
    system.wait_empty()


@contextmanager
def load(system: Stack, every_s: float = 0.02) -> Iterator[list[str]]:
    """Send while the block runs; yields the ids of sends that returned. One that raised is repeated under its id."""
    accepted: list[str] = []
    enough = threading.Event()

    def sending() -> None:
        again: str | None = None
        while not enough.wait(every_s):
            try:
                accepted.append(send.delay(TOPIC, f"record {len(accepted)}", message_id=again).id)
                again = None
            except EnqueueError as error:
                again = error.message_id

    thread = threading.Thread(target=sending, name="load")
    thread.start()
    try:
        yield accepted
    finally:
        enough.set()
        thread.join(60)
    assert not thread.is_alive(), "a send hangs"


def held(system: Stack) -> int:
    """Messages that workers have taken."""
    return sum(int(system.redis.hlen(key)) for key in system.redis.scan_iter("kafka-delivery:held:1:*"))


def accounted(system: Stack) -> set[str]:
    return {*system.ids(TOPIC), *system.ids(f"{TOPIC}-dlq"), *(item.id for item in system.parked())}


def wait_accounted(system: Stack, ids: set[str], timeout: float = 30) -> None:
    wait_until(
        lambda: ids <= accounted(system),
        timeout,
        f"{len(ids)} accounted for; {len(ids - accounted(system))} missing, {system.waiting} waiting",
    )


def wait_log(worker: Worker, text: str) -> None:
    wait_until(lambda: text in worker.log, 60, f"{text!r} in the worker's log")


IN_FLIGHT, THREADS, PREFORK = (), ("-P", "threads"), ("-P", "prefork", "-c", "4")


def pools(*pools: tuple[str, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pool", pools, ids=[pool[1] if pool else "in-flight" for pool in pools])


@pools(IN_FLIGHT, THREADS, PREFORK)
def test_no_new_connections(system: Stack, pool: tuple[str, ...]) -> None:
    """Retries and dead letters have to be published, and Redis takes no connection more (holes 2 and 3)."""
    kafka = mock(system)
    worker = system.worker(*ALONE, *pool)
    warm(system)
    for _ in range(8):
        kafka.fail_next(PASSING)
        kafka.fail_next(FINAL)
    # Kafka is away until all have begun, and the first one fails after that.
    system.command("breaker", "force-closed", "--reason", "a test")
    kafka.down()
    # Not one batch: each has an outcome of its own.
    ids = {send.delay(TOPIC, str(n), partition=n).id for n in range(8)}
    wait_until(lambda: held(system) >= 4, 60, "all processes to be busy")
    system.redis.config_set("maxclients", len(system.redis.client_list()))
    kafka.up()
    try:
        wait_log(worker, "max number of clients")
    finally:
        # A new connection could not lift it, nor could this one if it had to reconnect.
        system.redis.config_set("maxclients", 10_000)

    wait_accounted(system, ids)
    assert worker.process.poll() is None
    system.wait_empty()


def fill(system: Stack) -> Callable[[], object]:
    """Refuse every write that takes memory."""
    system.redis.config_set("maxmemory", 1)
    return lambda: system.redis.config_set("maxmemory", 0)


def refused(system: Stack) -> int:
    """How often Redis has answered with an error: a send of the load each time, or a worker."""
    errors: dict[str, Any] = system.redis.info("errorstats")
    return sum(int(one["count"]) for one in errors.values())


def demote(system: Stack) -> Callable[[], object]:
    """Make it a replica, of nobody who is there."""
    system.redis.replicaof("127.0.0.1", 1)
    return lambda: system.redis.replicaof("NO", "ONE")


@pools(IN_FLIGHT, PREFORK)
def test_no_writes(system: Stack, pool: tuple[str, ...]) -> None:
    """Redis is full, then read-only as after a failover, while a worker has its hands full and a backlog waits."""
    worker = system.worker(*ALONE, *pool)
    warm(system)
    sent = {send.delay(TOPIC, str(n)).id for n in range(300)}
    with load(system) as accepted:
        for refuse in (fill, demote):
            reached = len(accepted)
            wait_until(lambda reached=reached: len(accepted) > reached + 10, 60, "some load")  # type: ignore[misc]
            before = refused(system)
            lift = refuse(system)
            try:
                wait_until(lambda before=before: refused(system) > before + 50, 60, "refusals")  # type: ignore[misc]
                with looks(system.redis) as looked:
                    looked.renewals(3)  # a worker meets the refusal several times
            finally:
                lift()
        reached = len(accepted)
        wait_until(lambda: len(accepted) > reached + 10, 60, "some load after it")
    wait_accounted(system, sent | set(accepted))
    system.wait_empty()
    assert system.read(f"{TOPIC}-dlq") == []
    assert worker.process.poll() is None, worker.log[-3000:]


@pools(IN_FLIGHT, PREFORK)
def test_redis_is_killed_under_load(system: Stack, server: RealRedis, pool: tuple[str, ...]) -> None:
    """A worker that ends over it is started again, as a supervisor does."""
    worker = system.worker(*ALONE, *pool)
    warm(system)
    with load(system) as accepted:
        wait_until(lambda: len(accepted) > 30, 60, "some load")
        server.kill()
        noticed = "lease.not_renewed"
        wait_until(lambda: noticed in worker.log or worker.process.poll() is not None, 60, "the worker to notice it")
        server.start()
        reached = len(accepted)
        wait_until(lambda: len(accepted) > reached + 30, 60, "some load")
    wait_until(lambda: set(accepted) <= accounted(system) or worker.process.poll() is not None, 60, "all accounted for")
    if worker.process.poll() is not None:
        system.worker(*ALONE, *pool)
    wait_accounted(system, set(accepted))
    system.wait_empty()
    assert system.read(f"{TOPIC}-dlq") == []
    assert system.parked() == []
