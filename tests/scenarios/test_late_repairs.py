"""A topic or a permission that comes before the retries are used up is in time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from kafka_delivery import dead_letter, names, send
from kafka_delivery_worker.topics import REMEMBERED_S
from servers import RealKafka, wait_until
from stack import Stack, stack
from watching import ALONE, emptied

pytestmark = pytest.mark.real


REFUSED_S = 1.0
"""A producer remembers for about half of this that it may not write."""


@pytest.fixture(scope="module")
def system(redis_url: str, real_kafka: RealKafka) -> Iterator[Stack]:
    """A worker whose retries wait for ten minutes: `hasten_retries` moves their time, so no repair is too late."""
    with stack(emptied(redis_url), real_kafka, TOPIC_PROPAGATION_MS=10_000, FEW_BACKOFF_S=600) as system:
        system.worker(*ALONE)
        yield system


def wait_delayed(system: Stack, queue: str) -> None:
    wait_until(lambda: system.redis.zcard(names.DELAYED + queue) == 1, 60, "a retry to wait for its time")


def hasten_retries(system: Stack, queue: str, topic: str, remembered_s: float) -> None:
    """Let the retries be due one after the other, until the record is in its topic.

    There are two: a worker may hear of the repair later than it should, and not use up both.
    """

    delayed = names.DELAYED + queue
    for _ in range(2):
        time.sleep(remembered_s)
        (retry,) = system.redis.zrange(delayed, 0, -1)
        message = json.loads(retry)
        message["headers"]["eta"] = None
        with system.redis.pipeline() as pipe:
            pipe.zrem(delayed, retry).lpush(queue, json.dumps(message)).execute()

        def ended() -> bool:
            return bool(system.redis.zcard(delayed) or system.ids(topic) or system.parked())

        wait_until(ended, 60, "the retry")
        if not system.redis.zcard(delayed):
            break


def test_a_dead_letter_topic_that_comes_late(system: Stack, real_kafka: RealKafka) -> None:
    """It is still retried, and what is remembered of a topic is soon forgotten."""
    dead_letter.delay("late", "v", message_id="id-1")
    wait_delayed(system, names.DEAD_LETTER_QUEUE)
    real_kafka.create_topic("late-dlq")
    hasten_retries(system, names.DEAD_LETTER_QUEUE, "late-dlq", REMEMBERED_S)
    assert system.ids("late-dlq") == ["id-1"]
    assert system.parked() == []


def test_a_permission_that_comes_late(system: Stack, real_kafka: RealKafka) -> None:
    real_kafka.create_topic("permitted-late")
    real_kafka.deny_write("permitted-late")
    sent = send.delay("permitted-late", "x")
    wait_delayed(system, names.QUEUE)
    real_kafka.allow_write("permitted-late")
    hasten_retries(system, names.QUEUE, "permitted-late", REFUSED_S)
    assert system.ids("permitted-late") == [sent.id]
