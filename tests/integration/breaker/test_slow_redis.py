"""A Redis that is slow is no Redis that is away: a process waits for it, in its own thread, not in a record's way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from integration.breaker.processes import DOWN, RULES, STALL_S, Process
from integration.circuits.fleet import passes
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker import breaker as module
from kafka_delivery_worker.breaker import REDIS_TIMEOUT_S, Breaker, Probe
from kafka_delivery_worker.breaker.rules import Rules
from kafka_delivery_worker.breaker.store import CircuitStore
from proxy import Proxy
from servers import wait_until

QUICK = Rules.of(Settings(reset_timeout_s=0.1, reset_timeout_max_s=1.0))


@pytest.fixture
def network(redis_url: str, redis_client: redis.Redis) -> Iterator[Proxy]:
    port = urlsplit(redis_url).port
    assert port is not None
    with Proxy(port) as proxy:
        yield proxy


@pytest.fixture
def far(network: Proxy) -> Iterator[Breaker]:
    """One that reaches Redis over that network, with its thread, and claims."""
    store = CircuitStore(RedisClient(Settings(redis_url=network.redis_url), REDIS_TIMEOUT_S), "default", QUICK, "far")
    made = Breaker(store, QUICK, 2.0)
    made.claim_by(lambda: None)
    made.start()
    yield made
    network.slow(0)
    network.heal()
    made.stop()
    ended_thread(made)


def ended_thread(breaker: Breaker) -> None:
    assert breaker._thread is not None
    breaker._thread.join(60)
    assert not breaker._thread.is_alive()


@pytest.mark.parametrize(("delay_s", "jitter_s"), [(0.05, 0.05), (0.15, 0.1), (0.5, 0.2)])
def test_an_outage_begins_and_ends_by_itself(far: Breaker, network: Proxy, delay_s: float, jitter_s: float) -> None:
    network.slow(delay_s, jitter_s)

    def fails() -> bool:
        admission = far.admission("orders")
        if admission is not None:
            far.failed(admission, "orders", DOWN)
        return far._views["cluster"].state == "open"

    def arrives() -> bool:
        probe = far.take_probe()
        if probe is not None:
            far.admission("orders", probe.mark)
            far.delivered(probe, "orders")
        return far._views["cluster"].state == "closed"

    wait_until(fails, 60, "the fleet's circuit to open")
    wait_until(arrives, 60, "it to close")
    assert far._attached
    assert not far.paused


def test_a_probe_has_time_for_the_round_trips(one: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is claimed over the same network, while another claim is under way, and so is what became of it."""
    one.fails(DOWN, RULES.threshold)
    report, admit = one.breaker._store.report, one.breaker._store.admit
    leases: list[int] = []

    def late(counted: Any) -> Any:
        one.clock.now += 3
        return report(counted)

    def noted(scope: str, token: str, lease_ms: int) -> Any:
        leases.append(lease_ms)
        return admit(scope, token, lease_ms)

    monkeypatch.setattr(one.breaker._store, "report", late)
    monkeypatch.setattr(one.breaker._store, "admit", noted)
    one.passes(6)
    assert leases == [int((STALL_S + 5 + 4 * 3) * 1000)]
    assert one.breaker.has_probe
    monkeypatch.setattr(one.breaker._store, "report", report)
    one.passes(STALL_S + 2 * 3)
    assert one.breaker.has_probe, "its record is being claimed"


class TestInARecordsWay:
    def test_one_of_many_threads_waits_for_the_answer(
        self, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process = Process(redis_client, claims=False)
        process.fails(DOWN, RULES.threshold)
        process.passes(6)
        asked, answered = threading.Event(), threading.Event()
        admit = process.breaker._store.admit

        def slow(*arguments: Any) -> Any:
            asked.set()
            assert answered.wait(60)
            return admit(*arguments)

        monkeypatch.setattr(process.breaker._store, "admit", slow)
        got: list[Any] = []
        waits = threading.Thread(target=lambda: got.append(process.breaker.ask("orders")))
        waits.start()
        assert asked.wait(60)
        try:
            assert process.breaker.ask("orders") is None
        finally:
            answered.set()
            waits.join(60)
        assert isinstance(got[0], Probe)

    def test_who_was_not_answered_lets_the_next_ones_pass(self, redis_client: redis.Redis) -> None:
        """Each would wait as long."""
        process = Process(redis_client, claims=False)
        process.fails(DOWN, RULES.threshold)
        passes(redis_client, 6_000)
        process.clock.now += 6
        process.redis.away = True
        looks = process.redis.looks
        for _ in range(100):
            assert process.breaker.ask("orders") is None
        assert process.redis.looks == looks + 1

    def test_the_first_look_is_waited_for_a_moment(self, network: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "FIRST_LOOK_S", 0.2)
        network.partition()
        store = CircuitStore(RedisClient(Settings(redis_url=network.redis_url), 20), "default", QUICK, "new")
        new = Breaker(store, QUICK, 2.0)
        new.start()
        assert not new._looked.is_set()
        assert new.admission("orders") is not None
        network.heal()
        assert new._looked.wait(60)
        new.stop()
        ended_thread(new)

    def test_a_process_that_ends_waits_no_longer_than_that(
        self, far: Breaker, network: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A Redis that hangs holds up no shutdown: the bound is a fraction of its client's."""
        monkeypatch.setattr(module, "STOP_S", 0.2)
        network.partition()
        began = monotonic()
        far.stop()
        assert monotonic() - began < REDIS_TIMEOUT_S


def test_what_no_script_should_answer_is_no_view_either(one: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever keeps a process from the fleet's circuits, it goes on by its own, and says so."""
    one.fails(DOWN, RULES.threshold)

    def broken(_: Any) -> Any:
        raise ValueError("not what a script answers")

    with monkeypatch.context() as patch:
        patch.setattr(one.breaker._store, "report", broken)
        one.passes(1)
        assert not one.breaker._attached
        one.passes(6)
        probe = one.breaker.take_probe()
        assert probe is not None
        assert probe.scope == "local"
    one.breaker.not_sent(probe.mark)
    one.passes(1)
    assert one.breaker._attached
