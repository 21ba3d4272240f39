"""`kafka-delivery doctor` finds what is wrong with a Redis before it costs records, and neither fails nor hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import redis

from integration.doctor.findings import NOBODY, SECRET, examined
from kafka_delivery_worker import doctor
from kafka_delivery_worker.embedded import MockKafka
from servers import RealKafka, RealRedis, wait_until


@pytest.mark.real
def test_nothing_is_said_against_servers_that_are_as_they_should_be(
    start_redis: Callable[..., RealRedis], real_kafka: RealKafka, new_topic: str
) -> None:
    real_kafka.create_topic(new_topic)
    real_kafka.create_topic(f"{new_topic}-dlq", retention_ms=2 * 86_400_000)
    server = start_redis(maxmemory="100mb", min_replicas_to_write="0")

    found = examined(server.url, real_kafka.bootstrap_servers, "--topic", new_topic)

    assert found.code == 0
    assert found.bad() == {}
    assert {finding["check"] for finding in found.all} == {
        "settings", "librdkafka", "redis", "redis-tls", "redis-version", "redis-mode", "redis-eviction",
        "redis-persistence", "redis-memory", "redis-clients", "redis-replicas", "redis-latency", "clock", "kafka",
        "topic", "installation", "topic-size", "topic-durability", "dead-letter-topic", "dead-letter-size",
    }  # fmt: skip
    assert all(list(finding) == ["check", "level", "what", "do"] for finding in found.all)
    assert found.of("redis", f"Redis {redis.Redis.from_url(server.url).info()['redis_version']} at {server.url}")
    assert found.of("kafka", "1 broker(s)")
    assert found.of("dead-letter-topic", "for 2 day(s)")
    assert found.of("topic-durability", "1 of 1")


@pytest.mark.real
@pytest.mark.parametrize(
    ("options", "check", "level"),
    [
        ({"maxmemory_policy": "allkeys-lru"}, "redis-eviction", "error"),
        ({"maxmemory_policy": "volatile-ttl"}, "redis-eviction", "error"),
        ({"appendonly": "no"}, "redis-persistence", "error"),
        ({"appendonly": "no", "save": "60 1"}, "redis-persistence", "warning"),
        ({"appendfsync": "no"}, "redis-persistence", "warning"),
        ({"cluster_enabled": "yes"}, "redis-mode", "error"),
        ({"maxmemory": "0"}, "redis-memory", "warning"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value,
)
def test_what_is_wrong_with_a_redis_is_found_and_nothing_else(
    start_redis: Callable[..., RealRedis], mock_kafka: MockKafka, options: dict[str, str], check: str, level: str
) -> None:
    server = start_redis(**({"maxmemory": "100mb"} | options))
    found = examined(server.url, mock_kafka.bootstrap_servers)
    assert found.bad() == {check: level}
    assert found.level(check) == level
    assert found.code == (1 if level == "error" else 0)


@pytest.mark.real
def test_a_redis_that_fills_up_is_a_warning(start_redis: Callable[..., RealRedis], mock_kafka: MockKafka) -> None:
    server = start_redis(maxmemory="20mb")
    with redis.Redis.from_url(server.url) as client:
        for n in range(145):
            client.lpush("backlog", bytes(100_000 + n))
    assert examined(server.url, mock_kafka.bootstrap_servers).bad() == {"redis-memory": "warning"}


@pytest.mark.real
@pytest.mark.parametrize(("limit", "bad"), [("70000000", {}), ("200000000", {"redis-memory": "warning"})])
def test_a_limit_for_new_sends_that_is_never_reached_is_a_warning(
    start_redis: Callable[..., RealRedis], mock_kafka: MockKafka, limit: str, bad: dict[str, str]
) -> None:
    server = start_redis(maxmemory="100mb")
    assert examined(server.url, mock_kafka.bootstrap_servers, BACKLOG_MAX_BYTES=limit).bad() == bad


@pytest.mark.real
def test_a_redis_with_room_for_few_more_clients_is_a_warning(
    start_redis: Callable[..., RealRedis], mock_kafka: MockKafka
) -> None:
    server = start_redis(maxmemory="100mb", maxclients="10")
    with ExitStack() as clients:
        for _ in range(7):
            clients.enter_context(redis.Redis.from_url(server.url, single_connection_client=True)).ping()
        assert examined(server.url, mock_kafka.bootstrap_servers).bad() == {"redis-clients": "warning"}


@pytest.mark.real
def test_a_failover_that_loses_records_is_a_warning_and_a_replica_an_error(
    start_redis: Callable[..., RealRedis], mock_kafka: MockKafka
) -> None:
    options = {"maxmemory": "100mb", "repl_diskless_sync_delay": "0"}
    primary, replica = start_redis(**options), start_redis(**options)
    with redis.Redis.from_url(primary.url) as one, redis.Redis.from_url(replica.url) as other:
        other.replicaof("127.0.0.1", str(primary.port))
        wait_until(lambda: other.info("replication")["master_link_status"] == "up", 60, "the replica to follow")

        assert examined(primary.url, mock_kafka.bootstrap_servers).bad() == {"redis-replicas": "warning"}
        assert examined(replica.url, mock_kafka.bootstrap_servers).bad("redis") == {"redis-mode": "error"}
        one.config_set("min-replicas-to-write", 1)
        assert examined(primary.url, mock_kafka.bootstrap_servers).bad() == {}


@pytest.mark.real
def test_a_managed_redis_that_forbids_commands_is_checked_as_far_as_possible(
    start_redis: Callable[..., RealRedis], mock_kafka: MockKafka
) -> None:
    server = start_redis(maxmemory="100mb")
    url = server.url.replace("//", f"//limited:{SECRET}@")
    with redis.Redis.from_url(server.url) as client:
        user = {"enabled": True, "passwords": [f"+{SECRET}"], "keys": ["*"], "channels": ["*"]}
        client.acl_setuser("limited", **user, commands=["+@all", "-config"])
        found = examined(url, mock_kafka.bootstrap_servers)
        assert found.bad() == {"redis-config": "warning"}
        assert found.level("redis-eviction") == found.level("redis-persistence") == "ok"

        client.config_set("appendonly", "no")
        found = examined(url, mock_kafka.bootstrap_servers)
        assert found.bad() == {"redis-config": "warning", "redis-persistence": "warning"}

        client.acl_setuser("limited", **user, commands=["+@all", "-info", "-time"])
        found = examined(url, mock_kafka.bootstrap_servers)
        assert found.bad() == {"redis-info": "warning"}
        assert found.level("redis") == "ok"
        assert found.code == 0

        client.acl_setuser("limited", **user, commands=["+@all", "-time"])
        assert examined(url, mock_kafka.bootstrap_servers).level("clock") == "warning"


def test_a_valkey_is_known_by_its_own_name(redis_url: str, mock_kafka: MockKafka, redis_client: redis.Redis) -> None:
    info = redis_client.info()
    name = f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"
    found = examined(redis_url, mock_kafka.bootstrap_servers)
    assert found.of("redis", name)
    assert found.level("redis-version") == "ok"


def test_a_connection_that_verifies_nothing_is_an_error_of_the_command_too(mock_kafka: MockKafka) -> None:
    found = examined(f"rediss://{NOBODY}/0?ssl_cert_reqs=none", mock_kafka.bootstrap_servers)
    assert found.level("redis-tls") == "error"


@pytest.mark.parametrize(
    ("shift_s", "level"), [(0, "ok"), (0.5, "ok"), (5, "warning"), (-5, "warning"), (60, "error"), (-60, "error")]
)
def test_clocks_that_differ_are_found(
    redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, shift_s: float, level: str
) -> None:
    redis_client.ping()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + shift_s)
    finding = doctor._clock(redis_client)
    assert (finding.check, finding.level) == ("clock", level)
    assert bool(finding.do) == (level != "ok")


def test_a_redis_that_is_away_is_an_error_with_its_reason(mock_kafka: MockKafka) -> None:
    found = examined(f"redis://user:{SECRET}@{NOBODY}/0", mock_kafka.bootstrap_servers)
    assert found.level("redis", "Connection refused") == "error"
    assert found.of("redis")[0]["do"].startswith("Does Redis run, and is KAFKA_DELIVERY_REDIS_URL right?")
    assert found.level("kafka") == "ok"  # the rest is checked all the same
    assert found.code == 1
    assert found.seconds < 20


@pytest.mark.real
def test_a_redis_that_hangs_does_not_hang_the_command(
    start_redis: Callable[..., RealRedis], mock_kafka: MockKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "SECOND_TRY_S", 1 - doctor.REDIS_TIMEOUT_S)  # a second in all
    server = start_redis()
    server.pause()
    found = examined(server.url, mock_kafka.bootstrap_servers)
    assert found.level("redis", "no answer within 1 s") == "error"
    assert found.level("kafka") == "ok"
    assert found.code == 1
    assert found.seconds < 20
