"""Flower on our app, as its users start it: what it shows of a record, to whom, and what it does not."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError

from kafka_delivery import send
from kafka_delivery_worker.embedded import MockKafka, free_port
from servers import wait_until
from stack import BIN, Stack, stack
from watching import ALONE, emptied

TOPIC = "shown"
PAYLOAD = "secret-payload"


@pytest.fixture(scope="module")
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield kafka


@pytest.fixture(scope="module")
def system(redis_url: str, mock: MockKafka) -> Iterator[Stack]:
    with stack(emptied(redis_url), mock, RETRY_BACKOFF_S=60, RETRY_BACKOFF_MAX_S=60) as system:
        system.worker("-E", *ALONE)
        yield system


@pytest.fixture(scope="module")
def flower(system: Stack) -> Iterator[str]:
    """Where it is. It asks for no password, so that its API answers only for the test's sake."""
    port = free_port()
    process = subprocess.Popen(
        [BIN / "celery", "-A", "kafka_delivery_worker", "flower", f"--port={port}", "--loglevel=ERROR"],
        env=system.env() | {"FLOWER_UNAUTHENTICATED_API": "true"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: read(f"{url}/healthcheck") == "OK", 60, "Flower to answer")
        wait_until(lambda: bool(json.loads(read(f"{url}/api/workers") or "{}")), 60, "Flower to know the worker")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def read(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  # our own Flower
            return str(answer.read().decode())
    except OSError:
        return ""


def task(flower: str, task_id: str, state: str) -> dict[str, Any]:
    """What it knows of a task, once that has this state."""
    found: dict[str, Any] = {}

    def known() -> bool:
        found.update(json.loads(read(f"{flower}/api/task/info/{task_id}") or "{}"))
        return bool(found.get("state") == state)

    wait_until(known, 60, f"{task_id} to be {state} in Flower")
    return found


def test_a_record_is_found_by_its_id_with_what_became_of_it(flower: str, mock: MockKafka) -> None:
    arrived = send.delay(TOPIC, PAYLOAD, key=PAYLOAD, headers={"h": PAYLOAD}).id
    shown = [task(flower, arrived, "SUCCESS")]
    assert "'offset'" in shown[0]["result"]
    mock.fail_next(KafkaError.POLICY_VIOLATION)
    refused = send.delay(TOPIC, PAYLOAD, key=PAYLOAD).id
    shown += [task(flower, refused, "FAILURE"), task(flower, f"{refused}-dlq", "SUCCESS")]
    assert shown[1]["exception"].startswith("RejectedError(POLICY_VIOLATION: ")
    assert shown[2]["name"] == "kafka_delivery.dead_letter"
    mock.fail_next(KafkaError.FENCED_LEADER_EPOCH)
    retried = send.delay(TOPIC, PAYLOAD, key=PAYLOAD).id
    shown.append(task(flower, retried, "RETRY"))
    assert shown[3]["exception"].startswith("RetriableError(FENCED_LEADER_EPOCH: ")
    for one in shown:
        assert TOPIC in one["args"]
    for page in ("tasks", f"task/{arrived}", f"task/{refused}", f"task/{retried}", "api/tasks"):
        assert PAYLOAD not in read(f"{flower}/{page}"), page


def test_the_list_has_columns_that_say_it(flower: str) -> None:
    page = read(f"{flower}/tasks")
    assert [name for name in ("uuid", "state", "args", "exception") if f'data-column="{name}"' not in page] == []


def test_the_queues_have_their_lengths(flower: str) -> None:
    page = read(f"{flower}/broker")
    assert "kafka-delivery-dlq" in page


def test_it_listens_on_this_machine_only_unless_told_otherwise(flower: str) -> None:
    """Its /metrics asks nobody for a password."""
    elsewhere = flower.replace("127.0.0.1", "127.0.0.2")  # reaches what listens on all addresses
    assert read(f"{flower}/metrics")
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"{elsewhere}/metrics", timeout=5)  # noqa: S310
