"""The circuit of a single process, rule by rule, with the time as an argument: when it opens, for how long, and when it
closes. That it judges as the fleet does is in `integration/circuits/test_twin.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kafka_delivery.circuits import CLOSED, HALF_OPEN, OPEN
from kafka_delivery.settings import Settings
from kafka_delivery_worker.breaker.rules import LocalCircuit, Rules

RULES = Rules(
    threshold=3,
    rate=0.5,
    min_calls=4,
    window_ms=1_000,
    max_weight=2.0,
    open_ms=100,
    max_open_ms=350,
    growth=2.0,
    jitter=0.1,
    forget_ms=10_000,
    successes=2,
    max_lost=3,
)


def circuit(dice: float = 0.0, **changes: Any) -> LocalCircuit:
    return LocalCircuit(replace(RULES, **changes), dice=lambda: dice)


def fails(made: LocalCircuit, now: float, times: int = 1) -> list[bool]:
    return [made.report(now, 0, 1, True, "") for _ in range(times)]


class TestSettings:
    SETTINGS = Settings(
        max_retries=7,
        failure_threshold=5,
        failure_rate=0.4,
        failure_min_calls=20,
        failure_window_s=30,
        reset_timeout_s=10,
        reset_timeout_max_s=120,
        success_threshold=3,
    )

    def test_each_becomes_a_rule(self) -> None:
        assert Rules.of(self.SETTINGS) == Rules(
            threshold=5,
            rate=0.4,
            min_calls=20,
            window_ms=30_000,
            max_weight=10,
            open_ms=10_000,
            max_open_ms=120_000,
            growth=2.0,
            jitter=0.1,
            forget_ms=240_000,
            successes=3,
            max_lost=3,
        )

    @pytest.mark.parametrize(("max_retries", "threshold"), [(7, 5), (2, 2), (0, 1)])
    def test_one_record_that_uses_up_its_retries_opens_it(self, max_retries: int, threshold: int) -> None:
        assert Rules.of(replace(self.SETTINGS, max_retries=max_retries)).threshold == threshold

    def test_a_script_reads_them(self) -> None:
        assert json.loads(RULES.as_json())["max_open_ms"] == 350


class TestOpens:
    def test_after_so_many_failures_in_a_row(self) -> None:
        made = circuit(min_calls=100)
        assert fails(made, 0, 3) == [False, False, True]
        assert (made.state, made.why) == (OPEN, "3 failures in a row")

    def test_a_success_ends_the_row(self) -> None:
        made = circuit(min_calls=100)
        fails(made, 0, 2)
        made.report(0, 1, 0, False, "")
        assert fails(made, 0, 3) == [False, False, True]

    def test_a_row_may_begin_in_a_report_with_successes(self) -> None:
        made = circuit(min_calls=100)
        made.report(0, 1, 1, True, "")
        assert fails(made, 0, 2) == [False, True]

    def test_a_failure_before_the_last_success_is_in_no_row(self) -> None:
        made = circuit(min_calls=100)
        made.report(0, 1, 1, False, "")
        assert fails(made, 0, 3) == [False, False, True]

    def test_a_report_of_failures_only_is_in_a_row_whatever_it_says_of_the_last(self) -> None:
        made = circuit(min_calls=100)
        assert [made.report(0, 0, 1, False, "") for _ in range(3)] == [False, False, True]

    def test_a_report_without_failures_is_in_no_row(self) -> None:
        made = circuit(min_calls=100)
        fails(made, 0, 2)
        assert not made.report(0, 0, 0, True, "")

    def test_by_the_rate_of_failures(self) -> None:
        made = circuit(threshold=100)
        assert not made.report(0, 2, 0, False, "")
        assert fails(made, 0, 2) == [False, True]
        assert made.why == "50 % of 4 failed"

    def test_not_by_the_rate_of_too_few(self) -> None:
        assert fails(circuit(threshold=100), 0, 4) == [False, False, False, True]

    def test_not_by_a_lower_rate(self) -> None:
        made = circuit(threshold=100, max_weight=100.0)
        assert not made.report(0, 3, 2, False, "")

    def test_a_batch_counts_for_so_many_at_most(self) -> None:
        made = circuit(threshold=100)
        assert not made.report(0, 0, 1_000, True, "")
        assert made.report(0, 0, 1_000, True, "")

    def test_a_report_of_successes_and_failures_is_weighed_as_a_whole(self) -> None:
        made = circuit(threshold=100, min_calls=2)
        assert not made.report(0, 300, 100, False, "")
        assert made.report(0, 0, 1_000, True, ""), "half a failure of two, and two of two"

    def test_what_lies_behind_the_window_is_forgotten(self) -> None:
        made = circuit(threshold=100)
        fails(made, 0, 3)
        assert fails(made, 999, 1) == [True]
        made = circuit(threshold=100)
        fails(made, 0, 3)
        assert fails(made, 1_000, 1) == [False]

    def test_at_once_for_a_reason_that_is_sure(self) -> None:
        made = circuit()
        assert made.report(0, 0, 0, False, "no report for 30 s")
        assert made.why == "no report for 30 s"

    def test_once(self) -> None:
        made = circuit()
        fails(made, 0, 3)
        till = made.till
        assert fails(made, 50, 3) == [False] * 3
        assert made.till == till


class TestStaysOpen:
    def test_longer_after_each_round_that_failed_up_to_a_limit(self) -> None:
        made = circuit()
        lasted = []
        now = 0.0
        for _ in range(4):
            made.open(now, "why")
            lasted.append(made.till - now)
            now = made.till
            made.begin()
        assert lasted == [100, 200, 350, 350]
        assert made.trips == 4

    def test_for_a_time_that_is_drawn(self) -> None:
        made = circuit(dice=0.5)
        made.open(1_000, "why")
        assert made.till == 1_105

    def test_until_a_moment_that_is_given(self) -> None:
        made = circuit()
        made.open(0, "why", till=7_000)
        assert made.till == 7_000

    def test_after_thousands_of_rounds_too(self) -> None:
        made = circuit()
        made.trips = 5_000
        made.open(0, "why")
        assert made.till == 350

    @pytest.mark.parametrize(("closed_for", "trips"), [(10_000, 2), (10_001, 1)])
    def test_as_short_as_the_first_time_once_it_was_well_for_long(self, closed_for: int, trips: int) -> None:
        made = circuit(successes=1)
        made.open(0, "why")
        made.begin()
        made.settle(500, ok=True)
        made.open(500 + closed_for, "why")
        assert made.trips == trips

    def test_as_long_as_it_must_though_an_outage_is_long(self) -> None:
        made = circuit()
        made.open(0, "why")
        made.open(1_000_000, "why")
        assert made.trips == 2

    def test_shorter_if_a_record_arrives_meanwhile(self) -> None:
        made = circuit()
        made.open(0, "why")
        made.arrived(40)
        assert made.till == 40
        made.arrived(60)
        assert made.till == 40

    def test_without_what_was_counted_before(self) -> None:
        made = circuit(successes=1, threshold=100)
        fails(made, 0, 4)
        made.begin()
        made.settle(110, ok=True)
        assert fails(made, 120, 3) == [False] * 3

    def test_without_the_row_that_was_counted_before(self) -> None:
        made = circuit(successes=1, min_calls=100)
        fails(made, 0, 3)
        made.begin()
        made.settle(110, ok=True)
        assert fails(made, 120, 3) == [False, False, True]


class TestProbes:
    def test_one_is_due_when_the_time_is_over(self) -> None:
        made = circuit()
        assert not made.due(0)
        made.open(0, "why")
        assert not made.due(99)
        assert made.due(100)
        made.begin()
        assert made.state == HALF_OPEN
        assert made.due(100)

    def test_it_closes_after_so_many(self) -> None:
        made = circuit()
        made.open(0, "why")
        made.begin()
        made.settle(110, ok=True)
        assert made.state == HALF_OPEN
        made.settle(120, ok=True)
        assert (made.state, made.why) == (CLOSED, "2 probes arrived")

    def test_one_that_fails_opens_it_again(self) -> None:
        made = circuit()
        made.open(0, "why")
        made.begin()
        made.settle(110, ok=True)
        made.settle(120, ok=False)
        assert (made.state, made.why, made.till, made.trips) == (OPEN, "a probe failed", 320, 2)
        made.begin()
        made.settle(330, ok=True)
        assert made.state == HALF_OPEN, "those of an earlier round do not count"

    @pytest.mark.parametrize("ok", [True, False])
    def test_one_that_comes_too_late_says_nothing(self, ok: bool) -> None:
        made = circuit(successes=1)
        made.open(0, "why")
        made.settle(110, ok)
        assert (made.state, made.trips) == (OPEN, 1)

    def test_a_reset_forgets_all(self) -> None:
        made = circuit(min_calls=100)
        fails(made, 0, 3)
        made.reset()
        assert (made.state, made.why, made.till, made.trips) == (CLOSED, "", 0, 0)
        assert fails(made, 0, 3) == [False, False, True]
