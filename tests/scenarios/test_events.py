"""What Flower is told: of successes a sample, of everything else all; and of each task that it hears of, the end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from celery.events.state import State
from confluent_kafka import KafkaError

from kafka_delivery import circuit, send
from kafka_delivery_worker.embedded import MockKafka
from servers import wait_until
from stack import Stack, stack
from watching import ALONE, Events, emptied, watched_events

TOPIC = "told"
PAYLOAD = "secret-payload"
BEGUN = ["task-received", "task-started"]


@pytest.fixture(scope="module")
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC, 1)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield kafka


@pytest.fixture(scope="module")
def system(redis_url: str, mock: MockKafka) -> Iterator[Stack]:
    """One worker that tells of no success that it is not asked about."""
    quick = {"MESSAGE_TIMEOUT_MS": 4_000, "REQUEST_TIMEOUT_MS": 1_000, "TOPIC_PROPAGATION_MS": 500, "STALL_S": 1}
    with stack(emptied(redis_url), mock, SUCCESS_EVENTS_PER_S=0, SUCCESS_THRESHOLD=1, **quick) as system:
        system.worker("-E", *ALONE)
        system.wait_for(TOPIC, {send.delay(TOPIC, PAYLOAD).id})
        system.wait_empty()
        yield system


@pytest.fixture
def events(system: Stack) -> Iterator[Events]:
    with watched_events() as events:
        yield events


def states(events: Events) -> dict[str, tuple[str, str, str]]:
    """As Flower has them: task -> state, name and arguments."""
    state = State()
    for event in list(events.all):
        state.event(event)
    return {one.uuid: (one.state, one.name, one.args) for one in state.tasks.values()}


def closed() -> bool:
    """Whether the circuit is; what is sent shows it."""
    send.delay(TOPIC, PAYLOAD)
    return circuit().state == "closed"


def test_a_success_outside_the_sample_leaves_no_trace(system: Stack, mock: MockKafka, events: Events) -> None:
    ids = send.bulk([{"topic": TOPIC, "value": PAYLOAD} for _ in range(50)])
    system.wait_for(TOPIC, set(ids))
    system.wait_empty()
    mock.fail_next(KafkaError.POLICY_VIOLATION)
    later = send.delay(TOPIC, PAYLOAD).id
    events.wait_for(later, "task-failed")
    events.wait_for(f"{later}-dlq", "task-succeeded")
    assert states(events).keys() == {later, f"{later}-dlq"}, "of the successes before it nothing was told"


def test_what_is_retried_is_told_whole_and_its_success_too(system: Stack, mock: MockKafka, events: Events) -> None:
    mock.fail_next(KafkaError.FENCED_LEADER_EPOCH)
    sent = send.delay(TOPIC, PAYLOAD)
    seen = events.wait_for(sent.id, "task-succeeded")
    # A retry is published before Celery says so: its own "received" may come before the "retried" of the last one.
    begun = [event for event in seen if event["type"] == "task-received"]
    ended = [event for event in seen if event["type"] != "task-received"]
    assert [event["type"] for event in ended] == ["task-started", "task-retried", "task-started", "task-succeeded"]
    (first, again), (started, retried, *_) = begun, ended
    assert first["timestamp"] == started["timestamp"] < retried["timestamp"], "when it was, not when it was told"
    assert first["clock"] < started["clock"] < retried["clock"]
    assert [first["retries"], again["retries"]] == [0, 1]
    ((task_id, (state, name, shown)),) = states(events).items()
    assert (task_id, state, name) == (sent.id, "SUCCESS", "kafka_delivery.send")
    assert re.fullmatch(rf"\('{TOPIC}', \d+ bytes, '{sent.id}'\)", shown)


def test_what_is_refused_is_told_whole_and_its_dead_letter_too(system: Stack, mock: MockKafka, events: Events) -> None:
    mock.fail_next(KafkaError.POLICY_VIOLATION)
    sent = send.delay(TOPIC, PAYLOAD)
    events.wait_for(sent.id, "task-failed")
    events.wait_for(f"{sent.id}-dlq", "task-succeeded")
    assert events.types(sent.id) == [*BEGUN, "task-failed"]
    assert events.types(f"{sent.id}-dlq") == [*BEGUN, "task-succeeded"]
    shown = {task_id: (state, name) for task_id, (state, name, _) in states(events).items()}
    assert shown == {
        sent.id: ("FAILURE", "kafka_delivery.send"),
        f"{sent.id}-dlq": ("SUCCESS", "kafka_delivery.dead_letter"),
    }
    assert PAYLOAD not in str(events.all)


@pytest.mark.parametrize("way", ["plain", "celery"])
def test_what_waits_for_kafka_is_deferred_and_not_retried(
    system: Stack, mock: MockKafka, events: Events, way: str
) -> None:
    """The plain send is given back by the event loop; of the other, which expires, Celery is told by its task."""
    options: dict[str, Any] = {} if way == "plain" else {"expires": 600}
    mock.down()
    try:
        sent = send.apply_async((TOPIC, PAYLOAD), **options)
        wait_until(lambda: circuit().state != "closed", 60, "the circuit to open")
        # Each probe of the circuit is this record, and begins it again.
        wait_until(lambda: states(events).get(sent.id, ("",))[0] == "DEFERRED", 60, "it to be deferred")
        assert "task-retried" not in events.types(sent.id)
    finally:
        mock.up()
    events.wait_for(sent.id, "task-succeeded")
    assert states(events)[sent.id][0] == "SUCCESS"
    assert PAYLOAD not in str(events.all)
    wait_until(closed, 60, "the circuit to close")
