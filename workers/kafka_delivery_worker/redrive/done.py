"""What of a dead-letter topic is done: sent again, parked or discarded, in whatever order that was.

A consumer group has one offset per partition, below which all is done. What is done above it, because somebody asked
for some dead letters and not for others, is remembered here: one bit per offset, in segments that are dropped when the
group's offset has passed them. So it costs an eighth of a byte per dead letter behind the first one that still waits.

The group's offset is kept here too. Kafka forgets it after a week without a run (``offsets.retention.minutes``), and
all dead letters would wait again.

Concurrency: whoever writes here holds the topic's `RunLock`; each write checks in the same step that it still does.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kafka_delivery import names
from kafka_delivery.errors import KafkaDeliveryError
from kafka_delivery.names import AUDIT, DEFAULT_CLUSTER
from kafka_delivery.redis_client import RedisClient

from ..run_lock import RunLock

SEGMENT = 65_536
"""Offsets of one bitmap, 8 KiB of Redis."""

AT_ONCE = 500
"""Marks of one script; Redis serves others after each."""

AUDIT_ENTRIES = 10_000
"""The newest so many are kept, about."""

TOPIC_ID = "topic-id"


class RedriveError(KafkaDeliveryError):
    """Raised when dead letters cannot be read, sent again or discarded; the text says what to do."""


class DoneOffsets:
    """The memory of one dead-letter topic of a Kafka cluster."""

    def __init__(self, redis: RedisClient, topic: str, cluster: str = DEFAULT_CLUSTER) -> None:
        self._client = redis.client
        self._base = redis.prefix + names.redrive(cluster, topic)
        self._audit = redis.prefix + AUDIT
        self._mark, self._floors = (self._client.register_script(script(name)) for name in ("mark", "floors"))
        self._segments: dict[int, tuple[int, bytes]] = {}
        """Of each partition, the segment that was looked at last."""

    def floors(self) -> tuple[str, dict[int, int]]:
        """The topic's id at the last run, "" where the cluster tells none, and the offset of each partition."""
        stored = {name.decode(): value.decode() for name, value in self._client.hgetall(self._base).items()}
        topic_id = stored.pop(TOPIC_ID, "")
        return topic_id, {int(partition): int(offset) for partition, offset in stored.items()}

    def begin(self, lock: RunLock, topic_id: str, floors: Mapping[int, int], forgotten: Iterable[int]) -> None:
        """Before marks: know the topic, and lose what was remembered of partitions that are not what they were.

        Raises:
            NotAloneError: the lock is lost; nothing is noted.
        """
        dropped: list[Any] = []
        for partition in forgotten:
            dropped += self._client.scan_iter(f"{self._base}:{partition}:*", count=1_000)
            self._segments.pop(partition, None)
        self._note(lock, {TOPIC_ID: topic_id, **{str(p): offset for p, offset in floors.items()}}, dropped)

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
            NotAloneError: the lock is lost; nothing more is noted.
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
            NotAloneError: the lock is lost.
        """
        if self._client.get(lock.key) != lock.token.encode():
            raise lock.lost()

    def settle(self, lock: RunLock, before: Mapping[int, int], floors: Mapping[int, int]) -> None:
        """The group's offsets have moved: nothing below them needs a mark any more.

        Raises:
            NotAloneError: the lock is lost; nothing is noted.
        """
        dropped = [
            self._key(partition, number)
            for partition, floor in floors.items()
            for number in range(before[partition] // SEGMENT, floor // SEGMENT)
        ]
        self._note(lock, {str(partition): floor for partition, floor in floors.items()}, dropped)

    def _note(self, lock: RunLock, fields: Mapping[str, str | int], dropped: Sequence[Any]) -> None:
        for start in range(0, max(1, len(dropped)), AT_ONCE):
            keys = [lock.key, self._base, *dropped[start : start + AT_ONCE]]
            if not self._floors(keys, [lock.token, *(part for field in fields.items() for part in field)]):
                raise lock.lost()

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


@functools.cache
def script(name: str) -> str:
    """The source of a Lua script that lies beside this module."""
    return importlib.resources.files(__package__).joinpath(f"{name}.lua").read_text()
