"""What tests of sends in flight ask of the worker, of Redis and of Kafka."""

from __future__ import annotations

import json
from typing import Any

import redis

from kafka_delivery import app, send_many
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka
from servers import wait_until
from stack import Stack, Worker
from watching import ALONE, outage_after_the_first_answer

TOPIC = "in-flight"
PAYLOAD = "secret-payload"


def kafka_of(system: Stack) -> MockKafka:
    assert isinstance(system.kafka, MockKafka)
    return system.kafka


def inspected(what: str) -> Any:
    """What the one worker says when it is asked."""
    for _ in range(10):
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


def wait_settled(system: Stack) -> None:
    """Wait until the worker has answered three times in a row and taken nothing meanwhile: it takes no more by itself.

    It asks Redis for more on each turn of its event loop, and an answer is a turn.
    """
    seen: list[set[bytes]] = []

    def same() -> bool:
        inspected("stats")
        seen.append(set(held(system)))
        return len(seen) > 3 and all(one == seen[-1] for one in seen[-4:])

    wait_until(same, 60, "the worker to take no more")


def without_circuits(system: Stack) -> None:
    """Let no outage stop the claims: some seconds of one would, and how many pass here is the machine's affair."""
    system.command("breaker", "force-closed", "--reason", "a test")


def down_for_long(system: Stack) -> None:
    """Take Kafka down without that workers stop claiming after a few seconds of it."""
    without_circuits(system)
    wait_until(lambda: all("producer.ready" in one.log for one in system.workers), 60, "Kafka's first answer")
    kafka_of(system).down()


def worker_in_an_outage(system: Stack, *arguments: str, **changes: Any) -> Worker:
    """A worker that claims its first message after such an outage has begun."""
    without_circuits(system)
    with outage_after_the_first_answer(system, kafka_of(system)):
        return system.worker(*ALONE, *arguments, **changes)


def wait_connected_again(worker: Worker, connections: int) -> None:
    """Wait until a worker has connected to Redis since it had done so this often."""
    wait_until(lambda: connected(worker) > connections, 60, "the worker to connect again")


def connected(worker: Worker) -> int:
    """How often a worker has connected to Redis."""
    return worker.log.count("Connected to")


def delivered(system: Stack) -> int:
    return counts.read(system.redis).get(TOPIC, {}).get("delivered", 0)


def batches(count: int, size: int) -> list[str]:
    """Queue `count` batches of so many records; return the ids of the records."""
    ids = [[f"{number}.{place}" for place in range(size)] for number in range(count)]
    for batch in ids:
        send_many.delay([{"topic": TOPIC, "value": "x", "message_id": each} for each in batch])
    return [each for batch in ids for each in batch]
