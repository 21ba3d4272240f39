"""Which worker processes pause themselves and why, in Redis, so that `kafka-delivery status` can say so."""

from __future__ import annotations

import json
from time import time
from typing import NamedTuple

from kafka_delivery.names import PAUSED
from kafka_delivery.redis_client import RedisClient

FRESH_S = 15.0
"""A process repeats it once a second. What is older was left by one that died."""


class Paused(NamedTuple):
    """A process that pauses itself.

    Attributes:
        worker: its name.
        why: in words; it holds no secret.
        since_ms: when that began (ms since the epoch, by the clock of its host).
    """

    worker: str
    why: str
    since_ms: int


def say(redis: RedisClient, worker: str, why: str, since_ms: int) -> None:
    """Write that `worker` pauses; with "" for `why`, that it does not.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached, or refuses.
    """
    key = redis.prefix + PAUSED
    if why:
        seconds, _ = redis.client.time()
        redis.client.hset(key, worker, json.dumps({"why": why, "since_ms": since_ms, "at": seconds}))
        redis.client.expire(key, int(10 * FRESH_S))
    else:
        redis.client.hdel(key, worker)


def read(redis: RedisClient) -> list[Paused]:
    """Return the processes that pause themselves now, by name.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached.
    """
    with redis.client.pipeline(transaction=False) as pipe:  # one round trip
        pipe.time()
        pipe.hgetall(redis.prefix + PAUSED)
        (seconds, _), said_by = pipe.execute()
    found = []
    for worker, stored in sorted(said_by.items()):
        try:
            said = json.loads(stored)
            fresh, paused = seconds - said["at"] <= FRESH_S, Paused(worker.decode(), said["why"], said["since_ms"])
        except (ValueError, TypeError, LookupError, RecursionError):  # no process of ours wrote it
            continue
        if fresh and isinstance(paused.why, str) and isinstance(paused.since_ms, int):
            found.append(paused)
    return found


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return int(time() * 1000)
