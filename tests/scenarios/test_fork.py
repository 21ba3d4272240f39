"""Each process that sends has a Kafka client that was born in it: a parent that made one before it forked harms nobody.

An inherited client would take every record, send none, and never say so.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_delivery import send, send_many
from kafka_delivery_worker.embedded import MockKafka
from servers import wait_until
from stack import Stack, stack
from watching import emptied, other_worker

TOPIC = "forked"

PARENT_SENDS_FIRST = """
    import os

    from celery import signals

    from kafka_delivery import Record
    from kafka_delivery_worker import app, engine

    # Before there is a pool: this process has a client with threads and a connection, and its children inherit it.
    print("parent delivered", engine.current().deliver(Record("forked", "parent", message_id="parent")), flush=True)

    @signals.task_prerun.connect
    def say(task_id, **_):
        print(f"{task_id} runs in {os.getpid()}", flush=True)
"""


@pytest.fixture
def system(redis_url: str) -> Iterator[Stack]:
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield system


def test_children_of_a_parent_with_a_client(system: Stack, tmp_path: Path) -> None:
    worker = other_worker(
        system, tmp_path, PARENT_SENDS_FIRST, "-P", "prefork", "-c", "2", "--max-tasks-per-child", "5"
    )
    ids = {send.delay(TOPIC, str(n)).id for n in range(20)}
    send_many.delay([{"topic": TOPIC, "value": n, "message_id": n} for n in ("x", "y")])

    system.wait_for(TOPIC, ids | {"parent", "x", "y"})
    system.wait_empty()

    assert max(Counter(system.ids(TOPIC)).values()) == 1
    pids = {line.rpartition(" ")[2] for line in worker.log.splitlines() if " runs in " in line}
    assert len(pids) > 2, "children were replaced, and the new ones sent too"
    assert str(worker.pid) not in pids
    worker.stop(30)
    assert worker.process.returncode == 0


def test_a_child_that_dies_has_a_successor(system: Stack, tmp_path: Path) -> None:
    """What it was about to send comes back, and a process forked later sends it."""
    kafka = system.kafka
    assert isinstance(kafka, MockKafka)
    worker = other_worker(system, tmp_path, PARENT_SENDS_FIRST, "-P", "prefork", "-c", "1", MESSAGE_TIMEOUT_MS=60_000)
    kafka.down()
    sent = send.delay(TOPIC, "x")
    wait_until(lambda: f"{sent.id} runs in" in worker.log, 60, "the send to begin")
    child = int(worker.log.partition(f"{sent.id} runs in ")[2].split()[0])
    os.kill(child, signal.SIGKILL)
    kafka.up()
    system.wait_for(TOPIC, {sent.id})
    system.wait_empty()
    assert worker.process.poll() is None
