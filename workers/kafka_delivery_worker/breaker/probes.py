"""The probes of a process: single records that show whether a circuit may close again.

Each is granted (by Redis, or by the process's own circuit), claimed with a record, begun when that is sent, and
concluded once: by the record's report, by running out of time, or because there was nothing to send. Its outcome waits
here to be settled. Its time is attended time: a report that nobody collects is not missing.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter, deque
from collections.abc import Callable, Set

from .outcomes import Probe

SEEK_PAUSE_S = 1.0
"""Before a probe is asked for again for which there was no record."""

HELD_BACK_S = 1.0
"""How long records of topics in trouble are passed over for a probe of the cluster; there may be no others. One that is
sent has as long to arrive."""

Settled = tuple[Probe, str, str]
"""A probe, what became of it (ok, fail or ignore), and why."""


class Probes:
    """Those of one process. Any thread may call.

    Args:
        takes_s: seconds that a probe may take, from when its record is sent.
        clock: seconds.
        attended: seconds in which reports were collected.
        concluded: called with each outcome that is to be settled.
    """

    def __init__(
        self,
        takes_s: float,
        clock: Callable[[], float],
        attended: Callable[[], float],
        concluded: Callable[[], None],
    ) -> None:
        self._takes_s = takes_s
        self._clock = clock
        self._attended = attended
        self._concluded = concluded
        self._lock = threading.Lock()
        self.granted: Probe | None = None
        """To be claimed."""
        self.outcomes: Counter[str] = Counter()
        """What became of them: ok, fail or ignore."""
        self._till: dict[Probe, float] = {}
        self._begun: dict[Probe, str] = {}
        """With their topics, as far as these are known."""
        self._doubtful: set[Probe] = set()
        """Sent before a gap, in which they may have timed out."""
        self._settled: deque[Settled] = deque()
        self._tokens: dict[str, str] = {}
        self._seek_after: dict[str, float] = {}
        self._held_back_since: float | None = None
        """When the first of the probes of the cluster came that were none, for their topics."""

    def __len__(self) -> int:
        """How many have no outcome yet."""
        return len(self._till)

    # -- before they are granted
    def may_seek(self, scope: str) -> bool:
        """Whether one is worth asking for."""
        return self._clock() >= self._seek_after.get(scope, 0)

    def pause(self, scope: str, seconds: float) -> None:
        """Ask for none in this time."""
        self._seek_after[scope] = self._clock() + seconds

    def wanted(self, scope: str) -> Probe:
        """One to ask for: the same until there is an answer, for a lost one may have been a grant."""
        return Probe(scope, self._tokens.setdefault(scope, uuid.uuid4().hex))

    def answered(self, probe: Probe) -> None:
        """The next one to ask for is another."""
        self._tokens.pop(probe.scope, None)

    # -- from grant to report
    def grant(self, probe: Probe, within_s: float) -> Probe:
        """One that somebody is to send; it waits so long for a record."""
        with self._lock:
            self._till[probe] = self._attended() + within_s
        return probe

    def take(self) -> Probe | None:
        """One to claim a record for, now."""
        probe, self.granted = self.granted, None
        return probe

    def withdraw(self, probe: Probe) -> None:
        """It is not needed any more, and nobody has claimed it."""
        self._till.pop(probe, None)
        self.granted = None

    def tries_all(self) -> bool:
        """Whether one of the cluster may be of a topic in trouble: no other has come for a while."""
        now, since = self._clock(), self._held_back_since  # read once: other threads send, too
        if since is None:
            since = self._held_back_since = now
        return now - since >= HELD_BACK_S

    def found(self) -> None:
        """There is a record for one of the cluster."""
        self._held_back_since = None

    def begin(self, probe: Probe, topic: str) -> None:
        """It is being sent, here or by a child of this process."""
        with self._lock:
            self._begun[probe] = topic or self._begun.get(probe, "")
            # Where the parent of this process claimed it, its outcome is known here all the same.
            self._till[probe] = self._attended() + self._takes_s

    def report(self, probe: Probe, outcome: str, why: str = "") -> bool:
        """Its record has a report; False if it was given up before: evidence, as anything else that arrives late."""
        with self._lock:
            self._begun.pop(probe, None)
            if probe not in self._till:
                return False
            self._conclude(probe, outcome, why)
            return True

    def doubt(self) -> None:
        """Nobody has collected reports for a while: of what is being sent, none can be told from a timeout."""
        with self._lock:
            self._doubtful |= self._begun.keys() & self._till.keys()

    def give_up(self, probe: Probe) -> bool:
        """librdkafka has given its record up; True if that says nothing, and the next one may."""
        with self._lock:
            doubtful = probe in self._doubtful
            if doubtful:
                self._begun.pop(probe, None)
                self._conclude(probe, "ignore", "")
            return doubtful

    def drop(self, probe: Probe) -> None:
        """There was nothing that could be sent: it says nothing, and the next one may."""
        with self._lock:
            self._begun.pop(probe, None)
            self._conclude(probe, "ignore", "")

    def drop_all(self) -> None:
        """This process ends; what has no report yet is another one's to probe."""
        with self._lock:
            for probe in [*self._till]:
                self._conclude(probe, "ignore", "")

    def expire(self, shut_topics: Set[str]) -> None:
        """One that takes too long has failed; its record goes on, and is evidence if it arrives."""
        now = self._attended()
        with self._lock:
            for probe, till in [*self._till.items()]:
                # Its topic is in trouble, which says nothing about the cluster. Not at once: each leaves another record
                # in flight, and that topic may be well by now.
                tried = now - (till - self._takes_s) >= HELD_BACK_S
                if probe.of_cluster and tried and self._begun.get(probe) in shut_topics:
                    self._conclude(probe, "ignore", "")
            for probe in [probe for probe, till in self._till.items() if till <= now]:
                if self.granted == probe:
                    self.granted = None
                why = f"a probe had no report for {self._takes_s:g} s"
                self._conclude(probe, "fail" if probe in self._begun else "ignore", why)

    # -- outcomes
    def take_settled(self) -> list[Settled]:
        """What is to be settled, in its order."""
        return [self._settled.popleft() for _ in range(len(self._settled))]

    def keep(self, settled: list[Settled]) -> None:
        """Take these again: they could not be settled."""
        self._settled.extendleft(reversed(settled))

    def _conclude(self, probe: Probe, outcome: str, why: str) -> None:
        self._till.pop(probe, None)
        self._doubtful.discard(probe)
        self._tokens.pop(probe.scope, None)
        self.outcomes[outcome] += 1
        self._settled.append((probe, outcome, why))
        self._concluded()
