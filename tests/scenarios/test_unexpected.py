"""A bug of ours loses no record, and is not charged to one: what fails in a way that nobody planned goes back to its
queue, and is parked only when several processes failed at it, with the place of the fault and without its text, which
may quote a payload. If it cannot be parked, it stays in the queue.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_delivery import Record, dead_letter, send, send_many, settings
from kafka_delivery.disposition import BLAMED_AFTER
from kafka_delivery.record import member_id
from kafka_delivery.redis_client import RedisClient
from kafka_delivery_worker import paused
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import Parked, ParkingStore
from servers import wait_until
from stack import Stack, message_id, stack
from watching import ALONE, emptied, other_worker, watched_events

TOPIC = "unexpected"
PAYLOAD = "secret-payload"

QUICK = """
    from kafka_delivery_worker import failures, standstill

    failures.REQUEUE_PAUSE_S = failures.LONGEST_PAUSE_S = 0.1
    standstill.FIRST_PAUSE_S = standstill.LONGEST_PAUSE_S = 0.2
"""

FAULTY = (
    QUICK
    + """
    from kafka_delivery_worker import app, batch_lane, engine, lane, parking

    def broken(self, *args, **kwargs):
        raise ZeroDivisionError("secret-payload")

    engine.Engine.deliver = engine.Engine.deliver_many = engine.Engine.deliver_dead_letter = broken
    lane.Lane.take = batch_lane.BatchLane.take = lambda self, message: False  # every send goes through its task
"""
)

FAULTY_AND_UNABLE_TO_PARK = (
    FAULTY
    + """
    import pathlib
    from kafka_delivery import base

    park_all = parking.ParkingStore.park_all

    def unable(self, items):
        if not pathlib.Path(FLAG).exists():
            raise ConnectionError("Redis is away")
        return park_all(self, items)

    parking.ParkingStore.park_all = unable
    base.REQUEUE_PAUSE_S = 0.3
"""
)

FAULTY_PRODUCE = """
    from kafka_delivery_worker import app, failures, producer

    failures.REQUEUE_PAUSE_S = failures.LONGEST_PAUSE_S = 0.1

    def broken(self, pending):
        raise TypeError("secret-payload")

    producer.Producer._hand_over = broken
"""

FAULTY_LANE = """
    from kafka_delivery_worker import app, lane

    def broken(self, *args, **kwargs):
        raise ZeroDivisionError("secret-payload")

    lane.Lane._outgoing = broken
"""


@pytest.fixture
def system(redis_url: str) -> Iterator[Stack]:
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        kafka.create_topic(TOPIC)
        yield system


def wait_stored(system: Stack, item_id: str) -> Parked:
    store = ParkingStore(system.redis)
    wait_until(lambda: store.get(item_id) is not None, 60, f"{item_id} to be parked")
    item = store.get(item_id)
    assert item is not None
    return item


@pytest.mark.parametrize("pool", [(), ("-P", "prefork", "-c", "1")], ids=["in-flight", "prefork"])
def test_several_processes_fail_at_it_and_it_is_parked_without_its_text(
    system: Stack, tmp_path: Path, pool: tuple[str, ...]
) -> None:
    for _ in range(BLAMED_AFTER):
        other_worker(system, tmp_path, FAULTY, "-E", *pool)
    record = Record(TOPIC, PAYLOAD, "k", {"h": "v"}, message_id="single")
    with watched_events() as events:
        send.apply_async((record,))
        dead_letter.delay(TOPIC, PAYLOAD, message_id="letter", error_message="why")
        batch = send_many.delay([record, {"topic": TOPIC, "value": PAYLOAD}])

        single = wait_stored(system, "single")
        letter = wait_stored(system, "letter")
        member = wait_stored(system, member_id(batch.id, 1))
        system.wait_empty()
        events.wait_for("single", "task-failed")

    assert (single.kind, single.content, single.topic) == ("bug", "record", TOPIC)
    assert single.error_class == "ZeroDivisionError"
    assert "ZeroDivisionError" in single.error_message
    assert "broken, line " in single.error_message
    assert Record.from_wire(single.data, "default") == record
    assert (letter.kind, letter.content) == ("bug", "record")
    assert (member.kind, member.content, member.topic) == ("bug", "record", TOPIC)
    assert [item.id for item in system.parked() if PAYLOAD in item.error_message] == []
    seen = {
        "the workers' logs": "".join(worker.log for worker in system.workers),
        "task events": str(events.all),
        "results": str([system.redis.get(key) for key in system.redis.scan_iter("celery-task-meta-*")]),
    }
    assert [place for place, text in seen.items() if PAYLOAD in text] == []


def test_one_process_alone_blames_no_record(system: Stack, tmp_path: Path) -> None:
    """Its host may be what is broken. A process that is well delivers it."""
    broken = other_worker(system, tmp_path, FAULTY)
    ids = {send.delay(TOPIC, PAYLOAD).id for _ in range(5)}
    wait_until(lambda: "process.paused" in broken.log, 60, "the process to pause itself")
    wait_until(lambda: broken.log.count("record.failed_here") >= 10, 60, "many failures")
    assert (system.parked(), system.ids(TOPIC), system.waiting) == ([], [], 5)
    assert "Traceback" not in broken.log, "a message that goes back takes more than a line of the log"
    system.worker(*ALONE)
    system.wait_for(TOPIC, ids)
    system.wait_empty()
    assert system.parked() == []


@pytest.mark.parametrize("batch", [False, True], ids=["sends", "a batch"])
def test_a_client_that_raises_is_not_charged_to_a_record(system: Stack, tmp_path: Path, batch: bool) -> None:
    """Say, one that a tracer has wrapped. Nothing was handed over, so nothing is unknown."""
    broken = other_worker(system, tmp_path, FAULTY_PRODUCE)
    ids = [f"m{n}" for n in range(20)]
    records = [{"topic": TOPIC, "value": PAYLOAD, "message_id": name} for name in ids]
    if batch:
        for record in records:
            send_many.delay([record])
    else:
        send.bulk(records)
    wait_until(lambda: bool(paused.read(RedisClient(settings.current()))), 60, "the process to say that it pauses")
    (told,) = json.loads(system.command("status", "--json").stdout)["paused"]
    assert told["why"].startswith("TypeError in broken")
    assert broken.log.count("record.failed_here") < len(ids), "it went on taking messages"
    assert (system.parked(), system.ids(TOPIC)) == ([], [])
    system.worker(*ALONE)
    arrived = system.wait_for(TOPIC, set(ids))
    system.wait_empty()
    assert sorted(message_id(record) for record in arrived) == sorted(ids), "a record was sent twice"
    assert system.parked() == []
    assert PAYLOAD not in broken.log


def test_what_cannot_be_parked_stays_in_the_queue(system: Stack, tmp_path: Path) -> None:
    flag = tmp_path / "may-park"
    for _ in range(3):
        other_worker(system, tmp_path, FAULTY_AND_UNABLE_TO_PARK.replace("FLAG", repr(str(flag))))
    send.delay(TOPIC, PAYLOAD, message_id="single")
    letter = dead_letter.delay(TOPIC, PAYLOAD, message_id="letter")

    def rounds(task_id: str) -> int:
        return sum(worker.log.count(f"[{task_id}] received") for worker in system.workers)

    # It comes back, again and again, with a pause, and is never gone in between.
    wait_until(lambda: min(rounds("single"), rounds(letter.id)) >= 8, 60, "eight rounds")
    assert system.waiting == 2
    assert system.parked() == []

    flag.touch()

    wait_stored(system, "single")
    wait_stored(system, "letter")
    system.wait_empty()


def test_a_fault_in_the_short_way_of_a_plain_send(system: Stack, tmp_path: Path) -> None:
    """It is found before there is a task; the send takes Celery's way then."""
    worker = other_worker(system, tmp_path, FAULTY_LANE)
    sent = send.delay(TOPIC, PAYLOAD)
    system.wait_for(TOPIC, {sent.id})
    system.wait_empty()
    assert f"[{sent.id}] succeeded" in worker.log
    assert PAYLOAD not in worker.log
