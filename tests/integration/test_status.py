"""`kafka-delivery status` tells what waits, what is in flight, who works and what became of records."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from typing import Any

import pytest

from kafka_delivery import dead_letter, send, settings
from kafka_delivery.redis_client import RedisClient
from kafka_delivery_worker import paused
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import Parked, ParkingStore
from servers import RealRedis
from stack import Stack

SECRET = "hunter2"  # noqa: S105  # it is in what the tests configure, and must be in nothing that is printed

DUE_MS = 4_102_444_800_000
DUE = "2100-01-01T00:00:00Z"


def status(system: Stack) -> dict[str, Any]:
    """What the command prints for programs: one object."""
    done = system.command("status", "--json")
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def fill(system: Stack) -> None:
    """Something of everything, and no worker to take it."""
    for priority in (0, 0, 3, 9):
        send.apply_async(("orders", "value"), priority=priority)
    dead_letter.delay("orders", "value")
    system.redis.hset("unacked", mapping={"tag-1": "message", "tag-2": "message"})
    system.redis.zadd("kafka-delivery:leases:1", {"worker-1": 1, "worker-2": 2})
    system.redis.hset("kafka-delivery:held:1:worker-2", "tag-3", "message")
    system.redis.zadd("kafka-delivery:delayed:1:kafka-delivery", {"message": DUE_MS + 5_000, "another": DUE_MS + 9_000})
    system.redis.zadd("kafka-delivery:delayed:1:kafka-delivery\x06\x163", {"message": DUE_MS})
    system.redis.sadd("kafka-delivery:waiting:1", "orders:kafka-delivery")
    system.redis.lpush("kafka-delivery:waiting:1:orders:kafka-delivery", "message", "message")
    store = ParkingStore(system.redis)
    for item_id, kind in (("a", "bug"), ("b", "dead-letter"), ("c", "bug")):
        data = {"task": "t", "id": item_id, "args": [SECRET], "kwargs": {}}
        store.park(Parked(id=item_id, kind=kind, error_class="E", error_message="m", content="call", data=data))
    counts: dict[Any, Any] = {
        "delivered:orders": 7,
        "retried:orders": 2,
        "dead-lettered:bills": 1,
        "deferred:bills": 4,
        "parked:": 3,
    }
    system.redis.hset("kafka-delivery:counts:1", mapping=counts)


def test_programs_get_one_object(delivery: Stack) -> None:
    fill(delivery)
    none = {"delivered": 0, "retried": 0, "deferred": 0, "dead-lettered": 0, "parked": 0}
    found = status(delivery)
    assert 0 < found["parked"].pop("bytes") < found["parked"]["max_bytes"]
    until = found["next_due"]["kafka-delivery"].pop("in_s")
    assert until == pytest.approx(DUE_MS / 1000 - time.time(), abs=30)
    assert found == {
        "queues": {"kafka-delivery": 4, "kafka-delivery-dlq": 1},
        "priorities": {"kafka-delivery": {"3": 1, "9": 1}, "kafka-delivery-dlq": {}},
        "delayed": {"kafka-delivery": 3, "kafka-delivery-dlq": 0},
        "next_due": {"kafka-delivery": {"at": DUE}, "kafka-delivery-dlq": None},
        "put_aside": {"orders": 2},
        "in_flight": 3,
        "parked": {"total": 3, "max_bytes": 512 * 2**20, "kinds": {"bug": 2, "dead-letter": 1}},
        "workers": [],
        "paused": [],
        "unserved": [],
        "circuits": {"cluster": "closed"},
        "topics": {
            "": none | {"parked": 3},
            "bills": none | {"dead-lettered": 1, "deferred": 4},
            "orders": none | {"delivered": 7, "retried": 2},
        },
    }


def test_a_process_that_pauses_itself_is_named_with_the_reason(delivery: Stack) -> None:
    paused.say(RedisClient(settings.current()), "host:7", "there is no Kafka client: ssl.key.location", 5)
    assert status(delivery)["paused"] == [
        {"worker": "host:7", "why": "there is no Kafka client: ssl.key.location", "since_ms": 5}
    ]
    assert "paused: host:7" in delivery.command("status").stdout


def test_people_get_tables(delivery: Stack) -> None:
    fill(delivery)
    done = delivery.command("status")
    assert done.stderr == ""
    assert SECRET not in done.stdout
    rows = [" ".join(line.replace("│", " ").split()) for line in done.stdout.splitlines()]
    assert [re.sub(r"in [\d,]+ s$", "in N s", row) for row in rows if row and row[0] not in "┏┃┡└"] == [
        "Now",
        "waiting in kafka-delivery 4",
        "- of priority 3 1",
        "- of priority 9 1",
        "delayed in kafka-delivery 3",
        f"- the next is due {DUE}, in N s",
        "waiting in kafka-delivery-dlq 1",
        "put aside until orders is well 2",
        "in flight 3",
        "parked 3",
        "- of their room is taken 0.0%",
        "- bug 2",
        "- dead-letter 1",
        "workers none answered",
        "circuit of cluster closed",
        "Since the beginning",
        "(none) 0 0 0 0 3",
        "bills 0 0 4 1 0",
        "orders 7 2 0 0 0",
    ]


def test_what_is_overdue_is_shown_as_late(delivery: Stack) -> None:
    delivery.redis.zadd("kafka-delivery:delayed:1:kafka-delivery-dlq", {"message": time.time() * 1000 - 60_000})
    due = status(delivery)["next_due"]["kafka-delivery-dlq"]
    assert due["in_s"] == pytest.approx(-60, abs=30)
    assert datetime.fromisoformat(due["at"]).timestamp() == pytest.approx(time.time() - 60, abs=30)
    assert re.search(r"the next is due +│ .*Z, \d+ s late", delivery.command("status").stdout)


def test_without_redis_it_ends_with_one_sentence(mock_kafka: MockKafka) -> None:
    done = Stack(f"redis://:{SECRET}@127.0.0.1:1/0", mock_kafka, {}).command("status", "--json", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "kafka-delivery: Redis at redis://127.0.0.1:1/0: nothing listens there (Error 111 connecting to"
    )
    assert SECRET not in line


@pytest.mark.real
def test_a_redis_that_hangs_does_not_hang_the_command(real_redis: RealRedis, mock_kafka: MockKafka) -> None:
    real_redis.pause()
    started = time.monotonic()
    try:
        done = Stack(real_redis.url, mock_kafka, {}).command("status", check=False)
    finally:
        real_redis.resume()
    assert time.monotonic() - started < 20
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kafka-delivery: Redis at {real_redis.url}: it is connected, and has not answered in time")
