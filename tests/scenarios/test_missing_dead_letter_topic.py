"""Where a topic and its dead-letter topic are missing, records are parked, and other work does not wait behind them:
librdkafka takes ten seconds to give up a missing topic, and each of a worker's threads would wait for it.
"""

from __future__ import annotations

import pytest

from kafka_delivery import dead_letter, send, send_many
from kafka_delivery_worker.embedded import MockKafka
from servers import KafkaLike, wait_until
from stack import Stack, stack
from watching import ALONE, emptied

COUNT, TOPICS = 500, 100
"""Of each topic, the first would hold their threads for ten seconds, until librdkafka knows: minutes' worth in all."""


def overload(system: Stack) -> None:
    system.kafka.create_topic("others")
    system.worker(*ALONE)
    for number in range(COUNT):
        dead_letter.delay(f"missing-{number % TOPICS}", str(number), message_id=f"id-{number}")

    wanted = [send.apply_async(("others", str(number)), ignore_result=False) for number in range(20)]
    batch = send_many.apply_async(([{"topic": "others", "value": "of a batch"}],), ignore_result=False)
    for result in wanted:
        assert result.get(timeout=60)["message_id"] == result.id
    assert batch.get(timeout=60)[0]["outcome"] == "delivered"

    wait_until(lambda: len(system.parked()) == COUNT, 120, f"{COUNT} to be parked")
    system.wait_empty()
    assert {item.id for item in system.parked()} == {f"id-{number}" for number in range(COUNT)}


@pytest.fixture
def changes() -> dict[str, object]:
    return {"TOPIC_PROPAGATION_MS": 10_000}


def test_on_a_mock_cluster(redis_url: str, changes: dict[str, object]) -> None:
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, **changes) as system:
        overload(system)


@pytest.mark.real
def test_on_a_real_cluster(redis_url: str, real_kafka: KafkaLike, changes: dict[str, object]) -> None:
    with stack(emptied(redis_url), real_kafka, **changes) as system:
        overload(system)
