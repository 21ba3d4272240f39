"""A process that fails alone pauses itself; one without Redis goes by what it knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from integration.breaker.processes import DOWN, RULES, STALL_S, Process, ended
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker.breaker import REDIS_TIMEOUT_S, Breaker, Probe
from kafka_delivery_worker.breaker.outcomes import LOCAL
from kafka_delivery_worker.breaker.store import CircuitStore
from servers import RealRedis, valkey_binary, wait_until


class TestAlone:
    """Where only this process fails, the fleet goes on."""

    def test_it_pauses_itself_and_leaves_the_queue_to_the_others(self, one: Process, two: Process) -> None:
        two.succeeds()
        two.stays()
        one.fails(DOWN, RULES.threshold)
        assert one.breaker.shut
        assert one.state() == "closed"
        assert not two.breaker.shut

    def test_it_looks_again_by_itself(self, one: Process, two: Process) -> None:
        two.succeeds()
        two.stays()
        one.fails(DOWN, RULES.threshold)
        for _ in range(RULES.successes):
            one.clock.now += 6
            two.succeeds()
            two.stays()
            one.breaker.tick()
            probe = one.breaker.take_probe()
            assert probe is not None
            assert probe.scope == LOCAL
            one.breaker.delivered(probe, "orders")
            one.breaker.tick()
        assert not one.breaker.shut

    def test_what_is_still_in_flight_when_the_fleet_goes_on_pauses_nobody(self, redis_client: redis.Redis) -> None:
        """The records of failed probes, which wait in librdkafka for the cluster that has just come back."""
        one, two = Process(redis_client, "one", claims=False), Process(redis_client, "two")
        one.breaker.in_flight = lambda: {"orders": 2}
        two.stays()
        one.fails(DOWN, RULES.threshold)
        two.fails(DOWN)
        one.passes(STALL_S + 1)
        for _ in range(RULES.successes):
            two.passes(1)
            probe = two.breaker.take_probe()
            assert probe is not None
            two.breaker.delivered(probe, "orders")
            two.breaker.tick()
            one.clock.now += STALL_S
        one.breaker.tick()
        assert one.state() == "closed"
        assert not one.breaker.shut

    def test_who_claims_nothing_pauses_and_looks_again_too(self, redis_client: redis.Redis) -> None:
        """Children of prefork, and workers of another broker."""
        one, two = Process(redis_client, "one", claims=False), Process(redis_client, "two")
        two.succeeds()
        two.stays()
        one.fails(DOWN, RULES.threshold)
        assert one.breaker.shut
        assert one.breaker.ask("orders") is None
        for _ in range(RULES.successes):
            one.clock.now += 6
            two.succeeds()
            two.stays()
            one.breaker.tick()
            probe = one.breaker.ask("orders")
            assert isinstance(probe, Probe)
            assert one.breaker.ask("orders") is None, "one at a time"
            one.breaker.delivered(probe, "orders")
            one.breaker.tick()
        assert not one.breaker.shut

    def test_who_is_told_to_go_on_does(self, one: Process, two: Process) -> None:
        one.breaker._store.force("cluster", "closed", 0, "me", "all through")
        for _ in range(3):
            one.fails(DOWN, RULES.threshold)
            two.fails(DOWN, RULES.threshold)
        assert not one.breaker.shut
        assert not two.breaker.shut

    def test_when_a_second_one_fails_it_is_the_fleets(self, one: Process, two: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        two.fails(DOWN)
        one.breaker.tick()
        assert one.state() == two.state() == "open"
        assert one.breaker.local.state == "closed"

    def test_the_only_worker_of_a_fleet_is_the_fleet(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        assert one.state() == "open"
        assert one.breaker.local.state == "closed"


class TestNewcomers:
    def test_one_that_is_born_in_an_outage_sends_nothing_before_it_knows(self, one: Process, two: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        two.fails(DOWN, 2)
        assert Process(one.redis._client, "new").breaker.admission("orders") is None

    def test_one_that_finds_no_redis_starts_all_the_same(self, tmp_path: Path) -> None:
        settings = Settings(redis_url="redis://127.0.0.1:1/0")
        store = CircuitStore(RedisClient(settings, REDIS_TIMEOUT_S), "default", RULES, "new")
        breaker = Breaker(store, RULES, STALL_S)
        breaker.tick()
        assert breaker.admission("orders") is not None


class TestRedisAway:
    def test_what_was_open_stays_so_until_its_time_and_then_one_record_shows(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.redis.away = True
        one.breaker.tick()
        assert one.breaker.shut
        one.clock.now += 4
        one.breaker.tick()
        assert one.breaker.take_probe() is None
        one.clock.now += 2
        one.breaker.tick()
        probe = one.breaker.take_probe()
        assert probe is not None
        assert probe.scope == LOCAL
        one.breaker.failed(probe, "orders", DOWN)
        one.breaker.tick()
        assert one.breaker.shut
        assert one.breaker.take_probe() is None

    def test_what_was_closed_goes_on_and_is_guarded_by_the_same_rules(self, one: Process) -> None:
        one.redis.away = True
        one.succeeds()
        one.fails(DOWN, RULES.threshold - 1)
        assert not one.breaker.shut
        one.fails(DOWN)
        assert one.breaker.shut

    def test_it_is_asked_once_a_look_and_nothing_waits_for_it(self, one: Process) -> None:
        one.redis.away = True
        looks = one.redis.looks
        for _ in range(1_000):
            admission = one.breaker.admission("orders")
            assert admission is not None
            one.breaker.delivered(admission, "orders")
        one.breaker.tick()
        assert one.redis.looks == looks + 1

    def test_when_it_is_back_what_it_knows_holds(self, one: Process, two: Process) -> None:
        one.redis.away = True
        one.fails(DOWN, RULES.threshold)
        assert one.breaker.shut
        two.succeeds()
        two.stays()
        one.redis.away = False
        one.breaker.tick()
        assert not one.breaker.shut
        one.redis.away = True
        one.breaker.tick()
        two.passes(6)  # the other is taken for gone
        two.fails(DOWN, RULES.threshold)
        one.redis.away = False
        one.breaker.tick()
        assert one.breaker.shut

    def test_what_it_has_lost_is_restored_before_anything_is_sent(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.redis._client.flushall()
        assert one.breaker.admission("orders") is None
        one.breaker.tick()
        assert one.breaker.shut
        assert one.redis._client.hget("kafka-delivery:cb:1:{default}:cluster:st", "state") == b"open"

    @pytest.fixture
    def hung(self, tmp_path: Path) -> Iterator[RealRedis]:
        with RealRedis(tmp_path, binary=valkey_binary(), options={"appendonly": "no"}) as server:
            yield server
            server.resume()

    def test_one_that_hangs_holds_up_nobody_for_long(self, hung: RealRedis) -> None:
        """Its own client gives up in time, and does not try again."""
        store = CircuitStore(RedisClient(Settings(redis_url=hung.url), 1), "default", RULES, "one")
        breaker = Breaker(store, RULES, STALL_S)

        def attached() -> bool:
            breaker.tick()
            return breaker._attached

        wait_until(attached, 60, "an answer within a second")
        hung.pause()
        breaker.tick()
        assert not breaker._attached
        assert breaker.admission("orders") is not None


def test_the_thread_reports_and_ends(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(redis_client)
    told: list[Any] = []
    monkeypatch.setattr(process.breaker, "tick", lambda: told.append(1))
    process.breaker.start()
    process.breaker.failed(1, "orders", DOWN)
    process.breaker.stop()
    ended(process)
    assert len(told) >= 1
    assert redis_client.zscore("kafka-delivery:cb:1:{default}:workers", "one") is None


def test_what_one_process_has_missed_it_does_not_restore(one: Process, two: Process) -> None:
    """A topic was forced open, and set to automatic while one process was away; then Redis lost everything."""
    one.breaker._store.force("topic:orders", "open", 0, "me", "its consumers are ill")
    for process in one, two:
        process.breaker.tick()
        assert process.breaker.shut_topics == {"orders"}
    two.redis.away = True
    two.breaker.tick()
    one.breaker._store.force("topic:orders", "", 0, "me", "they are well")
    one.breaker.tick()
    one.breaker._topics.clear()  # as after a minute without a failure: it counts nothing of the topic any more
    one.redis._client.flushall()
    two.redis.away = False
    for process in two, one, two:
        process.breaker.tick()
    assert (one.breaker.shut_topics, two.breaker.shut_topics) == (frozenset(), frozenset())
