"""A bug of ours loses no record: what fails in a way that nobody planned is parked with the place of the fault and
without its text, which may quote a payload; and if it cannot be parked, it stays in the queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_delivery import Record, dead_letter, send, send_many
from kafka_delivery.record import member_id
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import Parked, ParkingStore
from servers import wait_until
from stack import Stack, stack
from watching import emptied, other_worker, watched_events

TOPIC = "unexpected"
PAYLOAD = "secret-payload"

FAULTY = """
    from kafka_delivery_worker import app, batch_lane, engine, lane, parking

    def broken(self, *args, **kwargs):
        raise ZeroDivisionError("secret-payload")

    engine.Engine.deliver = engine.Engine.deliver_many = engine.Engine.deliver_dead_letter = broken
    lane.Lane.take = batch_lane.BatchLane.take = lambda self, message: False  # every send goes through its task
"""

FAULTY_AND_UNABLE_TO_PARK = (
    FAULTY
    + """
    import pathlib

    park_all = parking.ParkingStore.park_all

    def unable(self, items):
        if not pathlib.Path(FLAG).exists():
            raise ConnectionError("Redis is away")
        return park_all(self, items)

    parking.ParkingStore.park_all = unable
    engine.REQUEUE_PAUSE_S = 0.3
"""
)

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


@pytest.mark.parametrize("pool", [(), ("-P", "prefork", "-c", "2")], ids=["in-flight", "prefork"])
def test_it_is_parked_with_the_place_and_without_the_text(system: Stack, tmp_path: Path, pool: tuple[str, ...]) -> None:
    worker = other_worker(system, tmp_path, FAULTY, "-E", *pool)
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
        "the worker's log": worker.log,
        "task events": str(events.all),
        "results": str([system.redis.get(key) for key in system.redis.scan_iter("celery-task-meta-*")]),
    }
    assert [place for place, text in seen.items() if PAYLOAD in text] == []


def test_what_cannot_be_parked_stays_in_the_queue(system: Stack, tmp_path: Path) -> None:
    flag = tmp_path / "may-park"
    worker = other_worker(system, tmp_path, FAULTY_AND_UNABLE_TO_PARK.replace("FLAG", repr(str(flag))))
    send.delay(TOPIC, PAYLOAD, message_id="single")
    letter = dead_letter.delay(TOPIC, PAYLOAD, message_id="letter")
    # It comes back, again and again, with a pause, and is never gone in between.
    wait_until(lambda: min(worker.log.count(f"[{i}] received") for i in ("single", letter.id)) >= 3, 60, "three rounds")
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
