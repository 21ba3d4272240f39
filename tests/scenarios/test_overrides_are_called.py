"""What this project overrides of kombu and Celery is called by them in the life of a worker."""

from __future__ import annotations

import base64
import json
import signal
import textwrap
from pathlib import Path

from confluent_kafka import KafkaError

from integration.transport.channels import QUEUE, message, queued
from kafka_delivery import app, names, send
from kafka_delivery_worker.embedded import MockKafka, Valkey
from overridden import CLASSES, OVERRIDDEN
from servers import wait_until
from stack import stack
from watching import other_worker, revoke

SMALL = {"MAX_RECORD_BYTES": 10_000, "PARKED_MAX_BYTES": 40_000}

OF_OLD = {"task": send.name, "id": "4", "args": [], "kwargs": "none"}
"""Celery's older form of a message; its keyword arguments are none."""


SPIES = """
    import functools, importlib, os
    from kafka_delivery_worker import app

    def spy(ours, name):
        original = vars(ours)[name]
        if isinstance(original, property):
            return

        @functools.wraps(original)
        def called(self, *args, **kwargs):
            os.write(2, f"CALLED {ours.__name__}.{name}\\n".encode())
            return original(self, *args, **kwargs)

        setattr(ours, name, called)

    for module, name in MODULES:
        ours = getattr(importlib.import_module(module), name)
        for method in METHODS:
            if method.partition(".")[0] == name:
                spy(ours, method.partition(".")[2])
"""


def test_in_the_life_of_a_worker_each_is_called(tmp_path: Path) -> None:
    """Plain and odd sends, garbage, a revoke, remote control, a broken connection, and a stop that does not wait."""
    code = f"MODULES = {[(c.__module__, c.__name__) for c in CLASSES.values()]}\nMETHODS = {list(OVERRIDDEN)}\n"
    with Valkey() as valkey, MockKafka() as kafka, stack(valkey.url, kafka, LEASE_S=5, **SMALL) as system:
        kafka.create_topic("t")
        worker = other_worker(system, tmp_path, code + textwrap.dedent(SPIES), "-E")

        def calls() -> list[str]:
            return [line.split()[1] for line in worker.log.splitlines() if line.startswith("CALLED ")]

        first = send.delay("t", "plain")
        system.wait_for("t", {first.id})
        system.wait_empty()
        order = calls()
        kafka.fail_next(KafkaError.FENCED_LEADER_EPOCH)
        again = send.delay("t", "retried")
        system.wait_for("t", {again.id})
        place = -1
        for name in (
            "TaskPool.__init__", "Consumer.__init__", "Channel.__init__", "Transport.register_with_event_loop",
            "Channel.basic_consume", "Consumer.create_task_handler", "TaskPool.register_with_event_loop",
            "QoS.can_consume", "Channel._brpop_start", "Channel._brpop_read", "Message.__init__", "QoS.append",
            "LaneRequest.__init__", "LaneRequest.acknowledge", "QoS.ack",
        ):  # fmt: skip
            place = order.index(name, place + 1)

        wanted = send.apply_async(("t", "with a result"), ignore_result=False)
        assert wanted.get(timeout=60)["message_id"] == wanted.id
        send.apply_async(("t", "expired"), expires=-1)
        good = json.loads(message("x"))
        for spoil in (
            {"body": "no json"},
            {"headers": {"id": "1", "task": "unheard of"}},
            {"headers": {"id": "2"}},
            {"headers": {"id": "3", "task": send.name, "eta": "never"}},
            {"headers": {}, "body": base64.b64encode(json.dumps(OF_OLD).encode()).decode()},
            {"headers": {"id": "5", "task": send.name, "compression": "unheard-of"}},
        ):
            system.redis.lpush(QUEUE, json.dumps(good | spoil))
        system.wait_parked(7)
        system.wait_empty()
        system.redis.hset(names.PARKED, "large", b"x" * SMALL["PARKED_MAX_BYTES"])  # there is no room for another
        system.redis.delete(names.PARKED_ROOM)
        app.send_task(send.name, ("no topic!", "v"), queue=QUEUE)
        wait_until(lambda: "Request.on_failure" in calls(), 60, "the refusal")

        kafka.down()
        stuck = send.delay("t", "stuck")
        inspect_ = app.control.inspect(timeout=30, limit=1)
        wait_until(lambda: stuck.id in str(inspect_.active() or {}), 60, "the send to be active")
        revoke(stuck.id, terminate=True)
        wait_until(lambda: "LaneRequest.terminate" in calls(), 60, "the revoke")
        assert inspect_.stats()
        before = calls().count("Channel._brpop_start")
        system.redis.client_kill_filter(_type="normal", skipme=True)
        wait_until(lambda: calls().count("Consumer.create_task_handler") == 2, 60, "the worker to connect again")
        wait_until(lambda: calls().count("Channel._brpop_start") > before, 60, "the worker to ask again")
        worker.signal(signal.SIGQUIT)
        worker.process.wait(60)
        # Properties; `inspect` above sees the one, and all messages are read by the other.
        assert set(OVERRIDDEN) - set(calls()) == {"LaneRequest.delivery_info", "Message.body"}
        assert queued(system.redis), "the send that was in flight is back in its queue, at once"
