"""A process by itself judges as the fleet does."""

from __future__ import annotations

import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from examples import examples
from integration.circuits.fleet import BASE, CLUSTER, OPEN_MS, RULES, Worker, passes
from kafka_delivery_worker.breaker.rules import LocalCircuit
from kafka_delivery_worker.breaker.store import Counted

Step = tuple[int, int, int, bool, bool]
steps = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.integers(0, 30),
        st.integers(0, 30),
        st.booleans(),
        st.integers(0, 9).map(lambda n: n == 0),
    ),
    max_size=25,
)


@given(history=steps)
@hypothesis_settings(
    max_examples=examples(300, least=60),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_one_process_by_itself_judges_as_the_fleet_does(redis_client: redis.Redis, history: list[Step]) -> None:
    """The same history, seconds apart, by the rules in Python and by those in Lua."""
    redis_client.flushall()
    worker = Worker(redis_client)
    local = LocalCircuit(RULES, dice=lambda: 0.0)
    passed = 0
    for seconds, ok, fail, row, hard in history:
        passes(redis_client, seconds * 1000)
        passed += seconds * 1000
        tail = bool(fail and (row or not ok))
        report = [Counted(CLUSTER, worker.views[CLUSTER].epoch, ok, fail, int(tail), hard="down" if hard else "")]
        _, (fleet, *_) = worker.store.report(report)
        at = redis_client.zscore(BASE + "workers", "one")  # the moment by which the script judged
        assert at is not None
        worker.views[CLUSTER] = fleet
        local.report(at + passed, ok, fail, tail, "down" if hard else "")
        assert (fleet.state, fleet.why) == (local.state, local.why)
        if fleet.state == "open":
            return


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
