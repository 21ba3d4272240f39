"""Who wants to know what became of a record is told: a caller who waits, and Celery's callbacks across apps.

`link` gets where the record is; `link_error` of the user's own app gets the id, under which that app finds the error
as it left the worker.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from confluent_kafka import KafkaError

from kafka_delivery import (
    DeliveryTimeoutError,
    RejectedError,
    RetriesExhaustedError,
    asend_and_wait,
    send,
    send_and_wait,
)
from kafka_delivery_worker.embedded import MockKafka
from servers import wait_until
from stack import Stack, message_id, stack
from watching import ALONE, emptied, other_worker

TOPIC = "called-back"
PAYLOAD = "secret-payload"

USERS_APP = """
    import json
    import os

    import redis
    from celery import Celery

    from kafka_delivery import send

    URL = os.environ["KAFKA_DELIVERY_REDIS_URL"]
    app = Celery("shop", broker=URL, backend=URL)
    said = redis.Redis.from_url(URL)

    @app.task(name="shop.delivered")
    def delivered(place, *args):
        said.rpush("said", json.dumps(["delivered", place, *args]))

    @app.task(name="shop.failed")
    def failed(task_id):
        error = send.AsyncResult(task_id).result
        known = {name: getattr(error, name, None) for name in ("topic", "message_id", "code", "name", "scope")}
        said.rpush("said", json.dumps(["failed", task_id, type(error).__name__, str(error), known]))
"""

shop = Celery("shop", set_as_current=False)
"""The user's app as the caller sees it; only names of its tasks are needed."""


@pytest.fixture(scope="module", params=["in-flight", "prefork"])
def system(request: pytest.FixtureRequest, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Our worker, and one of the user's app on the same Redis with Celery's default queue."""
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        system.worker(*ALONE, *(("-P", "prefork", "-c", "2") if request.param == "prefork" else ()))
        other_worker(system, tmp_path_factory.mktemp("shop"), USERS_APP, "-P", "solo", "-Q", "celery")
        yield system


def wait_said(system: Stack, word: str) -> list[Any]:
    """The last thing that a callback said, once it has said it."""

    def last() -> list[Any]:
        raw = system.redis.lindex("said", -1)
        assert raw is None or isinstance(raw, bytes)
        return json.loads(raw) if raw else [""]

    wait_until(lambda: last()[0] == word, 60, f"the callback {word!r}; {system.workers[-1].log[-500:]}")
    said = last()
    system.redis.delete("said")
    return said


def mock(system: Stack) -> MockKafka:
    assert isinstance(system.kafka, MockKafka)
    return system.kafka


def test_link_gets_the_place(system: Stack) -> None:
    sent = send.apply_async((TOPIC, PAYLOAD), link=shop.signature("shop.delivered", ("extra",)))

    _, place, extra = wait_said(system, "delivered")

    (record,) = [record for record in system.read(TOPIC) if message_id(record) == sent.id]
    assert place["topic"] == TOPIC
    assert (place["partition"], place["offset"]) == (record.partition, record.offset)
    assert place["message_id"] == sent.id
    assert set(place) == {"topic", "partition", "offset", "timestamp", "message_id"}
    assert extra == "extra"


def test_link_waits_until_it_is_true(system: Stack) -> None:
    """A send that is retried calls back once, when it has arrived."""
    mock(system).fail_next(KafkaError.FENCED_LEADER_EPOCH)
    sent = send.apply_async((TOPIC, PAYLOAD), link=shop.signature("shop.delivered"))
    _, place = wait_said(system, "delivered")
    assert place["message_id"] == sent.id
    system.wait_empty()
    assert system.redis.llen("said") == 0


def test_link_error_finds_a_refusal_under_the_id(system: Stack) -> None:
    mock(system).fail_next(KafkaError.POLICY_VIOLATION)
    sent = send.apply_async((TOPIC, PAYLOAD), link_error=shop.signature("shop.failed"))

    _, task_id, kind, text, known = wait_said(system, "failed")

    assert (task_id, kind) == (sent.id, "RejectedError")
    assert known == {
        "topic": TOPIC,
        "message_id": sent.id,
        "code": KafkaError.POLICY_VIOLATION,
        "name": "POLICY_VIOLATION",
        "scope": "topic",
    }
    assert "POLICY_VIOLATION" in text
    assert PAYLOAD not in text
    system.wait_for(f"{TOPIC}-dlq", {sent.id})  # the callback is told of a dead letter, not instead of one


def test_link_error_after_the_last_retry(system: Stack) -> None:
    mock(system).fail_next(KafkaError.INVALID_REQUEST, 3)
    sent = send.apply_async((TOPIC, PAYLOAD), link_error=shop.signature("shop.failed"))

    _, task_id, kind, _, known = wait_said(system, "failed")

    assert (task_id, kind) == (sent.id, "RetriesExhaustedError")
    assert (known["code"], known["name"]) == (KafkaError.INVALID_REQUEST, "INVALID_REQUEST")
    system.wait_empty()
    assert system.redis.llen("said") == 0


def test_the_caller_finds_the_error_too(system: Stack) -> None:
    mock(system).fail_next(KafkaError.POLICY_VIOLATION)
    result = send.apply_async((TOPIC, PAYLOAD), ignore_result=False)
    error: Any = result.get(timeout=60, propagate=False)
    assert type(error).__name__ == "RejectedError"
    assert (error.code, error.name, error.message_id) == (
        KafkaError.POLICY_VIOLATION,
        "POLICY_VIOLATION",
        result.id,
    )


class TestSendAndWait:
    def test_returns_the_place(self, system: Stack) -> None:
        place = send_and_wait(TOPIC, PAYLOAD, key="k", timeout=60)
        (record,) = [record for record in system.read(TOPIC) if message_id(record) == place["message_id"]]
        assert (record.partition, record.offset) == (place["partition"], place["offset"])
        assert record.key == b"k"

    def test_of_many_at_once_in_an_event_loop(self, system: Stack) -> None:
        async def requests() -> list[Any]:
            return await asyncio.gather(*(asend_and_wait(TOPIC, PAYLOAD, timeout=60) for _ in range(50)))

        ids = [place["message_id"] for place in asyncio.run(requests())]
        assert len(set(ids)) == 50
        assert set(ids) <= set(system.ids(TOPIC))

    def test_raises_a_refusal_when_the_record_is_safe(self, system: Stack) -> None:
        mock(system).fail_next(KafkaError.POLICY_VIOLATION)
        with pytest.raises(RejectedError) as caught:
            send_and_wait(TOPIC, PAYLOAD, timeout=60)
        error = caught.value
        assert (error.code, error.name, error.topic) == (KafkaError.POLICY_VIOLATION, "POLICY_VIOLATION", TOPIC)
        system.wait_for(f"{TOPIC}-dlq", {error.message_id})

    def test_waits_while_the_record_is_retried(self, system: Stack) -> None:
        mock(system).fail_next(KafkaError.FENCED_LEADER_EPOCH)
        place = send_and_wait(TOPIC, PAYLOAD, timeout=60)
        assert place["message_id"] in system.ids(TOPIC)

    def test_raises_when_retries_are_used_up(self, system: Stack) -> None:
        mock(system).fail_next(KafkaError.INVALID_REQUEST, 3)
        with pytest.raises(RetriesExhaustedError) as caught:
            send_and_wait(TOPIC, PAYLOAD, timeout=60)
        assert caught.value.name == "INVALID_REQUEST"

    def test_ends_in_time_and_the_record_goes_on(self, system: Stack) -> None:
        mock(system).down()
        try:
            with pytest.raises(DeliveryTimeoutError) as caught:
                send_and_wait(TOPIC, PAYLOAD, timeout=0.5)
        finally:
            mock(system).up()
        system.wait_for(TOPIC, {caught.value.message_id})

    def test_leaves_nothing_behind(self, system: Stack) -> None:
        place = send_and_wait(TOPIC, PAYLOAD, timeout=60)
        key = f"celery-task-meta-{place['message_id']}"
        wait_until(lambda: not system.redis.exists(key), 60, "the result to be forgotten")


def test_a_plain_send_leaves_no_result_behind(system: Stack) -> None:
    mock(system).fail_next(KafkaError.POLICY_VIOLATION)
    refused = send.delay(TOPIC, PAYLOAD)
    delivered = send.delay(TOPIC, PAYLOAD, partition=1)
    system.wait_empty()
    for sent in (refused, delivered):
        assert system.redis.exists(f"celery-task-meta-{sent.id}") == 0
