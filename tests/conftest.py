"""The servers, started when the first test asks for one. Each is chosen by one environment variable:

* TEST_REDIS: `valkey` (the wheel, default), `real` (redis-server), or a redis:// URL;
* TEST_KAFKA: `mock` (librdkafka's, default), `real` (Apache Kafka on java), or host:port.

Session-scoped servers are shared: a test that takes one down brings it up again.
"""

from __future__ import annotations

import os
import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from celery.result import AsyncResult
from hypothesis import settings as profiles

from examples import ALL
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

HERE = Path(__file__).parent

# Few examples by default and the library's usual number in CI; the same ones in each run, so that no run is luckier.
# (A time limit for one example would be a bound on the machine.)
profiles.register_profile("few", max_examples=15, deadline=None, derandomize=True, database=None)
profiles.register_profile("ci", parent=profiles.get_profile("few"), max_examples=ALL)
profiles.load_profile("ci" if os.environ.get("CI") == "true" else "few")

# A shell ignores SIGINT for jobs in its background, as nohup does SIGHUP, and an ignored signal stays ignored in all
# that these tests start. A handler does not outlive exec: with one that does nothing, children begin with the default.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

SERVERS = ("real_kafka", "real_rabbit")
"""Fixtures that take seconds of a core to start: in a parallel run, one process serves the tests that need one."""


@pytest.hookimpl(tryfirst=True)  # xdist looks for the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together in a parallel run what shares something, by `--dist loadgroup`.

    A file of scenarios, since its tests share a worker; in the other tiers, tests on the same real server, or with
    fixtures of their module.
    """
    for item in items:
        tier = item.path.relative_to(HERE).parts[0]
        if tier in ("unit", "integration"):
            shared = next((name for name in SERVERS if name in getattr(item, "fixturenames", ())), None)
        else:
            shared = item.path.name
        if shared is not None:
            item.add_marker(pytest.mark.xdist_group(shared))


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
