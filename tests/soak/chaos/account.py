"""The account: what became of everything that was accepted."""

from __future__ import annotations

import json
import time
from base64 import b64decode
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from confluent_kafka.admin import AdminClient
from rich.table import Table

from kafka_delivery import Record
from kafka_delivery.dead_letters import TASK_ID_SUFFIX
from kafka_delivery.names import PARKED, QUEUE, REDRIVE_COUNT
from kafka_delivery_worker.parked_items import Reason, of_record
from kafka_delivery_worker.parking import ParkingStore
from servers import Consumed, read_all
from stack import Stack, leftovers, message_id

from . import foreign
from .application import BATCH, DEAD_LETTERED, DELIVERED, IS_PARKED, MISSING, NOWHERE, TOPIC, UNWANTED, digest
from .foreign import mark_in
from .trail import task_id_of

DEAD_LETTER_TOPICS = (f"{TOPIC}-dlq", f"{MISSING}-dlq")

PARKED_BEFORE = "parked before"

READ_S = 120


@dataclass(frozen=True, slots=True)
class Accepted:
    """A record whose send was accepted, from the application's report."""

    id: str
    kind: str
    task_id: str
    at: float
    tries: int
    due: str = DELIVERED
    """What has to become of it. Nothing that happens around it changes that."""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Wrong:
    """A record that was charged with what it did not do, or that arrived otherwise than it was sent."""

    id: str
    what: str
    task_id: str
    kind: str


@dataclass
class Account:
    """What became of everything.

    Attributes:
        parked: kind of parking -> message ids.
        waiting: task ids of messages that are still in Redis: late for ever, perhaps, but not lost.
        digests: message id -> what its records in the topic were like.
        redriven: message id -> how many of its records in the topic were sent by an operator's redrive.
        discarded: message ids of which an operator's discard says that it has deleted them.
        strayed: message id -> how many of its records are in the Kafka of another installation.
    """

    accepted: dict[str, Accepted]
    errors: dict[str, int]
    not_accepted: int
    delivered: Counter[str]
    dead: Counter[str]
    parked: dict[str, set[str]]
    waiting: set[str]
    digests: dict[str, set[str]] = field(default_factory=dict)
    redriven: Counter[str] = field(default_factory=Counter)
    discarded: set[str] = field(default_factory=set)
    strayed: Counter[str] = field(default_factory=Counter)
    rows: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    lost: list[Accepted] = field(default_factory=list)
    vanished: list[Accepted] = field(default_factory=list)
    wrongly_dead: list[Wrong] = field(default_factory=list)
    wrongly_parked: list[Wrong] = field(default_factory=list)
    changed: list[Wrong] = field(default_factory=list)
    astray: list[Wrong] = field(default_factory=list)
    compared: int = 0

    def __post_init__(self) -> None:
        parked = set().union(*self.parked.values())
        for one in self.accepted.values():
            row = self.rows[one.kind]
            places = {"delivered": one.id in self.delivered, "dead-lettered": one.id in self.dead}
            places |= {"parked": one.id in parked, "left": bool({one.id, one.task_id} & self.waiting)}
            places |= {"discarded": one.id in self.discarded}
            again = self.redriven[one.id]
            row["accepted"] += 1
            row.update(place for place, there in places.items() if there)
            row["twice"] += max(0, self.delivered[one.id] - again + self.dead[one.id] + (one.id in parked) - 1)
            row["redriven"] += again
            row["redriven twice"] += max(0, again - 1)
            if not any(places.values()):
                row["lost"] += 1
                (self.vanished if one.kind in foreign.KINDS else self.lost).append(one)
        self.wrongly_dead = [self._wrong(one, "dead letter") for one in self.dead if self._is_wrong(one, DEAD_LETTERED)]
        self.wrongly_parked = [
            self._wrong(one, f"parked as {kind}")
            for kind, ids in self.parked.items()
            for one in sorted(ids)
            if self._is_wrong(one, IS_PARKED)
        ]
        self.astray = [self._wrong(one, "in the wrong Kafka") for one in self.strayed]
        for each, found in self.digests.items():
            sent = self.accepted.get(each)
            if sent is not None and sent.digest:
                self.compared += 1
                if found != {sent.digest}:
                    self.changed.append(self._wrong(each, "arrived changed"))
        for column, wrong in {"wrongly dead": self.wrongly_dead, "wrongly parked": self.wrongly_parked}.items():
            for charged in wrong:
                self.rows[charged.kind][column] += 1

    def _is_wrong(self, message_id: str, place: str) -> bool:
        """Whether it is nothing that the load has put in such a place on purpose; what was never accepted is none."""
        return message_id not in self.accepted or self.accepted[message_id].due != place

    def _wrong(self, message_id: str, what: str) -> Wrong:
        one = self.accepted.get(message_id)
        return Wrong(message_id, what, one.task_id if one else message_id, one.kind if one else "never accepted")

    @property
    def totals(self) -> Counter[str]:
        return sum(self.rows.values(), Counter())

    def table(self) -> Table:
        columns = (
            "accepted", "delivered", "dead-lettered", "wrongly dead", "parked", "wrongly parked",
            "discarded", "redriven", "left", "twice", "lost",
        )  # fmt: skip
        table = Table("kind of send", *columns, title="account")
        for kind, row in [*sorted(self.rows.items()), ("all", self.totals)]:
            table.add_row(kind, *(str(row[column]) for column in columns))
        return table


def read_report(path: Path) -> tuple[dict[str, Accepted], dict[str, Any]]:
    """What the application wrote down: what was accepted, and its last line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["id"]: Accepted(**line) for line in lines if "id" in line}, lines[-1]


def take(stack: Stack, report: Path, others: Iterable[Accepted], discarded: set[str], elsewhere: str) -> Account:
    """Read all topics and the parking store, by an independent consumer, and compare.

    Args:
        others: what the application has not sent: by strangers, or parked before.
        discarded: ids of parked items that operators have discarded.
        elsewhere: bootstrap servers of another Kafka, in which there is to be nothing; "" where there is none.
    """
    accepted, last = read_report(report)
    accepted |= {one.id: one for one in others}
    read = read_all(stack.kafka.bootstrap_servers, (TOPIC, *DEAD_LETTER_TOPICS), timeout=READ_S)
    digests: dict[str, set[str]] = defaultdict(set)
    redriven: Counter[str] = Counter()
    for record in read:
        if record.topic == TOPIC:
            redriven[message_id(record)] += _is_redriven(record)
            own = record.headers[1 + _is_redriven(record) :]  # behind the id
            digests[message_id(record)].add(digest(record.key, record.value, own))
    return Account(
        accepted=accepted,
        errors=last["errors"],
        not_accepted=last["not accepted"],
        delivered=Counter(message_id(record) for record in read if record.topic == TOPIC),
        dead=Counter(message_id(record) for record in read if record.topic != TOPIC),
        parked=_parked(stack, accepted.values()),
        waiting=_waiting(stack.redis),
        digests=digests,
        redriven=redriven,
        discarded=discarded,
        strayed=Counter(map(message_id, in_all_topics(elsewhere) if elsewhere else ())),
    )


def _is_redriven(record: Consumed) -> bool:
    return len(record.headers) > 1 and record.headers[1][0] == REDRIVE_COUNT


def in_all_topics(bootstrap_servers: str) -> list[Consumed]:
    """All that is in a cluster."""
    topics = AdminClient({"bootstrap.servers": bootstrap_servers}).list_topics(timeout=READ_S).topics
    return read_all(bootstrap_servers, sorted(topics), timeout=READ_S)


def _waiting(client: redis.Redis) -> set[str]:
    messages = [message for key in leftovers(client) for message in _messages(client, key)]
    return {task_id_of(message).decode().removesuffix(TASK_ID_SUFFIX) for message in messages}


def _parked(stack: Stack, accepted: Iterable[Accepted]) -> dict[str, set[str]]:
    """What is parked. Items by strangers are read as bytes: the tools that read items are what they try."""
    members: dict[str, set[str]] = defaultdict(set)  # a batch that was kept whole lies under its task id
    for one in accepted:
        if one.kind == BATCH:
            members[one.task_id].add(one.id)
    parked: dict[str, set[str]] = defaultdict(set)
    store = ParkingStore(stack.redis)
    for item_id, stored in stack.redis.hscan_iter(PARKED, count=100):
        if mark := mark_in(item_id) or mark_of(stored):
            parked[json.loads(stored)["kind"]].add(mark)
        elif item := store.get(item_id.decode()):
            task_id = item.message_id.removesuffix(TASK_ID_SUFFIX)
            parked[item.kind] |= {task_id} if item.content == "record" else members.get(task_id, {task_id})
    return dict(parked)


def mark_of(stored: bytes) -> str:
    """The mark in a parked item, "" without one. Bytes that are no text lie there as base64."""
    if mark := mark_in(stored):
        return mark
    data = json.loads(json.loads(stored)["data"]) if b"base64" in stored else None
    encoded = data.get("base64") if isinstance(data, dict) else None
    return mark_in(b64decode(encoded)) if isinstance(encoded, str) else ""


def _messages(client: redis.Redis, key: str) -> Iterable[bytes]:
    read: Mapping[bytes, Any] = {
        b"list": lambda: client.lrange(key, 0, -1),
        b"hash": lambda: client.hvals(key),
        b"zset": lambda: client.zrange(key, 0, -1),
    }
    kind: Any = client.type(key)
    found: Iterable[bytes] = read[kind]()
    return found


def park(client: redis.Redis, count: int) -> list[Accepted]:
    """Park so many records of each topic that does not exist; what is due of each."""
    why = Reason(kind="dead-letter", error_class="PermanentError", error_message="sent before the run")
    records = [
        Record(topic, "w" * 100, message_id=f"{topic}-{number:03}")
        for topic in (NOWHERE, UNWANTED)
        for number in range(count)
    ]
    ParkingStore(client).park_all([of_record(record, why) for record in records])
    return [Accepted(record.id, PARKED_BEFORE, record.id, time.time(), 1, IS_PARKED) for record in records]


def nested(client: redis.Redis, count: int) -> int:
    """Of the newest `count` messages in the queue, those into whose headers another tool has nested its own."""
    messages: Any = client.lrange(QUEUE, 0, count - 1)
    headers = [json.loads(message)["headers"] for message in messages if not mark_in(message)]
    return sum(isinstance(each.get("headers"), dict) for each in headers)


def consuming(client: redis.Redis) -> int:
    """Connections on which a worker takes messages, and has asked for some within the last seconds."""
    asking = ("blmove", "evalsha", "brpop")
    return sum(each["cmd"] in asking and int(each["idle"]) <= 3 for each in client.client_list())
