"""The story of an outage in which Sentry's SDK puts a dictionary of its own into the headers of messages.

Told with the newest SDK by a scenario, and with an older one by the tests of the package.
"""

from __future__ import annotations

import json
from pathlib import Path

from kafka_delivery import circuit
from kafka_delivery_worker.embedded import MockKafka
from scenarios.circuits import outcomes, state
from servers import wait_until
from stack import Stack
from watching import ALONE, other_worker

TOPIC = "nested"

SET_UP = """
import sentry_sdk
from sentry_sdk.integrations.celery import CeleryIntegration

class Nowhere(sentry_sdk.transport.Transport):
    def capture_envelope(self, envelope):
        pass

    def capture_event(self, event):
        pass

sentry_sdk.init(
    "http://key@127.0.0.1:9/1", transport=Nowhere, traces_sample_rate=1.0, integrations=[CeleryIntegration()]
)
"""

SEND = """
import contextlib, sys
from kafka_delivery import send

{set_up}

with {transaction}:
    for name in {names}:
        send.apply_async(({topic!r}, "x"), task_id=name, ignore_result=False)
    for name in {plain}:
        send.apply_async(({topic!r}, "x"), task_id=name, link_error=send.si({topic!r}, "never"))
"""


def outage(system: Stack, kafka: MockKafka, folder: Path, path: str, caller: bool, worker: bool) -> None:
    """Kafka goes away and comes back; all that was sent meanwhile arrives, without an attempt or a dead letter.

    Args:
        folder: for the worker's module.
        path: where the SDK lies; "" for that of this environment.
        caller, worker: where Sentry is set up.
    """
    env = {"PYTHONPATH": ":".join(part for part in (path, system.env().get("PYTHONPATH", "")) if part)}

    def sent(*names: str) -> set[str]:
        half = len(names) // 2
        system.application(
            SEND.format(
                set_up=SET_UP if caller else "",
                transaction='sentry_sdk.start_transaction(name="request")' if caller else "contextlib.nullcontext()",
                names=names[:half],
                plain=names[half:],
                topic=TOPIC,
            ),
            **env,
        )
        return set(names)

    if worker:
        (folder / "sitecustomize.py").write_text(f"import sys\nsys.path[:0] = {[path] if path else []}\n")
        other_worker(system, folder, SET_UP + "\nfrom kafka_delivery_worker import app\n")
    else:
        system.worker(*ALONE)
    ids = sent("warm-1", "warm-2")
    system.wait_for(TOPIC, ids)
    kafka.down()
    ids |= sent(*(f"first-{n}" for n in range(8)))
    wait_until(lambda: state() != "closed", 60, "the circuit to open")
    ids |= sent(*(f"then-{n}" for n in range(8)))
    if caller:
        raw = system.redis.lindex("kafka-delivery", 0)
        assert isinstance(raw, bytes)
        assert isinstance(json.loads(raw)["headers"]["headers"], dict), "Sentry does nest; or this shows nothing"
    wait_until(lambda: state() == "half-open" or circuit().trips >= 2, 60, "a round to begin")
    kafka.up()
    wait_until(lambda: state() == "closed", 60, "the circuit to close")
    system.wait_for(TOPIC, ids, 60)
    system.wait_empty()
    assert system.read(f"{TOPIC}-dlq") == []
    assert system.parked() == []
    wait_until(lambda: outcomes(system, TOPIC).get("delivered") == len(ids), 60, "all to be counted")
    assert set(outcomes(system, TOPIC)) <= {"delivered", "deferred"}, "no attempt is used"
