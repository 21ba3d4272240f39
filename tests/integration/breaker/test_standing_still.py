"""A process that is at fault itself claims nothing, probes nothing, says so, and goes on when it is well."""

from __future__ import annotations

import logging

import pytest
import redis

from integration.breaker.processes import DOWN, RULES, Process
from kafka_delivery.circuits import CLOSED, OPEN
from kafka_delivery.disposition import Circuit
from kafka_delivery.names import PAUSED
from kafka_delivery_worker import standstill
from kafka_delivery_worker.breaker.stall import DOWN_S
from kafka_delivery_worker.standstill import FAILURES, MAKING, NO_ANSWER


def stands_still(process: Process) -> None:
    """The process sends nothing, and tells whoever claims."""
    assert process.breaker.shut
    assert process.breaker.paused
    assert process.breaker.admission("orders") is None
    assert process.breaker.ask("orders") is None
    assert process.breaker.circuit("orders") is Circuit.CLUSTER


def goes_on(process: Process) -> None:
    assert not process.breaker.shut
    assert not process.breaker.paused
    assert process.breaker.admission("orders") is not None
    assert process.breaker.circuit("orders") is Circuit.CLOSED


class TestClient:
    def test_without_one_it_stands_still_at_once_and_goes_on_at_once(self, one: Process) -> None:
        woken = one.woken
        one.breaker.client("main", "ssl.key.location: No such file")
        stands_still(one)
        one.breaker.tick()
        stands_still(one)
        assert one.breaker.retry_after("orders") == standstill.NO_CLIENT_S
        one.breaker.client("main", "")
        goes_on(one)
        assert one.woken >= woken + 2, "whoever claims was not told"

    def test_it_is_told_to_redis_while_it_lasts(self, one: Process) -> None:
        one.breaker.client("main", "no key")
        one.breaker.tick()
        (told,) = one.redis.client.hvals(PAUSED)
        assert b"no key" in told
        one.breaker.client("main", "")
        one.breaker.tick()
        assert one.redis.client.hvals(PAUSED) == []

    def test_the_first_one_is_waited_for_without_a_word(self, one: Process, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            one.breaker.client("main", MAKING)
            stands_still(one)
            one.breaker.tick()
        assert one.redis.client.hvals(PAUSED) == []
        assert caplog.records == []

    def test_while_kafka_does_not_answer_the_first_one_that_is_an_outage(
        self, one: Process, caplog: pytest.LogCaptureFixture
    ) -> None:
        one.breaker.client("main", NO_ANSWER)
        stands_still(one)
        one.passes(DOWN_S - 1)
        assert one.state() == CLOSED
        one.breaker.client("main", NO_ANSWER)  # said again with each question
        one.passes(1)
        assert one.state() == OPEN
        assert one.redis.client.hvals(PAUSED) == []
        assert one.breaker.standstill.reason == ""
        assert not [record for record in caplog.records if record.getMessage().startswith("process.")]
        one.passes(RULES.max_open_ms / 1000)
        assert not one.breaker.has_probe  # it could send none
        one.breaker.client("main", "")
        one.breaker.tick()
        assert one.breaker.has_probe

    def test_an_answer_in_time_is_no_outage(self, one: Process) -> None:
        one.breaker.client("main", NO_ANSWER)
        one.passes(DOWN_S - 1)
        one.breaker.client("main", "another Kafka")
        one.passes(DOWN_S)
        assert one.state() == CLOSED

    def test_trouble_is_logged_once(self, one: Process, caplog: pytest.LogCaptureFixture) -> None:
        for _ in range(3):
            one.breaker.client("main", "no key")
            one.breaker.tick()
        assert [record.getMessage() for record in caplog.records if "process." in record.getMessage()] == [
            "process.paused why='there is no Kafka client: no key'"
        ]


class TestFailures:
    def test_in_a_row_they_pause_it_and_time_ends_that(self, one: Process) -> None:
        for number in range(FAILURES):
            goes_on(one)
            one.breaker.stand_still("TypeError", f"m{number}")
        stands_still(one)
        one.clock.now += standstill.FIRST_PAUSE_S
        one.breaker.tick()
        goes_on(one)

    def test_a_delivery_ends_the_row(self, one: Process) -> None:
        for number in range(10):
            one.breaker.stand_still("TypeError", f"m{number}")
            one.breaker.delivered(0, "orders")
        goes_on(one)


def test_it_leaves_probes_to_others(one: Process) -> None:
    one.fails(DOWN, RULES.threshold)
    assert one.state() == OPEN
    one.breaker.client("main", "no key")
    one.passes(RULES.max_open_ms / 1000)
    assert not one.breaker.has_probe
    one.breaker.client("main", "")
    one.passes(1)
    assert one.breaker.has_probe


def test_a_probe_that_it_was_granted_before_is_another_ones(one: Process) -> None:
    one.fails(DOWN, RULES.threshold)
    one.passes(RULES.max_open_ms / 1000)
    assert one.breaker.has_probe
    one.breaker.client("main", "no key")
    one.breaker.tick()
    assert not one.breaker.has_probe
    one.breaker.tick()
    assert one.breaker.probed == {"ignore": 1}


def test_who_claims_nothing_asks_for_no_probe(redis_client: redis.Redis) -> None:
    process = Process(redis_client, "child", claims=False)
    process.fails(DOWN, RULES.threshold)
    process.breaker.client("main", "no key")
    process.passes(RULES.max_open_ms / 1000)
    assert process.breaker.ask("orders") is None
    process.breaker.client("main", "")
    assert process.breaker.ask("orders") is not None


@pytest.mark.parametrize("topic", ["orders", "bills"])
def test_the_circuit_of_a_topic_is_that_topics(one: Process, topic: str) -> None:
    one.breaker.shut_topics = frozenset({"orders"})
    assert one.breaker.circuit(topic) is (Circuit.TOPIC if topic == "orders" else Circuit.CLOSED)
