"""An operator's command freezes in the middle, another one does all of it, and the first wakes: nothing is lost, and at
most what was in flight is sent again.

Each record is counted in Kafka by an independent consumer. The frozen command's last write reaches Redis late, after
the other command has ended, see `frozen`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from frozen import Frozen
from kafka_delivery.names import DELAYED, PARKED_LOCK, QUEUE, REDRIVE, RELEASE_LOCK, WAITING
from kafka_delivery_worker.embedded import MockKafka, Valkey
from kafka_delivery_worker.parking import ParkingStore
from kafka_delivery_worker.redrive import IN_FLIGHT
from letters import bury, lag, redrive, waiting
from parked_items import park
from servers import OtherKafka
from stack import Stack, stack
from watching import ALONE

COUNT = 40

ROUND_TRIP_S = 0.03
"""Each record takes a frozen command one at least: it is frozen long before its end."""

TOPICS = [f"frozen-{n}" for n in range(12)]


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as valkey:
        yield valkey


@pytest.fixture(scope="module")
def system(valkey: Valkey) -> Iterator[Stack]:
    """One worker, for all."""
    with MockKafka() as kafka, stack(valkey.url, kafka) as system:
        for name in TOPICS:
            kafka.create_topic(name)
            kafka.create_topic(f"{name}-dlq")
        system.worker(*ALONE)
        yield system


@pytest.fixture(scope="module")
def names() -> Iterator[str]:
    return iter(TOPICS)


@pytest.fixture
def topic(names: Iterator[str]) -> str:
    """A topic that no test has used, with its dead-letter topic."""
    return next(names)


@dataclass(frozen=True)
class Case:
    """What freezes, and what runs meanwhile. TOPIC stands for the topic.

    Attributes:
        first, second: the commands.
        parked: the records are parked, not dead letters.
        at_once: Redis queues a record and takes it out of the store in one step: nothing is in flight.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    parked: bool = True
    at_once: bool = True

    @property
    def lock(self) -> str:
        return PARKED_LOCK if self.parked else f"{REDRIVE}TOPIC-dlq:lock"

    def fill(self, system: Stack, topic: str) -> None:
        if not self.parked:
            bury(system, topic, COUNT)
        for n in range(COUNT if self.parked else 0):
            park(ParkingStore(system.redis), f"{topic}-{n}", topic)

    def left(self, system: Stack, topic: str) -> int:
        """Records on which nothing was done yet."""
        if self.parked:
            return sum(item.topic == topic for item in system.parked())
        marks = system.redis.scan_iter(f"{REDRIVE}{topic}-dlq:*:*")
        return COUNT - sum(int(system.redis.bitcount(key)) for key in marks)


REASON = ("--reason", "a test")
PARKED = ("parked", "redrive", "--topic", "TOPIC", "--yes")
PARKED_DISCARD = ("parked", "discard", "--topic", "TOPIC", "--yes", *REASON)
LETTERS = ("dead-letters", "redrive", "TOPIC", "--yes")
LETTERS_DISCARD = ("dead-letters", "discard", "TOPIC", "--all", "--yes", *REASON)

CASES = {
    "parked redrive while parked redrive": Case(PARKED, PARKED),
    "parked redrive while parked discard": Case(PARKED, PARKED_DISCARD),
    "parked discard while parked redrive": Case(PARKED_DISCARD, PARKED),
    "redrive while redrive": Case(LETTERS, LETTERS, parked=False, at_once=False),
    "redrive while discard": Case(LETTERS, LETTERS_DISCARD, parked=False, at_once=False),
    "redrive of whole ones while parked redrive": Case(LETTERS, PARKED, at_once=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_was_in_flight_is_sent_again_at_most(system: Stack, valkey: Valkey, topic: str, case: Case) -> None:
    case.fill(system, topic)
    lock = case.lock.replace("TOPIC", topic)
    with Frozen(of(case.first, topic), system.env(), valkey.port, ROUND_TRIP_S) as first:
        first.freeze(lambda: case.left(system, topic) <= COUNT - 5)
        refused = system.command(*of(case.second, topic), check=False)
        assert refused.returncode == 1
        assert f"process {first.process.pid}, since 20" in refused.stderr
        assert f"(kafka-delivery {' '.join(case.first[:2])}). Its lock ends in" in refused.stderr

        system.wait_empty()
        left = case.left(system, topic)
        sent = 0 if "discard" in case.first else len(system.ids(topic))
        in_flight = sent - (COUNT - left) if "discard" not in case.first else 0
        assert 0 <= in_flight <= (0 if case.at_once else IN_FLIGHT)
        system.redis.delete(lock)  # instead of waiting for its end
        system.command(*of(case.second, topic))
        system.wait_empty()
        between = Counter(system.ids(topic))

        woken = first.thaw()

    assert woken.returncode == 1, woken.stdout
    assert "the lock on " in woken.stderr
    assert "was lost" in woken.stderr
    assert "Traceback" not in woken.stderr
    system.wait_empty()
    counts = Counter(system.ids(topic))
    assert counts == between, "the one that woke sent something"
    assert counts.total() - len(counts) <= in_flight
    expected = {"discard": sent, "redrive": COUNT if "discard" not in case.first else left}
    assert len(counts) == expected[case.second[1]], "one was lost"
    assert case.left(system, topic) == 0
    if not case.parked:
        assert (waiting(system, topic), lag(system, topic)) == (0, 0)
        assert redrive(system, topic)["sent"] == 0


@pytest.mark.parametrize("verb", ["redrive", "discard"])
def test_a_run_that_freezes_while_it_asks_puts_nothing_back(
    system: Stack, valkey: Valkey, topic: str, verb: str
) -> None:
    """It has read the group's offset, which another run has moved meanwhile."""
    bury(system, topic, COUNT)
    arguments = of(LETTERS if verb == "redrive" else LETTERS_DISCARD, topic)
    with Frozen(tuple(one for one in arguments if one != "--yes"), system.env(), valkey.port, stdin=True) as first:
        first.freeze(lambda: asks(first, f"{verb.capitalize()} {COUNT} dead letters"))
        system.redis.delete(f"{REDRIVE}{topic}-dlq:lock")  # instead of waiting for its end
        assert redrive(system, topic)["delivered"] == COUNT
        woken = first.thaw(answer="y\n")
    assert woken.returncode == 1
    assert f"the lock on {topic}-dlq was lost" in woken.stderr
    assert (waiting(system, topic), lag(system, topic)) == (0, 0)
    assert redrive(system, topic)["sent"] == 0
    assert set(Counter(system.ids(topic)).values()) == {1}


def test_a_release_that_wakes_leaves_alone_what_workers_have_put_there_since() -> None:
    with Valkey() as valkey, stack(valkey.url, OtherKafka("127.0.0.1:1"), LEASE_S=1) as system:
        queues = [f"{QUEUE}\x06\x16{n}" for n in range(COUNT)]
        for queue in queues:
            system.redis.zadd(DELAYED + queue, {f"delayed in {queue}": 1})
        with Frozen(("release",), system.env(), valkey.port, ROUND_TRIP_S) as first:
            first.freeze(lambda: len(system.redis.keys(f"{DELAYED}*")) <= COUNT - 5)
            refused = system.command("release", check=False)
            assert refused.returncode == 1
            assert f"process {first.process.pid}, since 20" in refused.stderr
            system.redis.delete(RELEASE_LOCK)  # instead of waiting for its end
            system.redis.delete("kafka-delivery:leases:1")  # of the frozen one
            system.command("release")
            assert [system.redis.lrange(queue, 0, -1) for queue in queues] == [
                [f"delayed in {queue}".encode()] for queue in queues
            ]
            for queue in queues:  # as workers do that have begun since
                system.redis.zadd(DELAYED + queue, {f"later in {queue}": 1})
            system.redis.sadd(WAITING, f"orders:{QUEUE}")
            system.redis.lpush(f"{WAITING}:orders:{QUEUE}", "aside")

            woken = first.thaw()

        assert woken.returncode == 1
        assert "the lock on the release was lost" in woken.stderr
        assert len(system.redis.keys(f"{DELAYED}*")) == COUNT
        assert system.redis.smembers(WAITING) == {f"orders:{QUEUE}".encode()}


# -- helpers
def of(arguments: tuple[str, ...], topic: str) -> tuple[str, ...]:
    return tuple(topic if one == "TOPIC" else one for one in arguments)


def asks(frozen: Frozen, question: str) -> bool:
    """Read what the command prints until it asks."""
    assert frozen.process.stdout is not None
    printed = b""
    while question.encode() not in printed:
        some = os.read(frozen.process.stdout.fileno(), 4096)
        assert some, printed
        printed += some
    return True
