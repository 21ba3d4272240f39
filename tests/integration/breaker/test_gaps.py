"""While a process stands still, or cannot collect its reports, it is silent, and not Kafka."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from integration.breaker.processes import DOWN, RULES, STALL_S, TIMED_OUT, TOPICS_OWN, Process
from kafka_delivery_worker.breaker.attendance import GAP_S
from kafka_delivery_worker.breaker.outcomes import LOCAL

LONG = int(3 * STALL_S)


def frozen(process: Process) -> None:
    """No thread of it runs."""
    process.stands_still(LONG)
    process.breaker.tick()


def busy(process: Process) -> None:
    """Its breaker's thread runs, and the one that collects does not."""
    for _ in range(LONG):
        process.stands_still(1)
        process.breaker.tick()


def without_redis(process: Process) -> None:
    """The event loop waits for Redis to come back."""
    process.redis.away = True
    busy(process)
    process.redis.away = False
    process.breaker.tick()


standing = pytest.mark.parametrize("stands_still", [frozen, busy, without_redis])


def looks(process: Process) -> None:
    process.breaker.attendance.collected()
    process.breaker.tick()


class TestSilence:
    @standing
    def test_records_in_flight_are_no_stall(self, one: Process, stands_still: Callable[[Process], None]) -> None:
        one.breaker.in_flight = lambda: {"orders": 3}
        one.passes(1)
        stands_still(one)
        assert (one.state(), one.breaker.local.state) == ("closed", "closed")
        one.passes(STALL_S - 2)
        assert not one.breaker.shut, "of the gap no more counts than one look"
        one.passes(2)
        assert one.breaker.shut

    @standing
    def test_brokers_that_hung_up_meanwhile_are_not_down(
        self, one: Process, stands_still: Callable[[Process], None]
    ) -> None:
        one.breaker.in_flight = lambda: {"orders": 3}
        one.passes(1)
        one.breaker.broker_error(-187)
        stands_still(one)
        looks(one)
        assert not one.breaker.shut

    @standing
    def test_no_topic_is_silent(self, one: Process, stands_still: Callable[[Process], None]) -> None:
        asked = one.asked(answer=True)
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        for _ in range(3):
            one.succeeds("payments")
            one.passes(1)
        stands_still(one)
        looks(one)
        one.succeeds("payments")
        assert not one.breaker.shut_topics
        assert asked == []


class TestTimeouts:
    """librdkafka's clock goes on: as the process wakes, records have timed out."""

    @pytest.mark.parametrize("later", [False, True])
    def test_of_records_that_were_in_flight_count_for_nothing(self, one: Process, later: bool) -> None:
        one.succeeds()  # else no topic would be counted
        admission = one.breaker.admission("orders")
        assert admission is not None
        one.stands_still(LONG)
        if later:  # librdkafka looks once a second
            looks(one)
            one.passes(1)
        for _ in range(4 * RULES.min_calls):
            one.breaker.failed(admission, "orders", TIMED_OUT)
            one.breaker.tick()
        assert (one.state(), one.breaker.local.state, one.breaker.shut_topics) == ("closed", "closed", frozenset())

    def test_of_records_that_were_sent_since_count(self, one: Process) -> None:
        one.breaker.attendance.collected()
        one.stands_still(LONG)
        looks(one)
        one.fails(TIMED_OUT, RULES.threshold)
        assert one.breaker.shut

    def test_of_a_moment_that_was_no_gap_count(self, one: Process) -> None:
        one.breaker.attendance.collected()
        admission = one.breaker.admission("orders")
        assert admission is not None
        one.clock.now += GAP_S
        for _ in range(RULES.threshold):
            one.breaker.failed(admission, "orders", TIMED_OUT)
            one.breaker.tick()
        assert one.breaker.shut

    def test_what_a_broker_said_meanwhile_counts(self, one: Process) -> None:
        one.succeeds()
        admission = one.breaker.admission("orders")
        assert admission is not None
        one.stands_still(LONG)
        for _ in range(RULES.threshold):
            one.breaker.failed(admission, "orders", TOPICS_OWN)
            one.breaker.tick()
        assert one.breaker.shut_topics == {"orders"}

    def test_are_no_sign_of_life(self, one: Process) -> None:
        """Or a process that stands still every few seconds would never find out."""
        one.breaker.in_flight = lambda: {"orders": 300}
        for _ in range(int(STALL_S) + 1):
            admission = one.breaker.admission("orders")
            assert admission is not None
            one.stands_still(3)
            one.breaker.failed(admission, "orders", TIMED_OUT)
            looks(one)
        assert one.breaker.shut

    def test_after_it_what_arrives_is_counted_as_ever(self, one: Process) -> None:
        admission = one.breaker.admission("orders")
        assert admission is not None
        one.stands_still(LONG)
        looks(one)
        one.breaker.delivered(admission, "orders", 7)
        assert (one.breaker._cluster.ok, one.breaker._cluster.late) == (7, 0)


class TestProbes:
    def probed(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        assert one.breaker.has_probe

    @pytest.mark.parametrize("code", [None, DOWN])
    def test_one_without_a_report_is_waited_for(self, one: Process, code: int | None) -> None:
        self.probed(one)
        probe = one.breaker.take_probe()
        assert probe is not None
        one.breaker.admission("orders", probe.mark)
        one.stands_still(int(STALL_S) + 1)  # its lease lasts
        one.breaker.tick()
        assert one.breaker.probed == {}
        if code is None:
            one.breaker.delivered(probe, "orders")
        else:  # it may have timed out meanwhile, which says nothing
            one.breaker.failed(probe, "orders", code)
        looks(one)
        assert one.breaker.probed == {"ok" if code is None else "ignore": 1}
        assert (one.state(), one.breaker._views["cluster"].trips) == ("half-open", 1)

    def test_one_that_was_sent_after_the_gap_fails_as_ever(self, one: Process) -> None:
        self.probed(one)
        one.stands_still(3)
        looks(one)
        probe = one.breaker.take_probe()
        assert probe is not None
        one.breaker.admission("orders", probe.mark)
        one.breaker.failed(probe, "orders", DOWN)
        one.breaker.tick()
        assert (one.state(), one.breaker.probed) == ("open", {"fail": 1})

    def test_the_processs_own_is_waited_for_too(self, one: Process) -> None:
        one.redis.away = True
        one.fails(DOWN, RULES.threshold)
        one.clock.now += 6
        looks(one)
        probe = one.breaker.take_probe()
        assert probe is not None
        assert probe.scope == LOCAL
        one.breaker.admission("orders", probe.mark)
        busy(one)
        assert one.breaker.probed == {}
        for _ in range(int(STALL_S)):
            one.clock.now += 1
            looks(one)
        assert one.breaker.probed == {"fail": 1}

    def test_the_time_of_one_begins_when_it_is_sent(self, one: Process) -> None:
        """Its claim may have waited for a slow Redis."""
        self.probed(one)
        one.passes(STALL_S - 1)
        probe = one.breaker.take_probe()
        assert probe is not None
        one.breaker.admission("orders", probe.mark)
        one.passes(STALL_S - 1)
        assert one.breaker.probed == {}
        one.passes(1)
        assert one.breaker.probed == {"fail": 1}
