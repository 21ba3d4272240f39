"""Workers that are killed all together say nothing about what they held: it is delivered. A record that kills each
worker that takes it, while another lives on, is parked.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_delivery import names, send
from kafka_delivery_worker.embedded import MockKafka
from servers import wait_until
from stack import Stack, Worker, stack
from watching import ALONE, emptied

pytestmark = pytest.mark.long

TOPIC = "looping"
DEATHS = 2
"""So that two rounds would do to park everything."""
WORKERS = 8

HOLDS = """
    import threading
    from kafka_delivery_worker import app, engine

    engine.Engine.deliver = lambda *args, **kwargs: threading.Event().wait()
"""

DIES = """
    import os, signal
    from kafka_delivery_worker import app, engine

    real = engine.Engine.deliver

    def deliver(self, record, *args, **kwargs):
        if record.id == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, record, *args, **kwargs)

    engine.Engine.deliver = deliver
"""


@pytest.fixture
def system(redis_url: str) -> Iterator[Stack]:
    changes = {"LEASE_S": 4, "MAX_DEATHS": DEATHS, "POOL": "threads"}
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, **changes) as system:
        kafka.create_topic(TOPIC)
        yield system


def start(system: Stack, directory: Path, code: str, count: int) -> list[Worker]:
    """Start workers together, whose `-A` module is `code`."""
    (directory / "looping.py").write_text(textwrap.dedent(code))
    env = system.env()
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(directory), env.get("PYTHONPATH"))))
    first = len(system.workers)
    made = [Worker(env, ("-n", f"w{first + n}@%h", "-c", "4", *ALONE), "looping") for n in range(count)]
    system.workers += made
    return [worker.wait_ready() for worker in made]


def held(system: Stack) -> int:
    return sum(system.redis.hlen(key) for key in system.redis.scan_iter(names.HELD + "*"))


def test_eight_that_are_killed_together_again_and_again(system: Stack, tmp_path: Path) -> None:
    ids = set(send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(20)]))
    for _ in range(DEATHS):
        fleet = start(system, tmp_path, HOLDS, WORKERS)
        wait_until(lambda: system.redis.llen(names.QUEUE) == 0 and held(system) == len(ids), 120, "all to be held")
        for worker in fleet:
            worker.process.kill()
        for worker in fleet:
            worker.process.wait()
    system.worker(*ALONE)
    system.wait_for(TOPIC, ids)
    system.wait_empty()
    assert system.parked() == []
    assert not system.redis.exists(names.DEATHS)


def test_of_two_one_dies_each_time(system: Stack, tmp_path: Path) -> None:
    fleet = start(system, tmp_path, DIES, 2)
    ids = set(send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(10)]))
    send.delay(TOPIC, "v", message_id="poison")
    ids |= set(send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(10)]))

    def parked() -> bool:
        """As a supervisor, start again who has died."""
        for place, worker in enumerate(fleet):
            if worker.process.poll() is not None:
                (fleet[place],) = start(system, tmp_path, DIES, 1)
        return bool(system.parked())

    wait_until(parked, 180, "the poison to be parked")
    system.wait_for(TOPIC, ids)
    system.wait_empty()
    assert [(item.id, item.kind) for item in system.parked()] == [("poison", "poison")]
    assert sum(worker.process.poll() is not None for worker in system.workers) == DEATHS
