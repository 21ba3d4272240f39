"""A clock that goes on only while somebody collects delivery reports.

A process that is frozen or starved, or whose event loop waits for Redis, hears nothing of Kafka either. Such time says
nothing about Kafka: what is judged by silence is judged by this clock. It moves after reports were collected and told
of, so that no silence is found while they lie there.

librdkafka's own clock does not stop, and records may time out in its hands meanwhile. So whoever counts failures is
told of each gap.
"""

from __future__ import annotations

from collections.abc import Callable

STEP_S = 1.0
"""What one look at the reports adds at most. While records are in flight there are two in a second at least."""

GAP_S = 2.0
"""When nobody has looked for so long, that is a gap."""


class Attendance:
    """That of one process. `collected` is called by who collects reports, everything else by any thread.

    Args:
        clock: seconds.
        on_gap: called with each look that ends a gap.
    """

    def __init__(self, clock: Callable[[], float], on_gap: Callable[[], None]) -> None:
        self._clock = clock
        self._on_gap = on_gap
        self._looked_at = clock()
        self._somebody_collects = False
        self.now = 0.0
        """Seconds that were attended, as of the last look."""

    def collected(self) -> None:
        """All reports that were there have been told of."""
        self._somebody_collects = True
        self._look()

    def tick(self) -> None:
        """Called now and then; this is the clock of a process that has no reports to collect, as prefork's parent."""
        if not self._somebody_collects:
            self._look()

    @property
    def in_gap(self) -> bool:
        """Whether nobody has looked for long: what is collected now may have become of that."""
        return self._clock() - self._looked_at > GAP_S

    def _look(self) -> None:
        now = self._clock()
        passed, self._looked_at = now - self._looked_at, now
        self.now += min(passed, STEP_S)
        if passed > GAP_S:
            self._on_gap()
