"""Where in Redis a record is: waiting in a queue, for its time or for a circuit, in a worker's hands, or parked.

Everything is looked at in the order of a record's way, in small parts, and nothing is changed. What moves on meanwhile
is met further on; what moves back, say because its worker died, is met in the next round.
"""

from __future__ import annotations

import enum
import json
import math
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from kombu.transport.redis import Channel

from kafka_delivery import app, names, send_many, settings
from kafka_delivery.dead_letters import TASK_ID_SUFFIX
from kafka_delivery.names import SEND_MANY, is_topic_name
from kafka_delivery.redis_client import RedisClient

from . import task_ids
from .lease import script
from .parked_items import message_ids
from .parking import Parked, ParkingStore

SLICE_BYTES = 1_000_000
"""Of messages that Redis looks at before it serves others: some milliseconds."""

ASKED_S = 1.0
"""How long workers have to say which of them holds a record."""


class Where(enum.StrEnum):
    QUEUED = "queued"
    DELAYED = "delayed"  # until its time has come
    PUT_ASIDE = "put-aside"  # until its topic's circuit is closed
    HELD = "held"  # by a worker
    POISON = "poison"  # it took workers down, and is about to be parked
    PARKED = "parked"
    DELIVERED = "delivered"
    DEAD_LETTERED = "dead-lettered"
    NOWHERE = "not-found"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is.

    Attributes:
        where: the kind of place.
        dead_letter: whether it is its dead letter that is there.
        batch: id of the batch that it is in, if it is.
        facts: what else is known, by name; never a payload, key or header.
    """

    where: Where
    dead_letter: bool = False
    batch: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


Watch = Callable[[int, int], None]
"""Is told how many messages were looked at, and how many there are in what is looked through."""


class Whereabouts:
    """Looks for one record.

    Args:
        redis: where records are parked, and messages wait.
        message_id: the record's id, or a batch's.
        queues: whether messages wait in Redis; another broker cannot be searched.
    """

    def __init__(self, redis: RedisClient, message_id: str, queues: bool = True) -> None:
        self._redis = redis
        self._queues = queues
        self._prefix = redis.prefix
        self._id = message_id
        self._letter_id = message_id + TASK_ID_SUFFIX
        part = message_id + ".part"  # of a batch in several messages
        self._texts = [*map(json.dumps, (message_id, self._letter_id)), json.dumps(part)[:-1]]
        self._texts += [text.replace("/", r"\/") for text in self._texts if "/" in text]  # as some clients write JSON
        self._in_batches = base64_of(message_id)
        self._find = redis.client.register_script(script("find"))

    def look(self, watch: Watch = lambda looked, there: None) -> Place | None:
        """One round over all places; None if it is in none of them.

        Raises:
            redis.exceptions.RedisError: Redis cannot be reached or refuses.
        """
        places = chain(self._waiting(watch) if self._queues else (), self._parked(watch))
        return next(places, None)

    def _waiting(self, watch: Watch) -> Iterator[Place]:
        sends, letters = settings.current().queues
        yield from self._in_queue(sends, watch)
        yield from self._put_aside(watch)
        yield from self._held(watch)
        yield from self._in_queue(letters, watch)
        yield from self._held(watch)
        for _, message in self._search("list", names.POISON, watch):
            yield self._place(Where.POISON, message)

    def _in_queue(self, queue: str, watch: Watch) -> Iterator[Place]:
        lists = [(step, f"{queue}{Channel.sep}{step}" if step else queue) for step in Channel.priority_steps]
        for step, name in lists:
            for before, message in self._search("list", name, watch):
                yield self._place(Where.QUEUED, message, queue=queue, priority=step, before=int(before))
        for step, name in lists:
            for due, message in self._search("zset", names.DELAYED + name, watch):
                yield self._place(Where.DELAYED, message, queue=queue, priority=step, **self._until(float(due)))

    def _put_aside(self, watch: Watch) -> Iterator[Place]:
        for member in sorted(self._redis.client.smembers(self._prefix + names.WAITING)):
            topic, _, name = member.decode(errors="replace").partition(":")
            for before, message in self._search("list", f"{names.WAITING}:{topic}:{name}", watch):
                yield self._place(Where.PUT_ASIDE, message, topic=topic, before=int(before))

    def _held(self, watch: Watch) -> Iterator[Place]:
        for member in self._redis.client.zrange(self._prefix + names.LEASES, 0, -1):
            owner = member.decode(errors="surrogateescape")
            for _, message in self._search("hash", names.HELD + owner, watch):
                yield self._place(Where.HELD, message, worker=self._worker(message), **self._of_lease(owner))
        for _, message in self._search("hash", Channel.unacked_key, watch):  # of workers on Celery's own transport
            yield self._place(Where.HELD, message, worker=self._worker(message))

    def _search(self, kind: str, key: str, watch: Watch) -> Iterator[tuple[bytes, bytes]]:
        for place, message in self._found(kind, key, self._texts, self._in_batches, watch):
            if self._is_it(message) or self._is_with(message):
                yield place, message

    def _found(
        self, kind: str, key: str, texts: Sequence[str], in_batches: Sequence[str], watch: Watch
    ) -> Iterator[tuple[bytes, bytes]]:
        at, looked = b"0", 0
        while at:
            arguments = [kind, at, SLICE_BYTES, len(texts), *texts, *in_batches]
            at, found, there, some = self._find([self._prefix + key], arguments)
            looked += some
            watch(looked, there)
            yield from zip(found[::2], found[1::2], strict=True)

    def _is_it(self, message: bytes) -> bool:
        """Whether it is the record's own message, or its dead letter's: others may name it, as their root say."""
        said = (_headers(message).get("id"), task_ids.id_in(message))
        return any(one in (self._id, self._letter_id) for one in said)

    def _is_with(self, message: bytes) -> bool:
        """Whether it is a batch that the record is in, or a part of the batch."""
        headers = _headers(message)
        part = headers.get("task") == SEND_MANY and send_many.message_id_of(str(headers.get("id"))) == self._id
        return part or self._id in _topics(message)

    def _place(self, where: Where, message: bytes, **facts: Any) -> Place:
        headers = _headers(message)
        task_id = headers.get("id")
        batch = None if task_id in (self._id, self._letter_id) else task_id
        known = {"topic": _topics(message).get(self._id), "retries": headers.get("retries") or 0}
        return Place(where, task_id == self._letter_id, batch, known | facts)

    def _until(self, due_ms: float) -> dict[str, Any]:
        return {"due_ms": int(due_ms) if math.isfinite(due_ms) else None, "in_s": (due_ms - self._now_ms()) / 1000}

    def _of_lease(self, owner: str) -> dict[str, Any]:
        till = self._redis.client.zscore(self._prefix + names.LEASES, owner)
        return {"lease": owner, "lease_ends_in_s": None if till is None else (till - self._now_ms()) / 1000}

    def _now_ms(self) -> float:
        seconds, microseconds = self._redis.client.time()
        return float(seconds * 1000 + microseconds / 1000)

    def _worker(self, message: bytes) -> str | None:
        """The name of the worker that has it, if it answers: a lease does not say."""
        task_id = str(_headers(message).get("id"))
        answers = app.control.inspect(timeout=ASKED_S).query_task(task_id) or {}
        return next((worker for worker, known in answers.items() if task_id in (known or {})), None)

    def _parked(self, watch: Watch) -> Iterator[Place]:
        store = ParkingStore(self._redis.client, self._prefix)
        ids = (self._id, self._letter_id)
        for item_id in chain(ids, *map(store.namesakes, ids)):
            if (item := store.get(item_id)) is not None:
                yield Place(Where.PARKED, facts=_of_parked(item))
        for found, _ in self._found("hash", names.PARKED, [as_parked(self._id)], (), watch):
            item = store.get(found.decode(errors="surrogateescape"))
            if item is not None and self._id in message_ids(item):
                yield Place(Where.PARKED, batch=item.data["id"], facts=_of_parked(item))


def as_parked(text: str) -> str:
    """What becomes of a JSON text's string in a parked item, which is JSON in a string of JSON."""
    return json.dumps(json.dumps(text))[1:-1]


def base64_of(text: str) -> list[str]:
    """What base64 makes of a text that lies anywhere in what is encoded: one piece for each place in its groups."""
    pieces = []
    for shift in range(3):
        encoded = b64encode(bytes(shift) + text.encode()).decode()
        first, last = -(-8 * shift // 6), 8 * (shift + len(text)) // 6  # these characters hold bits of the text alone
        pieces.append(encoded[first:last])
    return [piece for piece in pieces if piece]


def _decoded(message: bytes) -> dict[str, Any]:
    """The envelope: what Celery's transport holds has it as the first of a list, poison behind the queue's name."""
    text = message.decode(errors="surrogateescape")
    if not text.startswith(("{", "[")):
        text = text.partition("\n")[2]
    try:
        envelope = json.loads(text)
    except (ValueError, RecursionError):  # what took workers down, or a stranger wrote, may be anything
        return {}
    if isinstance(envelope, list) and envelope:
        envelope = envelope[0]
    return envelope if isinstance(envelope, dict) else {}


def _headers(message: bytes) -> dict[str, Any]:
    headers = _decoded(message).get("headers")
    return headers if isinstance(headers, dict) else {}


def _topics(message: bytes) -> dict[str, str]:
    """Topics of the records that a message carries, by message id, as far as it has the form that our tasks give it."""
    envelope = _decoded(message)
    try:
        wires = json.loads(b64decode(envelope["body"]))[0][0]
        if envelope["headers"]["task"] != SEND_MANY:
            wires = [wires]
        return {wire[-1]: wire[2] for wire in wires if is_topic_name(wire[2])}
    except (ValueError, TypeError, LookupError, RecursionError):  # called by name, with plain arguments
        return {}


def _of_parked(item: Parked) -> dict[str, Any]:
    return {
        "parked_id": item.id,
        "parked_at_ms": item.parked_at_ms,
        "kind": item.kind,
        "topic": item.topic,
        "error_class": item.error_class,
        "error_message": item.error_message,
        "retry_count": item.retry_count,
    }
