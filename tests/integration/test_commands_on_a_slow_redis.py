"""Behind a slow and uneven network commands answer, only later: none takes a caller's short timeout for its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kafka_delivery.names import QUEUE
from kafka_delivery.settings import Settings
from kafka_delivery_worker.embedded import MockKafka, Valkey
from kafka_delivery_worker.metrics.fleet import FleetCollector
from kafka_delivery_worker.parking import ParkingStore
from letters import bury
from parked_items import park
from proxy import Proxy
from stack import Stack, stack

CALLERS_S = "0.02"
"""What a caller waits for one answer: less than each takes here."""

SLOW = (0.05, 0.05)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as valkey:
        yield valkey


@pytest.fixture
def proxy(valkey: Valkey) -> Iterator[Proxy]:
    with Proxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
def system(valkey: Valkey, proxy: Proxy, mock_kafka: MockKafka) -> Iterator[Stack]:
    """This process is near to Redis, and its commands are not. Without a worker."""
    with stack(valkey.url, mock_kafka, ENQUEUE_TIMEOUT_S=CALLERS_S) as system:
        system.settings["REDIS_URL"] = proxy.redis_url
        yield system


def status_answers(system: Stack) -> None:
    found: dict[str, Any] = json.loads(system.command("status", "--json").stdout)
    assert found["workers"] == []
    assert found["circuits"] == {"cluster": "closed"}


def exporter_answers(system: Stack) -> None:
    collector = FleetCollector(Settings.from_env(system.env()))
    up, *rest = collector.collect()
    assert [sample.value for sample in up.samples] == [1]
    assert rest


def test_status_answers(system: Stack, proxy: Proxy) -> None:
    proxy.slow(*SLOW)
    status_answers(system)


def test_what_is_parked_is_sent_again(system: Stack, proxy: Proxy) -> None:
    park(ParkingStore(system.redis), "a")
    proxy.slow(*SLOW)
    assert json.loads(system.command("parked", "redrive", "a", "--yes", "--json").stdout)["redriven"] == 1
    assert system.redis.llen(QUEUE) == 1


def test_dead_letters_are_planned_and_discarded(system: Stack, proxy: Proxy, mock_kafka: MockKafka) -> None:
    for name in ("slow", "slow-dlq"):
        mock_kafka.create_topic(name)
    bury(system, "slow", 3)
    proxy.slow(*SLOW)
    plan = json.loads(system.command("dead-letters", "redrive", "slow", "--dry-run", "--json").stdout)
    assert plan["send"] == {"slow": 3}
    done = system.command("dead-letters", "discard", "slow", "--all", "--reason", "x", "--yes", "--json")
    assert json.loads(done.stdout)["discarded"] == 3


def test_the_doctor_measures_it(system: Stack, proxy: Proxy) -> None:
    proxy.slow(*SLOW)
    done = system.command("doctor", "--json", check=False)
    findings = {one["check"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert findings["redis"]["level"] == "ok"
    latency = findings["redis-latency"]
    assert latency["level"] == "error"
    assert f"a send gives up after KAFKA_DELIVERY_ENQUEUE_TIMEOUT_S={CALLERS_S}" in latency["what"]
    proxy.slow(0)
    system.settings["ENQUEUE_TIMEOUT_S"] = "30"
    done = system.command("doctor", "--json", check=False)
    levels = {one["check"]: one["level"] for one in map(json.loads, done.stdout.splitlines())}
    assert levels["redis-latency"] == "ok"


def test_the_exporter_answers(system: Stack, proxy: Proxy) -> None:
    proxy.slow(*SLOW)
    exporter_answers(system)
