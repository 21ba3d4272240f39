"""What of a dead-letter topic is done: sent again, parked or discarded, in whatever order that was.

A consumer group has one offset per partition, below which all is done. What is done above it, because somebody asked
for some dead letters and not for others, is remembered here: one bit per offset, in segments that are dropped when the
group's offset has passed them. So it costs an eighth of a byte per dead letter behind the first one that still waits.

The group's offset is kept here too. Kafka forgets it after a week without a run (``offsets.retention.minutes``), and
all dead letters would wait again.

Concurrency: whoever marks holds the topic's `RunLock`; each write of marks checks that it still does.
"""

from __future__ import annotations

import functools
import getpass
import importlib.resources
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Self

from redis.exceptions import LockError, RedisError
from redis.lock import Lock

from kafka_delivery import names
from kafka_delivery.errors import KafkaDeliveryError
from kafka_delivery.names import AUDIT, DEFAULT_CLUSTER
from kafka_delivery.redis_client import RedisClient

SEGMENT = 65_536
"""Offsets of one bitmap, 8 KiB of Redis."""

AT_ONCE = 500
"""Marks of one script; Redis serves others after each."""

AUDIT_ENTRIES = 10_000
"""The newest so many are kept, about."""

TOPIC_ID = "topic-id"

LOCK_S = 10.0
"""A run that died holds its topic for so long; one that lives renews three times as often."""


class RedriveError(KafkaDeliveryError):
    """Raised when dead letters cannot be read, sent again or discarded; the text says what to do."""


class DoneOffsets:
    """The memory of one dead-letter topic of a Kafka cluster."""

    def __init__(self, redis: RedisClient, topic: str, cluster: str = DEFAULT_CLUSTER) -> None:
        self._client = redis.client
        self._base = redis.prefix + names.redrive(cluster, topic)
        self._audit = redis.prefix + AUDIT
        self._mark = self._client.register_script(_script("mark"))
        self._segments: dict[int, tuple[int, bytes]] = {}
        """Of each partition, the segment that was looked at last."""

    def floors(self) -> tuple[str, dict[int, int]]:
        """The topic's id at the last run, "" where the cluster tells none, and the offset of each partition."""
        stored = {name.decode(): value.decode() for name, value in self._client.hgetall(self._base).items()}
        topic_id = stored.pop(TOPIC_ID, "")
        return topic_id, {int(partition): int(offset) for partition, offset in stored.items()}

    def begin(self, topic_id: str, floors: Mapping[int, int], forgotten: Iterable[int]) -> None:
        """Before marks: know the topic, and lose what was remembered of partitions that are not what they were."""
        for partition in forgotten:
            for key in self._client.scan_iter(f"{self._base}:{partition}:*"):
                self._client.unlink(key)
            self._segments.pop(partition, None)
        self._client.hset(self._base, mapping={TOPIC_ID: topic_id, **{str(p): offset for p, offset in floors.items()}})

    def is_done(self, partition: int, offset: int) -> bool:
        """Whether an offset at or above its partition's floor is done. Ask in order: one segment is kept."""
        number, bit = divmod(offset, SEGMENT)
        kept = self._segments.get(partition)
        if kept is None or kept[0] != number:
            kept = self._segments[partition] = number, self._client.get(self._key(partition, number)) or b""
        byte, place = divmod(bit, 8)
        return byte < len(kept[1]) and bool(kept[1][byte] >> (7 - place) & 1)

    def count(self, partition: int, start: int, end: int) -> int:
        """How many offsets from `start` on and before `end` are done."""
        total = 0
        for number in range(start // SEGMENT, -(-end // SEGMENT)):
            bits = (self._client.get(self._key(partition, number)) or b"").ljust(SEGMENT // 8, b"\0")
            first, last = max(start - number * SEGMENT, 0), min(end - number * SEGMENT, SEGMENT)
            found = int.from_bytes(bits) >> (SEGMENT - last) & ((1 << (last - first)) - 1)
            total += found.bit_count()
        return total

    def mark(self, lock: RunLock, places: list[tuple[int, int]], audit: Mapping[str, Any] | None = None) -> None:
        """Note places (partition, offset) as done, and with the same step why.

        Raises:
            RedriveError: the lock is lost; nothing is noted.
        """
        for start in range(0, len(places), AT_ONCE):
            some = places[start : start + AT_ONCE]
            entry = "" if audit is None else json.dumps({**audit, "count": len(some), "places": ranges(some)})
            keys = [lock.key, self._audit, *(self._key(p, offset // SEGMENT) for p, offset in some)]
            arguments = [lock.token, entry, AUDIT_ENTRIES, *(offset % SEGMENT for _, offset in some)]
            if not self._mark(keys, arguments):
                raise lock.lost()

    def check(self, lock: RunLock) -> None:
        """Before anything that marks do not guard.

        Raises:
            RedriveError: the lock is lost.
        """
        if self._client.get(lock.key) != lock.token.encode():
            raise lock.lost()

    def settle(self, before: Mapping[int, int], floors: Mapping[int, int]) -> None:
        """The group's offsets have moved: nothing below them needs a mark any more."""
        with self._client.pipeline(transaction=True) as pipe:
            for partition, floor in floors.items():
                pipe.hset(self._base, str(partition), floor)
                for number in range(before[partition] // SEGMENT, floor // SEGMENT):
                    pipe.unlink(self._key(partition, number))
            pipe.execute()

    def note(self, entry: Mapping[str, Any]) -> None:
        """Add a line to the audit."""
        self._client.xadd(self._audit, {"entry": json.dumps(entry)}, maxlen=AUDIT_ENTRIES)

    def _key(self, partition: int, segment: int) -> str:
        return f"{self._base}:{partition}:{segment}"


def history(redis: RedisClient, limit: int) -> list[dict[str, Any]]:
    """The newest entries of the audit, the newest first."""
    found: Any = redis.client.xrevrange(redis.prefix + AUDIT, count=limit)
    return [json.loads(fields[b"entry"]) for _, fields in found]


def ranges(places: Iterable[tuple[int, int]]) -> str:
    """Places in short: ``0:3-7,0:9,1:0``."""
    found: list[list[int]] = []
    for partition, offset in sorted(places):
        if found and found[-1][0] == partition and found[-1][2] == offset - 1:
            found[-1][2] = offset
        else:
            found.append([partition, offset, offset])
    return ",".join(f"{p}:{first}" if first == last else f"{p}:{first}-{last}" for p, first, last in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Who runs."""

    host: str
    pid: int
    user: str
    since: str

    @classmethod
    def here(cls) -> Runner:
        """This process."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(host=socket.gethostname(), pid=os.getpid(), user=_user(), since=since)

    def __str__(self) -> str:
        return f"{self.user}@{self.host}, process {self.pid}, since {self.since}"


class RunLock:
    """One run at a time on a dead-letter topic; a context manager. A thread renews it; a dead process's ends by itself.

    Args:
        redis: where it is.
        topic: what is locked, by its name.
        lock_s: how long a dead process holds it.
        cluster: the Kafka cluster of the dead-letter topic.
        key: its name in Redis without the prefix; by default that of the dead-letter topic.

    Raises:
        RedriveError: on entry: another one runs; the text says who.
    """

    def __init__(
        self,
        redis: RedisClient,
        topic: str,
        lock_s: float = LOCK_S,
        key: str = "",
        cluster: str = DEFAULT_CLUSTER,
    ) -> None:
        self.key = redis.prefix + (key or f"{names.redrive(cluster, topic)}:lock")
        self.runner = Runner.here()
        self.token = json.dumps(asdict(self.runner) | {"nonce": uuid.uuid4().hex})
        self._client = redis.client
        self._lock = Lock(self._client, self.key, timeout=lock_s, blocking=False, thread_local=False)
        self._topic, self._lock_s = topic, lock_s
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        while not self._lock.acquire(token=self.token):
            holder = self._client.get(self.key)
            if holder is not None:  # else it ended in this moment
                known = {k: v for k, v in json.loads(holder).items() if k in Runner.__slots__}
                raise RedriveError(
                    f"{self._topic} is being worked on by {Runner(**known)}; wait for it. If that process is dead, "
                    f"try again in {self._lock_s:.0f} s"
                )
        threading.Thread(target=self._renew, name="kafka-delivery-redrive-lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with suppress(LockError, RedisError):  # it is another's, or ends by itself
            self._lock.release()

    def lost(self) -> RedriveError:
        """What to raise when it is found to be another's, or nobody's."""
        return RedriveError(
            f"the lock on {self._topic} was lost: Redis did not hear from this process for {self._lock_s:.0f} s. "
            "Nothing more is sent; run it again to go on"
        )

    def _renew(self) -> None:
        while not self._stop.wait(self._lock_s / 3):
            try:
                self._lock.reacquire()
            except LockError:
                return  # the next mark finds out
            except RedisError:
                continue  # it may be back in time


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return f"uid {os.getuid()}"


@functools.cache
def _script(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(f"{name}.lua").read_text()
