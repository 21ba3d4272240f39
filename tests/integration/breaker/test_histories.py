"""Whatever happens to a process and its Redis while Kafka is well, no circuit opens; and an outage begins and ends."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis.exceptions import TimeoutError as RedisTimeoutError

from examples import examples
from integration.breaker.processes import RULES, STALL_S, TIMED_OUT, Process
from integration.circuits.fleet import BASE, RedisClock
from kafka_delivery_worker.breaker.attendance import GAP_S

HOUR_S = 3_600
seconds = st.integers(1, 40)
step = st.one_of(
    st.tuples(st.just("is well"), seconds),
    st.tuples(st.just("is frozen"), seconds, st.booleans(), st.booleans()),
    st.tuples(st.just("is busy"), seconds, st.booleans(), st.booleans()),
    st.tuples(st.just("has no Redis"), seconds, st.booleans(), st.booleans()),
    st.tuples(st.just("has a slow Redis"), st.integers(1, 8)),
    st.tuples(st.just("loses a report"), st.booleans()),
    st.tuples(st.just("has a Redis whose clock steps"), st.integers(-HOUR_S, HOUR_S)),
)


class World:
    """A process, a Redis with a clock of its own, and a Kafka that answers at once while it is well."""

    def __init__(self, client: redis.Redis, clock: RedisClock) -> None:
        self.redis_clock = clock
        self.process = Process(client)
        self.breaker = self.process.breaker
        self.sent: list[Any] = []
        self.well = True
        self.breaker.in_flight = lambda: {"orders": len(self.sent)} if self.sent else {}
        self.breaker.attendance.collected()

    def passes(self, seconds: int) -> None:
        self.process.clock.now += seconds
        self.redis_clock.passes(1_000 * seconds)

    def sends(self) -> None:
        probe = self.breaker.take_probe()
        for _ in range(30):
            admission = self.breaker.admission("orders", probe and probe.mark)
            if admission is not None:
                self.sent.append(admission)
            if probe is not None:
                return

    def collects(self, timed_out: bool = False) -> None:
        """Reports of all that is in flight, if Kafka is well."""
        if self.well:
            sent, self.sent = self.sent, []
            for admission in sent:
                if timed_out:
                    self.breaker.failed(admission, "orders", TIMED_OUT)
                else:
                    self.breaker.delivered(admission, "orders")
        self.breaker.attendance.collected()

    def attends(self, seconds: int) -> None:
        for _ in range(seconds):
            self.passes(1)
            self.collects()
            self.breaker.tick()
            self.sends()

    def wakes(self, after_s: int, timed_out: bool, looks_first: bool) -> None:
        """Records that were in flight may have timed out in a gap; while Kafka is well, none does in a moment."""
        if looks_first:
            self.breaker.tick()
        self.collects(timed_out and after_s > GAP_S)
        self.breaker.tick()

    def lives(self, what: str, *how: Any) -> None:
        """One step of a history; records are in flight at its beginning."""
        self.sends()
        match what:
            case "is well":
                self.attends(how[0])
            case "is frozen":
                self.passes(how[0])
                self.wakes(*how)
            case "is busy":
                self.ticks(how[0])
                self.wakes(*how)
            case "has no Redis":
                self.process.redis.away = True
                self.ticks(how[0])
                self.process.redis.away = False
                self.wakes(*how)
            case "has a slow Redis":
                self.reports(how[0])
            case "loses a report":
                self.reports(5, lost="before" if how[0] else "after")
            case _:
                self.redis_clock.passes(1_000 * how[0])
                self.attends(1)

    def ticks(self, seconds: int) -> None:
        for _ in range(seconds):
            self.passes(1)
            self.breaker.tick()

    def reports(self, seconds: int, lost: str = "") -> None:
        """One report takes so long, and reports of records are collected meanwhile."""
        report = self.breaker._store.report

        def slow(counted: Any) -> Any:
            for _ in range(seconds):
                self.passes(1)
                self.collects()
            if lost == "before":
                raise RedisTimeoutError
            answer = report(counted)
            if lost == "after":
                raise RedisTimeoutError
            return answer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.breaker._store, "report", slow)
            self.breaker.tick()
        self.breaker.tick()


@given(history=st.lists(step, max_size=12))
@hypothesis_settings(max_examples=examples(60, least=10), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_circuit_opens_while_kafka_is_well_and_an_outage_begins_and_ends(
    redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, history: list[tuple[Any, ...]]
) -> None:
    redis_client.flushall()
    with monkeypatch.context() as patch:
        world = World(redis_client, RedisClock(redis_client, patch))
        for what, *how in history:
            world.lives(what, *how)
            assert not world.breaker.shut, what
            assert not world.breaker.shut_topics, what
            assert world.breaker.local.state == "closed", what
        assert not redis_client.exists(BASE + "log")

        world.sends()
        world.well = False
        world.attends(int(STALL_S) + 2)
        assert world.breaker.shut
        world.well = True
        waited = 0
        while world.breaker.shut:
            assert waited <= RULES.max_open_ms * 1.1 / 1_000 + RULES.successes + 5
            world.attends(1)
            waited += 1
