"""What tests of sends in flight ask of the worker, of Redis and of Kafka."""

from __future__ import annotations

import json
from typing import Any

import redis

from kafka_delivery import app
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka
from stack import Stack

TOPIC = "in-flight"


PAYLOAD = "secret-payload"


def kafka_of(system: Stack) -> MockKafka:
    assert isinstance(system.kafka, MockKafka)
    return system.kafka


def inspected(what: str) -> Any:
    """What the one worker says when it is asked."""
    for _ in range(5):
        try:
            replies = getattr(app.control.inspect(timeout=5, limit=1), what)()
        except redis.ConnectionError:  # a test has broken all connections
            continue
        if replies:
            (reply,) = replies.values()
            return reply
    raise AssertionError(f"no answer to inspect {what}")


def in_flight() -> int:
    count: int = inspected("stats")["pool"]["in-flight"]
    return count


def held(system: Stack) -> dict[bytes, bytes]:
    """Delivery tag -> message of all that workers hold."""
    keys = system.redis.scan_iter("kafka-delivery:held:1:*")
    return {tag: item for key in keys for tag, item in system.redis.hgetall(key).items()}


def queued(system: Stack) -> list[str]:
    """Ids of what waits, the next one first."""
    return [json.loads(item)["headers"]["id"] for item in reversed(system.redis.lrange("kafka-delivery", 0, -1))]


def break_connections(system: Stack) -> None:
    """End all connections to Redis but the one that asks for it."""
    for kind in ("pubsub", "normal"):
        system.redis.client_kill_filter(_type=kind, skipme=True)


def down_for_long(system: Stack) -> None:
    """Take Kafka down without that workers stop claiming after a few seconds of it."""
    kafka_of(system).down()
    system.command("breaker", "force-closed", "--reason", "a test")


def delivered(system: Stack) -> int:
    return counts.read(system.redis).get(TOPIC, {}).get("delivered", 0)
