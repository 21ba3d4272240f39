"""A fleet whose worker processes live and die by a clock that the test moves: the scripts ask a key for the time."""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import pytest

from integration.leases.workers import QUEUE
from kafka_delivery import names
from kafka_delivery_worker import lease as leases
from kafka_delivery_worker.lease import Lease, Settling
from servers import AnyRedis

CLOCK = "clock-of-the-test"
ASKS = "redis.call('TIME')"
TELLS = f"redis.call('HMGET', '{CLOCK}', 's', 'us')"
LEASE_S = 30.0
LOOK_S = LEASE_S / 3


class Process:
    """A worker process. It renews its lease when it starts, each third of it, and when the next lease may be over."""

    def __init__(self, fleet: Fleet, name: str, lease_s: float) -> None:
        self.fleet, self.name = fleet, name
        self.lease = Lease(lambda: fleet.client, lease_s, max_deaths=fleet.max_deaths)
        self.lease.owner = name
        self.lease.held_key = names.HELD + name
        self.alive = True
        self.lease._beat()
        self.looks()

    def claim(self, room: int = 150) -> list[bytes]:
        arguments = self.lease.claim_arguments(room, [QUEUE], Settling.nothing())
        _, items, tags, *_ = self.fleet.client.eval(leases.script("claim"), *arguments)
        self.lease.claimed([tag.decode() for tag in tags], items)
        return list(items)

    def delivers(self) -> None:
        """Everything that it holds."""
        for tag in list(self.lease.held):
            self.lease.settled(tag)
        self.lease.flush()

    def looks(self) -> None:
        soonest_s = self.lease.renew().soonest_s
        self.next_look = self.fleet.now + min(self.lease.milliseconds / 3000, soonest_s)


class Fleet:
    """Processes, the clock of Redis, and what Redis remembers of deaths."""

    def __init__(self, client: AnyRedis, monkeypatch: pytest.MonkeyPatch, max_deaths: int = 5) -> None:
        self.client = client
        self.max_deaths = max_deaths
        self.processes: list[Process] = []
        self.real = 0.0
        """Seconds that have passed."""
        self.wrong = 1_000_000.0
        """What the clock shows when none have passed."""
        self._tell()
        source = importlib.import_module("kafka_delivery_worker.lease").script

        def simulated(name: str) -> str:
            return str(source(name)).replace(ASKS, TELLS)

        monkeypatch.setattr(leases, "script", simulated)

    @property
    def now(self) -> float:
        return self.real

    def _tell(self) -> None:
        shown = self.real + self.wrong
        self.client.hset(CLOCK, mapping={"s": int(shown), "us": int(shown % 1 * 1_000_000)})

    def step_clock(self, seconds: float) -> None:
        """The clock of Redis is set, say by a failover to another host."""
        self.wrong += seconds
        self._tell()

    def start(self, name: str, lease_s: float = LEASE_S) -> Process:
        process = Process(self, name, lease_s)
        self.processes.append(process)
        return process

    def kill(self, *names_: str) -> None:
        for process in self.processes:
            process.alive = process.alive and process.name not in names_

    @property
    def living(self) -> list[Process]:
        return [process for process in self.processes if process.alive]

    def passes(self, seconds: float) -> None:
        """Let time go by. Who lives renews its lease meanwhile, and looks for leases that are over."""
        end = self.real + seconds
        while self.real < end:
            self.real = min([end, *(process.next_look for process in self.living)])
            self._tell()
            for process in self.living:
                if process.next_look <= self.real:
                    process.looks()

    def deaths(self, item: bytes) -> float:
        """Deaths that are remembered of a message."""
        key: Any = hashlib.sha1(item).hexdigest()  # noqa: S324  # Redis's own digest
        return int(self.client.hget(names.DEATHS, key) or 0) / 10

    @property
    def poisonous(self) -> list[bytes]:
        return [entry.partition(b"\n")[2] for entry in self.client.lrange(names.POISON, 0, -1)]
