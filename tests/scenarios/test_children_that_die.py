"""A record with which its child of prefork dies, again and again, is parked after so many deaths, with a pause between
them. Everything else is delivered meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_delivery import names, send, send_many
from kafka_delivery_worker.embedded import MockKafka
from stack import Stack, stack
from watching import emptied, other_worker

TOPIC = "deadly"
DEATHS = 3
LEASE_S = 3

DEADLY = """
    import os, signal
    from kafka_delivery_worker import app, engine

    def wrapped(real):
        def deliver(self, what, *args, **kwargs):
            for record in what if isinstance(what, list | tuple) else [what]:
                if record.id.startswith("exits"):
                    os._exit(1)
                if record.id.startswith("killed"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if record.id.startswith("raises"):
                    raise SystemExit(3)
            return real(self, what, *args, **kwargs)
        return deliver

    engine.Engine.deliver = wrapped(engine.Engine.deliver)
    engine.Engine.deliver_many = wrapped(engine.Engine.deliver_many)
"""


@pytest.fixture
def system(redis_url: str) -> Iterator[Stack]:
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, LEASE_S=LEASE_S, MAX_DEATHS=DEATHS) as system:
        kafka.create_topic(TOPIC)
        yield system


def test_they_are_parked_as_poison_and_nothing_else_is(system: Stack, tmp_path: Path) -> None:
    worker = other_worker(system, tmp_path, DEADLY, "-P", "prefork", "-c", "2")
    deadly = [send.delay(TOPIC, "v", message_id=name).id for name in ("exits", "killed", "raises")]
    send_many.delay([{"topic": TOPIC, "value": "v", "message_id": name} for name in ("exits-too", "beside")])
    well = {send.delay(TOPIC, "v").id for _ in range(20)}

    system.wait_for(TOPIC, well)
    parked = system.wait_parked(5)
    system.wait_empty()

    assert sorted((item.id, item.kind, item.content) for item in parked) == [
        (name, "poison", "record") for name in sorted([*deadly, "exits-too", "beside"])
    ]
    assert {item.error_message for item in parked} == {f"{DEATHS} processes died while they held it"}
    received = [worker.log.count(f"[{name}] received") for name in deadly]
    assert received == [DEATHS] * len(deadly), "it was handed out without a pause, or once too often"
    assert not system.redis.exists(names.DEATHS), "a death is remembered that is settled"
