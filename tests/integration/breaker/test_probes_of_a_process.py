"""A process asks for a probe when one is due, sends it, and says what became of it."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from confluent_kafka import KafkaError
from redis.exceptions import ConnectionError as RedisConnectionError

from integration.breaker.processes import (
    DOWN,
    FORBIDDEN,
    RECORDS_OWN,
    RULES,
    STALL_S,
    TIMED_OUT,
    TOPICS_OWN,
    Process,
    ended,
)
from kafka_delivery_worker.breaker import Probe


class TestProbes:
    def test_one_is_granted_when_it_is_due_also_without_traffic(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        woken = one.woken
        assert one.breaker.take_probe() is None
        one.passes(6)
        assert one.woken > woken
        probe = one.breaker.take_probe()
        assert probe is not None
        assert one.breaker.take_probe() is None
        assert one.breaker.admission("orders", probe.mark) == probe

    def test_enough_that_arrive_open_the_way_again(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        one.recovers()
        assert not one.breaker.shut
        assert one.state() == "closed"

    def test_each_change_is_logged_once_by_the_process_that_made_it(
        self, one: Process, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        one.fails(DOWN, RULES.threshold)
        two = Process(redis_client, "two")
        one.passes(6)
        one.recovers()
        two.breaker.tick()
        changes = [record.message.split()[0] for record in caplog.records if record.message.startswith("circuit.")]
        assert changes == ["circuit.open", "circuit.half-open", "circuit.closed"]

    @pytest.mark.parametrize(
        ("code", "state"),
        [(DOWN, "open"), (TIMED_OUT, "open"), (RECORDS_OWN, "half-open"), (KafkaError._PURGE_QUEUE, "half-open")],
    )
    def test_one_that_fails_says_something_or_nothing(self, one: Process, code: int, state: str) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        probe = one.breaker.take_probe()
        assert probe is not None
        one.breaker.failed(probe, "orders", code)
        one.breaker.tick()
        assert one.state() == state

    def test_one_without_a_report_has_failed_and_is_evidence_when_it_arrives(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        probe = one.breaker.take_probe()
        assert probe is not None
        assert one.breaker.admission("orders", probe.mark) == probe
        one.passes(STALL_S)
        one.breaker.tick()
        assert (one.state(), one.breaker._views["cluster"].trips) == ("open", 2)
        one.breaker.delivered(probe, "orders")
        one.clock.now += 1
        one.breaker.tick()
        assert one.breaker.take_probe() is not None

    def test_one_without_a_record_is_asked_for_again(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        probe = one.breaker.take_probe()
        assert probe is not None
        one.breaker.unused(probe)
        one.breaker.tick()
        assert one.breaker.take_probe() is None, "not at once: it would be asked for all the time"
        one.passes(2)
        assert one.breaker.take_probe() not in (None, probe)

    def test_who_claims_nothing_asks_with_the_record_at_hand(self, redis_client: redis.Redis) -> None:
        process = Process(redis_client, claims=False)
        process.fails(DOWN, RULES.threshold)
        assert process.breaker.ask("orders") is None
        process.passes(6)
        probe = process.breaker.ask("orders")
        assert isinstance(probe, Probe)
        assert process.breaker.ask("orders") is None
        process.breaker.delivered(probe, "orders")
        process.clock.now += 1
        process.breaker.tick()
        assert isinstance(process.breaker.ask("orders"), Probe)


def test_a_worker_that_stops_leaves_its_probe_to_the_others(one: Process, two: Process) -> None:
    """Else nothing shows that the cluster is back until the probe's lease is over."""
    for _ in range(RULES.threshold):
        one.fails()
        two.fails()
        two.stays()
    one.breaker.tick()
    assert (one.state(), two.state()) == ("open", "open")
    one.passes(RULES.max_open_ms / 1000)
    assert one.breaker.take_probe() is not None
    two.passes(0)
    assert two.breaker.take_probe() is None
    one.breaker.start()
    one.breaker.stop()
    ended(one)
    two.passes(2)  # it asks again a second after it was refused one
    assert two.breaker.take_probe() is not None


def test_a_probe_that_a_parent_claimed_is_settled_by_the_child_that_sends_it(redis_client: redis.Redis) -> None:
    """Prefork: one process claims, others send."""
    parent, child = Process(redis_client), Process(redis_client, claims=False)
    parent.fails(DOWN, RULES.threshold)
    for _ in range(RULES.successes):
        parent.passes(6)
        probe = parent.breaker.take_probe()
        assert probe is not None
        admission = child.breaker.admission("orders", probe.mark)
        assert admission == probe
        child.breaker.delivered(admission, "orders")
        child.breaker.tick()
    assert child.state() == "closed"
    parent.breaker.tick()
    assert not parent.breaker.shut


class TestProbesThatAreNone:
    """What was claimed as a probe and is not sent says nothing."""

    @pytest.mark.parametrize("mark", ["", "nonsense", "a|b|c", 7, ["x"]])
    def test_a_strangers_header_harms_nobody(self, one: Process, mark: Any) -> None:
        """Celery's transport and RabbitMQ bring what somebody wrote; only a claim takes it away."""
        admission = one.breaker.admission("orders", mark)
        assert admission is not None
        one.breaker.begun(mark)
        one.breaker.delivered(admission, "orders")
        one.breaker.not_sent(mark)
        one.breaker.tick()
        assert one.state() == "closed"
        assert not one.breaker.shut

    def test_it_frees_the_place_at_once(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        for _ in range(3 * RULES.max_lost):
            probe = one.breaker.take_probe()
            assert probe is not None
            one.breaker.not_sent(probe.mark)
            one.breaker.tick()
        assert (one.state(), one.breaker._views["cluster"].trips) == ("half-open", 1)

    def test_it_is_no_failed_round_if_nobody_says_so(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        assert one.breaker.take_probe() is not None
        one.passes(STALL_S)
        one.breaker.tick()
        assert (one.state(), one.breaker._views["cluster"].trips) == ("half-open", 1)

    def test_a_record_of_a_topic_in_trouble_is_no_probe_of_the_cluster(self, one: Process) -> None:
        one.fails(TOPICS_OWN, RULES.threshold)
        one.fails(DOWN, RULES.threshold, topic="others")
        one.passes(6)
        probe = one.breaker.take_probe()
        assert probe is not None
        assert one.breaker.admission("orders", probe.mark) is None
        assert one.breaker.admission("orders", probe.mark, released=True) == probe, "there is no other"
        assert one.breaker.admission("others", probe.mark) == probe

    def test_an_answer_that_was_lost_is_asked_for_again_with_the_same_token(
        self, one: Process, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one.fails(DOWN, RULES.threshold)
        admit = one.breaker._store.admit

        def lost(*arguments: Any) -> Any:
            admit(*arguments)
            raise RedisConnectionError("the answer was lost")

        with monkeypatch.context() as patch:
            patch.setattr(one.breaker._store, "admit", lost)
            one.passes(6)
            assert one.breaker.take_probe() is None
        one.passes(1)
        assert one.breaker.take_probe() is not None

    def test_what_became_of_one_is_said_again_if_redis_was_away(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        for _ in range(RULES.successes):
            one.passes(6)
            probe = one.breaker.take_probe()
            assert probe is not None
            one.breaker.delivered(probe, "orders")
            one.redis.away = True
            one.breaker.tick()
            one.redis.away = False
            one.breaker.tick()
        assert one.state() == "closed"

    @pytest.mark.parametrize(
        "code", [KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, FORBIDDEN, RECORDS_OWN]
    )
    def test_a_verdict_of_another_kind_ends_a_topics_trouble(self, one: Process, code: int) -> None:
        """There is nothing to wait for any more: its records become dead letters."""
        one.fails(TOPICS_OWN, RULES.threshold)
        for _ in range(RULES.successes):
            one.passes(6)
            probe = one.breaker.take_probe()
            assert probe is not None
            admission = one.breaker.admission("orders", probe.mark)
            assert admission == probe
            one.breaker.failed(admission, "orders", code)
            one.breaker.tick()
        assert one.breaker.shut_topics == frozenset()
