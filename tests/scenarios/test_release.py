"""`kafka-delivery release` is the way back to Celery's own transport: what only the leased one sees, delayed messages
and those that killed workers held, goes back to the queues, where Celery's workers find it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator

import pytest

from kafka_delivery import dead_letter, send
from kafka_delivery.names import DEATHS
from kafka_delivery_worker.embedded import MockKafka, Valkey
from servers import wait_until
from stack import Stack, leftovers, stack
from watching import ALONE, bring_forward, end_leases, outage_after_the_first_answer

TOPIC = "released"
QUEUE, DEAD_LETTERS = "kafka-delivery", "kafka-delivery-dlq"
WAITING = "kafka-delivery:waiting:1"
LAST_LIST = f"{QUEUE}\x06\x169"
"""The list of the lowest priority."""


@pytest.fixture
def mock() -> Iterator[MockKafka]:
    """Down: what a worker takes, it holds."""
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        kafka.down()
        yield kafka


@pytest.fixture
def system(mock: MockKafka) -> Iterator[Stack]:
    """Without a worker yet."""
    with Valkey() as valkey, stack(valkey.url, mock, LEASE_S=30, LINGER_MS=0) as system:
        yield system


def count(system: Stack, part: str) -> int:
    """Messages in what only the leased transport looks at: `held` or `delayed`."""
    return sum(n for key, n in leftovers(system.redis).items() if key.startswith(f"kafka-delivery:{part}:1:"))


def queued(system: Stack, name: str = QUEUE) -> list[str]:
    """Ids of what waits, the next one first."""
    return [json.loads(item)["headers"]["id"] for item in reversed(system.redis.lrange(name, 0, -1))]


@pytest.mark.smoke
def test_celerys_transport_delivers_what_leased_workers_had_put_aside_or_held(system: Stack, mock: MockKafka) -> None:
    with outage_after_the_first_answer(system, mock):
        killed = system.worker(*ALONE, MAX_IN_FLIGHT=10, CONCURRENCY=10)
    delayed = [send.apply_async((TOPIC, "x"), countdown=3600).id for _ in range(3)]
    last = send.apply_async((TOPIC, "x"), countdown=3600, priority=9).id
    letter = dead_letter.apply_async((TOPIC, "x"), countdown=3600).id
    wait_until(lambda: count(system, "delayed") == 5, 60, "the delayed ones to be put aside")
    sent = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(20)])
    wait_until(lambda: count(system, "held") == 10, 60, "ten in flight")
    killed.kill()
    end_leases(system.redis)
    aside = [send.delay(TOPIC, str(n)).id for n in range(5)]  # as a claim does it while their topic's circuit is open
    system.redis.sadd(WAITING, f"{TOPIC}:{QUEUE}")
    for item in [system.redis.lpop(QUEUE) for _ in aside][::-1]:
        system.redis.lpush(f"{WAITING}:{TOPIC}:{QUEUE}", item)

    done = system.command("release", "--json")

    (line,) = done.stdout.splitlines()
    assert json.loads(line) == {"delayed": 5, "put_aside": 5, "still_held": 0, "still_running": 0}
    assert queued(system) == aside + sent + delayed
    assert (queued(system, LAST_LIST), queued(system, DEAD_LETTERS)) == ([last], [letter])
    assert leftovers(system.redis).keys() == {QUEUE, LAST_LIST, DEAD_LETTERS}

    assert bring_forward(system.redis, QUEUE, LAST_LIST, DEAD_LETTERS) == 5 + 20 + 5
    mock.up()
    system.worker(*ALONE, TRANSPORT="celery", POOL="threads")
    system.wait_for(TOPIC, {*aside, *sent, *delayed, last})
    system.wait_for(f"{TOPIC}-dlq", {letter.removesuffix("-dlq")})
    system.wait_empty()
    assert set(Counter(system.ids(TOPIC, f"{TOPIC}-dlq")).values()) == {1}


def test_a_message_that_took_too_many_workers_down_is_parked(system: Stack, mock: MockKafka) -> None:
    """Not left where leased workers alone would find it."""
    sent = send.delay(TOPIC, "poison")
    (envelope,) = system.redis.lrange(QUEUE, 0, -1)
    system.redis.hset(DEATHS, hashlib.sha1(envelope).hexdigest(), "40")  # noqa: S324
    with outage_after_the_first_answer(system, mock):
        worker = system.worker(*ALONE)
    wait_until(lambda: count(system, "held") == 1, 60, "it to be in flight")
    worker.kill()
    end_leases(system.redis)

    system.command("release")

    assert [(item.id, item.kind) for item in system.parked()] == [(sent.id, "poison")]
    assert leftovers(system.redis) == {}


@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=["people", "programs"])
def test_what_a_living_worker_holds_is_its_own(system: Stack, mock: MockKafka, arguments: tuple[str, ...]) -> None:
    sent = {send.delay(TOPIC, str(n)).id for n in range(5)}
    with outage_after_the_first_answer(system, mock):
        worker = system.worker(*ALONE)
    wait_until(lambda: count(system, "held") == 5, 60, "five in flight")
    system.settings["LEASE_S"] = "1"  # the command waits for two and a half

    done = system.command("release", *arguments, check=False)

    assert done.returncode == 1
    if arguments:
        assert json.loads(done.stdout) == {"delayed": 0, "put_aside": 0, "still_held": 1, "still_running": 1}
    else:
        (line,) = done.stdout.splitlines()
        assert line.startswith("0 delayed messages are back in their queues, and 0 whose topic's circuit was open")
        assert line.endswith("1 workers still run, 1 hold messages")
    assert count(system, "held") == 5
    assert worker.process.poll() is None
    mock.up()
    system.wait_for(TOPIC, sent)
    system.wait_empty()
    assert set(Counter(system.ids(TOPIC)).values()) == {1}


def test_beside_a_worker_that_runs_nothing_is_released(system: Stack, mock: MockKafka) -> None:
    """Delayed messages would be put aside again at once, and the worker's end would leave them there."""
    with outage_after_the_first_answer(system, mock):
        system.worker(*ALONE)
    send.apply_async((TOPIC, "x"), countdown=3600)
    wait_until(lambda: count(system, "delayed") == 1, 60, "it to be put aside")
    system.settings["LEASE_S"] = "1"

    done = system.command("release", "--json", check=False)

    found = {"delayed": 0, "put_aside": 0, "still_held": 0, "still_running": 1}
    assert (done.returncode, json.loads(done.stdout)) == (1, found)
    assert count(system, "delayed") == 1
