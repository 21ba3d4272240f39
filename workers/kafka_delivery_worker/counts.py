"""What became of records, counted by outcome and topic; gathered in the process, written to Redis once a second."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from kafka_delivery.names import COUNTS
from kafka_delivery.redis_client import RedisClient

log = logging.getLogger("kafka_delivery.counts")

OUTCOMES = ("delivered", "retried", "deferred", "dead-lettered", "parked")

TOPICS = 2_000
"""Topics that have counts of their own, in a process and in Redis: names without end must fill neither."""

OTHER_TOPICS = "(other)"
"""Under which all further topics are counted; no topic of Kafka's can have this name."""


class Counts:
    """Counters of one process. Adding is cheap and safe from any thread; a killed process loses the last interval.

    Args:
        redis: where they are written.
        interval_s: how often, in seconds.
        told: called as often with what was counted since the last time, whether Redis takes it or not.
    """

    def __init__(
        self, redis: RedisClient, interval_s: float, told: Callable[[Mapping[str, int]], None] | None = None
    ) -> None:
        self._redis = redis
        self._interval_s = interval_s
        self._told = told
        self._unwritten: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._waiting: Counter[str] = Counter()
        self._named: set[str] = set()
        self._there: set[str] = set()
        """Fields that are in Redis, as far as this process knows."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, outcome: str, topic: str, count: int = 1) -> None:
        """Count `count` records of `topic` that ended as `outcome`, one of OUTCOMES."""
        with self._lock:
            if topic not in self._named:
                if len(self._named) < TOPICS:
                    self._named.add(topic)
                else:
                    topic = OTHER_TOPICS
            self._waiting[f"{outcome}:{topic}"] += count
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kafka-delivery-counts", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Write what is left."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._interval_s + 1)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            counted, self._waiting = self._waiting, Counter()
        if self._told is not None:
            self._told(counted)
        self._unwritten.update(counted)
        if not self._unwritten:
            return
        try:
            self._make_room()
            with self._redis.client.pipeline(transaction=True) as pipe:
                for field, count in self._unwritten.items():
                    pipe.hincrby(self._redis.prefix + COUNTS, field, count)
                pipe.execute()
        except (RedisError, KombuError, OSError) as error:
            # A timeout may have counted after all; counters may then be high, never a reason to stop a worker.
            log.warning("counts.not_written error=%s waiting=%d", type(error).__name__, len(self._unwritten))
        else:
            self._unwritten.clear()

    def _make_room(self) -> None:
        """Count what has no field in Redis yet under OTHER_TOPICS if there are too many fields already.

        Raises:
            redis.exceptions.RedisError: Redis cannot be reached.
        """
        new = [field for field in self._unwritten if field not in self._there]
        if not new:
            return
        with self._redis.client.pipeline(transaction=False) as pipe:
            pipe.hlen(self._redis.prefix + COUNTS)
            pipe.hmget(self._redis.prefix + COUNTS, new)
            fields, stored = pipe.execute()
        for field, count in zip(new, stored, strict=True):
            outcome, _, topic = field.partition(":")
            if count is not None or fields < TOPICS * len(OUTCOMES) or topic == OTHER_TOPICS:
                fields += count is None
                self._there.add(field)
            else:
                self._unwritten[f"{outcome}:{OTHER_TOPICS}"] += self._unwritten.pop(field)


def read(redis: Any, prefix: str = "") -> dict[str, dict[str, int]]:
    """Counts as ``{topic: {outcome: count}}``."""
    counts: dict[str, dict[str, int]] = {}
    for field, count in redis.hgetall(prefix + COUNTS).items():
        try:
            outcome, _, topic = field.decode().partition(":")
            counts.setdefault(topic, {})[outcome] = int(count)
        except ValueError:  # no worker wrote it
            continue
    return counts
