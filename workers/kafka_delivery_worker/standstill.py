"""Whether this process pauses itself, because what goes wrong is its own fault.

A process that has no Kafka client, or that fails at one record after the other, must not take more of them. It stands
still, says so, and goes on by itself: at once when a client is there, or after a pause that grows with each failure in
a row. One success ends the row.

The breaker asks it, so a process that stands still claims nothing, and what it holds goes back to the queue.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

FAILURES = 3
"""Failures in a row after which the process pauses. Fewer may be the fault of single messages, which pause alone."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""The pause doubles with each further failure in a row."""

MAKING = "it is being made"
"""Why there is no client at first. That takes some milliseconds, and is no trouble."""

NO_ANSWER = "Kafka has not answered this process yet"
"""Why there is none while Kafka is away: nobody knows yet which Kafka it is. That is an outage, and no trouble of the
process."""

NO_CLIENT_S = 1.0
"""How soon a record, or a message that came meanwhile, is worth another look while there is no client, in seconds."""


class Standstill:
    """The state of one process. Every method may be called by any thread.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.failures = 0
        """In a row."""
        self._until = 0.0
        self._why_failed = ""
        self._failed_at = ""
        self._lacking: dict[str, str] = {}

    def failed(self, why: str, message_id: str = "") -> None:
        """A message failed by this process's fault. Repeats of one message are no row: it pauses by itself."""
        with self._lock:
            if self._clock() < self._until or (message_id and message_id == self._failed_at):
                return  # it was in flight when the pause began, or is the same one
            self._failed_at = message_id
            self.failures += 1
            if self.failures >= FAILURES:
                doubled = min(self.failures - FAILURES, 10)
                self._until = self._clock() + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**doubled)
                self._why_failed = why

    def succeeded(self) -> None:
        """A record was delivered."""
        with self._lock:
            self.failures = 0
            self._until = 0.0
            self._failed_at = ""

    def client(self, which: str, missing: str) -> None:
        """Whether there is a client.

        Args:
            which: its name; a process may have several.
            missing: why there is none; "" if there is one.
        """
        with self._lock:
            if missing:
                self._lacking[which] = missing
            else:
                self._lacking.pop(which, None)

    @property
    def why(self) -> str:
        """Why the process pauses; "" if it does not."""
        with self._lock:
            for missing in self._lacking.values():
                return f"there is no Kafka client: {missing}"
            return self._why_failed if self._clock() < self._until else ""

    @property
    def begins(self) -> bool:
        """Whether it only waits for its first client, which is being made, or for Kafka."""
        with self._lock:
            return self._begins

    @property
    def _begins(self) -> bool:
        return bool(self._lacking) and {*self._lacking.values()} <= {MAKING, NO_ANSWER}

    @property
    def reason(self) -> str:
        """The same in one word for a metric's label: ``client``, ``failures`` or ``""``."""
        with self._lock:
            if self._lacking:
                return "" if self._begins and NO_ANSWER in self._lacking.values() else "client"
            return "failures" if self._clock() < self._until else ""

    @property
    def remaining_s(self) -> float:
        """Seconds until it is worth another look; 0 if it does not pause."""
        with self._lock:
            if self._lacking:
                return NO_CLIENT_S
            return max(0.0, self._until - self._clock())
