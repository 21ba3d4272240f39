"""A process by itself judges as the fleet does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from examples import examples
from integration.circuits.fleet import CLUSTER, OPEN_MS, RULES, RedisClock, Worker
from kafka_delivery_worker.breaker import store
from kafka_delivery_worker.breaker.attendance import Attendance
from kafka_delivery_worker.breaker.rules import LocalCircuit
from kafka_delivery_worker.breaker.stall import Stall
from kafka_delivery_worker.breaker.store import Counted

STALL_S = 10.0
LEASE_MS = 15_000

Step = tuple[int, bool, bool, int, int, bool, str, str]
step = st.tuples(
    st.integers(0, 12),  # seconds that go by
    st.booleans(),  # in which somebody collects reports
    st.booleans(),  # with records in flight
    st.one_of(st.just(0), st.integers(0, 30)),
    st.one_of(st.just(0), st.integers(0, 30)),
    st.booleans(),  # whether the last one failed
    st.sampled_from(["arrives", "arrives", "arrives", "is lost", "its answer is lost", "is late"]),
    st.sampled_from(["ok", "ok", "ok", "fail", "ignore"]),  # of a probe, where one is due
)


class Twins:
    """One circuit by the rules in Lua, as one worker sees it, and one by those in Python."""

    def __init__(self, client: redis.Redis, clock: RedisClock) -> None:
        self.clock = clock
        self.worker = Worker(client)
        self.local = LocalCircuit(RULES, dice=lambda: 0.0)
        self.attendance = Attendance(lambda: clock.ms / 1000, lambda: None)
        self.attendance.collected()
        self.stall = Stall(STALL_S)
        self.late: list[tuple[Counted, int]] = []
        self.rounds = 0

    def passes(self, seconds: int, attended: bool) -> None:
        for _ in range(seconds):
            self.clock.passes(1_000)
            if attended:
                self.attendance.collected()
        self.attendance.collected()

    def tells(self, counted: Counted, rounds: int, *, heard: bool = True) -> None:
        """It is done in Redis; the local one knows nothing of what was sent before its round."""
        _, (view, *_) = self.worker.store.report([counted])
        if heard:
            self.worker.views[CLUSTER] = view
        was = self.local.state
        if rounds == self.rounds:
            self.local.report(self.clock.ms, counted.ok, counted.fail, bool(counted.row), counted.hard)
        if (was, self.local.state) == ("closed", "open"):
            self.rounds += 1
            self.stall.begin_anew()
        assert (view.state, view.why, view.trips) == (self.local.state, self.local.why, self.local.trips)

    def goes_on(self, seconds: int, attended: bool, flies: bool, ok: int, fail: int, row: bool, fate: str) -> None:
        self.passes(seconds, attended)
        if ok + fail:
            self.stall.heard()
        hard = self.stall.why(self.attendance.now, int(flies))
        tail = int(bool(fail and (row or not ok)))
        counted = Counted(CLUSTER, self.worker.views[CLUSTER].epoch, ok, fail, tail, hard=hard)
        before, self.late = self.late, []
        if fate == "is late":
            self.late = [(counted, self.rounds)]
        elif fate != "is lost":
            self.tells(counted, self.rounds, heard=fate == "arrives")
        for one, rounds in before:
            self.tells(one, rounds)

    def probes(self, seconds: int, attended: bool, fate: str, outcome: str) -> None:
        self.passes(seconds, attended)
        token = f"t{self.clock.ms}"
        for _ in range(1 + (fate == "its answer is lost")):
            granted = self.worker.probes(token, lease_ms=LEASE_MS)
        assert (granted == "probe") == self.local.due(self.clock.ms)
        if granted != "probe":
            return
        self.local.begin()
        for _ in range(1 + (fate == "its answer is lost")):
            self.worker.settles(outcome, token)
        if outcome != "ignore":
            self.local.settle(self.clock.ms, outcome == "ok")
        view = self.worker.looks()
        assert (view.state, view.trips) == (self.local.state, self.local.trips)
        if self.local.state == "closed":
            self.rounds += 1
            self.stall.begin_anew()


@given(history=st.lists(step, max_size=30))
@hypothesis_settings(
    max_examples=examples(300, least=60),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_one_process_by_itself_judges_as_the_fleet_does(
    redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, history: list[Step]
) -> None:
    """The same history by the rules in Python and by those in Lua: of reports, silence, and time that nobody attends;
    of reports and answers that are lost or come late; and of probes."""
    redis_client.flushall()
    with monkeypatch.context() as patch:
        patch.setattr(store, "random", SimpleNamespace(random=lambda: 0.0))
        twins = Twins(redis_client, RedisClock(redis_client, patch))
        for seconds, attended, flies, ok, fail, row, fate, outcome in history:
            if twins.local.state == "closed":
                twins.goes_on(seconds, attended, flies, ok, fail, row, fate)
            else:
                twins.probes(seconds, attended, fate, outcome)


def test_the_twin_goes_through_the_same_states() -> None:
    local = LocalCircuit(RULES, dice=lambda: 0.0)
    assert local.report(0, 0, 1, True, "down")
    assert not local.due(OPEN_MS - 1)
    assert local.due(OPEN_MS)
    local.begin()
    local.settle(OPEN_MS, ok=False)
    assert (local.state, local.till) == ("open", OPEN_MS + 2 * OPEN_MS)
    local.arrived(OPEN_MS + 1)
    assert local.due(OPEN_MS + 1)
    local.begin()
    for _n in range(RULES.successes):
        assert local.state == "half-open"
        local.settle(20_000, ok=True)
    assert local.state == "closed"
