"""Whether Kafka takes records now, as far as the workers know: what an application may ask before it relies on it.

The workers of a fleet share a circuit breaker in Redis: one circuit for the Kafka cluster, one for each topic that has
trouble of its own. `.delay()` does not ask it: the queue is the buffer for an outage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from . import settings
from .names import CIRCUITS, CLUSTER_SCOPE, TOPIC_SCOPE
from .redis_client import RedisClient, kept_client

CLOSED, OPEN, HALF_OPEN, UNKNOWN = "closed", "open", "half-open", "unknown"


@dataclass(frozen=True, slots=True)
class Circuit:
    """One circuit, as it is now.

    Attributes:
        scope: ``"cluster"`` or ``"topic:<name>"``.
        state: ``"closed"`` (records flow), ``"open"`` (they wait), ``"half-open"`` (single ones are sent to see), or
            ``"unknown"``: Redis did not say.
        retry_after: seconds until it is worth another look; 0 where that has come; a minute where no end is known.
        why: what opened or closed it last, or why it is forced; of an unknown one, the name of the error.
        by: the worker that changed it, or who forced it.
        forced: ``"open"`` or ``"closed"`` by hand, else "".
        found: the state that the workers found by themselves, also while another one is forced.
        trips: rounds of the present outage, which its pauses grow with.
        since_s: seconds since it changed; None if it never did.
        forced_s: seconds until it is automatic again; None if it is not forced, or without an end.
    """

    scope: str
    state: str
    retry_after: float = 0.0
    why: str = ""
    by: str = ""
    forced: str = ""
    found: str = CLOSED
    trips: int = 0
    since_s: float | None = None
    forced_s: float | None = None


LAPSES_S = 30.0
"""A circuit that no worker has looked at for so long holds up nobody any more, unless it is forced; see claim.lua."""

NO_END_S = 60.0
"""What is said of a circuit that is forced open without an end."""


def circuit(topic: str | None = None) -> Circuit:
    """How the circuit is that decides about records for `topic`; that of the cluster where no topic is given.

    One round trip to Redis, bounded as `.delay()` is; never raises for a Redis that is away.

    Returns:
        The cluster's circuit if that one is not closed, else the topic's.
    """
    s = settings.current()
    scopes = [CLUSTER_SCOPE] if topic is None else [CLUSTER_SCOPE, TOPIC_SCOPE + topic]
    try:
        found = read(kept_client(s), s.cluster, scopes)
    except (RedisError, KombuError, OSError) as error:
        return Circuit(scopes[-1], UNKNOWN, why=type(error).__name__)
    return next((one for one in found if one.state != CLOSED), found[-1])


def read(redis: RedisClient, cluster: str, scopes: Iterable[str]) -> list[Circuit]:
    """Circuits of these scopes, at one moment.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached.
    """
    scopes = list(scopes)
    base = redis.prefix + CIRCUITS.format(cluster=cluster)
    with redis.client.pipeline(transaction=True) as pipe:
        pipe.time()
        pipe.zrevrange(base + "workers", 0, 0, withscores=True)
        for scope in scopes:
            pipe.hgetall(f"{base}{scope}:st")
        (seconds, microseconds), looked, *stored = pipe.execute()
    now = int(seconds) * 1000 + int(microseconds) // 1000
    lapsed = not any(abs(now - at) <= LAPSES_S * 1000 for _, at in looked)
    return [
        _circuit(scope, {name.decode(): value.decode() for name, value in fields.items()}, now, lapsed)
        for scope, fields in zip(scopes, stored, strict=True)
    ]


def _circuit(scope: str, fields: dict[str, str], now: int, lapsed: bool) -> Circuit:
    def number(name: str) -> float:
        return float(fields.get(name, 0))

    def left_s(till: str, since: str) -> float:
        # A beginning that is to come was written by a clock that was ahead; see circuit.lua.
        return (number(till) - max(now, number(since))) / 1000

    found = fields.get("state", CLOSED)
    remaining = max(0.0, left_s("till", "since"))
    if found == OPEN and (not remaining or lapsed):
        found = HALF_OPEN  # its time is over: the next record shows
    forced = fields.get("forced", "")
    forced_s = left_s("forced_till", "forced_at") if forced and number("forced_till") else None
    if forced_s is not None and forced_s <= 0:
        forced, forced_s = "", None
    state, why, by = forced or found, fields.get("why", ""), fields.get("by", "")
    retry_after = remaining if state == OPEN else 0.0
    if forced:
        why, by = fields.get("forced_why", ""), fields.get("forced_by", "")
        retry_after = (NO_END_S if forced_s is None else forced_s) if forced == OPEN else 0.0
    since = (now - number("since")) / 1000 if number("since") else None
    return Circuit(scope, state, retry_after, why, by, forced, found, int(number("trips")), since, forced_s)


def known_topics(redis: RedisClient, cluster: str) -> list[str]:
    """Scopes of the topics that have had trouble of their own lately."""
    found: list[Any] = redis.client.zrange(redis.prefix + CIRCUITS.format(cluster=cluster) + "topics", 0, -1)
    return [scope.decode() for scope in found]
