"""What becomes of a record, as far as it says something about a circuit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kafka_delivery.names import CLUSTER_SCOPE

from ..classify import Scope

LOCAL = "local"
"""The scope of the process's own circuit; it is no scope in Redis."""


class Probe(NamedTuple):
    """A record that is sent to see whether a circuit may close."""

    scope: str
    token: str

    @property
    def mark(self) -> str:
        """As a message header."""
        return f"{self.scope}|{self.token}"

    @property
    def of_cluster(self) -> bool:
        """Whether any record will do."""
        return self.scope in (CLUSTER_SCOPE, LOCAL)

    @classmethod
    def of(cls, mark: str) -> Probe:
        """That of a message header; of one that a stranger wrote, a probe that nobody granted."""
        scope, _, token = str(mark).partition("|")
        return cls(scope, token)


Admission = int | Probe
"""What a record was sent under: the generation of the circuits, or as a probe."""


@dataclass(slots=True)
class Tally:
    """Outcomes of records that were sent under the present state of a circuit."""

    since: int = 0
    ok: int = 0
    fail: int = 0
    row: int = 0
    late: int = 0
    quiet: int = 0
    """Reports in a row without a failure."""

    def take(self) -> tuple[int, int, int, int]:
        taken = self.ok, self.fail, self.row, self.late
        self.quiet = 0 if self.fail else self.quiet + 1
        self.ok = self.fail = self.row = self.late = 0
        return taken


def count_ok(tally: Tally, sent: int, records: int = 1) -> None:
    if sent >= tally.since:
        tally.ok += records
        tally.row = 0
    else:
        tally.late = 1


def count_failure(tally: Tally, sent: int) -> None:
    if sent >= tally.since:
        tally.fail += 1
        tally.row = 1


def of_probe(probe: Probe, scope: Scope, answered: bool, of_topic: bool, by_broker: bool) -> str:
    """What a probe's failure says about the scope that it was for."""
    if probe.of_cluster:
        return "fail" if scope is Scope.CLUSTER else "ok" if answered and by_broker else "ignore"
    if of_topic:
        return "fail"
    # A verdict of another kind, on this record or for good: there is nothing to wait for any more.
    return "ok" if scope is Scope.TOPIC or (scope is Scope.RECORD and by_broker) else "ignore"
