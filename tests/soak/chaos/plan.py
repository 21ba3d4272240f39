"""Which faults come, in which order and for how long: a function of the seed and nothing else."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

KILL, FREEZE, TERMINATE = "SIGKILL", "SIGSTOP past the lease", "SIGTERM under backlog"
CLIENT_KILL, REDIS_KILL, REDIS_HUNG = "CLIENT KILL", "Redis SIGKILL", "Redis hung"
MAXCLIENTS, MAXMEMORY, READONLY, KAFKA_KILL = "maxclients", "maxmemory", "READONLY", "Kafka SIGKILL"
NOREPLICAS = "NOREPLICAS"
NO_KEY, RENEWAL = "no client can be made", "certificate renewed"
FREEZE_ALL = "all hosts frozen"
SLOW, VERY_SLOW, PARTITION, CUT = "slow Redis", "very slow Redis", "partition", "connections cut"
STRANGERS, LARGE = "foreign messages", "foreign messages of 1 MB"
FROZEN_REDRIVE, FROZEN_DISCARD = "frozen parked redrive", "frozen parked discard"
FROZEN_DEAD_LETTERS = "frozen dead-letters redrive"
JOINER = "another installation joins"

LEASE_S = 5.0
LOCK_S = 10.0
"""For so long an operator's command is the only one without a sign of life."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How often a fault comes, in relation to the others, and how long it lasts (seconds, from and to)."""

    weight: float
    hold: tuple[float, float] = (0.0, 0.0)


WORKER_FAULTS = {
    KILL: Kind(6),
    FREEZE: Kind(2, (LEASE_S + 1, LEASE_S + 4)),
    TERMINATE: Kind(2),
    FREEZE_ALL: Kind(1, (LEASE_S + 1, 15)),
}
"""They hit one worker process, or all of them: then nobody is there who would take over, as on a suspended machine."""

SERVER_FAULTS = {
    CLIENT_KILL: Kind(3),
    REDIS_KILL: Kind(2, (0, 2)),
    REDIS_HUNG: Kind(2, (1, 6)),
    MAXCLIENTS: Kind(2, (2, 5)),
    MAXMEMORY: Kind(2, (2, 5)),
    READONLY: Kind(2, (1, 4)),
    NOREPLICAS: Kind(2, (1, 4)),
}
"""They hit Redis."""

KAFKA_FAULTS = {KAFKA_KILL: Kind(1, (0, 5))}
"""Apart, and rare enough that Kafka is well most of the time: only then a circuit may open wrongly."""

NETWORK_FAULTS = {
    SLOW: Kind(4, (3, 8)),
    VERY_SLOW: Kind(1, (4, 8)),
    PARTITION: Kind(2, (1, LEASE_S + 3)),
    CUT: Kind(2),
}
"""They hit the way from all workers to Redis. The application's stays whole, so that the backlog grows meanwhile."""

FOREIGN_FAULTS = {
    STRANGERS: Kind(3),
    LARGE: Kind(1),
}
"""Messages that nobody of ours has written, into the list of sends."""

PARKED_FAULTS = {
    FROZEN_REDRIVE: Kind(1, (LOCK_S + 1, LOCK_S + 3)),
    FROZEN_DISCARD: Kind(1, (LOCK_S + 1, LOCK_S + 3)),
}
DEAD_LETTER_FAULTS = {FROZEN_DEAD_LETTERS: Kind(1, (LOCK_S + 1, LOCK_S + 3))}
"""A command of an operator stands still in the middle, past its lock, while another one does the same."""

JOINER_FAULTS = {JOINER: Kind(1)}
"""A worker with the same Redis and the same names, and another Kafka."""

CLIENT_FAULTS = {
    NO_KEY: Kind(1, (1, 5)),
    RENEWAL: Kind(1, (0, 2)),
}
"""They hit what a worker's Kafka client is made of: the files with its key and its certificate."""

WORKERS_PAUSE = (1.5, 4.5)
SERVERS_PAUSE = (0.5, 2.5)
CLIENTS_PAUSE = (6, 14)
KAFKA_PAUSE = (12, 20)
NETWORK_PAUSE = (1, 4)
FOREIGN_PAUSE = (3, 8)
OPERATORS_PAUSE = (6, 9)
DEAD_LETTERS_PAUSE = (14, 20)
JOINER_PAUSE = (8, 20)
"""Seconds between two faults of a lane in a run of a minute, in which every kind has to have its turn."""

LONG_RUN_S = 180
CALMER = 3.0
"""In a longer run the system gets this many times as long to recover, so that backlogs come and go."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `pause` seconds after the one before, of `kind`, on worker `target`, for `hold` seconds.

    Attributes:
        strength: from 0 to 1, where a kind has any.
    """

    pause: float
    kind: str
    target: int
    hold: float
    strength: float


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
            yield Fault(pause, name, dice.randrange(workers), dice.uniform(*self.kinds[name].hold), dice.random())


BOTH = (
    Lane("workers", WORKER_FAULTS, WORKERS_PAUSE),
    Lane("Redis", SERVER_FAULTS, SERVERS_PAUSE),
    Lane("Kafka", KAFKA_FAULTS, KAFKA_PAUSE),
    Lane("clients", CLIENT_FAULTS, CLIENTS_PAUSE),
    Lane("network", NETWORK_FAULTS, NETWORK_PAUSE),
)
"""They meet Celery's own transport too."""

LANES = (
    *BOTH,
    Lane("strangers", FOREIGN_FAULTS, FOREIGN_PAUSE),
    Lane("parking store", PARKED_FAULTS, OPERATORS_PAUSE),
    Lane("dead letters", DEAD_LETTER_FAULTS, DEAD_LETTERS_PAUSE),
    Lane("joiner", JOINER_FAULTS, JOINER_PAUSE),
)
"""They come beside each other, so that all may be hit at once."""

ALL = tuple(kind for lane in LANES for kind in lane.kinds)


def lanes(only: Collection[str] = (), stock: bool = False) -> tuple[Lane, ...]:
    """Those of a run.

    Args:
        only: kinds that come; all, where none is named.
        stock: of a run with Celery's own transport.
    """
    chosen = [
        replace(lane, kinds={name: kind for name, kind in lane.kinds.items() if not only or name in only})
        for lane in (BOTH if stock else LANES)
    ]
    return tuple(lane for lane in chosen if lane.kinds)
