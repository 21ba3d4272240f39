"""A stop, of whatever kind, gives back what is in flight: nothing is lost, and what waits keeps its order."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from kafka_delivery import dead_letter, send, send_many
from scenarios.in_flight.asking import (
    TOPIC,
    batches,
    delivered,
    held,
    in_flight,
    inspected,
    kafka_of,
    queued,
    worker_in_an_outage,
)
from servers import wait_until
from stack import Stack, Worker, message_id
from watching import ALONE, other_worker

SOFTLY = """
    from kafka_delivery_worker import app

    app.conf.worker_soft_shutdown_timeout = 1
"""


def start(own: Stack, how: str, directory: Path) -> Worker:
    if how == "soft":
        return other_worker(own, directory, SOFTLY, *ALONE, MAX_IN_FLIGHT=20, SHUTDOWN_TIMEOUT_S=60)
    return own.worker(*ALONE, MAX_IN_FLIGHT=20, SHUTDOWN_TIMEOUT_S=60)


@pytest.mark.parametrize("how", ["warm", "soft", "cold"])
def test_a_stop_under_a_backlog_loses_and_repeats_nothing_and_keeps_the_order(
    own: Stack, tmp_path: Path, how: str
) -> None:
    kafka_of(own).delay(-1, 1_000)
    ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(2_000)])  # a hundred seconds' worth
    worker = start(own, how, tmp_path)
    wait_until(lambda: delivered(own) >= 20, 60, "the first deliveries")

    worker.signal(signal.SIGTERM if how == "warm" else signal.SIGQUIT)
    worker.process.wait(60)

    assert held(own) == {}
    arrived, waiting = own.ids(TOPIC), queued(own)
    assert waiting, "there was no backlog"
    if how == "warm":
        assert arrived + waiting == ids
    assert waiting == [task_id for task_id in ids if task_id in set(waiting)]
    assert set(arrived) | set(waiting) == set(ids)
    assert len(arrived) == len(set(arrived))
    assert not own.redis.exists("kafka-delivery:deaths:2")
    kafka_of(own).delay(-1, 0)
    own.worker(*ALONE)
    own.wait_for(TOPIC, set(ids))
    own.wait_empty()
    records = own.read(TOPIC)
    assert [record.value for record in records][: len(arrived)] == [str(n).encode() for n in range(len(arrived))]
    assert len(records) - len({message_id(record) for record in records}) <= (0 if how == "warm" else 100)


def test_a_cold_stop_does_not_wait_for_kafka(own: Stack) -> None:
    ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(50)])
    letters = [dead_letter.delay(TOPIC, str(n)) for n in range(3)]
    worker = worker_in_an_outage(own, SHUTDOWN_TIMEOUT_S=150)
    wait_until(lambda: in_flight() == 50 and len(inspected("active")) == 53, 60, "all to be in flight")
    worker.signal(signal.SIGQUIT)
    assert worker.process.wait(60) == 0, "Celery's handler of the signal was left by an exception"
    assert queued(own) == ids
    assert own.redis.llen("kafka-delivery-dlq") == len(letters)
    assert not own.redis.exists("kafka-delivery:deaths:2")


def test_a_stop_gives_back_batches_that_wait_in_order(own: Stack) -> None:
    ids = batches(12, 1_000)
    before = queued(own)
    worker = worker_in_an_outage(own, SHUTDOWN_TIMEOUT_S=1)
    wait_until(lambda: in_flight() >= 4_000, 60, "some to be in flight")
    worker.stop(60)  # a report may take twice as long
    assert (queued(own), held(own)) == (before, {})
    assert not own.redis.exists("kafka-delivery:deaths:2")
    kafka_of(own).up()
    own.worker(*ALONE)
    own.wait_for(TOPIC, set(ids))
    own.wait_empty()


LATE = """
    import time
    from celery.worker import state
    from kafka_delivery_worker import app, engine

    deliver_many = engine.Engine.deliver_many

    def late(self, *args):
        while state.should_stop is None:
            time.sleep(0.02)
        time.sleep(1)  # so that the pool waits already, which nothing tells of
        return deliver_many(self, *args)

    engine.Engine.deliver_many = late
"""


def test_a_thread_that_hands_over_a_record_while_the_worker_stops_is_waited_for(own: Stack, tmp_path: Path) -> None:
    """Its report is collected; else the stop would take as long as a report may take, two minutes."""
    records = [{"topic": TOPIC, "value": str(n)} for n in range(30)]
    batch = send_many.apply_async((records,), ignore_result=False)  # which a thread works on
    worker = other_worker(own, tmp_path, LATE, *ALONE)
    wait_until(lambda: [request["id"] for request in inspected("active")] == [batch.id], 60, "the batch to be active")
    worker.stop(60)
    assert (queued(own), held(own)) == ([], {})
    assert len(own.read(TOPIC)) == 30
