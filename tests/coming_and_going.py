"""A steady stream of sends while worker processes are added and removed, and the account of it."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, pairwise

from kafka_delivery import Record, send
from servers import RealKafka, RealRedis, wait_until
from stack import Stack, Worker, message_id, stack

LEASE_S = 10
TAKE_OVER_S = 20
"""After a lease: until the others look again, claim what came back, and have it confirmed."""

RATE = 200  # sends a second
BURST = 10  # of them in one call
MOST = 4  # workers at a time
PAUSE_S = (1.0, 3.0)  # between two changes
LINGER_MS = 100
"""Longer than by default, so that a worker that is killed most likely holds records."""


@dataclass(frozen=True)
class Account:
    """What came of a run. Times are seconds since the epoch, appends by the broker's clock, on the same machine."""

    sent: Mapping[str, float]
    """Message id of what was accepted -> when its send began."""
    began: float
    ended: float
    """When the stream of sends did."""
    appended: list[tuple[str, float]]
    """Message id and time of each record in the topic."""
    dead: list[str]
    parked: int
    seed: int
    changes: Counter[str]
    """How many workers were added, and removed by which signal."""
    came_back: int
    """Messages that killed workers held and others returned to the queue."""

    @property
    def lost(self) -> set[str]:
        return set(self.sent) - {one for one, _ in self.appended}

    @property
    def duplicates(self) -> int:
        return len(self.appended) - len({one for one, _ in self.appended})

    @property
    def longest_pause_s(self) -> float:
        """In which nothing was appended, from the first append on and while the stream of sends went on."""
        within = sorted(at for _, at in self.appended if at < self.ended)
        return max(later - earlier for earlier, later in pairwise([*within, self.ended]))

    @property
    def delays_s(self) -> list[float]:
        """From each send to the first append of its record, the shortest first."""
        first: dict[str, float] = {}
        for one, at in self.appended:
            first[one] = min(at, first.get(one, at))
        return sorted(first[one] - self.sent[one] for one in first.keys() & self.sent.keys())

    def check(self) -> None:
        """Nothing was lost or put aside, and the leases bounded what removals did to the stream and to each record."""
        assert not self.lost, f"lost: {sorted(self.lost)[:10]}"
        assert {one for one, _ in self.appended} <= set(self.sent), "a record that nobody sent"
        assert (self.dead, self.parked) == ([], 0), "put aside"
        assert self.duplicates <= self.came_back, "repeated, though no killed worker had held it"
        assert self.longest_pause_s < LEASE_S, f"the stream paused for {self.longest_pause_s:.2f} s"
        assert self.delays_s[-1] < LEASE_S + TAKE_OVER_S, f"a record waited {self.delays_s[-1]:.2f} s"

    def __str__(self) -> str:
        delays = self.delays_s
        return (
            f"seed {self.seed}, {self.ended - self.began:.0f} s, workers {dict(self.changes)}\n"
            f"accepted {len(self.sent)}, delivered {len({one for one, _ in self.appended})}, lost {len(self.lost)}, "
            f"duplicates {self.duplicates}, dead-lettered {len(self.dead)}, parked {self.parked}; killed workers held "
            f"{self.came_back}\n"
            f"lease {LEASE_S} s, longest pause between two appends {self.longest_pause_s:.2f} s; from send to append: "
            f"median {delays[len(delays) // 2]:.3f} s, longest {delays[-1]:.2f} s, "
            f"longer than a second {sum(delay > 1 for delay in delays)}"
        )


class Fleet:
    """Workers, of which one that is ready always goes on.

    A worker that was told to stop is none of the fleet's from then on.
    """

    def __init__(self, system: Stack, dice: random.Random) -> None:
        self._system, self._dice = system, dice
        self._removals = cycle((signal.SIGTERM, signal.SIGKILL))
        self._stopping: list[Worker] = []
        self.workers = [system.worker()]
        self.changes: Counter[str] = Counter()

    def change(self) -> None:
        """Add a worker, or remove one by the signal whose turn it is."""
        for worker in self.workers:
            assert worker.process.poll() is None, f"it ended by itself:\n{worker.log[-4000:]}"
        ready = [worker for worker in self.workers if " ready." in worker.log]
        if len(ready) > 1 and (len(self.workers) == MOST or self._dice.random() < 0.5):
            self._remove(self._dice.choice(ready))
        elif len(self.workers) < MOST:
            self.workers.append(self._system.worker(ready=False))
            self.changes["added"] += 1

    def came_back(self) -> int:
        """Messages that were returned to the queue for killed workers."""
        logs = "".join(worker.log for worker in self._system.workers)
        return sum(int(count) for count in re.findall(r"lease\.reaped .*returned=(\d+)", logs))

    def _remove(self, worker: Worker) -> None:
        number = next(self._removals)
        self.workers.remove(worker)
        self.changes[number.name] += 1
        worker.signal(number)
        self._stopping.append(worker)

    def ended(self) -> list[int]:
        """Wait for those that were removed; return their exit codes."""
        return [worker.process.wait(60) for worker in self._stopping]


def come_and_go(kafka: RealKafka, redis: RealRedis, topic: str, seconds: float) -> Account:
    """Send for so long, and a lease longer, while workers come and go; then wait until all is drained.

    It takes longer if so far no worker was killed that held anything: there is nothing to account for before.
    The topic is made here, so that the times of its records are those of the broker.
    """
    seed = random.randrange(10**6)
    print(f"\nseed {seed}")  # noqa: T201  # also of a run that fails
    kafka.create_topic(topic, message_timestamp_type="LogAppendTime")
    kafka.create_topic(f"{topic}-dlq")
    with stack(redis.url, kafka, LEASE_S=LEASE_S, LINGER_MS=LINGER_MS) as system, ThreadPoolExecutor(1) as pool:
        system.redis.flushall()
        dice = random.Random(seed)
        fleet = Fleet(system, dice)
        sent: dict[str, float] = {}
        stop = threading.Event()

        def stream() -> tuple[float, float]:
            began = due = time.time()
            while not stop.wait(max(0.0, due - time.time())):
                now = time.time()
                sent.update(dict.fromkeys(send.bulk([Record(topic, "x" * 200) for _ in range(BURST)]), now))
                due += BURST / RATE
            return began, time.time()

        streaming = pool.submit(stream)
        try:
            until = time.monotonic() + seconds
            while time.monotonic() < until or not fleet.came_back():
                time.sleep(dice.uniform(*PAUSE_S))
                fleet.change()
            time.sleep(1.5 * LEASE_S)  # the stream outlasts what the last change can do to it
        finally:
            stop.set()
        began, ended = streaming.result(30)
        wait_until(lambda: system.waiting == 0, 60, "all to be drained")
        codes = Counter(fleet.ended())
        assert codes == Counter({0: fleet.changes["SIGTERM"], -signal.SIGKILL: fleet.changes["SIGKILL"]}), codes
        appended = [(message_id(record), record.timestamp / 1000) for record in system.read(topic)]
        dead, parked = system.ids(f"{topic}-dlq"), len(system.parked())
    return Account(sent, began, ended, appended, dead, parked, seed, fleet.changes, fleet.came_back())
