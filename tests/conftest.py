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
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import redis
from celery.result import AsyncResult
from hypothesis import settings as profiles

import side_by_side
from certificates import Authority
from examples import ALL
from kafka_delivery_worker import embedded
from kafka_delivery_worker.embedded import MockKafka, Valkey
from servers import (
    KafkaLike,
    OtherKafka,
    RealKafka,
    RealRabbit,
    RealRedis,
    SecureKafka,
    have_real_kafka,
    have_real_rabbit,
    have_real_redis,
    missing,
)
from stack import Stack, stack, started

HERE = Path(__file__).parent

LOG_END = 6_000
"""Characters of a worker's log that are shown."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark scenarios by their folder, and let the longest tests begin first."""
    for item in items:
        if side_by_side.tier(item.nodeid) == "scenarios":
            item.add_marker(pytest.mark.scenario)
    side_by_side.order(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> side_by_side.Scheduler:
    return side_by_side.Scheduler(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a failure the end of each worker's log, and where the whole of it is."""
    report = yield
    if report.failed:
        for worker in started:
            report.sections.append((f"worker {worker.pid}, {worker.log_path}", worker.log[-LOG_END:]))
    if call.when == "teardown":
        started[:] = [worker for worker in started if worker.process.poll() is None]
    return report


if (process := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    # Processes side by side take ports from ranges of their own, so that none gives away what is down in another.
    share = int(process.removeprefix("gw")) % 10
    embedded.PORTS = range(20_000 + 1_000 * share, 21_000 + 1_000 * share)

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
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs the certificates of the tests."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def secure_kafka(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[SecureKafka]:
    """An Apache Kafka with TLS for clients with certificates, and SASL for those with tokens."""
    if not have_real_kafka():
        missing("java, and Maven or TEST_KAFKA_LIB")
    with SecureKafka(tmp_path_factory.mktemp("secure-kafka"), authority) as server:
        yield server


@pytest.fixture(scope="session")
def real_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    """A Redis with an AOF."""
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["wheel", pytest.param("redis-server", marks=pytest.mark.real)])
def either_redis(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    """A client to an empty Redis of each kind: Valkey of the wheel, and redis-server."""
    if request.param == "wheel":
        yield request.getfixturevalue("redis_client")
        return
    with redis.Redis.from_url(request.getfixturevalue("real_redis").url, socket_timeout=5) as client:
        client.flushall()
        yield client


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
