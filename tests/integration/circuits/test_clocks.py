"""Redis's clock may be another host's after a failover, and be set: what was written by one that was ahead lasts for as
long as it was to last, and no longer.
"""

from __future__ import annotations

from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from examples import examples
from integration.circuits.fleet import BASE, CLUSTER, OPEN_MS, RULES, TOPIC, RedisClock, Worker
from kafka_delivery import circuits
from kafka_delivery_worker.breaker.store import Counted
from kafka_delivery_worker.lease import script

HOUR = 3_600_000
LEASE_MS = 15_000
FORCED_MS = 60_000
STEP_MS = 5_000
LONGEST_OPEN_MS = RULES.max_open_ms * (1 + RULES.jitter)


@pytest.fixture
def clock(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> RedisClock:
    return RedisClock(redis_client, monkeypatch)


@pytest.fixture
def one(redis_client: redis.Redis, clock: RedisClock) -> Worker:
    return Worker(redis_client)


back = pytest.mark.parametrize("back_ms", [3 * 60_000, HOUR, 30 * HOUR])


class TestClockThatWasAhead:
    @back
    def test_an_open_circuit_is_due_after_its_own_time(self, one: Worker, clock: RedisClock, back_ms: int) -> None:
        assert one.says(hard="down").state == "open"
        clock.passes(1_000 - back_ms)
        left = one.looks().remaining_ms
        assert 0 < left <= OPEN_MS * (1 + RULES.jitter)
        clock.passes(left)
        assert one.probes() == "probe"

    @back
    def test_of_a_topic_too_though_nobody_tells_of_it(self, one: Worker, clock: RedisClock, back_ms: int) -> None:
        one.says(ok=1)
        topics_own = Counted(TOPIC, hard="silent")
        one.store.report([Counted(CLUSTER, one.views[CLUSTER].epoch), topics_own])
        clock.passes(-back_ms)
        one.looks()
        for _ in range(8):
            clock.passes(1_000)
            one.looks()
        assert one.probes("t", TOPIC) == "probe"

    @back
    def test_a_probes_lease_ends_after_its_own_time(self, one: Worker, clock: RedisClock, back_ms: int) -> None:
        one.says(hard="down")
        clock.passes(2 * OPEN_MS)
        assert one.probes("of a worker that dies", lease_ms=LEASE_MS) == "probe"
        clock.passes(-back_ms)
        assert one.probes("early", lease_ms=LEASE_MS) == "denied"
        clock.passes(LEASE_MS - 1)
        assert one.probes("early", lease_ms=LEASE_MS) == "denied", "it may be under way"
        clock.passes(1)
        assert one.probes("next", lease_ms=LEASE_MS) == "probe"

    def test_one_that_is_under_way_counts(self, one: Worker, clock: RedisClock) -> None:
        one.says(hard="down")
        clock.passes(2 * OPEN_MS)
        one.probes("t")
        clock.passes(-HOUR)
        one.looks()
        assert one.settles("ok")[0]

    def test_a_lease_of_unknown_length_is_no_longer_than_the_next_ones(self, one: Worker, clock: RedisClock,
            redis_client: redis.Redis) -> None:  # fmt: skip
        """That of a worker of an earlier version."""
        one.says(hard="down")
        clock.passes(2 * OPEN_MS)
        one.probes("mine")
        one.settles("ignore", "mine")
        redis_client.zadd(f"{BASE}{CLUSTER}:p", {"another one's": clock.ms + 30 * 60_000})
        assert one.probes("next", lease_ms=LEASE_MS) == "probe"

    @back
    def test_what_is_forced_for_a_time_ends_after_it(self, one: Worker, clock: RedisClock, back_ms: int,
            redis_client: redis.Redis) -> None:  # fmt: skip
        one.store.force(CLUSTER, "open", FORCED_MS, "me", "maintenance")
        clock.passes(-back_ms)
        for _ in range(FORCED_MS // STEP_MS - 1):
            assert one.looks().forced == "open"
            clock.passes(STEP_MS)
        assert one.looks().forced_ms == STEP_MS
        clock.passes(STEP_MS)
        assert (one.looks().forced, one.looks().state) == ("", "closed")

    @back
    def test_who_failed_an_hour_from_now_is_no_second_opinion(self, one: Worker, clock: RedisClock, back_ms: int,
            redis_client: redis.Redis) -> None:  # fmt: skip
        gone = Worker(redis_client, "gone")
        gone.fails()
        clock.passes(-back_ms)
        one.looks()
        two = Worker(redis_client, "two")
        for _ in range(RULES.threshold):
            one.fails()
            two.looks()
        assert one.looks().state == "closed"
        two.fails()
        assert one.looks().state == "open"

    def test_a_generation_of_the_future_is_one_as_any_other(self, one: Worker, clock: RedisClock) -> None:
        one.says(hard="down")
        clock.passes(2 * OPEN_MS)
        for n in range(RULES.successes):
            one.probes(f"t{n}")
            one.settles("ok", f"t{n}")
        ahead = one.looks().epoch
        clock.passes(-HOUR)
        assert one.says(hard="down").state == "open"
        assert one.views[CLUSTER].epoch == ahead + 1

    def test_a_topic_of_the_future_is_forgotten_in_time(self, one: Worker, clock: RedisClock,
            redis_client: redis.Redis) -> None:  # fmt: skip
        one.says(ok=1, topic=(0, 1))
        clock.passes(-HOUR)
        one.looks()
        clock.passes(11 * 60_000)
        one.looks()
        assert redis_client.zcard(BASE + "topics") == 0

    @pytest.mark.parametrize(("fields", "state", "retry_after"), [
        ({"state": "open", "till": HOUR + 4_000, "since": HOUR - 1_000}, "open", 5.0),
        ({"state": "open", "till": 4_000, "since": -1_000}, "open", 4.0),
        ({"forced": "open", "forced_till": HOUR + 4_000, "forced_at": HOUR}, "open", 4.0),
    ])  # fmt: skip
    def test_an_application_is_told_the_same(
        self, redis_client: redis.Redis, one: Worker, fields: dict[str, Any], state: str, retry_after: float
    ) -> None:
        seconds, _ = redis_client.time()
        moved: Any = {
            name: value if isinstance(value, str) else value + int(seconds) * 1000 for name, value in fields.items()
        }
        redis_client.hset(f"{BASE}{CLUSTER}:st", mapping=moved)
        (found,) = circuits.read(one.store._redis, "default", [CLUSTER])
        assert found.state == state
        assert found.retry_after == pytest.approx(retry_after, abs=3)


REPORTS = [(1, 0, ""), (0, 1, ""), (0, 30, ""), (0, 1, "down"), (0, 0, "")]
steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("report"), st.sampled_from([(1, 0, ""), (0, 1, ""), (0, 30, ""), (0, 1, "down"), (0, 0, "")])
        ),
        st.tuples(st.just("probe"), st.integers(0, 3)),
        st.tuples(st.just("settle"), st.tuples(st.integers(0, 3), st.sampled_from(["ok", "fail", "ignore"]))),
        st.tuples(st.just("force"), st.sampled_from(["open", "closed", ""])),
        st.tuples(st.just("passes"), st.integers(0, 60_000)),
        st.tuples(st.just("steps"), st.integers(-HOUR, HOUR)),
    ),
    max_size=30,
)


@given(history=steps, steps_back=st.integers(0, HOUR))
@hypothesis_settings(max_examples=examples(150, least=40), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_clock_did_an_outage_ends_in_its_own_time(
    redis_client: redis.Redis, clock: RedisClock, history: list[tuple[str, Any]], steps_back: int
) -> None:
    """Between any two operations it steps back and forth; who held a probe is dead; then comes one that is well."""
    redis_client.flushall()
    clock.passes(0)
    worker = Worker(redis_client)
    for what, how in history:
        match what:
            case "report":
                worker.says(how[0], how[1], hard=how[2])
            case "probe":
                worker.probes(f"t{how}", lease_ms=LEASE_MS)
            case "settle":
                worker.settles(how[1], f"t{how[0]}")
            case "force":
                worker.store.force(CLUSTER, how, FORCED_MS, "me", "why")
            case "passes":
                clock.passes(how)
            case _:
                clock.passes(how)
    clock.passes(-steps_back)
    well = Worker(redis_client, "well")
    waited = 0
    while well.looks().shut:
        # What is forced, what is open beneath it, the lease of a probe of the dead; and a step until it is seen.
        assert waited <= FORCED_MS + LONGEST_OPEN_MS + LEASE_MS + 3 * STEP_MS
        if well.probes(f"new {waited}", lease_ms=LEASE_MS) == "probe":
            well.settles("ok", f"new {waited}")
            continue
        clock.passes(STEP_MS)
        waited += STEP_MS


@back
def test_a_claim_goes_by_the_same(one: Worker, clock: RedisClock, redis_client: redis.Redis, back_ms: int) -> None:
    """What nobody can end, because no worker reports, holds up no claim."""
    one.store.force(CLUSTER, "open", FORCED_MS, "me", "maintenance")
    keys = ["gate", "leases", "held", "deaths", f"{BASE}{CLUSTER}:st", f"{BASE}{CLUSTER}:p", "waiting", "poison"]
    keys += ["q", "put off"]
    arguments = ["w", 30_000, 1, 1_000, 1, "", 1, 0, BASE, "", "", "delayed:", 0, 3, 5, 0, 0, 0, 0, 0, "q"]

    def status() -> int:
        answer: Any = redis_client.eval(clock.set_in(script("claim")), len(keys), *keys, *map(str, arguments))
        return int(answer[0])

    assert status() == -1
    clock.passes(-back_ms)
    assert status() == 0
