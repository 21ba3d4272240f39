"""`kafka-delivery status` tells what workers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kafka_delivery import send
from servers import wait_until
from stack import Stack
from watching import ALONE, other_worker

STRANGER = """
    from celery import Celery

    app = Celery("stranger")
    app.conf.broker_url = "{url}"
"""


def status(system: Stack) -> dict[str, Any]:
    """What the command prints for programs: one object."""
    found: dict[str, Any] = json.loads(system.command("status", "--json").stdout)
    return found


@pytest.mark.parametrize("transport", ["celery", "leased"])
def test_what_workers_do_is_seen(delivery: Stack, topic: str, tmp_path: Path, transport: str) -> None:
    worker = delivery.worker(*ALONE, TRANSPORT=transport)
    other_worker(delivery, tmp_path, STRANGER.format(url=delivery.settings["REDIS_URL"]))
    for n in range(3):
        send.delay(topic, n.to_bytes())
    send.apply_async((topic, "later"), countdown=600)
    wait_until(lambda: status(delivery)["topics"].get(topic, {}).get("delivered") == 3, 60, "the counters")
    # A record is counted before its message is let go of.
    wait_until(lambda: not delivery.redis.llen("kafka-delivery") and delivery.waiting == 1, 60, "the later one alone")
    found: dict[str, Any] = {}

    def answered() -> bool:
        found.update(status(delivery))
        return bool(found["workers"])

    wait_until(answered, 60, "the worker to answer in time")
    # The worker of somebody else's app in the same database is alive too, but delivers nothing.
    (name,) = found["workers"]
    assert name.startswith("w0@")
    assert found["queues"] == {"kafka-delivery": 0, "kafka-delivery-dlq": 0}
    assert found["in_flight"] + found["delayed"]["kafka-delivery"] == 1  # the one with a countdown
    if transport == "leased":
        assert found["next_due"]["kafka-delivery"]["in_s"] == pytest.approx(600, abs=60)

    worker.stop()
    after = status(delivery)
    assert after["workers"] == []
    assert after["queues"]["kafka-delivery"] + after["delayed"]["kafka-delivery"] == 1
