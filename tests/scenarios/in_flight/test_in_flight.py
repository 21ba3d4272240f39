"""Sends in flight look like any other Celery task: events, states, counts, signals and results come in the same
order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import KafkaError

from kafka_delivery import app, dead_letter, send, send_many
from kafka_delivery.errors import RejectedError
from kafka_delivery_worker.embedded import MockKafka
from scenarios.in_flight.asking import (
    PAYLOAD,
    TOPIC,
    in_flight,
    inspected,
    kafka_of,
    without_circuits,
)
from servers import wait_until
from stack import Stack, stack
from watching import ALONE, bring_forward, emptied, other_worker, revoke, watched_events

DELAYED = "kafka-delivery:delayed:1:kafka-delivery"


@pytest.fixture(scope="module")
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC, 1)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield kafka


@pytest.fixture(scope="module")
def system(redis_url: str, mock: MockKafka) -> Iterator[Stack]:
    """One worker for many tests; it sends events."""
    with stack(emptied(redis_url), mock, SUCCESS_EVENTS_PER_S=-1) as system:
        without_circuits(system)  # or a test's outage would be the next one's
        system.worker("-E", *ALONE)
        yield system


@pytest.fixture
def idle(system: Stack) -> Stack:
    """The same, with nothing to do."""
    system.wait_empty()
    return system


class TestEvents:
    def test_of_a_send_come_in_order(self, idle: Stack) -> None:
        with watched_events() as events:
            sent = send.delay(TOPIC, PAYLOAD)
            seen = events.wait_for(sent.id, "task-succeeded")
        assert [event["type"] for event in seen] == ["task-received", "task-started", "task-succeeded"]
        received, started, succeeded = seen
        assert received["clock"] < started["clock"] < succeeded["clock"]
        assert received["name"] == "kafka_delivery.send"
        assert TOPIC in received["args"]
        assert "'offset'" in succeeded["result"]
        assert 0 < succeeded["runtime"] < 30
        assert PAYLOAD not in str(seen)

    def test_of_one_that_is_retried_come_once_for_each_attempt(self, idle: Stack, mock: MockKafka) -> None:
        with watched_events() as events:
            mock.fail_next(KafkaError.FENCED_LEADER_EPOCH)
            sent = send.delay(TOPIC, PAYLOAD)
            events.wait_for(sent.id, "task-succeeded")
        # A retry is published before Celery says so: its own "received" may come before the "retried" of the last one.
        ended = [kind for kind in events.types(sent.id) if kind != "task-received"]
        assert ended == ["task-started", "task-retried", "task-started", "task-succeeded"]
        assert [event["retries"] for event in events.of(sent.id) if event["type"] == "task-received"] == [0, 1]

    def test_of_one_that_is_refused_come_once(self, idle: Stack, mock: MockKafka) -> None:
        with watched_events() as events:
            mock.fail_next(KafkaError.POLICY_VIOLATION)
            sent = send.delay(TOPIC, PAYLOAD)
            events.wait_for(sent.id, "task-failed")
            events.wait_for(f"{sent.id}-dlq", "task-succeeded")
        assert events.types(sent.id) == ["task-received", "task-started", "task-failed"]
        assert PAYLOAD not in str(events.all)

    def test_of_many_none_is_missing(self, idle: Stack) -> None:
        with watched_events() as events:
            ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(1500)])
            idle.wait_empty()
            for task_id in ids:
                events.wait_for(task_id, "task-succeeded")
        assert {tuple(events.types(task_id)) for task_id in ids} == {
            ("task-received", "task-started", "task-succeeded")
        }


class TestInspect:
    def test_counts_are_those_of_attempts(self, idle: Stack, mock: MockKafka) -> None:
        before = inspected("stats")["total"].get("kafka_delivery.send", 0)
        for _ in range(3):
            send.delay(TOPIC, PAYLOAD)
        idle.wait_empty()
        mock.fail_next(KafkaError.FENCED_LEADER_EPOCH)
        send.delay(TOPIC, PAYLOAD)
        idle.wait_empty()
        mock.fail_next(KafkaError.POLICY_VIOLATION)
        send.delay(TOPIC, PAYLOAD)
        idle.wait_empty()
        assert inspected("stats")["total"]["kafka_delivery.send"] - before == 3 + 2 + 1

    def test_what_is_in_flight_is_active_and_shown_without_payload(self, idle: Stack, mock: MockKafka) -> None:
        mock.down()
        try:
            sent = send.delay(TOPIC, PAYLOAD, key=PAYLOAD, headers={"h": PAYLOAD})
            batch = send_many.delay([{"topic": TOPIC, "value": PAYLOAD}])
            wait_until(lambda: in_flight() == 2, 60, "both to be in flight")
            wait_until(lambda: len(inspected("active")) == 2, 60, "both to be active")
            active = {request["id"]: request for request in inspected("active")}
            assert active.keys() == {sent.id, batch.id}
            assert TOPIC in active[sent.id]["args"]
            assert active[sent.id]["delivery_info"]["routing_key"] == "kafka-delivery"
            assert inspected("reserved") == []
            stats = inspected("stats")
            assert stats["pool"]["in-flight"] == 2
            assert 0 < stats["pool"]["in-flight-bytes"] < 3000
            assert stats["pool"]["max-in-flight"] == stats["prefetch_count"] == 1000
            asked = inspected("stats"), inspected("active"), app.control.inspect(timeout=5, limit=1).query_task(sent.id)
            assert PAYLOAD not in json.dumps([list(active.values()), *asked])
        finally:
            mock.up()
        idle.wait_empty()
        wait_until(lambda: in_flight() == 0, 60, "nothing in flight")
        assert inspected("active") == []

    def test_a_revoke_of_what_is_in_flight_takes_nothing_back(self, idle: Stack, mock: MockKafka) -> None:
        mock.down()
        try:
            sent = send.delay(TOPIC, PAYLOAD)
            wait_until(lambda: in_flight() == 1, 60, "the send to be in flight")
            revoke(sent.id, terminate=True)
        finally:
            mock.up()
        idle.wait_for(TOPIC, {sent.id})
        idle.wait_empty()
        assert [item for item in idle.parked() if item.id == sent.id] == []


class TestCelerysWay:
    """Whatever is asked of Celery is done by Celery."""

    def taken_by_celery(self, system: Stack, task_id: str) -> bool:
        return f"{send.name}[{task_id}] received" in system.workers[0].log

    def test_nothing_is_asked(self, idle: Stack) -> None:
        sent = send.delay(TOPIC, PAYLOAD)
        idle.wait_for(TOPIC, {sent.id})
        assert not self.taken_by_celery(idle, sent.id)

    def test_a_result(self, idle: Stack, mock: MockKafka) -> None:
        sent = send.apply_async((TOPIC, PAYLOAD), ignore_result=False)
        assert sent.get(timeout=20)["message_id"] == sent.id
        mock.fail_next(KafkaError.POLICY_VIOLATION)
        refused = send.apply_async((TOPIC, PAYLOAD), ignore_result=False)
        with pytest.raises(RejectedError):
            refused.get(timeout=20)
        assert self.taken_by_celery(idle, sent.id)

    def test_a_countdown(self, idle: Stack) -> None:
        """It waits in Redis; when it is due it is a plain send."""
        later = send.apply_async((TOPIC, PAYLOAD), countdown=3600)
        wait_until(lambda: idle.redis.zcard(DELAYED) == 1, 60, "it to be put aside")
        started = time.time()
        sent = send.apply_async((TOPIC, PAYLOAD), countdown=2)
        idle.wait_for(TOPIC, {sent.id})
        assert time.time() - started >= 2
        assert inspected("scheduled") == []
        assert later.id not in idle.ids(TOPIC)
        assert bring_forward(idle.redis) == 1
        idle.wait_for(TOPIC, {later.id})
        assert not self.taken_by_celery(idle, sent.id)
        assert not self.taken_by_celery(idle, later.id)
        idle.wait_empty()
        assert idle.ids(TOPIC).count(sent.id) == 1

    def test_an_expiry(self, idle: Stack) -> None:
        in_time = send.apply_async((TOPIC, PAYLOAD), expires=60)
        late = send.apply_async((TOPIC, PAYLOAD), expires=-1)
        idle.wait_for(TOPIC, {in_time.id})
        wait_until(lambda: late.id in {item.id for item in idle.parked()}, 60, "the late one to be parked")
        assert self.taken_by_celery(idle, in_time.id)
        assert late.id not in idle.ids(TOPIC)

    def test_a_link(self, idle: Stack) -> None:
        callback = send.si(TOPIC, "callback").set(task_id="of-a-link", queue="kafka-delivery")
        sent = send.apply_async((TOPIC, PAYLOAD), link=callback)
        idle.wait_for(TOPIC, {sent.id, "of-a-link"})
        assert self.taken_by_celery(idle, sent.id)

    def test_a_rate_limit_that_is_set_by_remote_control(self, idle: Stack) -> None:
        app.control.rate_limit(send.name, "2/s", reply=True, timeout=5, limit=1)
        try:
            started = time.monotonic()
            ids = {send.delay(TOPIC, PAYLOAD).id for _ in range(4)}
            idle.wait_for(TOPIC, ids)
            assert time.monotonic() - started > 1
        finally:
            app.control.rate_limit(send.name, 0, reply=True, timeout=5, limit=1)
        plain = send.delay(TOPIC, PAYLOAD)
        idle.wait_for(TOPIC, {plain.id})
        assert not self.taken_by_celery(idle, plain.id)

    def test_other_tasks_run_in_threads(self, idle: Stack, mock: MockKafka) -> None:
        mock.down()
        try:
            letters = {dead_letter.delay(TOPIC, str(n)).id for n in range(3)}
            wait_until(lambda: len(inspected("active")) == 3, 60, "three dead letters to be active")
            pool = inspected("stats")["pool"]
            assert pool["in-flight"] == 0
            assert pool["threads"] >= 3
        finally:
            mock.up()
        idle.wait_for(f"{TOPIC}-dlq", {letter.removesuffix("-dlq") for letter in letters})


class TestBatches:
    """They are in flight as sends are."""

    def test_their_events_come_in_order(self, idle: Stack) -> None:
        before = inspected("stats")["total"].get("kafka_delivery.send_many", 0)
        with watched_events() as events:
            sent = send_many.delay([{"topic": TOPIC, "value": PAYLOAD}] * 3)
            seen = events.wait_for(sent.id, "task-succeeded")
        assert [event["type"] for event in seen] == ["task-received", "task-started", "task-succeeded"]
        assert seen[-1]["result"] == "3 records delivered"
        assert PAYLOAD not in str(seen)
        idle.wait_empty()
        assert inspected("stats")["total"]["kafka_delivery.send_many"] == before + 1
        assert inspected("active") == []

    def test_a_record_that_fails_has_its_own_fate_and_the_others_are_sent_once(self, idle: Stack) -> None:
        names = [f"own-fate-{n}" for n in range(4)]
        topics = [TOPIC, "no-such-topic", TOPIC, TOPIC]
        before = inspected("stats")["total"].get("kafka_delivery.send_many", 0)
        with watched_events() as events:
            sent = send_many.delay(
                [{"topic": topic, "value": "x", "message_id": name} for topic, name in zip(topics, names, strict=True)]
            )
            events.wait_for(sent.id, "task-succeeded")
        idle.wait_empty()
        assert events.types(sent.id) == ["task-received", "task-started", "task-succeeded"]
        ids = [each for each in idle.ids(TOPIC) if each in names]
        assert sorted(ids) == [names[0], names[2], names[3]]
        assert [item.topic for item in idle.parked() if item.id == names[1]] == ["no-such-topic"]
        assert inspected("stats")["total"]["kafka_delivery.send_many"] == before + 1


LISTENING = """
    import os
    from celery import signals
    from kafka_delivery_worker import app

    def told(name):
        def listener(sender=None, task_id=None, request=None, **_):
            os.write(2, f"TOLD {name} {task_id or (request or sender.request).id}\\n".encode())
        return listener

    listeners = []
    for name in NAMES:
        listeners.append(told(name))
        getattr(signals, f"task_{name}").connect(listeners[-1])
"""


@pytest.mark.parametrize("names", [("prerun", "postrun", "success", "failure", "retry", "received"), ("success",)])
def test_whoever_listens_to_signals_is_told(own: Stack, tmp_path: Path, names: tuple[str, ...]) -> None:
    """In a module of the user's that is named with -A."""
    code = LISTENING.replace("NAMES", repr(names))
    worker = other_worker(own, tmp_path, code, *ALONE)

    def told(task_id: str) -> list[str]:
        lines = [line.split() for line in worker.log.splitlines() if line.startswith("TOLD ")]
        return [line[1] for line in lines if line[2] == task_id and line[1] in names]

    def expect(task_id: str, *expected: str) -> None:
        wanted = [name for name in expected if name in names]
        wait_until(lambda: len(told(task_id)) >= len(wanted), 60, f"{wanted} of {task_id}, not {told(task_id)}")
        own.wait_empty()
        assert sorted(told(task_id)) == sorted(wanted)

    plain = send.delay(TOPIC, PAYLOAD)
    expect(plain.id, "received", "prerun", "success", "postrun")
    kafka_of(own).fail_next(KafkaError.FENCED_LEADER_EPOCH)
    retried = send.delay(TOPIC, PAYLOAD)
    own.wait_for(TOPIC, {retried.id})
    expect(retried.id, "received", "prerun", "retry", "postrun", "received", "prerun", "success", "postrun")
    kafka_of(own).fail_next(KafkaError.POLICY_VIOLATION)
    refused = send.delay(TOPIC, PAYLOAD)
    own.wait_for(f"{TOPIC}-dlq", {refused.id})
    expect(refused.id, "received", "prerun", "failure", "postrun")
