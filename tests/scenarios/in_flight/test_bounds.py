"""How much may be in flight is bounded, in number and in bytes. A broken connection changes nothing of it."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path

from kafka_delivery import dead_letter, send, send_many
from scenarios.in_flight.asking import (
    TOPIC,
    batches,
    break_connections,
    connected,
    delivered,
    down_for_long,
    held,
    in_flight,
    inspected,
    kafka_of,
    queued,
    wait_connected_again,
    wait_settled,
    worker_in_an_outage,
)
from servers import wait_until
from stack import Stack
from watching import ALONE, revoke


def test_the_number_in_flight_is_bounded_also_after_a_broken_connection(own: Stack) -> None:
    """Kafka is down, so what is in flight stays there; Redis's connections break again and again."""
    ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(300)])
    worker = worker_in_an_outage(own, MAX_IN_FLIGHT=50)
    wait_until(lambda: len(held(own)) == 50, 60, "fifty in flight")
    for _ in range(3):
        before = connected(worker)
        break_connections(own)
        wait_connected_again(worker, before)
        wait_settled(own)
        assert len(held(own)) == 50
    assert queued(own) == ids[50:]
    stats = inspected("stats")
    assert stats["pool"]["in-flight"] == 50
    assert stats["prefetch_count"] == 50
    kafka_of(own).up()
    own.wait_for(TOPIC, set(ids))
    own.wait_empty()
    assert Counter(own.ids(TOPIC)).most_common(1)[0][1] == 1


def test_after_a_broken_connection_it_is_as_fast_as_before(own: Stack) -> None:
    """Celery would leave room for a handful of messages, and raise it only for what goes its own way."""
    worker = own.worker(*ALONE)
    down_for_long(own)
    ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(400)])
    wait_until(lambda: in_flight() == 400, 60, "all to be in flight")
    before = connected(worker)
    break_connections(own)
    wait_connected_again(worker, before)
    ids += send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(400)])
    wait_until(lambda: in_flight() == 800, 60, "all to be in flight")
    kafka_of(own).up()
    own.wait_for(TOPIC, set(ids))


def test_bytes_in_flight_are_bounded(own: Stack) -> None:
    """A hundred records of 900 kB: neither Redis's hands nor the worker's memory are full of them."""
    bound = 5_000_000
    for n in range(100):
        send.delay(TOPIC, b"\xff" * 900_000, key=str(n))
    worker = worker_in_an_outage(own, MAX_IN_FLIGHT_BYTES=bound)
    wait_until(lambda: in_flight() > 0, 60, "something in flight")
    wait_settled(own)

    sizes = [len(item) for item in held(own).values()]
    assert sum(sizes) - max(sizes) < bound
    assert len(sizes) + len(queued(own)) == 100
    status = Path(f"/proc/{worker.pid}/status").read_text()
    (rss_kb,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    assert rss_kb < 220_000

    kafka_of(own).up()
    wait_until(lambda: delivered(own) == 100, 60, "all to be delivered")  # the mock keeps only the newest
    own.wait_empty()


def test_bytes_that_wait_for_threads_are_bounded_too(own: Stack) -> None:
    bound = 2_000_000
    for _ in range(40):
        send_many.delay([{"topic": TOPIC, "value": b"\xff" * 90_000} for _ in range(3)])
    worker_in_an_outage(own, "-c", "2", MAX_IN_FLIGHT_BYTES=bound)
    wait_until(lambda: len(held(own)) > 2, 60, "some to be claimed")
    wait_settled(own)
    sizes = [len(item) for item in held(own).values()]
    assert sum(sizes) - max(sizes) < bound
    kafka_of(own).up()
    wait_until(lambda: delivered(own) == 120, 60, "all to be delivered")


def test_what_waits_for_a_thread_is_not_repeated_after_a_broken_connection(own: Stack) -> None:
    """The pool starts it all the same; what it was given is the worker's."""
    ids = [dead_letter.delay(TOPIC, "x").id.removesuffix("-dlq") for _ in range(20)]
    worker = worker_in_an_outage(own, "-c", "2")
    wait_until(lambda: len(held(own)) == 20, 60, "all to be claimed")
    before = connected(worker)
    break_connections(own)
    wait_connected_again(worker, before)
    wait_settled(own)
    kafka_of(own).up()
    own.wait_for(f"{TOPIC}-dlq", set(ids))
    own.wait_empty()
    assert set(Counter(own.ids(f"{TOPIC}-dlq")).values()) == {1}


class TestBatches:
    """Plain batches are in flight as sends are; those for which there is no room wait in the worker."""

    def test_what_is_in_flight_is_bounded_and_the_rest_waits_its_turn(self, own: Stack) -> None:
        ids = batches(12, 1_000)
        worker_in_an_outage(own)
        wait_until(lambda: len(held(own)) == 12, 60, "all to be claimed")
        wait_until(lambda: in_flight() >= 4_000, 60, "some to be in flight")
        wait_settled(own)
        assert in_flight() < 6_000
        assert len(inspected("active")) + len(inspected("reserved")) == 12
        kafka_of(own).up()
        own.wait_for(TOPIC, set(ids))
        own.wait_empty()
        assert len(own.ids(TOPIC)) == len(ids)
        wait_until(lambda: in_flight() == 0, 60, "nothing in flight")

    def test_what_waits_is_not_repeated_after_a_broken_connection(self, own: Stack) -> None:
        ids = batches(12, 1_000)
        worker = worker_in_an_outage(own)
        wait_until(lambda: in_flight() >= 4_000, 60, "some to be in flight")
        before = connected(worker)
        break_connections(own)
        wait_connected_again(worker, before)
        wait_settled(own)
        wait_until(lambda: len(held(own)) == 12, 60, "all to be held")
        kafka_of(own).up()
        own.wait_for(TOPIC, set(ids))
        own.wait_empty()
        assert len(own.ids(TOPIC)) == len(ids)

    def test_one_that_is_revoked_while_it_waits_is_parked(self, own: Stack) -> None:
        batches(8, 1_000)
        last = send_many.delay([{"topic": TOPIC, "value": "x", "message_id": "last"}])
        worker_in_an_outage(own)
        wait_until(lambda: last.id in [each["id"] for each in inspected("reserved")], 60, "the last to wait")
        revoke(last.id)
        kafka_of(own).up()
        own.wait_empty()
        assert [(item.id, item.kind) for item in own.parked()] == [("last", "revoked")]
        assert "last" not in own.ids(TOPIC)


def test_numbers_that_librdkafka_cannot_take_are_parked(own: Stack) -> None:
    """By a caller in another language, say. They must not count as in flight for ever."""
    send.delay(TOPIC, "x")
    (raw,) = own.redis.lpop("kafka-delivery", 1)
    good = json.loads(raw)
    for place, value in ((7, 10**30), (7, 0), (6, 2**40), (6, -1), (5, [[1, "x"]])):
        args, kwargs, embed = json.loads(base64.b64decode(good["body"]))
        args[0][place] = value
        args[0][8] = task_id = f"{place}-{value}"[:20]
        body = base64.b64encode(json.dumps([args, kwargs, embed]).encode()).decode()
        message = good | {"body": body, "headers": good["headers"] | {"id": task_id}}
        own.redis.lpush("kafka-delivery", json.dumps(message))
    worker = own.worker(*ALONE, SHUTDOWN_TIMEOUT_S=150)
    own.wait_parked(5)
    own.wait_empty()
    assert {item.kind for item in own.parked()} == {"invalid"}
    assert in_flight() == 0
    worker.stop(60)  # it waits for none of them
