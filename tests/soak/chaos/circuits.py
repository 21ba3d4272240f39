"""Which circuits opened, and whether Kafka gave them reason to."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import redis

from kafka_delivery.circuits import OPEN
from kafka_delivery.names import CIRCUITS, CLUSTER_SCOPE, TOPIC_SCOPE
from kafka_delivery.settings import Settings

LOG = CIRCUITS.format(cluster=Settings().cluster) + "log"

AFTERWARDS_S = 15.0
"""An outage ends so much later for those who wait for reports: what was sent in its last moment times out after eight
seconds, and the report of that may come five seconds late."""


@dataclass(frozen=True, slots=True)
class Opening:
    """A circuit that opened; `at` in seconds since the epoch."""

    at: float
    scope: str
    before: str
    why: str
    by: str


@dataclass(frozen=True, slots=True)
class Outage:
    """A time without Kafka: from its kill until it answered again (seconds since the epoch)."""

    began: float
    ended: float

    def excuses(self, at: float) -> bool:
        """Whether a circuit may open at this moment because of it."""
        return self.began <= at <= self.ended + AFTERWARDS_S


class History:
    """The openings so far. To be read every now and then: Redis keeps the newest thousand transitions."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._last = "-"
        self.openings: list[Opening] = []

    def read(self) -> None:
        """Take in what is new.

        Raises:
            redis.RedisError: Redis is away; nothing is forgotten.
        """
        entries: Any = self._client.xrange(LOG, min=self._last)
        for entry, fields in entries:
            self._last = f"({entry.decode()}"
            if fields[b"to"].decode() == OPEN:
                at_ms = int(entry.partition(b"-")[0])
                text = {name: fields[name].decode() for name in (b"scope", b"from", b"why", b"by")}
                self.openings.append(Opening(at_ms / 1000, *text.values()))


def without_reason(openings: Iterable[Opening], outages: Collection[Outage], topics: Collection[str]) -> list[Opening]:
    """Those of the cluster's circuit, and of the circuits of these topics, while Kafka was well.

    Args:
        topics: that exist. Circuits of others may open at any time.
    """
    scopes = {CLUSTER_SCOPE, *(TOPIC_SCOPE + topic for topic in topics)}
    return [one for one in openings if one.scope in scopes and not any(outage.excuses(one.at) for outage in outages)]


def well_s(began: float, ended: float, outages: Iterable[Outage]) -> float:
    """For how much of this time no outage excused an open circuit (seconds)."""
    total, at = 0.0, began
    for outage in sorted(outages, key=lambda one: one.began):
        total += max(0.0, min(outage.began, ended) - at)
        at = max(at, outage.ended + AFTERWARDS_S)
    return total + max(0.0, ended - at)
