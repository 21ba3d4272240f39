"""A worker's log says what became of each record, in text or as JSON, and never what is in it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError

from kafka_delivery import app, send
from kafka_delivery_worker.embedded import MockKafka
from stack import Stack, Worker, stack
from watching import ALONE, emptied, other_worker

TOPIC = "logged"
PAYLOAD = "secret-payload"
KEY = "secret-key"


@pytest.fixture(scope="module")
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC, 1)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield kafka


@pytest.fixture(scope="module")
def system(redis_url: str, mock: MockKafka) -> Iterator[Stack]:
    with stack(emptied(redis_url), mock, SUCCESS_LOGS_PER_S=-1) as system:
        yield system


def ways(system: Stack, mock: MockKafka) -> dict[str, str]:
    """Records that end in each way, by the event that says so."""
    delivered = send.delay(TOPIC, PAYLOAD, key=KEY).id
    system.wait_for(TOPIC, {delivered})
    mock.fail_next(KafkaError.FENCED_LEADER_EPOCH)
    retried = send.delay(TOPIC, PAYLOAD, key=KEY).id
    system.wait_for(TOPIC, {retried})
    mock.fail_next(KafkaError.POLICY_VIOLATION)
    refused = send.delay(TOPIC, PAYLOAD, key=KEY).id
    system.wait_for(f"{TOPIC}-dlq", {refused})
    expired = send.apply_async((TOPIC, PAYLOAD), {"key": KEY}, expires=-1).id
    system.wait_parked()
    by_name = app.send_task(send.name, (TOPIC, PAYLOAD), {"key": KEY}, queue="kafka-delivery", ignore_result=False)
    by_name.get(timeout=60)
    system.wait_empty()
    return {
        "record.delivered": delivered,
        "record.retried": retried,
        "record.dead_lettered": refused,
        "record.parked": expired,
    }


def lines(worker: Worker) -> list[dict[str, Any]]:
    """All that it wrote, to either stream; a line that is none raises."""
    return [json.loads(line) for line in worker.log.splitlines()]


def test_every_line_is_an_object_with_fields(system: Stack, mock: MockKafka) -> None:
    worker = system.worker(*ALONE, LOG_FORMAT="json")
    ended = ways(system, mock)
    worker.stop()
    written = lines(worker)
    for line in written:
        assert {"time", "level", "logger", "message"} <= line.keys()
    assert any(line["logger"].startswith("celery.") for line in written)
    found = {
        event: next(line for line in written if line.get("event") == event and line["message_id"] == message_id)
        for event, message_id in ended.items()
    }
    for line in found.values():
        assert line["topic"] == TOPIC
        assert line["logger"].startswith("kafka_delivery.")
    assert (found["record.delivered"]["partition"], found["record.delivered"]["offset"]) == (0, 0)
    assert found["record.delivered"]["level"] == "INFO"
    assert found["record.retried"]["error_code"] == KafkaError.FENCED_LEADER_EPOCH
    assert found["record.retried"]["attempt"] == 1
    assert found["record.dead_lettered"]["error_class"] == "RejectedError"
    assert found["record.dead_lettered"]["dead_letter_topic"] == f"{TOPIC}-dlq"
    assert found["record.parked"]["kind"] == "expired"
    assert PAYLOAD not in worker.log
    assert KEY not in worker.log


def test_text_says_the_same(system: Stack, mock: MockKafka) -> None:
    worker = system.worker(*ALONE)
    ended = ways(system, mock)
    worker.stop()
    for event, message_id in ended.items():
        assert f"{event} " in worker.log
        assert f"message_id={message_id} " in worker.log
    assert PAYLOAD not in worker.log
    assert KEY not in worker.log


def test_of_successes_a_sample_is_logged_and_at_warning_none(system: Stack) -> None:
    for level, per_s in (("INFO", 1), ("WARNING", 0)):
        ready = level == "INFO"  # else it does not say so
        worker = system.worker(*ALONE, f"--loglevel={level}", ready=ready, SUCCESS_LOGS_PER_S=1)
        started = time.monotonic()
        ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(500)])
        system.wait_for(TOPIC, set(ids))
        system.wait_empty()
        took = time.monotonic() - started
        worker.stop()
        assert per_s <= worker.log.count("record.delivered ") <= per_s * (took + 1), level


THEIR_OWN = """
    import logging
    from celery import signals

    @signals.setup_logging.connect
    def setup(**_):
        logging.basicConfig(level="INFO", format="THEIRS %(message)s")

    from kafka_delivery_worker import app
"""


def test_who_sets_logging_up_keeps_what_was_made(system: Stack, tmp_path: Path) -> None:
    worker = other_worker(system, tmp_path, THEIR_OWN, LOG_FORMAT="json")
    worker.stop()
    assert "THEIRS worker.settings " in worker.log
    assert '{"' not in worker.log.replace("{'", "")
