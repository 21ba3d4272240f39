"""A limit for what waits: applications are refused before Redis is full.

A full Redis refuses everybody, also workers, which then have no room to lease what they would empty it by. What counts
is the memory of Redis as a whole: queued, delayed and parked records, results, and whatever else lies there.
"""

from __future__ import annotations

import time
from typing import Any

from . import settings
from .errors import BacklogFullError
from .redis_client import kept_client

LOOK_S = 1.0
"""How long a process goes by what it has seen (seconds): it looks this often, not with each send."""

_seen: tuple[Any, float, int] = (None, 0.0, 0)
"""By which client, when (by the monotonic clock), and how many bytes."""


def refuse_if_full(message_id: str) -> None:
    """Refuse a send while Redis holds `backlog_max_bytes` or more.

    Raises:
        BacklogFullError: it does.
        redis.exceptions.RedisError: Redis cannot be asked; nothing was queued.
    """
    s = settings.current()
    if not s.backlog_max_bytes or not s.queue_on_redis:
        return
    used = _used_bytes(s)
    if used >= s.backlog_max_bytes:
        raise BacklogFullError(
            message_id, f"Redis holds {used} bytes, KAFKA_DELIVERY_BACKLOG_MAX_BYTES={s.backlog_max_bytes}"
        )


def _used_bytes(s: settings.Settings) -> int:
    global _seen
    redis = kept_client(s)
    client, seen_at, used = _seen
    if client is not redis or time.monotonic() - seen_at > LOOK_S:
        used = int(redis.client.info("memory")["used_memory"])
        _seen = redis, time.monotonic(), used
    return used
