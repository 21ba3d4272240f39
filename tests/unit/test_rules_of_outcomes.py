"""What an outcome says about a circuit, rule by rule."""

from __future__ import annotations

import pytest

from kafka_delivery.names import CLUSTER_SCOPE
from kafka_delivery_worker.breaker.outcomes import LOCAL, Probe, Tally, count_failure, count_ok, of_probe
from kafka_delivery_worker.classify import Scope

CLUSTER, TOPIC = Probe(CLUSTER_SCOPE, "t"), Probe("topic:orders", "t")


class TestTally:
    def test_outcomes_under_the_present_state_are_counted(self) -> None:
        tally = Tally(since=5)
        count_ok(tally, 5, 3)
        count_ok(tally, 6)
        count_failure(tally, 5)
        assert tally.take() == (4, 1, 1, 0)

    def test_the_last_outcome_says_whether_a_row_of_failures_goes_on(self) -> None:
        tally = Tally()
        count_failure(tally, 0)
        count_ok(tally, 0)
        assert tally.take() == (1, 1, 0, 0)

    def test_a_success_from_before_is_late_and_counts_for_nothing_else(self) -> None:
        tally = Tally(since=5)
        count_failure(tally, 5)
        count_ok(tally, 4)
        assert tally.take() == (0, 1, 1, 1)

    def test_a_failure_from_before_counts_for_nothing(self) -> None:
        tally = Tally(since=5)
        count_failure(tally, 4)
        assert tally.take() == (0, 0, 0, 0)

    def test_nothing_is_taken_twice(self) -> None:
        tally = Tally(since=5)
        count_ok(tally, 5)
        count_failure(tally, 5)
        count_ok(tally, 4)
        tally.take()
        assert tally.take() == (0, 0, 0, 0)

    def test_reports_without_a_failure_are_counted_in_a_row(self) -> None:
        tally = Tally()
        assert (tally.quiet, tally.since) == (0, 0)
        tally.take()
        tally.take()
        assert tally.quiet == 2
        count_failure(tally, 0)
        tally.take()
        assert tally.quiet == 0


class TestProbe:
    def test_its_mark_is_read_back(self) -> None:
        assert Probe.of(TOPIC.mark) == TOPIC

    @pytest.mark.parametrize(("scope", "any_record"), [(CLUSTER_SCOPE, True), (LOCAL, True), ("topic:orders", False)])
    def test_any_record_will_do_for_the_cluster(self, scope: str, any_record: bool) -> None:
        assert Probe(scope, "t").of_cluster is any_record

    @pytest.mark.parametrize(
        ("scope", "answered", "by_broker", "says"),
        [
            (Scope.CLUSTER, False, False, "fail"),
            (Scope.CLUSTER, True, True, "fail"),
            (Scope.TOPIC, True, True, "ok"),
            (Scope.RECORD, True, True, "ok"),
            (Scope.RECORD, False, True, "ignore"),
            (Scope.TOPIC, True, False, "ignore"),
            (Scope.PRODUCER, False, False, "ignore"),
        ],
    )
    def test_of_the_cluster(self, scope: Scope, answered: bool, by_broker: bool, says: str) -> None:
        assert of_probe(CLUSTER, scope, answered, False, by_broker) == says
        assert of_probe(CLUSTER, scope, answered, True, by_broker) == says

    @pytest.mark.parametrize(
        ("scope", "of_topic", "by_broker", "says"),
        [
            (Scope.TOPIC, True, True, "fail"),
            (Scope.CLUSTER, True, False, "fail"),
            (Scope.TOPIC, False, True, "ok"),
            (Scope.TOPIC, False, False, "ok"),
            (Scope.RECORD, False, True, "ok"),
            (Scope.RECORD, False, False, "ignore"),
            (Scope.CLUSTER, False, True, "ignore"),
            (Scope.PRODUCER, False, True, "ignore"),
        ],
    )
    def test_of_a_topic(self, scope: Scope, of_topic: bool, by_broker: bool, says: str) -> None:
        assert of_probe(TOPIC, scope, True, of_topic, by_broker) == says
        assert of_probe(TOPIC, scope, False, of_topic, by_broker) == says
