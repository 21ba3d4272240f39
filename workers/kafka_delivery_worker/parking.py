"""The parking store: what can go nowhere else is kept in Redis, whole, with the reason, until a person decides.

An item holds one of three contents:

``record``
    a record as it travels on the wire;
``call``
    a call of one of our tasks that is not a valid record: task, args, kwargs;
``message``
    a message that never reached a task: the envelope as it lay in the queue, and the queue's name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import logging
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple, Self

from kombu.utils.json import dumps, loads

from kafka_delivery.errors import ParkingFullError
from kafka_delivery.names import PARKED, PARKED_INDEX, PARKED_ROOM
from kafka_delivery.record import unpack
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings

log = logging.getLogger("kafka_delivery.parking")

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
"""How long a process asks a full store no more; doubles with each refusal in a row."""

PAGE = 100
PAGE_BYTES = 4 * 1024 * 1024
"""Of items that are read at a time: what bounds the memory of whoever lists them."""


KINDS = {
    "dead-letter": "its dead-letter topic refused it or is missing: create or correct that topic, then redrive",
    "redriven": "it was sent again from its dead-letter topic too often: find out why it is refused, then redrive",
    "invalid": "its message or its record has a wrong shape: correct the sender, then discard",
    "expired": "its `expires` passed before it could be sent: redrive or discard",
    "revoked": "it was revoked by remote control: redrive or discard",
    "undecodable": "its bytes cannot be decoded: if it is newer, update the workers and redrive; else discard",
    "unknown-task": "the workers do not know its task: update them, then redrive, or discard",
    "poison": "workers died while they held it: find out why (memory?), then redrive or discard",
    "bug": "several processes failed at it in a way that nobody planned: report it, with the error; then redrive",
}
"""Why items are parked, and what a person can do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """One parked item.

    Attributes:
        id: the message id, or a made-up one where there is none.
        parked_at_ms: milliseconds since the epoch.
        kind: why, in one word; one of `KINDS`.
        error_class, error_code, error_message: the reason; never a payload.
        retry_count: attempts that were used.
        redrive_count: how often it had been sent again from its dead-letter topic.
        topic: the record's topic where it is known.
        content: ``record``, ``call`` or ``message``.
        data: that content.
        size, sha256: bytes of a record's value, and their digest (hexadecimal); None for no record, and for a
            tombstone.
    """

    id: str
    kind: str
    error_class: str
    error_message: str
    content: str
    data: Any
    error_code: int | None = None
    retry_count: int = 0
    redrive_count: int = 0
    topic: str | None = None
    parked_at_ms: int = 0
    size: int | None = None
    sha256: str | None = None

    @property
    def at_ms(self) -> int:
        """When it was parked."""
        return self.parked_at_ms

    @property
    def message_id(self) -> str:
        """The record's; its own id where there is no record."""
        return self._wire[8] if self._wire else self.id

    @property
    def key(self) -> bytes | None:
        """The record's key."""
        return unpack(self._wire[4]) if self._wire else None

    @property
    def timestamp_ms(self) -> int | None:
        """The record's time."""
        return self._wire[7] if self._wire else None

    @property
    def headers(self) -> list[tuple[str, bytes | None]]:
        """The record's own headers."""
        return [(name, unpack(value)) for name, value in self._wire[5]] if self._wire else []

    @property
    def value(self) -> bytes | None:
        """The record's value."""
        return unpack(self._wire[3]) if self._wire else None

    @property
    def _wire(self) -> list[Any]:
        return self.data if self.content == "record" else []

    def __repr__(self) -> str:
        return f"Parked(id={self.id!r}, kind={self.kind!r}, topic={self.topic!r}, error_class={self.error_class!r})"


class Usage(NamedTuple):
    """What the store takes of Redis's memory.

    Attributes:
        items: how many are parked.
        bytes: what they take.
        max_bytes: what they may take; 0 for any number.
    """

    items: int
    bytes: int
    max_bytes: int


class ParkingStore:
    """Parked items in Redis. Parking the same content twice keeps it once.

    Args:
        redis: a client.
        prefix: of the keys, where the client does not add it itself.
        max_bytes: that all items may take together; 0 for any number.
    """

    def __init__(self, redis: Any, prefix: str = "", max_bytes: int = 0) -> None:
        self._redis = redis
        self._max_bytes = max_bytes
        self._keys = [prefix + name for name in (PARKED, PARKED_INDEX, PARKED_ROOM)]
        self._items, self._index, _ = self._keys
        self._park, self._unpark, self._taken = (redis.register_script(_script(name)) for name in _SCRIPTS)
        self._lock = threading.Lock()
        self._pause_s = 0.0
        self._full_until = 0.0

    @classmethod
    def of(cls, redis: RedisClient, s: Settings) -> Self:
        """The store as the settings bound it.

        Raises:
            redis.exceptions.ConnectionError: Redis cannot be reached.
        """
        return cls(redis.client, redis.prefix, s.parked_max_bytes)

    def park(self, item: Parked) -> str:
        """Keep `item` and return the id under which it lies: its own, or that and a suffix if another has it.

        Raises:
            ParkingFullError: there is no room; nothing was thrown away for it. For a while, Redis is not even asked.
            redis.exceptions.RedisError: it is not kept.
        """
        if monotonic() < self._full_until:
            raise self._full()
        now = time.time_ns() // 1_000_000
        content = dumps({"content": item.content, "data": item.data})
        digest = hashlib.sha256(content.encode()).hexdigest()
        # Kombu's JSON for the data, because a message may hold what only its decoder knows; as text inside ours,
        # so that reading an item here never interprets it.
        fields = {name: getattr(item, name) for name in Parked.__slots__}
        stored = json.dumps(fields | {"parked_at_ms": now, "data": dumps(item.data), "digest": digest})
        item_id = item.id.encode("ascii", "backslashreplace")  # a stranger's message has any id
        kept: bytes
        kept, taken = self._park(self._keys, [item_id, digest, now, stored, self._max_bytes])
        if not kept:
            self._refused(taken, item.kind, len(stored))
            raise self._full()
        self._pause_s = 0.0
        return kept.decode()

    def _refused(self, taken: int, kind: str, size: int) -> None:
        with self._lock:
            if monotonic() < self._full_until:  # another thread was refused at the same time, which counts once
                return
            self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
            self._full_until = monotonic() + self._pause_s
        log.error(
            "parking.full bytes=%d max_bytes=%d kind=%s size=%d asked_again_in_s=%.0f",
            taken, self._max_bytes, kind, size, self._pause_s,
        )  # fmt: skip

    def _full(self) -> ParkingFullError:
        wait_s = max(0.0, self._full_until - monotonic())
        # Spread: what was refused together must not come back together.
        return ParkingFullError(self._max_bytes, wait_s + random.uniform(0.1, 1 + self._pause_s / 4))

    def count(self) -> int:
        """How many items are parked."""
        return int(self._redis.hlen(self._items))

    def usage(self) -> Usage:
        """How much of its room is taken."""
        items, taken = self._taken(self._keys)
        return Usage(items, taken, self._max_bytes)

    def list(self, since_ms: int | None = None, until_ms: int | None = None) -> Iterator[Parked]:
        """All items, oldest first, under the ids by which they are kept; what is parked meanwhile is left out.

        Args:
            since_ms, until_ms: only what was parked from the one on and before the other (ms since the epoch).
        """
        for ids in self._pages(since_ms, until_ms):
            with self._redis.pipeline(transaction=False) as pipe:
                for item_id in ids:
                    pipe.hstrlen(self._items, item_id)
                sizes = pipe.execute()
            for some in _chunks(ids, sizes):
                for item_id, stored in zip(some, self._redis.hmget(self._items, some), strict=True):
                    if stored is not None:  # taken away meanwhile
                        yield _item(stored, item_id.decode())

    def _pages(self, since_ms: int | None, until_ms: int | None) -> Iterator[Sequence[bytes]]:
        newest = self._redis.zrange(self._index, -1, -1, withscores=True)
        if not newest:
            return
        last = newest[0][1] if until_ms is None else min(newest[0][1], until_ms - 1)
        at: float = since_ms or 0
        seen: set[bytes] = set()  # of those of the time `at`: the next page begins with them
        while page := [
            (item_id, when)
            for item_id, when in self._redis.zrangebyscore(
                self._index, at, last, start=0, num=len(seen) + PAGE, withscores=True
            )
            if item_id not in seen
        ]:
            yield [item_id for item_id, _ in page]
            newer = page[-1][1]
            seen = {item_id for item_id, when in page if when == newer} | (seen if newer == at else set())
            at = newer

    def get(self, item_id: str) -> Parked | None:
        """The item of this id, or None."""
        stored = self._redis.hget(self._items, item_id)
        return None if stored is None else _item(stored, item_id)

    def namesakes(self, item_id: str) -> Iterator[str]:
        """Ids under which other contents of the same id lie; looked for in small steps."""
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", item_id) + "~*"
        for found, _ in self._redis.zscan_iter(self._index, match=pattern, count=1_000):
            yield found.decode()

    def remove(self, item_id: str, parked_at_ms: int | None = None) -> bool:
        """Take the item away; False if it was not there.

        Args:
            item_id: its id.
            parked_at_ms: when it was parked; one that was parked again since then stays.
        """
        at = "" if parked_at_ms is None else parked_at_ms
        return bool(self._unpark(self._keys, [item_id, at]))


def fingerprint(value: bytes | None) -> dict[str, Any]:
    """`Parked.size` and `Parked.sha256` of a record's value."""
    return {} if value is None else {"size": len(value), "sha256": hashlib.sha256(value).hexdigest()}


def _item(stored: bytes, item_id: str) -> Parked:
    fields = json.loads(stored)
    text = fields["data"]
    try:
        fields["data"] = loads(text)
    except ValueError:  # what kombu would interpret and cannot; it is shown as it is
        fields["data"] = json.loads(text)
    fields["id"] = item_id
    # Of what a newer version parked, take what this one knows; an older one knew less.
    return Parked(**{name: fields[name] for name in Parked.__slots__ if name in fields})


def _chunks(ids: Sequence[bytes], sizes: Sequence[int]) -> Iterator[list[bytes]]:
    """`ids` in groups of items that take up to PAGE_BYTES; one that is larger is a group of its own."""
    some: list[bytes] = []
    total = 0
    for item_id, size in zip(ids, sizes, strict=True):
        if some and total + size > PAGE_BYTES:
            yield some
            some, total = [], 0
        some.append(item_id)
        total += size
    yield some


_SCRIPTS = ("park", "unpark", "taken")


@functools.cache
def _script(name: str) -> str:
    """The source of one of the scripts, behind what they share."""
    files = importlib.resources.files(__package__)
    return files.joinpath("room.lua").read_text() + files.joinpath(f"{name}.lua").read_text()
