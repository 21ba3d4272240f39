"""One message id may be in flight twice, say for two topics. What becomes of a record is its own message's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kafka_delivery import send
from kafka_delivery_worker.embedded import MockKafka
from scenarios.in_flight.asking import inspected
from servers import wait_until
from stack import Stack, stack
from watching import emptied

POLICY_VIOLATION = 44
EVENT = "event-7"


@pytest.fixture
def kafka() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        for topic in ("good", "bad", "good-dlq", "bad-dlq"):
            kafka.create_topic(topic, 1)  # so that the connection to its leader is open
        yield kafka


@pytest.fixture
def system(redis_url: str, kafka: MockKafka) -> Iterator[Stack]:
    with stack(emptied(redis_url), kafka, CONCURRENCY=1, LINGER_MS=0) as system:
        yield system


def test_the_outcome_of_one_is_not_the_others(system: Stack, kafka: MockKafka) -> None:
    """One record waits for the only thread while the record of the same id for another topic is refused."""
    worker = system.worker()
    for topic in ("good", "bad"):
        send.delay(topic, "first")
    system.wait_empty()
    kafka.delay(-1, 3_000)
    for n in range(2):  # a wanted result takes a thread; the only one is busy with these
        send.apply_async(("good", f"busy-{n}"), {"message_id": f"busy-{n}"}, ignore_result=False)
    wait_until(lambda: "[busy-1] received" in worker.log, 60, "both to be taken")
    wait_until(lambda: "'id': 'busy-0'" in str(inspected("active")), 60, "the thread to be busy")
    send.apply_async(("good", "to deliver"), {"message_id": EVENT}, ignore_result=False)
    wait_until(lambda: f"[{EVENT}] received" in worker.log, 60, "the record to wait for the thread")
    kafka.fail_next(POLICY_VIOLATION, 1)
    send.delay("bad", "to refuse", message_id=EVENT)
    wait_until(lambda: worker.log.count(f"[{EVENT}] received") == 2, 60, "the refusal to wait for the thread, too")
    kafka.delay(-1, 0)
    system.wait_empty()
    values = {topic: [record.value for record in system.read(topic)] for topic in ("good", "bad", "good-dlq")}
    assert values == {"good": [b"first", b"busy-0", b"busy-1", b"to deliver"], "bad": [b"first"], "good-dlq": []}
    assert [record.value for record in system.read("bad-dlq")] == [b"to refuse"]
    assert system.parked() == []
