"""Which faults come, in which order and for how long: a function of the seed and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

KILL, FREEZE, TERMINATE = "SIGKILL", "SIGSTOP past the lease", "SIGTERM under backlog"
CLIENT_KILL, REDIS_KILL, REDIS_HUNG = "CLIENT KILL", "Redis SIGKILL", "Redis hung"
MAXCLIENTS, MAXMEMORY, READONLY, KAFKA_KILL = "maxclients", "maxmemory", "READONLY", "Kafka SIGKILL"
NOREPLICAS = "NOREPLICAS"
NO_KEY, RENEWAL = "no client can be made", "certificate renewed"

LEASE_S = 5.0


@dataclass(frozen=True, slots=True)
class Kind:
    """How often a fault comes, in relation to the others, and how long it lasts (seconds, from and to)."""

    weight: float
    hold: tuple[float, float] = (0.0, 0.0)


WORKER_FAULTS = {
    KILL: Kind(6),
    FREEZE: Kind(2, (LEASE_S + 1, LEASE_S + 4)),
    TERMINATE: Kind(2),
}
"""They hit one worker process."""

SERVER_FAULTS = {
    CLIENT_KILL: Kind(3),
    REDIS_KILL: Kind(2, (0, 2)),
    REDIS_HUNG: Kind(2, (1, 6)),
    MAXCLIENTS: Kind(2, (2, 5)),
    MAXMEMORY: Kind(2, (2, 5)),
    READONLY: Kind(2, (1, 4)),
    NOREPLICAS: Kind(2, (1, 4)),
    KAFKA_KILL: Kind(2, (0, 5)),
}
"""They hit Redis or Kafka."""

CLIENT_FAULTS = {
    NO_KEY: Kind(1, (1, 5)),
    RENEWAL: Kind(1, (0, 2)),
}
"""They hit what a worker's Kafka client is made of: the files with its key and its certificate."""

ALL = (*WORKER_FAULTS, *SERVER_FAULTS, *CLIENT_FAULTS)

WORKERS_PAUSE = (1.5, 4.5)
SERVERS_PAUSE = (0.5, 2.5)
CLIENTS_PAUSE = (6, 14)
"""Seconds between two faults of a lane in a run of a minute, in which every kind has to have its turn."""

LONG_RUN_S = 180
CALMER = 3.0
"""In a longer run the system gets this many times as long to recover, so that backlogs come and go."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `pause` seconds after the one before, of `kind`, on worker `target`, for `hold` seconds."""

    pause: float
    kind: str
    target: int
    hold: float


@dataclass(frozen=True, slots=True)
class Lane:
    """Faults that come one after the other."""

    name: str
    kinds: Mapping[str, Kind]
    pause: tuple[float, float]

    def draw(self, seed: int, workers: int, seconds: float) -> Iterator[Fault]:
        """The faults of a run of `seconds`, without end. The first come in a random order, each kind once."""
        dice = random.Random(f"{seed} {self.name}")
        calm = CALMER if seconds >= LONG_RUN_S else 1.0
        first = dice.sample(list(self.kinds), len(self.kinds))
        weights = [kind.weight for kind in self.kinds.values()]
        while True:
            pause = dice.uniform(*self.pause) * calm
            name = first.pop() if first else dice.choices(list(self.kinds), weights)[0]
            yield Fault(pause, name, dice.randrange(workers), dice.uniform(*self.kinds[name].hold))


LANES = (
    Lane("workers", WORKER_FAULTS, WORKERS_PAUSE),
    Lane("servers", SERVER_FAULTS, SERVERS_PAUSE),
    Lane("clients", CLIENT_FAULTS, CLIENTS_PAUSE),
)
"""They come beside each other, so that all may be hit at once."""
