"""Kafka dies for a minute under load: everything accepted is delivered, nothing dead-lettered, no attempt used."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from kafka_delivery import EnqueueError, send
from kafka_delivery.record import uuid7
from servers import RealKafka, RealRedis
from stack import message_id, stack

OUTAGE_S = 60
RATE = 100  # sends a second


@pytest.mark.real
@pytest.mark.timeout(600)
@pytest.mark.parametrize("message_timeout_ms", [120_000, 10_000], ids=["ridden out in librdkafka", "timing out"])
def test_an_outage_of_a_minute(tmp_path: Path, message_timeout_ms: int) -> None:
    timeouts = {"MESSAGE_TIMEOUT_MS": message_timeout_ms, "REQUEST_TIMEOUT_MS": 5_000}
    with (
        RealKafka(tmp_path / "kafka") as kafka,
        RealRedis(tmp_path / "redis") as redis,
        stack(redis.url, kafka, **timeouts, DEFER_S=5, DEFER_MAX_S=10) as system,
    ):
        kafka.create_topic("orders")
        kafka.create_topic("orders-dlq")
        system.worker()
        accepted: list[str] = []
        stop = threading.Event()

        def load() -> None:
            while not stop.wait(1 / RATE):
                message_id = uuid7()
                while not stop.is_set():
                    try:
                        accepted.append(send.delay("orders", "x" * 200, message_id=message_id).id)
                        break
                    except EnqueueError:
                        continue  # as an application should: the same record, the same id

        sender = threading.Thread(target=load)
        sender.start()
        time.sleep(10)  # under load for a while
        kafka.kill()
        before = len(accepted)
        time.sleep(OUTAGE_S)
        during = len(accepted) - before
        kafka.start()
        back = time.monotonic()
        time.sleep(10)
        stop.set()
        sender.join()
        system.wait_empty(timeout=240)
        drained = time.monotonic() - back

        delivered = Counter(message_id(record) for record in system.read("orders"))
        dead = system.ids("orders-dlq")
        parked = system.parked()
        counts = json.loads(system.command("status", "--json").stdout)["topics"]["orders"]

    lost = set(accepted) - set(delivered)
    print(  # noqa: T201  # what the run is for
        f"\naccepted {len(accepted)} ({during} during the outage), delivered {len(delivered)}, "
        f"dead-lettered {len(dead)}, lost {len(lost)}, duplicates {delivered.total() - len(delivered)}, "
        f"empty {drained:.0f} s after the broker was back\n{counts}"
    )
    assert not lost
    assert not dead
    assert not parked
    assert counts["retried"] == 0
