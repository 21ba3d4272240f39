"""What the scenario tests use besides `stack`: task events, workers of another `-A` module, an empty Redis."""

from __future__ import annotations

import json
import os
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from kafka_delivery import app, send
from servers import wait_until
from stack import Stack, Worker

ALONE = ("--without-mingle", "--without-gossip")
"""Options of a worker that does not look for others when it starts: it is ready a second sooner."""


@contextmanager
def load(topic: str) -> Iterator[list[str]]:
    """Sends, some fifty a second, while the block runs; yields the ids of what was accepted."""
    accepted: list[str] = []
    enough = threading.Event()

    def send_on() -> None:
        while not enough.wait(0.02):
            accepted.append(send.delay(topic, f"record {len(accepted)}").id)

    loading = threading.Thread(target=send_on)
    loading.start()
    try:
        yield accepted
    finally:
        enough.set()
        loading.join()


def opened(system: Stack, topic: str | None = None) -> str | None:
    """Why a circuit, the cluster's or a topic's, opened the first time; None if it never did."""
    scope = "cluster" if topic is None else f"topic:{topic}"
    changes = map(json.loads, system.command("breaker", "history", "--json").stdout.splitlines())
    opening = [one for one in changes if (one["scope"], one["before"], one["after"]) == (scope, "closed", "open")]
    return str(opening[-1]["why"]) if opening else None


class Events:
    """Task events as Flower gets them; only those sent after it was opened."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def of(self, task_id: str) -> list[dict[str, Any]]:
        """The events of one task, in the order in which they came."""
        return [event for event in list(self.all) if event.get("uuid") == task_id]

    def types(self, task_id: str) -> list[str]:
        return [event["type"] for event in self.of(task_id)]

    def wait_for(self, task_id: str, kind: str, timeout: float = 30) -> list[dict[str, Any]]:
        """Wait until the last event of a task is of this type; return its events."""
        wait_until(
            lambda: self.types(task_id)[-1:] == [kind], timeout, f"{kind} of {task_id}; got {self.types(task_id)}"
        )
        return self.of(task_id)


@contextmanager
def watched_events() -> Iterator[Events]:
    """Collect events while the block runs; workers need ``-E``."""
    events, stop, listening = Events(), threading.Event(), threading.Event()

    def watch() -> None:
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": events.all.append})
            with receiver.consumer_context() as (its_own, _, _):
                while not stop.is_set():
                    try:
                        its_own.drain_events(timeout=0.05)
                    except TimeoutError:
                        listening.set()  # after one round the subscription stands

    thread = threading.Thread(target=watch, name="task-events", daemon=True)
    thread.start()
    assert listening.wait(10), "no subscription to the task events"
    try:
        yield events
    finally:
        stop.set()
        thread.join(5)


OtherWorker = Worker


def other_worker(system: Stack, directory: Path, code: str, *arguments: str, **changes: Any) -> Worker:
    """Start a worker whose `-A` module is `code`; it is ended with the stack.

    Args:
        system: whose environment it gets.
        directory: where the module is written; pytest's `tmp_path`.
        code: the module; it has to define or import `app`.
        changes: settings, as for `Stack.worker`.
    """
    module = f"other_{len(system.workers)}"
    (directory / f"{module}.py").write_text(textwrap.dedent(code))
    env = system.env(**changes)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(directory), env.get("PYTHONPATH"))))
    worker = Worker(env, ("-n", f"w{len(system.workers)}@%h", *ALONE, *arguments), module)
    system.workers.append(worker)
    return worker.wait_ready()


def emptied(redis_url: str) -> str:
    """Empty the shared Redis for a fixture of a whole module; one that we did not start is left as it is."""
    if os.environ.get("TEST_REDIS", "valkey") in ("valkey", "real"):
        with redis.Redis.from_url(redis_url, socket_timeout=5) as client:
            client.flushall()
    return redis_url
