"""A slow Redis ends no less of an outage, and a worker that stands still, or has no Redis, begins none."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from kafka_delivery import circuit, send
from kafka_delivery_worker.embedded import MockKafka, Valkey
from proxy import Proxy
from scenarios.circuits import QUICK, state
from servers import wait_until
from stack import Stack, Worker, stack
from watching import ALONE

pytestmark = pytest.mark.long

TOPIC = "steady"
STALL_S = 4
LOG = "kafka-delivery:cb:1:{default}:log"


@pytest.fixture
def mock() -> Iterator[MockKafka]:
    with MockKafka(1) as kafka:
        kafka.create_topic(TOPIC, 1)
        kafka.create_topic(f"{TOPIC}-dlq", 1)
        yield kafka


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(directory=tmp_path, appendonly="yes", appendfsync="always") as server:
        yield server


@pytest.fixture
def system(valkey: Valkey, mock: MockKafka) -> Iterator[Stack]:
    with stack(valkey.url, mock, **QUICK | {"STALL_S": STALL_S, "ENQUEUE_TIMEOUT_S": 10}) as system:
        yield system


def warm(system: Stack, *workers: Worker) -> None:
    for worker in workers:
        worker.wait_ready()
    for n in range(5 * len(workers)):
        send.delay(TOPIC, f"warm {n}")
    system.wait_empty()


@pytest.mark.parametrize(("delay_s", "jitter_s"), [(0.15, 0.1), (2.0, 0.5)])
def test_an_outage_ends_though_redis_is_slow(
    system: Stack, valkey: Valkey, mock: MockKafka, delay_s: float, jitter_s: float
) -> None:
    """Its records are delivered with the latency still on."""
    port = urlsplit(valkey.url).port
    assert port is not None
    with Proxy(port) as network:
        # Celery sends a heartbeat every two seconds, and its event loop waits for each.
        worker = system.worker(*ALONE, "--without-heartbeat", REDIS_URL=network.redis_url, SUCCESS_THRESHOLD=1)
        warm(system, worker)
        mock.down()
        sent = {send.delay(TOPIC, f"first {n}").id for n in range(10)}
        wait_until(lambda: state() == "open", 60, "the circuit to open")
        network.slow(delay_s, jitter_s)
        sent |= {send.delay(TOPIC, f"then {n}").id for n in range(10)}
        trips = circuit().trips
        wait_until(lambda: state() == "half-open" or circuit().trips > trips, 60, "another look")
        mock.up()
        system.wait_for(TOPIC, sent, 120)
        wait_until(lambda: state() == "closed", 60, "the circuit to close")
        assert "breaker.detached" not in worker.log
        assert system.read(f"{TOPIC}-dlq") == []


def test_who_stands_still_or_has_no_redis_opens_nothing(system: Stack, valkey: Valkey, mock: MockKafka) -> None:
    """Kafka is well all the time, with records in flight, some of which time out before anybody looks."""
    system.settings |= {"REQUEST_TIMEOUT_MS": "2000", "MESSAGE_TIMEOUT_MS": "5000"}
    workers = [system.worker(*ALONE, ready=False) for _ in range(2)]
    warm(system, *workers)

    def in_flight() -> None:
        mock.delay(-1, 3_000)
        for n in range(40):
            send.delay(TOPIC, f"{n}")
        wait_until(lambda: system.redis.llen("kafka-delivery") == 0, 60, "them to be claimed")
        assert system.waiting

    in_flight()
    for worker in workers:
        worker.signal(signal.SIGSTOP)
    mock.delay(-1, 0)
    time.sleep(STALL_S + 3)
    for worker in workers:
        worker.signal(signal.SIGCONT)
    system.wait_empty(60)

    in_flight()
    valkey.stop()
    mock.delay(-1, 0)
    time.sleep(STALL_S + 2)
    valkey.start()
    system.wait_empty(60)

    for worker in workers:
        wait_until(lambda worker=worker: "breaker.attached" in worker.log, 60, "a worker to look")  # type: ignore[misc]
        assert "circuit." not in worker.log
    assert system.redis.exists(LOG) == 0
    assert system.read(f"{TOPIC}-dlq") == []
    assert len(set(system.ids(TOPIC))) == 10 + 2 * 40
