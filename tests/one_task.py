"""One task in this process, run by Celery's own tracer, with a stand-in for what a worker's engine would do."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import kombu
import pytest
from celery import states
from celery.app.trace import build_tracer

from kafka_delivery import RejectedError, app, base, delivery, names, send
from kafka_delivery.disposition import BLAMED_AFTER, Circuit
from kafka_delivery_worker.failures import Failed
from servers import AnyRedis
from stack import stack

TOPIC = "t"


class Engine:
    """What a task asks of a worker process."""

    def __init__(self) -> None:
        self.stopping = False
        self.pauses = 0
        self.delivered: list[str] = []
        self.parked: list[tuple[str, str | None]] = []
        self.refuse: set[str] = set()
        self.at_delivery: Callable[[], object] = lambda: None
        self.fail: Exception | None = None
        self.when_queued_again: Callable[[], object] = lambda: None
        self.at_pause: Callable[[], object] = lambda: None
        self.at_park: Callable[[], object] = lambda: None
        self.processes = BLAMED_AFTER
        self.breaker = SimpleNamespace(is_shut=lambda topic: False, circuit=lambda topic: Circuit.CLOSED)
        self.asked: list[tuple[Any, int]] = []

    def failed_here(self, message_id: str | None, error: Exception) -> Failed:
        return Failed(self.processes)

    def deliver(self, record: Any, probe: Any = None, redrives: int = 0, tag: str | None = None) -> dict[str, Any]:
        self.asked.append((probe, redrives))
        self.at_delivery()
        if self.fail is not None:
            raise self.fail
        if record.id in self.refuse:
            raise RejectedError("POLICY_VIOLATION", record.topic, record.id, 44, "POLICY_VIOLATION", "topic")
        self.delivered.append(record.id)
        return {
            "topic": record.topic,
            "partition": 0,
            "offset": len(self.delivered),
            "timestamp": 1,
            "message_id": record.id,
        }

    def park_call(self, request: Any, error: Exception, why: str | None = None) -> None:
        self.at_park()
        self.parked.append((request.id, why))

    def sent_again(self, outcome: str, error: Any, retries: int) -> None:
        self.when_queued_again()

    def pause(self, seconds: float) -> None:
        self.pauses += 1
        self.at_pause()


class _NoKafka:
    bootstrap_servers = "127.0.0.1:1"


@contextmanager
def working(redis_url: str, patch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Tasks have an `Engine` and this Redis, which is empty, and takes everything again in the end.

    Messages have no lease, so a pause is made by the task and can be seen.
    """
    engine = Engine()
    for module in (base, delivery):
        patch.setattr(module, "engine", lambda: engine)
    with stack(redis_url, _NoKafka(), TRANSPORT="celery") as system:  # type: ignore[arg-type]
        system.redis.flushall()
        app.finalize()
        yield engine
        for name in ("maxmemory", "min-replicas-to-write"):
            system.redis.config_set(name, 0)
        system.redis.replicaof("NO", "ONE")


def queued(client: AnyRedis, queue: str = names.QUEUE) -> list[dict[str, Any]]:
    """Messages of a queue, the oldest first."""
    return [json.loads(raw) for raw in reversed(client.lrange(queue, 0, -1))]


def ids(client: AnyRedis, queue: str = names.QUEUE) -> list[str]:
    return [message["headers"]["id"] for message in queued(client, queue)]


def take(client: AnyRedis, queue: str = names.QUEUE) -> dict[str, Any]:
    """The oldest message, out of its queue."""
    raw = client.rpop(queue)
    assert isinstance(raw, bytes)
    found: dict[str, Any] = json.loads(raw)
    return found


def run(message: dict[str, Any], task: Any = send) -> Any:
    """Run a message as a worker does; return how the task ended: state and value."""
    decoded = kombu.Message(
        body=b64decode(message["body"]).decode(),
        content_type=message["content-type"], content_encoding=message["content-encoding"],
    ).decode()  # fmt: skip
    args, kwargs, embed = decoded
    request = {
        **message["headers"],
        **embed,
        "delivery_info": message["properties"]["delivery_info"],
        "is_eager": False,
    }
    traced = build_tracer(task.name, task, app=app)(message["headers"]["id"], args, kwargs, request)
    if traced.info is None:
        return states.SUCCESS, traced.retval
    return traced.info.state, traced.info.retval


def step(name: str) -> Any:
    return send.si(TOPIC, name).set(task_id=name)
