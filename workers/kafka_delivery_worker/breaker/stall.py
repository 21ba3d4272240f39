"""Whether all of Kafka is silent while records are in flight: that is an outage, though no record has failed yet."""

from __future__ import annotations

from ..standstill import NO_ANSWER

DOWN_S = 5.0
"""All brokers are down for this long, with records in flight: that is an outage."""


class Stall:
    """The silence of one process's cluster. Times are seconds of the caller's clock; nothing here locks or waits.

    Args:
        stall_s: how long it lasts before it is an outage.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._reports = self._seen = 0
        self._quiet_since: float | None = None
        self._down_at: float | None = None
        self._unanswered_since: float | None = None

    def heard(self, records: int = 1) -> None:
        """There are reports, of whatever kind."""
        self._reports += records

    def arrived(self) -> None:
        """A record is in the log: some broker is there."""
        self._down_at = None

    def brokers_down(self, now: float) -> bool:
        """librdkafka reaches none; whether that is new."""
        new = self._down_at is None
        if new:
            self._down_at = now
        return new

    def first_answer(self, now: float, *, missing: bool) -> None:
        """Whether this process still waits for Kafka's first answer, before which it hands over no record."""
        if not missing:
            self._unanswered_since = None
        elif self._unanswered_since is None:
            self._unanswered_since = now

    def begin_anew(self) -> None:
        """The circuit has changed: what was before says nothing about it."""
        self._quiet_since = self._down_at = None

    def why(self, now: float, waiting: int) -> str:
        """Why the cluster is down for sure, or ""; `waiting` are records without a report."""
        if self._unanswered_since is not None and now - self._unanswered_since >= min(DOWN_S, self._stall_s):
            return NO_ANSWER
        if waiting <= 0 or self._reports != self._seen:
            self._seen, self._quiet_since = self._reports, None
        if waiting <= 0:
            self._down_at = None  # long ago, perhaps, when nothing was to be sent
            return ""
        if self._quiet_since is None:
            self._quiet_since = now
        if now - self._quiet_since >= self._stall_s:
            return f"no report for {self._stall_s:g} s"
        if self._down_at is not None and now - max(self._down_at, self._quiet_since) >= min(DOWN_S, self._stall_s):
            return "all brokers are down"
        return ""
