"""The table of codes decides which failure counts for which circuit, and what records cost."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka import KafkaError

from integration.breaker.processes import DOWN, FORBIDDEN, RECORDS_OWN, RULES, TIMED_OUT, TOPICS_OWN, Process
from kafka_delivery_worker.breaker import MAX_TOPICS
from kafka_delivery_worker.engine import Engine
from kafka_delivery_worker.producer import Report


class TestWhatCounts:
    """The table of codes decides."""

    def test_the_clusters_failures_open_the_clusters_circuit(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        assert one.state() == "open"
        assert one.breaker.shut
        assert one.breaker.admission("orders") is None
        assert one.breaker.retry_after("orders") > 4

    @pytest.mark.parametrize(
        "code", [RECORDS_OWN, FORBIDDEN, KafkaError._PURGE_INFLIGHT, KafkaError.UNKNOWN_TOPIC_OR_PART]
    )
    def test_a_bad_record_and_a_refused_topic_count_for_neither(self, one: Process, code: int) -> None:
        one.fails(code, 20)
        assert not one.breaker.shut
        assert one.breaker.shut_topics == frozenset()

    def test_a_brokers_verdict_about_a_topic_opens_that_topic_only(self, one: Process) -> None:
        one.fails(TOPICS_OWN, RULES.threshold)
        assert one.breaker.shut_topics == {"orders"}
        assert not one.breaker.shut
        assert one.breaker.admission("orders") is None
        assert one.breaker.admission("others") is not None
        assert one.breaker.is_shut("orders")

    def test_records_of_one_topic_that_time_out_while_others_arrive_open_that_topic(self, one: Process) -> None:
        for _ in range(RULES.threshold):
            one.succeeds("others")
            one.fails(TIMED_OUT)
        assert one.breaker.shut_topics == {"orders"}
        assert not one.breaker.shut

    def test_where_nothing_arrives_it_is_the_clusters(self, one: Process) -> None:
        one.fails(TIMED_OUT, RULES.threshold)
        assert one.breaker.shut
        assert one.breaker.shut_topics == frozenset()

    def test_what_was_sent_before_says_nothing_about_after(self, one: Process) -> None:
        old = one.breaker.admission("orders")
        assert old is not None
        one.fails(DOWN, RULES.threshold)
        trips = one.breaker._views["cluster"].trips
        for _ in range(20):
            one.breaker.failed(old, "orders", TIMED_OUT)
            one.breaker.tick()
        assert one.breaker._views["cluster"].trips == trips

    def test_what_arrives_late_makes_it_worth_a_look(self, one: Process) -> None:
        old = one.breaker.admission("orders")
        assert old is not None
        one.fails(DOWN, RULES.threshold)
        assert one.breaker.take_probe() is None
        one.breaker.delivered(old, "orders")
        one.breaker.tick()
        one.breaker.tick()
        assert one.breaker.take_probe() is not None


@pytest.mark.parametrize(("codes", "row"), [([DOWN, None], 0), ([None, DOWN], 1), ([DOWN, None, DOWN, None], 0)])
def test_reports_of_one_poll_count_in_their_order(one: Process, codes: list[int | None], row: int) -> None:
    """Whether the last of them failed begins a row of failures."""
    worker = object.__new__(Engine)
    worker.breaker = one.breaker
    admission = one.breaker.admission("orders")
    assert admission is not None
    worker.tell_breaker(admission, "orders", [Report(None if code is None else KafkaError(code)) for code in codes])
    counted = one.breaker._cluster
    assert (counted.ok, counted.fail, counted.row) == (codes.count(None), codes.count(DOWN), row)


class TestManyTopics:
    def test_in_an_outage_none_of_them_is_counted_by_itself(self, one: Process) -> None:
        for n in range(500):
            admission = one.breaker.admission(f"topic{n}")
            one.breaker.failed(0 if admission is None else admission, f"topic{n}", TIMED_OUT)
        one.breaker.tick()
        assert one.breaker._topics == {}

    def test_no_more_than_can_be_looked_after(self, one: Process) -> None:
        one.succeeds()
        for n in range(500):
            admission = one.breaker.admission(f"topic{n}")
            assert admission is not None
            one.breaker.failed(admission, f"topic{n}", TOPICS_OWN)
        one.breaker.tick()
        assert len(one.breaker._topics) == MAX_TOPICS
        assert len(one.breaker._views) <= MAX_TOPICS + 1


class TestCost:
    def test_records_cost_no_calls(self, one: Process, monkeypatch: pytest.MonkeyPatch) -> None:
        """At a thousand a second, reported four times a second."""
        made: list[str] = []
        execute: Any = one.redis._client.execute_command

        def noted(*command: Any, **options: Any) -> Any:
            made.append(command[0])
            return execute(*command, **options)

        monkeypatch.setattr(one.redis._client, "execute_command", noted)
        for _ in range(40):
            for _ in range(250):
                admission = one.breaker.admission("orders")
                assert admission is not None
                one.breaker.delivered(admission, "orders")
            one.breaker.tick()
        assert made == ["EVALSHA"] * 40

    def test_while_it_is_open_and_not_due_nothing_is_asked_for_records(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        looks = one.redis.looks
        for _ in range(1_000):
            assert one.breaker.admission("orders") is None
        assert one.redis.looks == looks
