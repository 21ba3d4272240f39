"""The numbers of a circuit breaker, and a circuit of one process: what it goes by when Redis, or the fleet, is away.

The fleet's circuits follow the same rules in Lua; a test runs both over the same histories.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass

from kafka_delivery.circuits import CLOSED, HALF_OPEN, OPEN
from kafka_delivery.settings import Settings

BUCKETS = 10


@dataclass(frozen=True, slots=True)
class Rules:
    """Times in milliseconds; see the settings of the same names.

    Attributes:
        max_weight: calls that one report counts for at most. Less than `min_calls`: librdkafka fails a batch as a
            whole, and one batch is not everybody's experience.
        growth, jitter: of the time a circuit stays open, per failed round; the jitter is a share of it.
        forget_ms: a circuit that was closed for so long begins a new outage with the shortest pause.
        max_lost: probes in a row whose worker died, which count as a failed round.
    """

    threshold: int
    rate: float
    min_calls: int
    window_ms: int
    max_weight: float
    open_ms: int
    max_open_ms: int
    growth: float
    jitter: float
    forget_ms: int
    successes: int
    max_lost: int

    @classmethod
    def of(cls, s: Settings) -> Rules:
        return cls(
            threshold=min(s.failure_threshold, max(1, s.max_retries)),
            rate=s.failure_rate,
            min_calls=s.failure_min_calls,
            window_ms=max(BUCKETS, int(s.failure_window_s * 1000)),
            max_weight=s.failure_min_calls / 2,
            open_ms=int(s.reset_timeout_s * 1000),
            max_open_ms=int(s.reset_timeout_max_s * 1000),
            growth=2.0,
            jitter=0.1,
            forget_ms=int(2 * s.reset_timeout_max_s * 1000),
            successes=s.success_threshold,
            max_lost=3,
        )

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class LocalCircuit:
    """One circuit in one process. Time is an argument, in milliseconds; nothing here waits or locks.

    Args:
        rules: of all circuits.
        dice: gives a number from 0 to 1, for the jitter.
    """

    def __init__(self, rules: Rules, dice: Callable[[], float] = random.random) -> None:
        self._rules = rules
        self._dice = dice
        self.reset()

    def reset(self) -> None:
        """Closed, as if nothing had been."""
        self.state, self.why = CLOSED, ""
        self.till = self._since = 0.0
        self.trips = self._good = self._streak = 0
        self._buckets: dict[int, tuple[float, float]] = {}

    def report(self, now: float, ok: int, fail: int, row: bool, hard: str) -> bool:
        """Take in what became of records; True if that opens it.

        Args:
            now: the moment.
            ok, fail: records by outcome.
            row: whether the last of them failed.
            hard: why everything is down for sure, or "".
        """
        if self.state != CLOSED:
            return False
        why = self._verdict(now, ok, fail, row, hard)
        if why:
            self.open(now, why)
        return bool(why)

    def _verdict(self, now: float, ok: int, fail: int, row: bool, hard: str) -> str:
        rules = self._rules
        weight = min(1.0, rules.max_weight / (ok + fail)) if ok + fail else 1.0
        bucket = int(now // (rules.window_ms / BUCKETS))
        good, bad = self._buckets.get(bucket, (0.0, 0.0))
        self._buckets[bucket] = good + ok * weight, bad + fail * weight
        self._buckets = {at: counts for at, counts in self._buckets.items() if at > bucket - BUCKETS}
        calls = sum(good + bad for good, bad in self._buckets.values())
        failures = sum(bad for _, bad in self._buckets.values())
        if ok:
            self._streak = 0
        if fail and (row or not ok):
            self._streak += 1
        if hard:
            return hard
        # Counts are weighted, and no fractions add up exactly.
        if calls >= rules.min_calls - 1e-6 and failures / calls >= rules.rate - 1e-6:
            return f"{100 * failures / calls:.0f} % of {calls:.0f} failed"
        if self._streak >= rules.threshold:
            return f"{self._streak} failures in a row"
        return ""

    def open(self, now: float, why: str, till: float | None = None) -> None:
        """Open it until `till`, or for as long as the rules say."""
        if self.state == CLOSED and now - self._since > self._rules.forget_ms:
            self.trips = 0
        self.state, self.why, self._since = OPEN, why, now
        self.trips += 1
        self._good = self._streak = 0
        self._buckets = {}
        wait = min(self._rules.max_open_ms, self._rules.open_ms * self._rules.growth ** min(self.trips - 1, 60))
        self.till = now + int(wait * (1 + self._rules.jitter * self._dice())) if till is None else till

    def due(self, now: float) -> bool:
        """Whether a probe may be sent."""
        return self.state == HALF_OPEN or (self.state == OPEN and now >= self.till)

    def begin(self) -> None:
        """A probe is sent."""
        self.state = HALF_OPEN

    def settle(self, now: float, ok: bool) -> None:
        """A probe arrived, or did not."""
        if self.state != HALF_OPEN:
            return
        if not ok:
            self.open(now, "a probe failed")
            return
        self._good += 1
        if self._good >= self._rules.successes:
            self.state, self.why, self._since = CLOSED, f"{self._good} probes arrived", now

    def arrived(self, now: float) -> None:
        """A record arrived that was sent before it opened: worth a look at once."""
        self.till = min(self.till, now)
