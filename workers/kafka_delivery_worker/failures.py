"""How many processes have failed at a message by a fault of their own: the one thing that lets a message be blamed.

A failure that nobody planned may be a bug that any message would meet, or a broken host. The message goes back to its
queue, and another process tries. Redis counts them, so that the count outlives a restart.
"""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from kafka_delivery.base import REQUEUE_PAUSE_S
from kafka_delivery.faults import QUEUE_FAULTS
from kafka_delivery.names import FAILED
from kafka_delivery.redis_client import RedisClient

log = logging.getLogger("kafka_delivery.failures")

REMEMBERED_S = 24 * 3600
"""How long a count is kept after the last failure."""

LONGEST_PAUSE_S = 60.0
"""The pause of a message doubles with each failure, up to this."""


class Failed(NamedTuple):
    """What is known of the failures at one message.

    Attributes:
        processes: how many processes failed at it; 0 where nobody counts.
        pause_s: how long it waits before it is handed out again, in seconds.
    """

    processes: int = 0
    pause_s: float = REQUEUE_PAUSE_S


class Failures:
    """Counts in Redis.

    Args:
        redis: where they lie.
        process: the name of this process, unique among all hosts.
    """

    def __init__(self, redis: RedisClient, process: str) -> None:
        self._redis = redis
        self._process = process

    def count(self, message_id: str, pid: int | None = None) -> Failed:
        """Count one more failure of this process at a message. Redis may be away; then nothing is counted.

        Args:
            message_id: of the message.
            pid: of the child that failed; by default it is this process.
        """
        key = self._redis.prefix + FAILED + message_id
        try:
            with self._redis.client.pipeline() as pipe:
                pipe.hincrby(key, f"{self._process}:{pid or os.getpid()}", 1)
                pipe.expire(key, REMEMBERED_S)
                pipe.hvals(key)
                tries = [int(count) for count in pipe.execute()[-1]]
        except QUEUE_FAULTS as error:
            log.warning("failures.not_counted message_id=%s error=%s", message_id, type(error).__name__)
            return Failed()
        return Failed(len(tries), min(LONGEST_PAUSE_S, REQUEUE_PAUSE_S * 2 ** min(sum(tries) - 1, 10)))

    def forget(self, message_id: str) -> None:
        """Forget a message that is parked: its redrive begins anew."""
        try:
            self._redis.client.delete(self._redis.prefix + FAILED + message_id)
        except QUEUE_FAULTS as error:  # it is forgotten in a day
            log.warning("failures.not_forgotten message_id=%s error=%s", message_id, type(error).__name__)
