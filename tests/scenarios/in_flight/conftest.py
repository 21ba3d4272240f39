"""A stack of a test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kafka_delivery_worker.embedded import MockKafka, Valkey
from scenarios.in_flight.asking import TOPIC
from stack import Stack, stack


@pytest.fixture
def own() -> Iterator[Stack]:
    """Without a worker yet; Kafka and Redis are this test's own."""
    with Valkey() as valkey, MockKafka() as kafka, stack(valkey.url, kafka, LEASE_S=30, LINGER_MS=0) as system:
        kafka.create_topic(TOPIC, 1)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield system
