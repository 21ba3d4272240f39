"""The fleet's circuits in Redis: one script for each operation, so that each happens as a whole and once."""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from kafka_delivery.circuits import CLOSED, OPEN
from kafka_delivery.names import CIRCUITS
from kafka_delivery.redis_client import RedisClient

from .. import paused
from .rules import Rules


class View(NamedTuple):
    """A circuit as a script left it.

    Attributes:
        epoch: grows with each change; what was sent under another one says nothing about this circuit.
        remaining_ms: until it is due, 0 if it is or is not open.
        forced, forced_ms: by hand, and for how long (0: until it is changed).
        changed: whether this very call changed it: of all workers one is told.
    """

    scope: str
    state: str = CLOSED
    epoch: int = 0
    remaining_ms: int = 0
    trips: int = 0
    forced: str = ""
    forced_ms: int = 0
    why: str = ""
    changed: bool = False

    @property
    def shut(self) -> bool:
        """Whether records wait."""
        return self.forced == OPEN or (not self.forced and self.state != CLOSED)


class Counted(NamedTuple):
    """What one worker has to say of one circuit since the last time; see report.lua."""

    scope: str
    epoch: int = 0
    ok: int = 0
    fail: int = 0
    row: int = 0
    late: int = 0
    hard: str = ""
    open_ms: int = -1
    trips: int = 0
    forced: str = ""
    forced_ms: int = 0


class Transition(NamedTuple):
    """One line of the history; `at_ms` by Redis's clock."""

    at_ms: int
    scope: str
    before: str
    after: str
    why: str
    by: str
    trips: int
    epoch: int


class CircuitStore:
    """Operations on the circuits of one Kafka cluster.

    Every one raises `redis.exceptions.RedisError` where Redis is away. Only `report` may then be lost, or done without
    its answer; the others may be repeated.

    Args:
        redis: a client with short timeouts and no retries.
        cluster: the Kafka cluster's name.
        rules: of this worker.
        worker: whom the history names.
    """

    def __init__(self, redis: RedisClient, cluster: str, rules: Rules, worker: str) -> None:
        self._redis = redis
        self.base = redis.prefix + CIRCUITS.format(cluster=cluster)
        self._rules = rules.as_json()
        self._worker = worker
        self._scripts: dict[str, Any] = {}

    def _run(self, operation: str, *arguments: Any) -> Any:
        client = self._redis.client
        script = self._scripts.get(operation)
        if script is None or script.registered_client is not client:
            script = self._scripts[operation] = client.register_script(source(operation))
        return script([self.base], [self._rules, self._worker, random.random(), *arguments])

    def report(self, counted: Sequence[Counted]) -> tuple[int, list[View]]:
        """Tell what became of records, the cluster first; how many workers are alive, and how all circuits are."""
        alive, *views = self._run("report", json.dumps([one._asdict() for one in counted]))
        return alive, [_view(view) for view in views]

    def admit(self, scope: str, token: str, lease_ms: int) -> tuple[str, View]:
        """Ask for a probe: "probe", "denied", or "free" where the circuit is closed."""
        verdict, view = self._run("admit", scope, token, lease_ms)
        return verdict.decode(), _view(view)

    def settle(self, scope: str, token: str, outcome: str, why: str) -> tuple[bool, View]:
        """Say what became of a probe: "ok", "fail" or "ignore"; False if it came too late to matter."""
        done, view = self._run("settle", scope, token, outcome, why)
        return bool(done), _view(view)

    def force(self, scope: str, mode: str, for_ms: int, who: str, why: str) -> View:
        """Override a circuit by hand: "open", "closed", or "" for automatic; for so long, 0 for no end."""
        return _view(self._run("force", scope, mode, for_ms, who, why))

    def say_paused(self, why: str, since_ms: int) -> None:
        """Write that this process pauses itself; with "" for `why`, that it does not."""
        paused.say(self._redis, f"{self._worker}:{os.getpid()}", why, since_ms)

    def leave(self) -> None:
        """This worker stops: the others need not wait for its opinion."""
        self._redis.client.zrem(self.base + "workers", self._worker)

    def history(self, limit: int) -> list[Transition]:
        """The last transitions of all circuits, the newest first."""
        entries: list[Any] = self._redis.client.xrevrange(self.base + "log", count=limit)
        return [_transition(entry_id, fields) for entry_id, fields in entries]


ALIVE_S = 5.0
"""A worker reports each second; see report.lua."""


def alive(redis: RedisClient, cluster: str) -> int:
    """How many workers look at the circuits of a cluster.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached.
    """
    with redis.client.pipeline(transaction=True) as pipe:
        pipe.time()
        pipe.zrange(redis.prefix + CIRCUITS.format(cluster=cluster) + "workers", 0, -1, withscores=True)
        (seconds, microseconds), reported = pipe.execute()
    now_ms = seconds * 1000 + microseconds / 1000
    return sum(now_ms - at <= ALIVE_S * 1000 for _, at in reported)


@functools.cache
def source(operation: str) -> str:
    """The script of an operation, with what all of them share."""
    files = importlib.resources.files(__package__)
    return "".join(files.joinpath(f"{name}.lua").read_text() for name in ("circuit", operation))


def _view(fields: Sequence[Any]) -> View:
    scope, state, epoch, remaining, trips, forced, forced_ms, why, changed = fields
    return View(
        scope.decode(), state.decode(), epoch, remaining, trips, forced.decode(), forced_ms, why.decode(), bool(changed)
    )


def _transition(entry_id: bytes, fields: dict[bytes, bytes]) -> Transition:
    text = {name.decode(): value.decode() for name, value in fields.items()}
    at = int(entry_id.partition(b"-")[0])
    return Transition(
        at, text["scope"], text["from"], text["to"], text["why"], text["by"], int(text["trips"]), int(text["epoch"])
    )
