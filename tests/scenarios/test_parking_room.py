"""A full parking store throws nothing away and takes nothing in: whatever was to be parked waits in its queue, is
looked at ever more seldom, holds up nobody, and is parked when there is room.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from kafka_delivery import Record, app, dead_letter, names, send, send_many
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import ParkingStore
from servers import wait_until
from stack import Stack, Worker, message_id, stack
from watching import ALONE, emptied, looks, other_worker, revoke

TOPIC = "room"
PAYLOAD = "secret-payload"
ROOM = 40_000

WORKER = """
    from kafka_delivery import disposition
    from kafka_delivery_worker import app, engine, parking

    disposition.BLAMED_AFTER = 1  # there is one process only
    parking.FIRST_PAUSE_S, parking.LONGEST_PAUSE_S = 0.5, 2.0
    deliver = engine.Engine.deliver

    def broken(self, record, *more, **named):
        if record.topic == "bug":
            raise LookupError("nobody planned this")
        return deliver(self, record, *more, **named)

    engine.Engine.deliver = broken
"""
"""A worker that is patient for seconds instead of a minute, and that has a bug."""

POOLS = {"in flight": (), "threads": ("-P", "threads", "-c", "2"), "prefork": ("-P", "prefork", "-c", "2")}


@pytest.fixture(params=["in flight"])
def working(
    request: pytest.FixtureRequest, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    changes = {"MAX_RECORD_BYTES": 10_000, "PARKED_MAX_BYTES": ROOM, "TOPIC_PROPAGATION_MS": 300, "MAX_RETRIES": 1}
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, **changes) as system:
        kafka.create_topic(TOPIC)
        fill(system)
        other_worker(system, tmp_path_factory.mktemp("worker"), WORKER, *POOLS[request.param])
        yield system


def fill(system: Stack) -> None:
    """As if a worker of an older version had parked something large."""
    system.redis.hset(names.PARKED, "large", json.dumps({"data": "null"}) + " " * ROOM)


def make_room(system: Stack) -> None:
    system.redis.hdel(names.PARKED, "large")


def odd(system: Stack) -> set[str]:
    """One of each that is to be parked; their ids."""
    by_name = {"queue": names.QUEUE, "argsrepr": "()", "kwargsrepr": "{}"}
    dead_letter.delay("missing", PAYLOAD, message_id="dead-letter")
    app.send_task(send.name, ("no topic!", PAYLOAD), task_id="invalid", **by_name)
    app.send_task(send.name, ("bug", PAYLOAD), task_id="bug", **by_name)
    app.send_task("kafka_delivery.never", (PAYLOAD,), task_id="unknown-task", **by_name)
    send.apply_async((Record(TOPIC, PAYLOAD, message_id="expired"),), expires=-1)
    revoke("revoked")
    send.delay(TOPIC, PAYLOAD, message_id="revoked")
    envelope = {
        "body": "e30=",
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {"delivery_info": {}, "delivery_tag": "t", "body_encoding": "base64"},
    }
    spoilt: dict[str, dict[str, Any]] = {
        "no-body": {"body": "!"},
        "no-task": {"headers": {"id": "no-task"}},
        "rejected": {"headers": {"id": "rejected", "task": send.name, "eta": "9999-12-31T23:59:59-14:00"}},
    }
    for item_id, change in spoilt.items():
        headers = {"id": item_id, "task": send.name}
        system.redis.lpush(names.QUEUE, json.dumps({**envelope, "headers": headers} | change))
    system.redis.lpush(names.QUEUE, PAYLOAD)  # no message at all
    system.redis.rpush(names.POISON, f"{names.QUEUE}\n" + json.dumps({**envelope, "correlation_id": "poison"}))
    return {"dead-letter", "invalid", "bug", "unknown-task", "expired", "revoked", "poison", *spoilt}


@pytest.mark.parametrize("working", POOLS, indirect=True)
def test_all_that_was_to_be_parked_waits_and_others_flow(working: Stack) -> None:
    system, worker = working, working.workers[0]
    ids = odd(system)
    wait_until(lambda: "parking.full" in worker.log, 60, "the first refusal")
    wait_until(lambda: system.redis.llen(names.QUEUE) == 0, 60, "all to be put off")

    # Several rounds: what is looked for is that nothing comes of them.
    started, tried = time.monotonic(), tries(worker)
    with looks(system.redis) as looked:
        took = looked.claims(25)
    assert took > 25 / 40  # an idle worker claims five times a second
    wait_until(lambda: len(tries(worker) - tried) == len(tries(worker)), 60, "another round of each")
    # As often what went back would come back.
    assert max((tries(worker) - tried).values()) < 2.5 * max(1.0, time.monotonic() - started)
    assert system.waiting == len(ids) + 1  # and what is no message
    assert set(system.redis.hkeys(names.PARKED)) == {b"large"}
    assert PAYLOAD not in worker.log
    assert worker.process.poll() is None

    sent = send.apply_async((TOPIC, "others flow"), ignore_result=False)
    assert sent.get(timeout=20)["message_id"] == sent.id
    assert set(system.ids(TOPIC)) == {sent.id}

    make_room(system)
    wait_until(lambda: system.redis.hlen(names.PARKED) == len(ids) + 1, 60, "all to be parked")
    system.wait_empty()
    parked = {item.id: item for item in system.parked()}
    assert {item_id for item_id in parked if not item_id.startswith("garbage")} == ids
    assert parked["poison"].kind == "poison"
    usage = ParkingStore(system.redis, max_bytes=ROOM).usage()
    assert usage.bytes <= ROOM
    assert set(system.ids(TOPIC)) == {sent.id}  # and nothing of it was sent meanwhile


def test_a_batch_that_waits_for_room_sends_nothing_until_then(working: Stack) -> None:
    """Its good records would be sent again in each round."""
    app.send_task(
        send_many.name,
        ([{"topic": TOPIC, "value": "good"}, {"topic": "no topic!", "value": PAYLOAD}],),
        task_id="batch",
        queue=names.QUEUE,
        argsrepr="()",
        kwargsrepr="{}",
    )
    wait_until(lambda: "parking.full" in working.workers[0].log, 60, "the refusal")
    log = working.workers[0]
    wait_until(lambda: log.log.count("[batch] received") >= 3, 60, "three rounds")
    assert working.read(TOPIC) == []
    make_room(working)
    (record,) = working.wait_for(TOPIC, {"batch.0"})
    assert message_id(record) == "batch.0"
    working.wait_empty()
    assert [item.id for item in working.parked()] == ["batch.1"]


def test_a_worker_that_is_killed_meanwhile_loses_nothing(working: Stack, tmp_path_factory: Any) -> None:
    ids = odd(working) - {"revoked"}  # which is sent: only the worker that was killed knew of it
    wait_until(lambda: "parking.full" in working.workers[0].log, 60, "the first refusal")
    working.workers[0].kill()
    make_room(working)
    next_one = other_worker(working, tmp_path_factory.mktemp("next"), WORKER, LEASE_S=2)
    wait_until(lambda: working.redis.hlen(names.PARKED) == len(ids) + 1, 60, "all to be parked")
    working.wait_empty(60)
    assert ids <= {item.id for item in working.parked()}
    assert next_one.process.poll() is None


def tries(worker: Worker) -> Counter[str]:
    """How often each task was received."""
    return Counter(re.findall(r"\[(\S+)\] received", worker.log))


def test_a_worker_says_how_full_it_is(redis_url: str) -> None:
    """Before anybody looks: in its log, with what takes the room and what may take it."""
    with (
        MockKafka() as kafka,
        stack(emptied(redis_url), kafka, MAX_RECORD_BYTES=10_000, PARKED_MAX_BYTES=ROOM) as system,
    ):
        fill(system)
        worker = system.worker(*ALONE)
        app.send_task(send.name, ("no topic!", "v"), queue=names.QUEUE)
        wait_until(lambda: "parking.full" in worker.log, 60, "the refusal")
        (line, *_) = [line for line in worker.log.splitlines() if "parking.full" in line]
        assert f"max_bytes={ROOM}" in line
        assert "kind=invalid" in line
