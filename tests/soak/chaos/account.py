"""The account: what became of everything that was accepted."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from rich.table import Table

from kafka_delivery.dead_letters import TASK_ID_SUFFIX
from servers import read_all
from stack import Stack, leftovers, message_id

from .application import MISSING, TOPIC
from .trail import task_id_of

DEAD_LETTER_TOPICS = (f"{TOPIC}-dlq", f"{MISSING}-dlq")

READ_S = 120


@dataclass(frozen=True, slots=True)
class Accepted:
    """A record whose send was accepted, from the application's report."""

    id: str
    kind: str
    task_id: str
    at: float
    tries: int


@dataclass
class Account:
    accepted: dict[str, Accepted]
    errors: dict[str, int]
    not_accepted: int
    delivered: Counter[str]
    dead: Counter[str]
    parked: dict[str, set[str]]
    """Kind of parking -> message ids."""
    waiting: set[str]
    """Task ids of messages that are still in Redis: late for ever, perhaps, but not lost."""
    rows: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    lost: list[Accepted] = field(default_factory=list)

    def __post_init__(self) -> None:
        parked = set().union(*self.parked.values())
        for one in self.accepted.values():
            row = self.rows[one.kind]
            places = {"delivered": one.id in self.delivered, "dead-lettered": one.id in self.dead}
            places |= {"parked": one.id in parked, "left": bool({one.id, one.task_id} & self.waiting)}
            row["accepted"] += 1
            row.update(place for place, there in places.items() if there)
            row["twice"] += max(0, self.delivered[one.id] + self.dead[one.id] + (one.id in parked) - 1)
            if not any(places.values()):
                row["lost"] += 1
                self.lost.append(one)

    @property
    def totals(self) -> Counter[str]:
        return sum(self.rows.values(), Counter())

    def table(self) -> Table:
        columns = ("accepted", "delivered", "dead-lettered", "parked", "left", "twice", "lost")
        table = Table("kind of send", *columns, title="account")
        for kind, row in [*sorted(self.rows.items()), ("all", self.totals)]:
            table.add_row(kind, *(str(row[column]) for column in columns))
        return table


def read_report(path: Path) -> tuple[dict[str, Accepted], dict[str, Any]]:
    """What the application wrote down: what was accepted, and its last line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["id"]: Accepted(**line) for line in lines if "id" in line}, lines[-1]


def take(stack: Stack, report: Path) -> Account:
    """Read all topics and the parking store, by an independent consumer, and compare."""
    accepted, last = read_report(report)
    read = read_all(stack.kafka.bootstrap_servers, (TOPIC, *DEAD_LETTER_TOPICS), timeout=READ_S)
    return Account(
        accepted=accepted,
        errors=last["errors"],
        not_accepted=last["not accepted"],
        delivered=Counter(message_id(record) for record in read if record.topic == TOPIC),
        dead=Counter(message_id(record) for record in read if record.topic != TOPIC),
        parked=_parked(stack, accepted.values()),
        waiting=_waiting(stack.redis),
    )


def _waiting(client: redis.Redis) -> set[str]:
    messages = [message for key in leftovers(client) for message in _messages(client, key)]
    return {task_id_of(message).decode().removesuffix(TASK_ID_SUFFIX) for message in messages}


def _parked(stack: Stack, accepted: Iterable[Accepted]) -> dict[str, set[str]]:
    members: dict[str, set[str]] = defaultdict(set)  # a batch that was kept whole lies under its task id
    for one in accepted:
        members[one.task_id].add(one.id)
    parked: dict[str, set[str]] = defaultdict(set)
    for item in stack.parked():
        task_id = item.message_id.removesuffix(TASK_ID_SUFFIX)
        parked[item.kind] |= {task_id} if item.content == "record" else members.get(task_id, {task_id})
    return dict(parked)


def _messages(client: redis.Redis, key: str) -> Iterable[bytes]:
    read: Mapping[bytes, Any] = {
        b"list": lambda: client.lrange(key, 0, -1),
        b"hash": lambda: client.hvals(key),
        b"zset": lambda: client.zrange(key, 0, -1),
    }
    kind: Any = client.type(key)
    found: Iterable[bytes] = read[kind]()
    return found


def consuming(client: redis.Redis) -> int:
    """Connections on which a worker takes messages, and has asked for some within the last seconds."""
    asking = ("blmove", "evalsha", "brpop")
    return sum(each["cmd"] in asking and int(each["idle"]) <= 3 for each in client.client_list())
