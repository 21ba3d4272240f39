"""A send that expired or was revoked is parked with that reason, never silently gone; and whoever watches workers and
events sees which record it was and never what is in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain

from kafka_delivery import app, dead_letter, send, send_many
from kafka_delivery.results import Result
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import Parked, ParkingStore
from servers import wait_until
from stack import Stack, stack
from watching import ALONE, bring_forward, emptied, revoke, watched_events

TOPIC = "revocable"
PAYLOAD = "secret-payload"
DELAYED = "kafka-delivery:delayed:1:kafka-delivery"


@pytest.fixture(scope="module")
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield kafka


@pytest.fixture(scope="module")
def system(redis_url: str, mock: MockKafka) -> Iterator[Stack]:
    """One worker with one thread for what is no plain send; what cannot be sent is tried again soon."""
    changes = {"MESSAGE_TIMEOUT_MS": 2500, "REQUEST_TIMEOUT_MS": 1000}
    with stack(emptied(redis_url), mock, **changes) as system:
        system.worker(*ALONE, "-c", "1", "-E")
        yield system


@pytest.fixture
def kafka_down(mock: MockKafka) -> Iterator[MockKafka]:
    mock.down()
    yield mock
    mock.up()


def wait_stored(system: Stack, item_id: str) -> Parked:
    store = ParkingStore(system.redis)
    wait_until(lambda: store.get(item_id) is not None, 60, f"{item_id} to be parked")
    item = store.get(item_id)
    assert item is not None
    return item


def inspected(what: str) -> list[dict[str, Any]]:
    """What the workers say when they are asked for their requests of one kind."""
    replies = getattr(app.control.inspect(timeout=5, limit=1), what)() or {}
    for worker, reply in replies.items():
        assert isinstance(reply, list), f"{worker} answered inspect {what} with {reply}"
    return [request.get("request", request) for requests in replies.values() for request in requests]


def wait_inspected(what: str, ids: set[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = inspected(what)
        return ids <= {request["id"] for request in found}

    wait_until(there, 60, f"{ids} to be {what}")
    return found  # what was seen then: it may have gone on


class TestParked:
    def test_expired(self, system: Stack) -> None:
        sent = send.apply_async((TOPIC, PAYLOAD), {"key": "k"}, countdown=2, expires=1)

        item = wait_stored(system, sent.id)

        assert (item.kind, item.content, item.topic) == ("expired", "record", TOPIC)
        assert "expires" in item.error_message
        system.wait_empty()
        assert sent.id not in system.ids(TOPIC)

    def test_expired_before_there_was_room_for_it(self, system: Stack, kafka_down: MockKafka) -> None:
        """It lay in the queue, or reserved in the worker, for longer than it was wanted."""
        in_front = send.delay(TOPIC, "in front")
        sent = send.apply_async((TOPIC, PAYLOAD), expires=0.5)
        assert wait_stored(system, sent.id).kind == "expired"
        kafka_down.up()
        system.wait_for(TOPIC, {in_front.id})

    def test_retry_of_an_expired_one_delivers_it(self, system: Stack) -> None:
        sent = send.apply_async((TOPIC, PAYLOAD), countdown=1, expires=0.5)
        wait_stored(system, sent.id)
        system.command("parked", "retry", sent.id, "--yes")
        system.wait_for(TOPIC, {sent.id})

    def test_revoked_before_a_worker_took_it(self, system: Stack) -> None:
        revoke("revoked-first")
        send.delay(TOPIC, PAYLOAD, message_id="revoked-first")

        item = wait_stored(system, "revoked-first")

        assert (item.kind, item.content, item.topic) == ("revoked", "record", TOPIC)
        assert "revoked" in item.error_message
        system.wait_empty()
        assert "revoked-first" not in system.ids(TOPIC)

    def test_revoked_while_it_waits_for_its_time(self, system: Stack) -> None:
        sent = send.apply_async((TOPIC, PAYLOAD), countdown=3600)
        wait_until(lambda: system.redis.zcard(DELAYED) == 1, 60, "it to be put aside")
        revoke(sent.id)
        assert bring_forward(system.redis) == 1
        assert wait_stored(system, sent.id).kind == "revoked"
        system.wait_empty()
        assert sent.id not in system.ids(TOPIC)

    def test_retry_of_a_revoked_one_delivers_it(self, system: Stack) -> None:
        """Workers remember for hours whom they were told to revoke; a person has decided otherwise since."""
        revoke("revoked-and-wanted")
        send.delay(TOPIC, PAYLOAD, message_id="revoked-and-wanted")
        wait_stored(system, "revoked-and-wanted")
        system.command("parked", "retry", "revoked-and-wanted", "--yes")
        system.wait_for(TOPIC, {"revoked-and-wanted"})

    def test_a_revoked_batch_is_parked_record_by_record(self, system: Stack) -> None:
        revoke("batch")
        send_many.apply_async(([{"topic": TOPIC, "value": PAYLOAD}, {"topic": TOPIC, "value": "2"}],), task_id="batch")
        items = [wait_stored(system, item_id) for item_id in ("batch.0", "batch.1")]
        assert [(item.kind, item.content, item.topic) for item in items] == [("revoked", "record", TOPIC)] * 2
        system.wait_empty()
        assert ParkingStore(system.redis).get("batch") is None
        system.command("parked", "retry", "batch.1", "--yes")
        system.wait_for(TOPIC, {"batch.1"})
        assert "batch.0" not in system.ids(TOPIC)

    def test_a_batch_that_something_waits_for_is_parked_whole_and_found_by_its_records(self, system: Stack) -> None:
        """Its callback is called once, after all of it; no record of it can stand for that."""
        batch = [{"topic": TOPIC, "value": PAYLOAD, "message_id": f"linked-{n}"} for n in range(2)]
        after = send.si(TOPIC, "after", message_id="after-the-batch").set(task_id="after-the-batch")
        send_many.apply_async((batch,), task_id="linked", expires=-1, link=after)
        item = wait_stored(system, "linked")
        assert (item.kind, item.content) == ("expired", "call")
        found = json.loads(system.command("trace", "linked-1", "--topic", TOPIC, "--json", check=False).stdout)
        assert (found["where"], found["batch"], found["parked_id"]) == ("parked", "linked", "linked")
        assert "after-the-batch" not in system.ids(TOPIC)
        system.command("parked", "redrive", "linked", "--yes")
        system.wait_for(TOPIC, {"linked-0", "linked-1", "after-the-batch"})

    @pytest.mark.smoke
    def test_what_was_to_follow_a_parked_record_follows_its_redrive(self, system: Stack) -> None:
        def then(name: str) -> Any:
            return send.si(TOPIC, name, message_id=name).set(task_id=name)

        send.apply_async((TOPIC, PAYLOAD), {"message_id": "first"}, expires=-1, link=then("linked-to-first"))
        chain(then("step-1").set(expires=-1), then("step-2"), then("step-3")).apply_async()
        items = [wait_stored(system, item_id) for item_id in ("first", "step-1")]
        assert [item.content for item in items] == ["record", "record"]
        system.wait_empty()
        system.command("parked", "redrive", "first", "step-1", "--yes")
        system.wait_for(TOPIC, {"first", "linked-to-first", "step-1", "step-2", "step-3"})

    def test_retry_of_what_is_revoked_again_loses_nothing(self, system: Stack) -> None:
        """Sent now, or parked again: it is somewhere when the queue is empty."""
        ids = {f"revoked-{n}" for n in range(10)}
        for item_id in ids:
            revoke(item_id)
            send.delay(TOPIC, PAYLOAD, message_id=item_id)
        for item_id in ids:
            wait_stored(system, item_id)
        system.command("parked", "retry", *ids, "--yes")
        system.wait_empty()
        assert ids - {item.id for item in system.parked()} - set(system.ids(TOPIC)) == set()

    @pytest.mark.parametrize("plain", [True, False])
    def test_a_running_send_goes_on_but_its_next_attempt_is_revoked(
        self, system: Stack, kafka_down: MockKafka, plain: bool
    ) -> None:
        """Neither a record in librdkafka's hands nor a thread can be called back."""
        sent = send.apply_async((TOPIC, PAYLOAD), ignore_result=plain)
        wait_inspected("active", {sent.id})
        revoke(sent.id, terminate=True)

        assert wait_stored(system, sent.id).kind == "revoked"
        kafka_down.up()
        system.wait_empty()
        after = send.delay(TOPIC, "after")
        system.wait_for(TOPIC, {after.id})


class TestShown:
    @pytest.mark.parametrize("kind", ["plain send", "send with a result", "batch"])
    def test_inspect_active(self, system: Stack, kafka_down: MockKafka, kind: str) -> None:
        record = {"topic": TOPIC, "value": PAYLOAD, "key": PAYLOAD, "headers": {"h": PAYLOAD}}
        sent: Result[Any]
        if kind == "batch":
            sent = send_many.delay([record])
        else:
            sent = send.apply_async((), record, ignore_result=kind == "plain send")

        asked: list[Any] = []

        def known() -> bool:  # between two attempts it is in Redis
            asked.append(app.control.inspect(timeout=5, limit=1).query_task(sent.id))
            return sent.id in json.dumps(asked[-1])

        active = wait_inspected("active", {sent.id})
        wait_until(known, 60, "the worker to know it")

        assert PAYLOAD not in json.dumps([active, asked])
        (shown,) = [request for request in active if request["id"] == sent.id]
        assert shown["name"].startswith("kafka_delivery.send")
        assert "bytes" in shown["args"]
        kafka_down.up()
        system.wait_empty()

    def test_inspect_reserved(self, system: Stack, kafka_down: MockKafka) -> None:
        """The one thread is busy; what came after it waits in the worker."""
        record = {"topic": TOPIC, "value": PAYLOAD, "key": PAYLOAD, "headers": {"h": PAYLOAD}}
        first = send_many.apply_async(([record],), ignore_result=False)
        wait_inspected("active", {first.id})
        second = send_many.apply_async(([record],), ignore_result=False)

        reserved = wait_inspected("reserved", {second.id})

        assert PAYLOAD not in json.dumps(reserved)
        kafka_down.up()
        system.wait_empty()

    def test_events(self, system: Stack, mock: MockKafka) -> None:
        """A send that is retried, one that succeeds, a dead letter, an invalid one, a batch."""
        from confluent_kafka import KafkaError

        system.wait_empty()
        with watched_events() as events:
            mock.fail_next(KafkaError.FENCED_LEADER_EPOCH)
            retried = send.delay(TOPIC, PAYLOAD, key=PAYLOAD, headers={"h": PAYLOAD})
            events.wait_for(retried.id, "task-succeeded")
            mock.fail_next(KafkaError.POLICY_VIOLATION)
            refused = send.delay(TOPIC, PAYLOAD, key=PAYLOAD, headers={"h": PAYLOAD})
            events.wait_for(refused.id, "task-failed")
            events.wait_for(f"{refused.id}-dlq", "task-succeeded")
            letter = dead_letter.delay(TOPIC, PAYLOAD, error_message="why")
            events.wait_for(letter.id, "task-succeeded")
            batch = send_many.delay([{"topic": TOPIC, "value": PAYLOAD}])
            events.wait_for(batch.id, "task-succeeded")
            revoke("in-events")
            send.delay(TOPIC, PAYLOAD, message_id="in-events")
            events.wait_for("in-events", "task-revoked")
            shown = json.dumps(events.all, default=str)

        assert PAYLOAD not in shown
        assert retried.id in shown
        (received, *_) = events.of(retried.id)
        assert TOPIC in received["args"]
        assert PAYLOAD not in system.workers[0].log

    def test_events_of_sends_by_name(self, system: Stack) -> None:
        """A chain, beat or `send_task` writes the arguments into its message as text; the worker passes none on."""
        system.wait_empty()
        with watched_events() as events:
            app.send_task(send.name, (TOPIC, PAYLOAD), {"key": PAYLOAD}, task_id="by-name", queue="kafka-delivery")
            events.wait_for("by-name", "task-succeeded")
            app.send_task(
                send.name, ("no topic!", PAYLOAD), {"key": PAYLOAD}, task_id="by-name-2", queue="kafka-delivery"
            )
            events.wait_for("by-name-2", "task-failed")
            shown = json.dumps(events.all, default=str)

        assert PAYLOAD not in shown
        assert PAYLOAD not in system.workers[0].log


def test_a_running_send_is_ended_in_a_process_of_its_own(system: Stack, mock: MockKafka) -> None:
    """Last in this file: another worker, with prefork, takes over."""
    system.workers[0].stop()
    mock.down()
    try:
        prefork = system.worker(*ALONE, "-P", "prefork", "-c", "1", MESSAGE_TIMEOUT_MS=150_000)
        sent = send.delay(TOPIC, PAYLOAD)
        wait_inspected("active", {sent.id})
        started = time.monotonic()
        revoke(sent.id, terminate=True)

        item = wait_stored(system, sent.id)

        assert time.monotonic() - started < 100, "it would have taken longer by itself"
        assert (item.kind, item.content) == ("revoked", "record")
        assert "may have been delivered" in item.error_message
    finally:
        mock.up()
    after = send.delay(TOPIC, "after")
    system.wait_for(TOPIC, {after.id})
    system.wait_empty()
    assert [one.id for one in system.parked()].count(sent.id) == 1
    assert prefork.process.poll() is None
    assert PAYLOAD not in prefork.log
