"""`kafka-delivery doctor` finds what would cost records, says what to do, and neither fails nor hangs itself."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from kafka_delivery.settings import Settings
from kafka_delivery_worker import doctor
from kafka_delivery_worker.embedded import MockKafka, free_port
from servers import RealKafka, RealRedis, have_real_redis, missing, wait_until
from stack import Stack

SECRET = "hunter2"  # noqa: S105  # it is in what the tests configure, and must be in nothing that is printed
NOBODY = "127.0.0.1:1"


class Findings:
    """What one run of the command said."""

    def __init__(self, lines: str, code: int, seconds: float) -> None:
        self.all: list[dict[str, str]] = [json.loads(line) for line in lines.splitlines()]
        self.code = code
        self.seconds = seconds

    def of(self, check: str, about: str = "") -> list[dict[str, str]]:
        return [finding for finding in self.all if finding["check"] == check and about in finding["what"]]

    def level(self, check: str, about: str = "") -> str:
        """The level of the one finding of `check` whose text has `about`."""
        (finding,) = self.of(check, about)
        assert bool(finding["do"]) == (finding["level"] != "ok"), finding
        return finding["level"]

    def bad(self, prefix: str = "") -> dict[str, str]:
        """Level by check of all that is not well."""
        return {f["check"]: f["level"] for f in self.all if f["level"] != "ok" and f["check"].startswith(prefix)}


class _Elsewhere:
    """A Kafka by its address only."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers

    def create_topic(self, name: str, partitions: int = 4) -> None:
        raise NotImplementedError


def examined(redis_url: str, bootstrap_servers: str, *arguments: str, **settings: Any) -> Findings:
    """Run the command as its users do."""
    system = Stack(redis_url, _Elsewhere(bootstrap_servers), settings)
    started = time.monotonic()
    done = system.command("doctor", "--json", *arguments, check=False)
    assert done.stderr == ""
    return Findings(done.stdout, done.returncode, time.monotonic() - started)


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., RealRedis]]:
    """Starts servers that end with the test; options with `_` for `-`."""
    if not have_real_redis():
        missing("redis-server")
    with ExitStack() as servers:

        def start(**options: str) -> RealRedis:
            given = {name.replace("_", "-"): value for name, value in options.items()}
            if "cluster-enabled" in given:
                given["cluster-port"] = str(free_port())  # else the port and 10,000, which anybody may have
            return servers.enter_context(RealRedis(tmp_path / uuid.uuid4().hex, options=given))

        yield start


@pytest.fixture
def new_topic() -> str:
    return f"doctor-{uuid.uuid4().hex[:12]}"


# -- Redis


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
        "redis-persistence", "redis-memory", "redis-clients", "redis-replicas", "clock", "kafka", "topic",
        "topic-size", "topic-durability", "dead-letter-topic", "dead-letter-size",
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
        wait_until(lambda: other.info("replication")["master_link_status"] == "up", 20, "the replica to follow")

        assert examined(primary.url, mock_kafka.bootstrap_servers).bad() == {"redis-replicas": "warning"}
        assert examined(replica.url, mock_kafka.bootstrap_servers).bad("redis") == {"redis-mode": "error"}
        one.config_set("min-replicas-to-write", 1)
        assert examined(primary.url, mock_kafka.bootstrap_servers).bad() == {}


def test_an_aof_that_cannot_be_written_is_an_error() -> None:
    # A full disk is not to be had on demand; what INFO says then is known.
    wrong = {"aof_enabled": 1, "aof_last_write_status": "err"}
    assert doctor._persistence(wrong, {"appendfsync": "everysec"}).level == "error"
    assert doctor._persistence(wrong | {"aof_last_write_status": "ok"}, {"appendfsync": "everysec"}).level == "ok"


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


@pytest.mark.parametrize(
    ("version", "level"), [("6.0.16", "error"), ("6.2.0", "ok"), ("10.0.1", "ok"), (None, "error")]
)
def test_an_old_redis_is_an_error(version: str | None, level: str) -> None:
    assert doctor._version({"redis_version": version}).level == level


@pytest.mark.parametrize(
    ("url", "level"),
    [
        ("redis://127.0.0.1:6379/0", "ok"),
        ("redis://localhost/0", "ok"),
        ("redis://[::1]:6379/0", "ok"),
        ("redis+socket:///run/redis.sock", "ok"),
        ("redis://10.0.0.5:6379/0", "warning"),
        ("redis://:secret@redis.example.org/0", "warning"),
        ("redis://localhost/0;redis://redis.example.org/0", "warning"),
        ("rediss://redis.example.org/0", "ok"),
        ("rediss://redis.example.org/0?ssl_ca_certs=/etc/ca.pem", "ok"),
        ("rediss://redis.example.org/0?ssl_cert_reqs=required", "ok"),
        ("rediss://redis.example.org/0?ssl_cert_reqs=none", "error"),
        ("rediss://redis.example.org/0?ssl_cert_reqs=CERT_NONE", "error"),
        ("rediss://redis.example.org/0?ssl_check_hostname=false", "warning"),
    ],
)
def test_a_connection_that_others_can_read_or_fake_is_found(url: str, level: str) -> None:
    (finding,) = doctor._encryption(url)
    assert (finding.check, finding.level) == ("redis-tls", level)


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
    assert found.of("redis")[0]["do"].startswith(f"is a Redis at redis://{NOBODY}/0, ")
    assert found.level("kafka") == "ok"  # the rest is checked all the same
    assert found.code == 1
    assert found.seconds < 20


@pytest.mark.real
def test_a_redis_that_hangs_does_not_hang_the_command(
    start_redis: Callable[..., RealRedis], mock_kafka: MockKafka
) -> None:
    server = start_redis()
    server.pause()
    found = examined(server.url, mock_kafka.bootstrap_servers)
    assert found.level("redis", "no answer within 5 s") == "error"
    assert found.level("kafka") == "ok"
    assert found.code == 1
    assert found.seconds < 20


# -- Kafka


def test_a_kafka_that_is_away_is_an_error_with_its_reason(redis_url: str) -> None:
    found = examined(redis_url, NOBODY)
    assert found.level("kafka", "Connection refused") == "error"
    assert NOBODY in found.of("kafka")[0]["do"]
    assert found.code == 1
    assert found.seconds < 20


def test_a_kafka_that_hangs_does_not_hang_the_command(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are accepted, nobody ever answers
        found = examined(redis_url, f"127.0.0.1:{silent.getsockname()[1]}")
    assert found.level("kafka") == "error"
    assert found.seconds < 20


def test_what_has_no_timeout_of_its_own_does_not_hang_the_command_either() -> None:
    end, ended = threading.Event(), threading.Event()

    def endless() -> Iterator[doctor.Finding]:
        yield doctor.Finding("first", "ok", "fine")
        end.wait(60)
        ended.set()
        yield doctor.Finding("late", "ok", "never seen")

    try:
        findings = list(doctor._within(0.3, "slow", endless(), "do this"))
        assert not ended.is_set()
    finally:
        end.set()
    assert [(f.check, f.level, f.do) for f in findings] == [("first", "ok", ""), ("slow", "error", "do this")]


def test_an_error_that_nobody_expected_is_a_finding_without_its_text() -> None:
    def broken() -> Iterator[doctor.Finding]:
        yield doctor.Finding("first", "ok", "fine")
        raise ValueError(f"cannot parse {SECRET}")

    _, finding = doctor._within(1, "broken", broken(), "do this")
    assert (finding.check, finding.level, finding.do) == ("broken", "error", "do this")
    assert "ValueError" in finding.what
    assert SECRET not in finding.what


def test_a_mechanism_that_the_library_lacks_is_an_error_that_names_it(redis_url: str, mock_kafka: MockKafka) -> None:
    lacking = json.dumps({"security.protocol": "sasl_ssl", "sasl.mechanism": "NTLM", "sasl.password": SECRET})
    found = examined(redis_url, mock_kafka.bootstrap_servers, PRODUCER=lacking)
    assert found.level("sasl", "NTLM") == "error"
    assert found.code == 1
    assert SECRET not in str(found.all)


def test_a_mechanism_that_is_not_used_is_a_warning(redis_url: str, mock_kafka: MockKafka) -> None:
    unused = json.dumps({"sasl.mechanism": "PLAIN", "sasl.username": "me", "sasl.password": SECRET})
    found = examined(redis_url, mock_kafka.bootstrap_servers, PRODUCER=unused)
    assert found.level("sasl", "PLAIN") == "warning"
    assert found.level("librdkafka") == "ok"


@pytest.mark.real
def test_a_password_that_kafka_refuses_is_an_error_and_is_not_shown(
    real_redis: RealRedis, real_kafka: RealKafka
) -> None:
    properties = {"security.protocol": "sasl_plaintext", "sasl.mechanism": "PLAIN", "sasl.username": "me"}
    given = json.dumps(properties | {"sasl.password": SECRET})
    found = examined(real_redis.url, real_kafka.bootstrap_servers, PRODUCER=given)
    assert found.level("sasl") == "ok"
    assert found.level("kafka", "SASL") == "error"
    assert SECRET not in str(found.all)


def test_a_property_that_the_library_does_not_know_is_an_error(redis_url: str, mock_kafka: MockKafka) -> None:
    found = examined(redis_url, mock_kafka.bootstrap_servers, PRODUCER='{"batch.sizes": 1}')
    assert found.level("librdkafka", "batch.sizes") == "error"
    assert found.code == 1


# -- topics


@pytest.mark.real
def test_a_missing_topic_is_an_error_until_it_is_created(
    real_redis: RealRedis, real_kafka: RealKafka, new_topic: str
) -> None:
    servers = (real_redis.url, real_kafka.bootstrap_servers)
    before = examined(*servers, "--topic", new_topic)
    assert before.level("topic", new_topic) == "error"
    assert before.level("dead-letter-topic", f"{new_topic}-dlq") == "warning"
    assert before.code == 1
    assert partitions(real_kafka, new_topic) == 0  # looking creates nothing

    created = examined(*servers, "--topic", new_topic, "--create", "--partitions", "3", DEAD_LETTER_PARTITIONS=2)
    assert [finding["what"] for finding in created.of("create")] == [
        f"{new_topic} was created with 3 partition(s)",
        f"{new_topic}-dlq was created with 2 partition(s)",
    ]
    assert created.bad("topic") == created.bad("dead") == {}
    assert created.code == 0
    assert (partitions(real_kafka, new_topic), partitions(real_kafka, f"{new_topic}-dlq")) == (3, 2)

    again = examined(*servers, "--topic", new_topic, "--create", "--partitions", "9")
    assert again.of("create") == []
    assert again.code == 0
    assert partitions(real_kafka, new_topic) == 3


@pytest.mark.real
def test_a_topic_that_cannot_be_created_is_an_error(
    real_redis: RealRedis, real_kafka: RealKafka, new_topic: str
) -> None:
    arguments = ("--topic", new_topic, "--create", "--replication", "3")
    found = examined(real_redis.url, real_kafka.bootstrap_servers, *arguments)
    assert found.level("create", f"{new_topic} was not created: INVALID_REPLICATION_FACTOR") == "error"
    assert found.level("create", f"{new_topic}-dlq was not created") == "error"
    assert found.code == 1


def test_a_creation_that_nobody_confirms_is_an_error(
    mock_kafka: MockKafka, monkeypatch: pytest.MonkeyPatch, new_topic: str
) -> None:
    def too_long(*_: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(doctor, "create_topic", too_long)
    s = Settings(bootstrap_servers=mock_kafka.bootstrap_servers)
    found = list(doctor._kafka(s, [new_topic], [], doctor.Creation()))
    assert [finding.level for finding in found if finding.check == "create"] == ["error", "error"]
    assert found[-1].check == "dead-letter-topic"  # and the rest is checked


@pytest.mark.real
def test_topics_that_refuse_what_callers_may_send_are_warnings(
    real_redis: RealRedis, real_kafka: RealKafka, new_topic: str
) -> None:
    small, letters = f"{new_topic}-small", f"{new_topic}-letters"
    real_kafka.create_topic(small, max_message_bytes=1000)
    real_kafka.create_topic(f"{small}-dlq", max_message_bytes=1_008_192)
    real_kafka.create_topic(letters)
    real_kafka.create_topic(f"{letters}-dlq", max_message_bytes=1_008_191)

    found = examined(real_redis.url, real_kafka.bootstrap_servers, "--topic", small, "--topic", letters)
    assert found.level("topic-size", f"{small} takes 1,000 bytes") == "warning"
    assert found.level("topic-size", f"{letters} takes") == "ok"
    assert found.level("dead-letter-size", f"{small}-dlq takes") == "ok"
    assert found.level("dead-letter-size", f"{letters}-dlq takes") == "warning"
    assert found.code == 0

    found = examined(
        real_redis.url, real_kafka.bootstrap_servers, "--topic", small, "--topic", letters, MAX_RECORD_BYTES=1000
    )
    assert found.bad("topic") == found.bad("dead") == {}


@pytest.mark.real
def test_topics_that_confirm_too_little_or_forget_are_found(
    real_redis: RealRedis, real_kafka: RealKafka, new_topic: str
) -> None:
    real_kafka.create_topic(new_topic, min_insync_replicas=2)
    real_kafka.create_topic(f"{new_topic}-dlq", cleanup_policy="compact", retention_ms=-1)
    found = examined(real_redis.url, real_kafka.bootstrap_servers, "--topic", new_topic)
    assert found.level("topic-durability", f"{new_topic} confirms") == "warning"
    assert found.level("topic-durability", f"{new_topic}-dlq confirms") == "ok"
    assert found.level("dead-letter-topic", "for ever") == "warning"
    assert found.code == 0


@pytest.mark.parametrize(
    ("copies", "least", "level"), [(1, 1, "ok"), (3, 1, "warning"), (3, 2, "ok"), (3, 3, "ok"), (2, 3, "warning")]
)
def test_confirmed_by_one_of_many_replicas_is_a_warning(copies: int, least: int, level: str) -> None:
    assert doctor._durability("orders", copies, least).level == level


@pytest.mark.real
def test_topics_that_only_the_counters_know_are_looked_at_but_not_created(
    start_redis: Callable[..., RealRedis], real_kafka: RealKafka, new_topic: str
) -> None:
    typo = f"{new_topic}-typo"
    real_kafka.create_topic(new_topic)
    server = start_redis(maxmemory="100mb")
    with redis.Redis.from_url(server.url) as client:
        client.hset("kafka-delivery:counts:1", mapping={f"delivered:{new_topic}": 5, f"parked:{typo}": 1, "parked:": 2})

    found = examined(server.url, real_kafka.bootstrap_servers, "--create")

    assert found.level("topic", new_topic + " has") == "ok"
    assert found.level("topic", f"{typo} does not exist") == "warning"
    assert len(found.of("topic")) == 2
    assert {finding["what"].split()[0] for finding in found.of("create")} == {f"{new_topic}-dlq", f"{typo}-dlq"}
    assert partitions(real_kafka, typo) == 0
    assert found.code == 0

    named = examined(server.url, real_kafka.bootstrap_servers, "--topic", new_topic)
    assert [finding["what"].split()[0] for finding in named.of("topic")] == [new_topic]


@pytest.mark.real
def test_a_missing_dead_letter_topic_is_fine_where_workers_create_it(
    real_redis: RealRedis, real_kafka: RealKafka, new_topic: str
) -> None:
    real_kafka.create_topic(new_topic)
    servers = (real_redis.url, real_kafka.bootstrap_servers)
    found = examined(*servers, "--topic", new_topic, CREATE_DEAD_LETTER_TOPICS="true")
    assert found.level("dead-letter-topic", f"{new_topic}-dlq does not exist yet") == "ok"
    found = examined(*servers, "--topic", new_topic)
    assert found.level("dead-letter-topic", f"{new_topic}-dlq does not exist,") == "warning"


def test_a_name_that_no_topic_can_have_is_an_error(redis_url: str, mock_kafka: MockKafka) -> None:
    found = examined(redis_url, mock_kafka.bootstrap_servers, "--topic", "no good", "--topic", "t" * 249)
    assert found.level("topic", "'no good' cannot be") == "error"
    assert found.level("topic", "tttt' cannot be") == "error"


def test_a_cluster_that_does_not_tell_its_settings_is_a_warning(redis_url: str, mock_kafka: MockKafka) -> None:
    mock_kafka.create_topic("orders")  # the mock does not answer the request for them
    found = examined(redis_url, mock_kafka.bootstrap_servers, "--topic", "orders")
    assert found.level("topic-settings", "orders: _TIMED_OUT") == "warning"
    assert found.level("topic", "orders has 4 partition(s), 3 replica(s)") == "ok"
    assert found.of("topic-size") == []


def partitions(kafka: RealKafka, topic: str) -> int:
    """How many partitions the topic has; 0 if it does not exist."""
    metadata = kafka.admin.list_topics(timeout=10).topics.get(topic)
    return 0 if metadata is None else len(metadata.partitions)


# -- the command


def test_a_wrong_setting_is_a_finding(redis_url: str) -> None:
    found = examined(redis_url, NOBODY, LINGER_M="5")
    (finding,) = found.all
    assert (finding["check"], finding["level"]) == ("settings", "error")
    assert "did you mean KAFKA_DELIVERY_LINGER_MS?" in finding["what"]
    assert found.code == 1


def test_people_get_marks_and_what_to_do(mock_kafka: MockKafka) -> None:
    system = Stack(f"redis://:{SECRET}@{NOBODY}/0", mock_kafka, {})
    done = system.command("doctor", "--topic", "[red]", check=False)
    assert done.returncode == 1
    assert done.stderr == ""
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "✓ settings understood" in text
    assert f"✗ redis OperationalError: Error 111 connecting to {NOBODY}. Connection refused." in text
    assert "To do: is a Redis at" in text
    assert "✗ topic '[red]' cannot be" in text
    assert text.endswith("2 error(s), 0 warning(s), 4 ok")
    assert SECRET not in text


def test_a_terminal_that_knows_only_ascii_gets_words(mock_kafka: MockKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = Stack(f"redis://{NOBODY}/0", mock_kafka, {}).command("doctor", check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "| error |" in done.stdout


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}@{NOBODY}/0",
        f"redis://:{SECRET}/{SECRET}@{NOBODY}/0",
        f"redis://:a[{SECRET}@{NOBODY}/0",
        f"redis://:{SECRET}#{SECRET}@{NOBODY}/0",
        f"redis://:{SECRET}?{SECRET}@{NOBODY}/0",
        f"redis://:{SECRET}@x@{NOBODY}/0",
        f"redis://:{SECRET}@{NOBODY}/0;redis://:{SECRET}@{NOBODY}/1",
        f"rediss://:{SECRET}@{NOBODY}/0?ssl_password={SECRET}",
    ],
)
def test_no_password_is_shown_however_the_url_is_malformed(url: str, mock_kafka: MockKafka) -> None:
    found = examined("redis://", mock_kafka.bootstrap_servers, REDIS_URL=url)
    assert found.code == 1
    assert SECRET not in str(found.all)
