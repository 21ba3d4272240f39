"""What is claimed while a circuit is open, and after it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import redis

from integration.leases.workers import (
    CLAIMED,
    NOTHING,
    OTHER,
    QUEUE,
    RAMP,
    RELEASED,
    SHUT,
    Answer,
    Worker,
    has_killed,
    message,
    now,
    publish,
    queued,
)
from kafka_delivery import names
from kafka_delivery.circuits import LAPSES_S
from kafka_delivery_worker.lease import Settling, script

CIRCUITS = "kafka-delivery:cb:1:{default}:"
CIRCUIT = CIRCUITS + "cluster:"


OF_TOPIC = "kafka-delivery:cb:1:{default}:topic:orders:st"


class TestCircuits:
    """What is claimed while a circuit is open, and after it; what decides is written by the circuits' own scripts."""

    @pytest.fixture(autouse=True)
    def looked_at(self, client: redis.Redis) -> None:
        """Some worker has reported, and goes on doing so for as long as no test takes."""
        client.zadd(CIRCUITS + "workers", {"one": now(client) + LAPSES_S * 1000})

    def claim(self, worker: Worker, room: int = 500, limit: int = 1_000, probe: tuple[str, str] = ("", ""),
              asides: Sequence[tuple[bytes, str]] = (), lists: tuple[str, ...] = (QUEUE,),
              beyond: int = 0) -> Answer:  # fmt: skip
        settling = Settling([], [], [*asides], [], [])  # type: ignore[list-item]
        arguments = worker.lease.claim_arguments(room, list(lists), settling, limit, probe, beyond)
        return Answer(*worker.client.eval(script("claim"), *arguments))

    def test_while_the_clusters_is_shut_nothing_is(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        client.hset(CIRCUIT + "st", "shut", "1")
        assert self.claim(Worker(client)).status == SHUT
        assert queued(client) == sent

    def test_a_probe_is_one_message_and_needs_a_lease_that_lasts(self, client: redis.Redis) -> None:
        oldest, *rest = publish(client, *(message(n) for n in range(5)))
        client.hset(CIRCUIT + "st", "shut", "1")
        client.zadd(CIRCUIT + "p", {"over": now(client) - 1, "good": now(client) + 600_000})
        assert self.claim(Worker(client), probe=("cluster", "none")).status == SHUT
        assert self.claim(Worker(client), probe=("cluster", "over")).status == SHUT
        assert self.claim(Worker(client), probe=("cluster", "good")).items == [oldest]
        assert queued(client) == rest

    def test_after_many_rounds_the_newest_is_tried_too(self, client: redis.Redis) -> None:
        """The oldest may be of a topic that is in trouble, and hide that the cluster is well."""
        sent = publish(client, *(message(n) for n in range(5)))
        client.hset(CIRCUIT + "st", mapping={"shut": "1", "trips": "4"})
        client.zadd(CIRCUIT + "p", {"good": now(client) + 600_000})
        assert self.claim(Worker(client), probe=("cluster", "good")).items == [sent[-1]]
        client.hset(CIRCUIT + "st", "trips", "5")
        assert self.claim(Worker(client), probe=("cluster", "good")).items == [sent[0]]

    @pytest.mark.parametrize("busy", [False, True], ids=["empty-handed", "busy"])
    def test_a_probe_passes_over_a_suspect_at_the_front(self, client: redis.Redis, busy: bool) -> None:
        """It may take its worker down, and the next probe would be the same one."""
        worker = Worker(client)
        if busy:
            publish(client, message("in flight"))
            self.claim(worker)
        sent = publish(client, *(message(n) for n in range(3)))
        has_killed(client, sent[0], 4)
        client.hset(CIRCUIT + "st", "shut", "1")
        client.zadd(CIRCUIT + "p", {"good": now(client) + 600_000})
        assert self.claim(worker, probe=("cluster", "good")).items == [sent[-1]]
        assert queued(client) == sent[:-1]

    def test_after_it_claims_grow(self, client: redis.Redis) -> None:
        publish(client, *(message(n) for n in range(1_000)))
        worker = Worker(client)
        worker.lease.ramp_ms = 10_000
        held = 0
        for passed, most in ((0, 1), (1_000, 11), (2_000, 42), (5_000, 255), (9_900, 1_000)):
            began = now(client) - passed
            client.hset(CIRCUIT + "st", mapping={"shut": "0", "ramp_at": began})
            held += len(self.claim(worker).items)
            held += len(self.claim(worker).items)
            later = math.ceil(1_000 * ((now(client) - began) / worker.lease.ramp_ms) ** 2)  # if it took its time
            assert most * 0.9 <= held <= max(most, later)
        client.hset(CIRCUIT + "st", "ramp_at", now(client) - 10_000)
        assert self.claim(worker).status in (CLAIMED, NOTHING)

    def test_a_worker_that_holds_enough_for_now_is_told_to_wait(self, client: redis.Redis) -> None:
        publish(client, *(message(n) for n in range(10)))
        worker = Worker(client)
        worker.lease.ramp_ms = 10_000_000
        # From 1,000 to 1,414 s on it may hold two.
        client.hset(CIRCUIT + "st", mapping={"shut": "0", "ramp_at": now(client) - 1_050_000})
        assert len(self.claim(worker, limit=100).items) <= 2
        assert self.claim(worker, limit=100).status == RAMP

    def test_what_is_stuck_takes_no_room_of_those_that_grow(self, client: redis.Redis) -> None:
        publish(client, *(message(n) for n in range(1_000)))
        worker = Worker(client)
        assert len(worker.claim(100).items) == 100
        worker.lease.ramp_ms = 10_000_000
        client.hset(CIRCUIT + "st", mapping={"shut": "0", "ramp_at": now(client) - 1_050_000})
        assert self.claim(worker, limit=100).status == RAMP
        assert 1 <= len(self.claim(worker, limit=100, beyond=100).items) <= 2

    def test_what_is_put_aside_waits_for_its_topic_in_its_order(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(6)))
        client.hset(OF_TOPIC, "shut", "1")
        worker = Worker(client)
        first = worker.claim(4)
        self.claim(worker, 0, asides=[(tag, "orders") for tag in first.tags])
        rest = worker.claim()
        assert rest.items == sent[4:]
        self.claim(worker, 0, asides=[(tag, "orders") for tag in rest.tags])
        assert worker.claim().items == []
        assert worker.holds == []
        assert client.llen(names.WAITING + ":orders:" + QUEUE) == 6
        later = publish(client, message("later"))
        client.hset(OF_TOPIC, "shut", "0")
        released = worker.claim()
        assert released.items == sent + later
        assert released.suspected == [RELEASED] * 6 + [0], "who has not heard yet must not put them aside again"
        assert worker.claim().items == []
        assert client.scard(names.WAITING) == 0

    def test_a_probe_of_a_topic_takes_one_of_its_own(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(3)))
        others = publish(client, message("other"))
        client.hset(OF_TOPIC, "shut", "1")
        worker = Worker(client)
        claimed = worker.claim(3)
        self.claim(worker, 0, asides=[(tag, "orders") for tag in claimed.tags])
        assert self.claim(worker, probe=("topic:orders", "t")).items == sent[:1]
        assert self.claim(worker, probe=("topic:none", "t")).items == []
        assert queued(client) == others

    def test_where_only_topics_in_trouble_wait_one_of_them_is_the_clusters_probe(self, client: redis.Redis) -> None:
        """Else the cluster's circuit would wait for a record, and these for the cluster's circuit."""
        sent = publish(client, *(message(n) for n in range(3)))
        client.hset(OF_TOPIC, "shut", "1")
        worker = Worker(client)
        claimed = worker.claim(3)
        self.claim(worker, 0, asides=[(tag, "orders") for tag in claimed.tags])
        client.hset(CIRCUIT + "st", "shut", "1")
        client.zadd(CIRCUIT + "p", {"good": now(client) + 600_000})
        other = publish(client, message("other"))
        assert self.claim(worker, probe=("cluster", "good")).items == other, "what flows comes first"
        assert self.claim(worker, probe=("cluster", "good")).items == sent[:1]

    def test_who_does_not_serve_the_queue_does_not_take_what_waits_for_a_topic(self, client: redis.Redis) -> None:
        publish(client, message(1))
        worker = Worker(client)
        claimed = worker.claim()
        self.claim(worker, 0, asides=[(tag, "orders") for tag in claimed.tags])
        assert self.claim(Worker(client), lists=(OTHER,)).items == []
        assert len(self.claim(Worker(client), lists=(QUEUE, OTHER)).items) == 1

    def test_what_waited_returns_to_its_queue_if_its_worker_dies(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        worker, dead, other = Worker(client), Worker(client), Worker(client)
        claimed = worker.claim()
        self.claim(worker, 0, asides=[(tag, "orders") for tag in claimed.tags])
        assert self.claim(dead).items == sent
        dead.dies()
        assert other.reaps(dead) == (1, 0)
        assert queued(client) == sent

    def test_a_worker_that_lost_its_lease_puts_nothing_aside(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        slow, other = Worker(client), Worker(client)
        claimed = slow.claim()
        slow.dies()
        other.reaps(slow)
        self.claim(slow, 0, asides=[(tag, "orders") for tag in claimed.tags])
        assert queued(client) == sent
        assert client.llen(names.WAITING + ":orders:" + QUEUE) == 0
