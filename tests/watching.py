"""What the scenario tests use besides `stack`: task events, the looks of workers, clocks that are moved, workers of
another `-A` module, an empty Redis.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import textwrap
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from kafka_delivery import app, names, send
from kafka_delivery_worker.breaker import store
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.lease import script
from servers import AnyRedis, wait_until
from stack import Stack, Worker

ALONE = ("--without-mingle", "--without-gossip")
"""Options of a worker that does not look for others when it starts: it is ready a second sooner."""


@contextmanager
def outage_after_the_first_answer(system: Stack, kafka: MockKafka) -> Iterator[None]:
    """Workers that are started in the block get Kafka's first answer, and claim their first message when it is away.

    One that never had an answer claims nothing.
    """
    before = len(system.workers)
    system.redis.set(names.GATE, 1)
    kafka.up()
    yield
    wait_until(lambda: all("producer.ready" in one.log for one in system.workers[before:]), 60, "Kafka's first answer")
    kafka.down()
    system.redis.delete(names.GATE)


def two_in_an_outage(system: Stack, kafka: MockKafka, **changes: Any) -> list[Worker]:
    """Two such workers. The second one stands still (SIGSTOP) until the caller lets it go on."""
    with outage_after_the_first_answer(system, kafka):
        workers = [system.worker(*ALONE, **changes) for _ in range(2)]
        wait_until(lambda: "producer.ready" in workers[1].log, 60, "Kafka's first answer")
        workers[1].signal(signal.SIGSTOP)
    return workers


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


class Looks:
    """What workers ask Redis, as it says itself (MONITOR): the measure of "and nothing came of it", instead of a sleep.

    Each method waits until so many looks of one kind were answered that began after its call. A worker asks again only
    when it has its answer, so it waits for one look more. Times are Redis's.
    """

    def __init__(self, client: AnyRedis, lines: Iterator[bytes]) -> None:
        self._client = client
        self._lines = lines
        self.seen: Counter[str] = Counter()
        """Looks of each kind, of all workers, while the last call waited."""

    def claims(self, count: int, workers: int = 1) -> float:
        """Wait until so many claims of each worker were answered; return the seconds that this took the quickest one.

        A worker that has no room, or whose circuit is open, claims nothing: see `reports`.
        """
        return self._wait("claims", count, workers)

    def reports(self, count: int, workers: int = 1) -> float:
        """The same for reports to the circuits, from which a worker learns how they are; at least one a second."""
        return self._wait("reports", count, workers)

    def renewals(self, count: int, workers: int = 1) -> float:
        """The same for renewals of leases, by which a worker finds those that are over; three a lease."""
        return self._wait("renewals", count, workers)

    def _wait(self, what: str, count: int, workers: int) -> float:
        mark = uuid.uuid4().hex.encode()
        self._client.echo(mark)  # what lies before it is of earlier
        deadline = time.monotonic() + 60
        times: dict[bytes, list[float]] = defaultdict(list)
        begun = False
        self.seen.clear()
        for line in self._lines:
            begun = begun or mark in line
            kind, worker = _look(line) if begun else ("", b"")
            self.seen[kind] += 1
            if kind == what:
                times[worker].append(float(line[1:].partition(b" ")[0]))
                took = sorted(at[count] - at[0] for at in times.values() if len(at) > count)
                if len(took) >= workers:
                    return took[0]
            if time.monotonic() > deadline:
                break
        got = [len(at) for at in times.values()]
        raise TimeoutError(f"{count} {what} of {workers} workers; got {got}")


@contextmanager
def looks(client: AnyRedis) -> Iterator[Looks]:
    """Watch what workers ask this Redis while the block runs."""
    at = client.connection_pool.connection_kwargs
    with socket.create_connection((at["host"], at["port"]), timeout=60) as connection:
        connection.sendall(b"MONITOR\r\n")
        with connection.makefile("rb") as lines:
            assert lines.readline() == b"+OK\r\n"
            yield Looks(client, lines)


_QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_CLAIM = hashlib.sha1(script("claim").encode()).hexdigest().encode()  # noqa: S324  # Redis's name of a script
_REPORT = hashlib.sha1(store.source("report").encode()).hexdigest().encode()  # noqa: S324
_RENEW = script("renew").partition(".")[0].encode()
_KINDS = {_CLAIM: "claims", _REPORT: "reports", _RENEW: "renewals"}


def _look(line: bytes) -> tuple[str, bytes]:
    """Which look of which worker a line of MONITOR tells of; empty for anything else."""
    for kind, script_name, place in ((b"EVALSHA", _CLAIM, 0), (b"EVALSHA", _REPORT, 1), (b"EVAL", _RENEW, 0)):
        if script_name in line and b'"' + kind + b'"' in line:
            words = _QUOTED.findall(line)
            return _KINDS[script_name], words[3 + int(words[2]) + place]  # behind the keys
    return "", b""


def end_leases(client: AnyRedis) -> None:
    """Make the leases of all workers end now, as if nobody but those that renew again had been there for long."""
    now = int(client.time()[0]) * 1000
    client.zadd(names.LEASES, dict.fromkeys(client.zrange(names.LEASES, 0, -1), now - 1000))
    client.hset(names.LEASE_CLOCK, mapping={"beat": now, "since": now - 3_600_000})


_ETA = re.compile(rb'"eta": "[^"]+"')


def bring_forward(client: AnyRedis, *lists: str) -> int:
    """Make all messages due that wait for their time in Redis, or in these lists; return how many."""
    count = 0
    for key in client.scan_iter(names.DELAYED + "*"):
        for item in client.zrangebyscore(key, "(0", "+inf"):  # not what a worker may be about to take
            with client.pipeline() as pipe:  # at once: it is always somewhere
                pipe.zrem(key, item)
                pipe.zadd(key, {_past(item): 0})
                pipe.execute()
            count += 1
    for name in lists:
        for place, item in enumerate(client.lrange(name, 0, -1)):
            client.lset(name, place, _past(item))
            count += 1
    return count


def _past(item: bytes) -> bytes:
    return _ETA.sub(b'"eta": "2000-01-01T00:00:00+00:00"', item)


class Events:
    """Task events as Flower gets them; only those sent after it was opened."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def of(self, task_id: str) -> list[dict[str, Any]]:
        """The events of one task, in the order in which they came."""
        return [event for event in list(self.all) if event.get("uuid") == task_id]

    def types(self, task_id: str) -> list[str]:
        return [event["type"] for event in self.of(task_id)]

    def wait_for(self, task_id: str, kind: str, timeout: float = 60) -> list[dict[str, Any]]:
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
    assert listening.wait(60), "no subscription to the task events"
    try:
        yield events
    finally:
        stop.set()
        thread.join(5)


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


def revoke(task_id: str, terminate: bool = False) -> None:
    """Revoke a task, and wait until a worker has heard it: one that has just started may not listen yet."""

    def heard() -> bool:
        return bool(app.control.revoke(task_id, terminate=terminate, reply=True, timeout=2, limit=1))

    wait_until(heard, 60, f"a worker to hear that {task_id} is revoked")


def emptied(redis_url: str) -> str:
    """Empty the shared Redis for a fixture of a whole module; one that we did not start is left as it is."""
    if os.environ.get("TEST_REDIS", "valkey") in ("valkey", "real"):
        with redis.Redis.from_url(redis_url, socket_timeout=5) as client:
            client.flushall()
    return redis_url
