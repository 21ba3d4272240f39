"""`kafka-delivery doctor` finds topics that are missing, refuse what callers may send, or lose what they confirmed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import redis

from integration.doctor.findings import examined
from kafka_delivery.settings import Settings
from kafka_delivery_worker import doctor
from kafka_delivery_worker.embedded import MockKafka
from servers import RealKafka, RealRedis


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


def test_a_cluster_that_does_not_tell_its_settings_is_a_warning(
    redis_url: str, mock_kafka: MockKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = doctor._Topics._configs

    def hastily(self: Any, topics: Sequence[str]) -> Any:
        with monkeypatch.context() as hasty:
            hasty.setattr(doctor, "KAFKA_TIMEOUT_S", 0.5)
            return configs(self, topics)

    monkeypatch.setattr(doctor._Topics, "_configs", hastily)
    mock_kafka.create_topic("orders")  # the mock does not answer the request for them
    found = examined(redis_url, mock_kafka.bootstrap_servers, "--topic", "orders")
    assert found.level("topic-settings", "orders: ") == "warning"
    # The second is what waits for librdkafka's answer; a machine that stands still may let it be the first to give up.
    assert any(found.of("topic-settings", f"orders: {reason}") for reason in ("_TIMED_OUT", "TimeoutError"))
    assert found.level("topic", "orders has 4 partition(s), 3 replica(s)") == "ok"
    assert found.of("topic-size") == []


def partitions(kafka: RealKafka, topic: str) -> int:
    """How many partitions the topic has; 0 if it does not exist."""
    metadata = kafka.admin.list_topics(timeout=60).topics.get(topic)
    return 0 if metadata is None else len(metadata.partitions)
