"""A failure that may pass is tried again, later and later, and the record arrives once, under its own id; one that
stays ends in exactly one dead letter that says how often it was tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError

from kafka_delivery import send
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka
from servers import wait_until
from stack import Stack, stack
from watching import ALONE, Events, bring_forward, emptied, looks, watched_events

PASSING = KafkaError.FENCED_LEADER_EPOCH
"""Worth all retries; librdkafka does not try it again by itself."""

RARELY_PASSING = KafkaError.INVALID_REQUEST
"""Worth few retries; librdkafka does not try it again by itself."""

BACKOFF = {"RETRY_BACKOFF_S": 60, "RETRY_BACKOFF_MAX_S": 120, "FEW_BACKOFF_S": 60}
"""Minutes: a test sees a retry wait in Redis, however slow the machine is, and brings it forward."""

MILLISECOND = 0.001
"""To which Redis keeps the time at which a message is due."""

TOPIC = "retries"
DELAYED = "kafka-delivery:delayed:1:kafka-delivery"


@pytest.fixture(scope="module")
def system(redis_url: str) -> Iterator[Stack]:
    """One worker with events, on a cluster that fails on demand."""
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, **BACKOFF) as system:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        system.worker(*ALONE, "-E")
        yield system


@pytest.fixture
def kafka(system: Stack) -> MockKafka:
    assert isinstance(system.kafka, MockKafka)
    return system.kafka


@pytest.fixture
def events(system: Stack) -> Iterator[Events]:
    with watched_events() as events:
        yield events


@pytest.mark.smoke
def test_a_failure_that_passes_is_retried_later_and_later_and_delivered_once(
    system: Stack, kafka: MockKafka, events: Events
) -> None:
    before = outcomes(system)
    kafka.fail_next(PASSING, 2)
    sent = send.delay(TOPIC, "x")

    due = [brought_forward(system, claims=3) for _ in range(2)]
    seen = events.wait_for(sent.id, "task-succeeded")

    # A retry is published before Celery says so: its own "received" may come before the "retried" of the last one.
    assert [kind for kind in types(seen) if kind != "task-received"] == [
        "task-started",
        "task-retried",
        "task-started",
        "task-retried",
        "task-started",
        "task-succeeded",
    ]
    assert types(seen)[0] == "task-received"
    received = [event for event in seen if event["type"] == "task-received"]
    assert [event["retries"] for event in received] == [0, 1, 2]
    # What was meant: how long it became says also how busy the machine was.
    said = "".join(event["traceback"] for event in seen if event["type"] == "task-retried")
    assert re.findall(r"Retry in (\S+):", said) == ["60s", "120s"]
    first, second, _ = [event["timestamp"] for event in seen if event["type"] == "task-started"]
    assert due[0] - first >= 60 - MILLISECOND
    assert due[1] - second >= 120 - MILLISECOND
    assert system.ids(TOPIC).count(sent.id) == 1
    system.wait_empty()
    assert_counted(system, before, delivered=1, retried=2)


def test_an_error_worth_few_retries_gets_two(system: Stack, kafka: MockKafka, events: Events) -> None:
    before = outcomes(system)
    kafka.fail_next(RARELY_PASSING, 3)
    sent = send.delay(TOPIC, "x")

    for _ in range(2):
        brought_forward(system)
    seen = events.wait_for(sent.id, "task-failed")

    assert types(seen).count("task-retried") == 2
    (letter,) = system.wait_for(f"{TOPIC}-dlq", {sent.id})
    said = dict(letter.headers)
    assert said["retry-count"] == b"2"
    assert said["error-class"] == b"RetriesExhaustedError"
    assert said["error-code"] == str(RARELY_PASSING).encode()
    assert sent.id not in system.ids(TOPIC)
    system.wait_empty()
    assert_counted(system, before, retried=2, dead_lettered=1)


def test_exhausted_retries_give_one_dead_letter_with_their_number(
    system: Stack, kafka: MockKafka, events: Events
) -> None:
    """Another of its topic arrives meanwhile: else it would be the topic's trouble, and no attempt would count."""
    before = outcomes(system)
    kafka.fail_next(PASSING, 2)
    sent = send.delay(TOPIC, "value", key="k")
    brought_forward(system)
    wait_until(lambda: events.types(sent.id).count("task-retried") == 2, 60, "two retries")
    events.wait_for(send.delay(TOPIC, "another").id, "task-succeeded")
    kafka.fail_next(PASSING, 2)  # MAX_RETRIES is 3 here
    for _ in range(2):
        brought_forward(system)

    seen = events.wait_for(sent.id, "task-failed")

    assert types(seen).count("task-retried") == 3
    system.wait_for(f"{TOPIC}-dlq", {sent.id})
    system.wait_empty()
    (letter,) = [one for one in system.read(f"{TOPIC}-dlq") if ("message-id", sent.id.encode()) in one.headers]
    said = dict(letter.headers)
    assert said["retry-count"] == b"3"
    assert said["error-class"] == b"RetriesExhaustedError"
    assert said["error-code"] == str(PASSING).encode()
    assert (letter.key, letter.value) == (b"k", b"value")
    assert sent.id not in system.ids(TOPIC)
    assert_counted(system, before, delivered=1, retried=3, dead_lettered=1)
    assert system.parked() == []

    # What the one has used up, the next one still has.
    events.wait_for(send.delay(TOPIC, "another").id, "task-succeeded")
    kafka.fail_next(PASSING, 2)
    fresh = send.delay(TOPIC, "y")
    for _ in range(2):
        brought_forward(system)
    seen = events.wait_for(fresh.id, "task-succeeded")
    assert [event["retries"] for event in seen if event["type"] == "task-received"] == [0, 1, 2]


def brought_forward(system: Stack, claims: int = 0) -> float:
    """Wait until a retry waits for its time, and through so many claims; make it due now. Return when it was to be due.

    Seconds since the epoch, by the clock of the worker.
    """
    wait_until(lambda: system.redis.zcount(DELAYED, "(0", "+inf") == 1, 60, "a retry to wait for its time")
    if claims:
        with looks(system.redis) as looked:
            looked.claims(claims)
    ((_, due),) = system.redis.zrangebyscore(DELAYED, "(0", "+inf", withscores=True)
    assert bring_forward(system.redis) == 1
    return float(due / 1000)


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def outcomes(system: Stack) -> dict[str, int]:
    return counts.read(system.redis).get(TOPIC, {})


def assert_counted(system: Stack, before: dict[str, int], **expected: int) -> None:
    """The counters since `before`; they are written a moment after the fact."""
    wanted = {name.replace("_", "-"): count for name, count in expected.items()}

    def counted() -> dict[str, int]:
        now = outcomes(system)
        grown = {name: now[name] - before.get(name, 0) for name in now}
        return {name: count for name, count in grown.items() if count}

    wait_until(lambda: counted() == wanted, 60, f"counters {wanted}; got {counted()}")
