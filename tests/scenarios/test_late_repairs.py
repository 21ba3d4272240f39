"""A topic or a permission that comes before the retries are used up is in time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from kafka_delivery import dead_letter, names, send
from kafka_delivery_worker.topics import REMEMBERED_S
from servers import RealKafka, wait_until
from stack import Stack, stack
from watching import ALONE, emptied

pytestmark = pytest.mark.real

SENDS, DEAD_LETTERS = names.DELAYED + names.QUEUE, names.DELAYED + names.DEAD_LETTER_QUEUE

NOW = 1
"""A time that has long come (ms)."""

REFUSED_S = 1.0
"""A producer remembers for about half of this that it may not write."""


@pytest.fixture(scope="module")
def system(redis_url: str, real_kafka: RealKafka) -> Iterator[Stack]:
    """A worker whose retries wait for ten minutes: `hasten` moves their time, so that no repair is late by chance."""
    with stack(emptied(redis_url), real_kafka, TOPIC_PROPAGATION_MS=10_000, FEW_BACKOFF_S=600) as system:
        system.worker(*ALONE)
        yield system


def wait_delayed(system: Stack, delayed: str) -> None:
    wait_until(lambda: system.redis.zcard(delayed) == 1, 60, "a retry to wait for its time")


def hasten_retries(system: Stack, delayed: str, topic: str, remembered_s: float) -> None:
    """Let the retries be due one after the other, until the record is in its topic.

    There are two: a worker may hear of the repair later than it should, and not use up both.
    """

    def delayed_again() -> bool:
        return any(due > NOW for _, due in system.redis.zrange(delayed, 0, -1, withscores=True))

    for _ in range(2):
        time.sleep(remembered_s)
        (retry,) = system.redis.zrange(delayed, 0, -1)
        system.redis.zadd(delayed, {retry: NOW}, xx=True)
        wait_until(lambda: delayed_again() or bool(system.ids(topic) or system.parked()), 60, "the retry")
        if not delayed_again():
            break


def test_a_dead_letter_topic_that_comes_late(system: Stack, real_kafka: RealKafka) -> None:
    """It is still retried, and what is remembered of a topic is soon forgotten."""
    dead_letter.delay("late", "v", message_id="id-1")
    wait_delayed(system, DEAD_LETTERS)
    real_kafka.create_topic("late-dlq")
    hasten_retries(system, DEAD_LETTERS, "late-dlq", REMEMBERED_S)
    assert system.ids("late-dlq") == ["id-1"]
    assert system.parked() == []


def test_a_permission_that_comes_late(system: Stack, real_kafka: RealKafka) -> None:
    real_kafka.create_topic("permitted-late")
    real_kafka.deny_write("permitted-late")
    sent = send.delay("permitted-late", "x")
    wait_delayed(system, SENDS)
    real_kafka.allow_write("permitted-late")
    hasten_retries(system, SENDS, "permitted-late", REFUSED_S)
    assert system.ids("permitted-late") == [sent.id]
