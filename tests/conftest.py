"""The servers, started when the first test asks for one. Each is chosen by one environment variable:

* TEST_REDIS: `valkey` (the wheel, default), `real` (redis-server), or a redis:// URL;
* TEST_KAFKA: `mock` (librdkafka's, default), `real` (Apache Kafka on java), or host:port.

Session-scoped servers are shared: a test that takes one down brings it up again.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery.result import AsyncResult

from kafka_delivery_worker.embedded import MockKafka, Valkey
from servers import (
    KafkaLike,
    OtherKafka,
    RealKafka,
    RealRabbit,
    RealRedis,
    have_real_kafka,
    have_real_rabbit,
    have_real_redis,
    missing,
)
from stack import Stack, stack

SLOW = (
    "chaos/",
    "integration/test_bench.py",
    "integration/test_parked_many.py",
    "integration/test_producer.py",
    "integration/test_send_and_wait.py",
    "scenarios/test_alerts.py",
    "scenarios/test_another_broker.py",
    "scenarios/test_breaker.py",
    "scenarios/test_brokers_of_a_cluster.py",
    "scenarios/test_chains.py",
    "scenarios/test_dead_letters_for_others.py",
    "scenarios/test_demo.py",
    "scenarios/test_examples.py",
    "scenarios/test_five_kinds.py",
    "scenarios/test_holes_of_the_stock_transport.py",
    "scenarios/test_in_flight.py",
    "scenarios/test_leases.py",
    "scenarios/test_missing_dead_letter_topic.py",
    "scenarios/test_outage.py",
    "scenarios/test_parking_room.py",
    "scenarios/test_quickstarts.py",
    "scenarios/test_redis_refuses.py",
    "scenarios/test_redrive_for_real.py",
    "scenarios/test_release.py",
    "scenarios/test_stopping.py",
    "scenarios/test_workers_come_and_go.py",
)
"""Long suites, which `make test-slow` runs."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if str(item.path.relative_to(here)).startswith(SLOW):
            item.add_marker("slow")


# A result that is collected after its Redis has gone fails to unsubscribe, at any moment. Where that is within a
# compile(), showing it compiles too, and Python 3.11 takes that for a fault (SystemError, python/cpython#106905).
AsyncResult.__del__ = lambda self: None

REDIS = os.environ.get("TEST_REDIS", "valkey")
KAFKA = os.environ.get("TEST_KAFKA", "mock")


@pytest.fixture(scope="session")
def redis_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where Redis is, database 0."""
    if REDIS == "valkey":
        with Valkey() as valkey:
            yield valkey.url
    elif REDIS == "real":
        yield request.getfixturevalue("real_redis").url
    else:
        yield REDIS


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client to an empty Redis; one that we did not start is left as it is."""
    with redis.Redis.from_url(redis_url, socket_timeout=5) as client:
        if REDIS in ("valkey", "real"):
            client.flushall()
        yield client


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Iterator[KafkaLike]:
    """A Kafka that works; for one that fails on demand see `mock_kafka`."""
    if KAFKA == "mock":
        with MockKafka() as mock:
            yield mock
    elif KAFKA == "real":
        yield request.getfixturevalue("real_kafka")
    else:
        yield OtherKafka(KAFKA)


@pytest.fixture
def topic(request: pytest.FixtureRequest, kafka: KafkaLike) -> str:
    """A new topic of four partitions; its dead-letter topic, with `-dlq` after the name, exists too."""
    name = re.sub(r"[^a-zA-Z0-9._-]", "-", request.node.name)[:60] + "-" + uuid.uuid4().hex[:12]
    kafka.create_topic(name)
    kafka.create_topic(f"{name}-dlq")
    return name


@pytest.fixture
def mock_kafka() -> Iterator[MockKafka]:
    """A mock cluster of three brokers for one test, to break as it likes."""
    with MockKafka() as mock:
        yield mock


@pytest.fixture(scope="session")
def real_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealKafka]:
    """An Apache Kafka that checks ACLs."""
    if not have_real_kafka():
        missing("java, and Maven or TEST_KAFKA_LIB")
    with RealKafka(tmp_path_factory.mktemp("kafka"), authorizer=True) as server:
        yield server


@pytest.fixture(scope="session")
def real_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    """A Redis with an AOF."""
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def real_rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRabbit]:
    """A RabbitMQ."""
    if not have_real_rabbit():
        missing("rabbitmq-server")
    with RealRabbit(tmp_path_factory.mktemp("rabbit")) as server:
        yield server


@pytest.fixture
def delivery(redis_client: redis.Redis, redis_url: str, kafka: KafkaLike) -> Iterator[Stack]:
    """A whole system on the shared servers; this process is its application."""
    with stack(redis_url, kafka) as system:
        yield system
