"""The parking store: what can go nowhere else is kept in Redis, whole, with the reason, until a person decides.

An item holds one of three contents:

``record``
    a record as it travels on the wire;
``call``
    a call of one of our tasks that is not a valid record: task, args, kwargs;
``message``
    a message that never reached a task: the envelope as it lay in the queue, and the queue's name.

What lies in the store and is none of these is damaged: somebody else wrote it. It is listed as an item, with what lies
there, and can be discarded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import logging
import math
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple, Protocol, Self

from kombu.utils.json import dumps

from kafka_delivery.errors import ParkingFullError
from kafka_delivery.names import PARKED, PARKED_INDEX, PARKED_ROOM
from kafka_delivery.record import MAX_TIMESTAMP_MS, unpack
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings

from .stored import DamagedError, fields_of

log = logging.getLogger("kafka_delivery.parking")

FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
"""How long a process asks a full store no more; doubles with each refusal in a row."""

PAGE = 100
PAGE_BYTES = 4 * 1024 * 1024
"""Of items that are read or parked at a time. It bounds the memory of the process, and how long Redis is busy."""

NAMESAKE = "{item_id}~{digest:.8}"
"""Under which an item lies whose id is another content's; park.lua makes the same."""

DAMAGED = "damaged"
"""Kind and content of what is no parked item."""

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
    DAMAGED: "no worker parked it so: find out who writes to this Redis; if a newer version did, update; else discard",
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
        content: ``record``, ``call``, ``message`` or `DAMAGED`.
        data: that content. Of a damaged item, under ``stored``, what lies there, or None for an id without an item.
        size, sha256: bytes of a record's value, and their digest (hexadecimal); None for no record, and for a
            tombstone.
        asked: what the message asked of Celery beside the call: `callbacks`, `errbacks`, `chain`, `chord`, `root_id`,
            `parent_id`, `group`, `group_index`, those of them that it had. It may hold payloads. A message that is
            kept whole has it in its envelope.
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
    asked: dict[str, Any] | None = field(default=None, repr=False)

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
    def digest(self) -> str:
        """What tells its content from another one of the same id: SHA-256 (hexadecimal)."""
        # Not of the calls that it belongs to: the same record in another tree of calls is the same record.
        asked = {name: value for name, value in (self.asked or {}).items() if name not in ("root_id", "parent_id")}
        content = {"content": self.content, "data": self.data} | ({"asked": asked} if asked else {})
        return hashlib.sha256(dumps(content).encode()).hexdigest()

    @property
    def places(self) -> tuple[str, str]:
        """Ids under which the store may keep it: its own, or with a suffix if that is another content's."""
        return self.id, NAMESAKE.format(item_id=self.id, digest=self.digest)

    @property
    def _wire(self) -> list[Any]:
        return self.data if self.content == "record" else []

    def __repr__(self) -> str:
        return f"Parked(id={self.id!r}, kind={self.kind!r}, topic={self.topic!r}, error_class={self.error_class!r})"


Times = tuple[float | None, float | None]
"""When something was parked under each of `Parked.places` (ms since the epoch); None where nothing is."""


class Lock(Protocol):
    """What a command holds that removes items, so that no other one does; see `run_lock.RunLock`."""

    @property
    def key(self) -> str: ...

    @property
    def token(self) -> str: ...

    def lost(self) -> Exception:
        """What to raise when it is found to be another's, or nobody's."""


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
        self._prefix = prefix
        self._park, self._unpark, self._send_back, self._taken, self._drop = (
            redis.register_script(_script(name)) for name in _SCRIPTS
        )
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

    def park(self, item: Parked, lock: Lock | None = None) -> str:
        """Keep `item` and return the id under which it lies: its own, or that and a suffix if another has it.

        Args:
            item: what to keep.
            lock: what only one command holds at a time; checked in the same step.

        Raises:
            NotAloneError: the lock is lost; it is not kept.
            ParkingFullError: there is no room; nothing was thrown away for it. For a while, Redis is not even asked.
            redis.exceptions.RedisError: it is not kept.
        """
        (kept,) = self._park_some(item, [self._arguments(item)], lock)
        self._pause_s = 0.0
        return kept

    def park_all(self, items: Sequence[Parked]) -> list[str]:
        """Keep all `items`, in order, and return the ids under which they lie.

        An error leaves some of them parked. All may then be parked again: what is kept already is kept once.

        Raises:
            ParkingFullError: there is no room for all; nothing was thrown away for them. For a while, Redis is not
                even asked.
            redis.exceptions.RedisError: not all are kept.
        """
        kept: list[str] = []
        some: list[list[Any]] = []
        total = 0
        for item in items:
            arguments = self._arguments(item)
            if some and (len(some) == PAGE or total + len(arguments[3]) > PAGE_BYTES):
                kept += self._park_some(items[len(kept)], some)
                some, total = [], 0
            some.append(arguments)
            total += len(arguments[3])
        if some:
            kept += self._park_some(items[len(kept)], some)
        self._pause_s = 0.0
        return kept

    def _arguments(self, item: Parked) -> list[Any]:
        """Those of park.lua."""
        now = time.time_ns() // 1_000_000
        digest = item.digest
        # Kombu's JSON for the data, because a message may hold what only its decoder knows; as text inside ours,
        # so that reading an item here never interprets it.
        fields = {name: getattr(item, name) for name in Parked.__slots__} | {"data": dumps(item.data)}
        fields["asked"] = None if item.asked is None else dumps(item.asked)
        stored = json.dumps(fields | {"parked_at_ms": now, "digest": digest})
        item_id = item.id.encode("ascii", "backslashreplace")  # a stranger's message has any id
        return [item_id, digest, now, stored, self._max_bytes]

    def _park_some(self, first: Parked, some: Sequence[list[Any]], lock: Lock | None = None) -> list[str]:
        if monotonic() < self._full_until:
            raise self._full()
        if lock is not None:
            replies = [self._park([*self._keys, lock.key], [*arguments, lock.token]) for arguments in some]
            if any(taken < 0 for _, taken in replies):
                raise lock.lost()
        elif len(some) == 1:
            replies = [self._park(self._keys, some[0])]
        else:
            with self._redis.pipeline(transaction=False) as pipe:
                for arguments in some:
                    self._park(self._keys, arguments, client=pipe)
                replies = pipe.execute()
        for (kept, taken), arguments in zip(replies, some, strict=True):
            if not kept:
                self._refused(taken, first.kind, len(arguments[3]))
                raise self._full()
        return [kept.decode() for kept, _ in replies]

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

        Damaged ones are among them. Those that no worker put into the index come last.

        Args:
            since_ms, until_ms: only what was parked from the one on and before the other (ms since the epoch).
        """
        astray = False
        for page in self._pages(since_ms, until_ms):
            with self._redis.pipeline(transaction=False) as pipe:
                for item_id in page:
                    pipe.hstrlen(self._items, item_id)
                sizes = pipe.execute()
            for some in _chunks(list(page), sizes):
                for item_id, stored in zip(some, self._redis.hmget(self._items, some), strict=True):
                    if stored is not None:
                        yield _item(stored, item_id, page[item_id])
                    elif (item := self._without_item(item_id)) is not None:
                        astray = True
                        yield item
        if astray or self._redis.hlen(self._items) > self._redis.zcard(self._index):
            for item in self._not_in_the_index():
                if (since_ms is None or item.at_ms >= since_ms) and (until_ms is None or item.at_ms < until_ms):
                    yield item

    def _pages(self, since_ms: int | None, until_ms: int | None) -> Iterator[dict[bytes, float]]:
        newest = self._redis.zrange(self._index, -1, -1, withscores=True)
        if not newest:
            return
        last = newest[0][1] if until_ms is None else min(newest[0][1], until_ms - 1)
        at: float = -math.inf if since_ms is None else since_ms
        seen: set[bytes] = set()  # of those of the time `at`: the next page begins with them
        while page := {
            item_id: when
            for item_id, when in self._redis.zrangebyscore(
                self._index, at, last, start=0, num=len(seen) + PAGE, withscores=True
            )
            if item_id not in seen
        }:
            yield page
            newer = max(page.values())
            seen = {item_id for item_id, when in page.items() if when == newer} | (seen if newer == at else set())
            at = newer

    def _without_item(self, item_id: bytes) -> Parked | None:
        """What the index alone knows; None for what was taken away meanwhile."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.zscore(self._index, item_id)
            pipe.hget(self._items, item_id)
            when, stored = pipe.execute()
        if stored is not None:
            return _item(stored, item_id, when)
        return None if when is None else _damaged(item_id, None, "nothing is kept under its id", when)

    def _not_in_the_index(self) -> Iterator[Parked]:
        ids = self._redis.hkeys(self._items)
        for start in range(0, len(ids), PAGE):
            some = ids[start : start + PAGE]
            for item_id, when in zip(some, self._redis.zmscore(self._index, some), strict=True):
                if when is None and (stored := self._redis.hget(self._items, item_id)) is not None:
                    yield _item(stored, item_id)

    def get(self, item_id: str) -> Parked | None:
        """The item of this id, or None."""
        if (raw := _raw(item_id)) is None:
            return None
        stored = self._redis.hget(self._items, raw)
        return self._without_item(raw) if stored is None else _item(stored, raw)

    def namesakes(self, item_id: str) -> Iterator[str]:
        """Ids under which other contents of the same id lie; looked for in small steps."""
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", item_id) + "~????????"
        for found, _ in self._redis.zscan_iter(self._index, match=pattern, count=1_000):
            yield _shown(found)

    def parked_at(self, places: Sequence[tuple[str, str]]) -> Iterator[Times]:
        """When something was parked under each of the `Parked.places` of some items."""
        ids = [place for pair in places for place in pair]
        scores = self._redis.zmscore(self._index, ids) if ids else []
        return zip(scores[::2], scores[1::2], strict=True)

    def discard(self, item: Parked, lock: Lock | None = None) -> bool:
        """Take away `item` as it was read, also a damaged one; False if it is not there any more, or another one is.

        Raises:
            RedriveError: the lock is lost; nothing is taken away.
        """
        if item.content != DAMAGED:
            return self.remove(item.id, item.parked_at_ms, lock)
        stored = item.data["stored"]
        digest = "" if stored is None else _sha1(stored.encode(errors="surrogateescape"))
        keys, arguments = self._keys, [_raw(item.id), digest]
        if lock is not None:
            keys, arguments = [*keys, lock.key], [*arguments, lock.token]
        return self._told(self._drop(keys, arguments), lock)

    def remove(self, item_id: str, parked_at_ms: int | None = None, lock: Lock | None = None) -> bool:
        """Take the item away; False if it was not there.

        Args:
            item_id: its id.
            parked_at_ms: when it was parked; one that was parked again since then stays.
            lock: what only one command holds at a time; checked in the same step.

        Raises:
            NotAloneError: the lock is lost; nothing is taken away.
        """
        at = "" if parked_at_ms is None else parked_at_ms
        keys, arguments = self._keys, [_raw(item_id), at]
        if lock is not None:
            keys, arguments = [*keys, lock.key], [*arguments, lock.token]
        return self._told(self._unpark(keys, arguments), lock)

    def send_back(self, item: Parked, messages: Sequence[tuple[str, str | bytes]], lock: Lock) -> bool:
        """Put messages into their queues and take the item away, in one step; False if it is not there any more.

        Args:
            item: the item, as it was read.
            messages: each a list in the Redis of the store, without the prefix, and what is to lie in that list.
            lock: what only one command holds at a time; checked in the same step.

        Raises:
            NotAloneError: the lock is lost; nothing is done.
            redis.exceptions.RedisError: Redis refused; nothing is done. It did not answer: unknown.
        """
        keys = [*self._keys, lock.key, *(self._prefix + queue for queue, _ in messages)]
        arguments = [_raw(item.id), item.parked_at_ms, lock.token, *(envelope for _, envelope in messages)]
        return self._told(self._send_back(keys, arguments), lock)

    def check(self, lock: Lock) -> None:
        """Before what no script guards.

        Raises:
            NotAloneError: the lock is lost.
        """
        if self._redis.get(lock.key) != lock.token.encode():
            raise lock.lost()

    def _told(self, reply: int, lock: Lock | None) -> bool:
        if reply < 0 and lock is not None:
            raise lock.lost()
        return bool(reply)


def fingerprint(value: bytes | None) -> dict[str, Any]:
    """`Parked.size` and `Parked.sha256` of a record's value."""
    return {} if value is None else {"size": len(value), "sha256": hashlib.sha256(value).hexdigest()}


def _shown(item_id: bytes) -> str:
    return item_id.decode(errors="surrogateescape")


def _raw(item_id: str) -> bytes | None:
    """An id as it lies in Redis; None where no bytes stand for it."""
    try:
        return item_id.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return None


def _sha1(stored: bytes) -> str:
    """What Redis's scripts can compute of it too."""
    return hashlib.sha1(stored, usedforsecurity=False).hexdigest()


def _item(stored: bytes, item_id: bytes, when: float | None = None) -> Parked:
    """What lies under an id; damaged, if it is no item. `when` is what the index says of its time."""
    try:
        return Parked(id=_shown(item_id), **fields_of(stored))
    except DamagedError as error:
        return _damaged(item_id, stored, str(error), when)


def _damaged(item_id: bytes, stored: bytes | None, why: str, when: float | None) -> Parked:
    return Parked(
        id=_shown(item_id),
        kind=DAMAGED,
        error_class=DamagedError.__name__,
        error_message=f"it is no parked item: {why}",
        content=DAMAGED,
        data={"stored": None if stored is None else stored.decode(errors="surrogateescape")},
        parked_at_ms=int(when) if when is not None and 0 <= when <= MAX_TIMESTAMP_MS else 0,
    )


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


_SCRIPTS = ("park", "unpark", "send_back", "taken", "drop")


@functools.cache
def _script(name: str) -> str:
    """The source of one of the scripts, behind what they share."""
    files = importlib.resources.files(__package__)
    return files.joinpath("room.lua").read_text() + files.joinpath(f"{name}.lua").read_text()
