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
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kombu.utils.json import dumps, loads

from kafka_delivery.names import PARKED, PARKED_INDEX


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """One parked item.

    Attributes:
        id: the message id, or a made-up one where there is none.
        parked_at_ms: milliseconds since the epoch.
        kind: why, in one word: ``dead-letter`` (its dead-letter topic refused), ``invalid``, ``expired``, ``revoked``,
            ``undecodable``, ``unknown-task``, ``poison`` (workers died with it), ``bug``.
        error_class, error_code, error_message: the reason; never a payload.
        retry_count: attempts that were used.
        topic: the record's topic where it is known.
        content: ``record``, ``call`` or ``message``.
        data: that content.
    """

    id: str
    kind: str
    error_class: str
    error_message: str
    content: str
    data: Any
    error_code: int | None = None
    retry_count: int = 0
    topic: str | None = None
    parked_at_ms: int = 0

    def __repr__(self) -> str:
        return f"Parked(id={self.id!r}, kind={self.kind!r}, topic={self.topic!r}, error_class={self.error_class!r})"


class ParkingStore:
    """Parked items in Redis. Parking the same content twice keeps it once.

    Args:
        redis: a client.
        prefix: of the keys, where the client does not add it itself.
    """

    def __init__(self, redis: Any, prefix: str = "") -> None:
        self._redis = redis
        self._items, self._index = prefix + PARKED, prefix + PARKED_INDEX
        self._park, self._unpark = (redis.register_script(_script(name)) for name in ("park", "unpark"))

    def park(self, item: Parked) -> str:
        """Keep `item` and return the id under which it lies: its own, or that and a suffix if another has it.

        Raises:
            redis.exceptions.RedisError: it is not kept.
        """
        now = time.time_ns() // 1_000_000
        content = dumps({"content": item.content, "data": item.data})
        digest = hashlib.sha256(content.encode()).hexdigest()
        # Kombu's JSON for the data, because a message may hold what only its decoder knows; as text inside ours,
        # so that reading an item here never interprets it.
        stored = json.dumps(asdict(item) | {"parked_at_ms": now, "data": dumps(item.data), "digest": digest})
        item_id = item.id.encode("ascii", "backslashreplace")  # a stranger's message has any id
        kept: bytes = self._park([self._items, self._index], [item_id, digest, now, stored])
        return kept.decode()

    def count(self) -> int:
        """How many items are parked."""
        return int(self._redis.hlen(self._items))

    def list(self) -> Iterator[Parked]:
        """All items, oldest first, under the ids by which they are kept."""
        ids = self._redis.zrange(self._index, 0, -1)
        for start in range(0, len(ids), 100):
            some = ids[start : start + 100]
            for item_id, stored in zip(some, self._redis.hmget(self._items, some), strict=True):
                if stored is not None:  # taken away meanwhile
                    yield _item(stored, item_id.decode())

    def get(self, item_id: str) -> Parked | None:
        """The item of this id, or None."""
        stored = self._redis.hget(self._items, item_id)
        return None if stored is None else _item(stored, item_id)

    def remove(self, item_id: str, parked_at_ms: int | None = None) -> bool:
        """Take the item away; False if it was not there.

        Args:
            item_id: its id.
            parked_at_ms: when it was parked; one that was parked again since then stays.
        """
        at = "" if parked_at_ms is None else parked_at_ms
        return bool(self._unpark([self._items, self._index], [item_id, at]))


def _item(stored: bytes, item_id: str) -> Parked:
    fields = json.loads(stored)
    fields.pop("digest")
    text = fields["data"]
    try:
        fields["data"] = loads(text)
    except ValueError:  # what kombu would interpret and cannot; it is shown as it is
        fields["data"] = json.loads(text)
    fields["id"] = item_id
    return Parked(**fields)


@functools.cache
def _script(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(f"{name}.lua").read_text()
