"""`kafka-delivery doctor` finds what is wrong with the way to Kafka and with its security, and does not hang."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from integration.doctor.findings import NOBODY, SECRET, Findings, examined
from kafka_delivery_worker import doctor
from kafka_delivery_worker.embedded import MockKafka
from servers import RealKafka, RealRedis


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each answer of Kafka that does not come."""
    monkeypatch.setattr(doctor, "KAFKA_TIMEOUT_S", 1.0)


def with_reason(reason: str, redis_url: str, bootstrap_servers: str, **settings: Any) -> Findings:
    """What the command finds, when librdkafka has said why in time: a machine that stands still keeps it from that."""
    for _ in range(20):
        found = examined(redis_url, bootstrap_servers, **settings)
        if found.of("kafka", reason):
            break
    return found


@pytest.mark.usefixtures("hasty")
def test_a_kafka_that_is_away_is_an_error_with_its_reason(redis_url: str) -> None:
    found = with_reason("Connection refused", redis_url, NOBODY)
    assert found.level("kafka", "Connection refused") == "error"
    assert NOBODY in found.of("kafka")[0]["do"]
    assert found.code == 1
    assert found.seconds < 20


@pytest.mark.usefixtures("hasty")
def test_a_kafka_that_hangs_does_not_hang_the_command(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are accepted, nobody ever answers
        found = examined(redis_url, f"127.0.0.1:{silent.getsockname()[1]}")
    assert found.level("kafka") == "error"
    assert found.seconds < 20


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
@pytest.mark.usefixtures("hasty")
def test_a_password_that_kafka_refuses_is_an_error_and_is_not_shown(
    real_redis: RealRedis, real_kafka: RealKafka
) -> None:
    properties = {"security.protocol": "sasl_plaintext", "sasl.mechanism": "PLAIN", "sasl.username": "me"}
    given = json.dumps(properties | {"sasl.password": SECRET})
    found = with_reason("SASL", real_redis.url, real_kafka.bootstrap_servers, PRODUCER=given)
    assert found.level("sasl") == "ok"
    assert found.level("kafka", "SASL") == "error"
    assert SECRET not in str(found.all)


def test_a_property_that_the_library_does_not_know_is_an_error(redis_url: str, mock_kafka: MockKafka) -> None:
    found = examined(redis_url, mock_kafka.bootstrap_servers, PRODUCER='{"batch.sizes": 1}')
    assert found.level("librdkafka", "batch.sizes") == "error"
    assert found.code == 1
