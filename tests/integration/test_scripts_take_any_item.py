"""No script takes longer than in proportion to an item's length, whatever the item is.

Anybody who can write to Redis writes items: other clients, broken or evil ones. While a script runs, Redis serves
nobody.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

import kafka_delivery_worker
from kafka_delivery_worker.embedded import Valkey
from kafka_delivery_worker.lease import script
from kafka_delivery_worker.parking import _script as of_parking
from kafka_delivery_worker.redrive.done import script as redrive_script
from kafka_delivery_worker.task_ids import LOOKED_AT, LOOKS
from servers import AnyRedis

SHORT, LONG = 100_000, 1_000_000
RATIO = 30
"""Ten times the length takes ten times as long; what is quadratic takes a hundred times."""
FLOOR_US = 1_000
"""Below this a time says nothing."""
TIMEOUT_S = 30

MEMBER, LIST = "w", "1.1:q"


def envelope(size: int, **dumped: Any) -> str:
    properties = {"correlation_id": str(uuid.uuid4()), "delivery_tag": str(uuid.uuid4()), "delivery_info": {}}
    headers = {"id": str(uuid.uuid4()), "task": "kafka_delivery.send_many", "eta": None}
    return json.dumps({"body": "A" * size, "headers": headers, "properties": properties}, **dumped)


def again(text: str) -> Callable[[int], str]:
    return lambda size: text * (size // len(text))


ITEMS: dict[str, Callable[[int], str]] = {
    "JSON": envelope,
    "compact JSON": lambda size: envelope(size, separators=(",", ":")),
    "garbage": again("A"),
    "spaces": again(" "),
    "quotes": again('"'),
    "backslashes": again("\\"),
    "brackets": again("["),
    "braces": again('{"a":'),
    "zeros": again("\0"),
    "spaces behind a name": lambda size: '"eta"' + " " * (size // 2) + '"correlation_id"' + " " * (size // 2),
    "a time without an end": lambda size: '"eta": "2100-01-01T00:00:00.' + "0" * size,
    "an id without an end": lambda size: '"correlation_id": "' + "a" * size,
} | {
    f"many of {text!r}": again(text)
    for text in (
        '"delivery_tag"', '"delivery_tag": "', '"correlation_id"', '"correlation_id": ', '"correlation_id":   "',
        '"correlation_id"         ', '"eta"', '"eta": ', '"eta": "2100-01-01T00:00:00', '"kafka_delivery.send_many"',
        '"kafka_delivery.send_man', '"digest": "', '"digest": "0123456789abcde', '"parked_at_ms": ',
        '"parked_at_ms": 1',
    )
}  # fmt: skip


# -- each of these prepares what a script meets, and calls it
def claim(client: AnyRedis, item: str, *, died: int = 0) -> None:
    """One that waits, one that is done with, one that holds up others, and one whose process died."""
    keys = ["gate", "leases", "held", "deaths", "circuit", "probes", "waiting", "poison", "q", "delayed:q"]
    client.hset("deaths", "somebody's", 10)
    client.lpush("q", item)
    client.hset("held", LIST, item)
    settled = [LIST] if died else []
    acks = [] if died else [LIST]
    arguments = [MEMBER, 60_000, 10, 10**9, 2, "", 100, 0, "cb:", "", "", "delayed:", 0, 3, 5, len(acks), 0, 0, 0, died]
    client.eval(script("claim"), len(keys), *keys, *arguments, *acks, *settled, "q")
    client.eval(script("claim"), len(keys), *keys, *arguments[:4], 3, *arguments[5:15], 0, 0, 0, 0, 0, "q")


def reap(client: AnyRedis, item: str) -> None:
    client.hset("held", LIST, item)
    keys = ["leases", "held", "deaths", "poison", "began", "ended"]
    client.eval(script("reap"), len(keys), *keys, MEMBER, "", 5, 3, 60_000, "1")


def release(client: AnyRedis, item: str) -> None:
    client.set("lock", "token")
    client.zadd("delayed", {item: 1})
    client.eval(script("release"), 3, "lock", "delayed", "list", "token", 10, "")
    client.lpush("aside", item)
    client.eval(script("release"), 4, "lock", "aside", "list", "waiting", "token", 10, "member")


def send(client: AnyRedis, item: str) -> None:
    client.set("lock", "token")
    client.eval(redrive_script("send"), 3, "lock", "result", "list", "token", 1, item)


def recall(client: AnyRedis, item: str) -> None:
    client.zadd("delayed", {item: 9_000_000_000_000.5})
    client.eval(script("recall"), 1, "delayed", "0", 60_000)


def fronts(client: AnyRedis, item: str) -> None:
    client.lpush("list", item)
    client.eval(script("fronts"), 1, "list", LOOKED_AT, LOOKS)


def find(client: AnyRedis, item: str) -> None:
    client.lpush("list", item)
    texts = [json.dumps(str(uuid.uuid4())), '"' + "A" * 199, "kafka_delivery.send_manz", "bm90IGluIGl0"]
    client.eval(script("find"), 1, "list", "list", "0", 10**9, 2, *texts)


def parking(name: str) -> Callable[[AnyRedis, str], None]:
    def call(client: AnyRedis, item: str) -> None:
        client.hset("items", "a", item)
        client.set("lock", "token")
        arguments: dict[str, list[Any]] = {
            "park": [3, "a", "0123456789abcdef", 1, item, 0],
            "unpark": [4, "lock", "a", "17", "token"],
            "send_back": [5, "lock", "list", "a", "17", "token", item],
            "drop": [4, "lock", "a", "", "token"],
            "taken": [3],
        }
        keys, *rest = arguments[name]
        client.eval(of_parking(name), keys, "items", "index", "room", *rest)

    return call


CALLS: dict[str, Callable[[AnyRedis, str], None]] = {
    "claim": claim,
    "claim, of a dead process": lambda client, item: claim(client, item, died=1),
    "reap": reap,
    "release": release,
    "redrive/send": send,
    "recall": recall,
    "fronts": fronts,
    "find": find,
} | {name: parking(name) for name in ("park", "unpark", "send_back", "taken", "drop")}

BEFORE_OTHERS = {"deaths", "room", "breaker/circuit"}
"""Not scripts by themselves."""
WITHOUT_ITEMS = {
    "renew", "remember", "run_lock", "redrive/floors", "redrive/mark", "breaker/admit", "breaker/force",
    "breaker/report", "breaker/settle",
}  # fmt: skip
"""They see names, numbers and what scripts wrote themselves."""


def test_each_script_is_here() -> None:
    """A new one comes with its call, or with the knowledge that it sees no item."""
    folder = Path(kafka_delivery_worker.__file__).parent
    there = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.lua")}
    assert {name.partition(",")[0] for name in CALLS} | BEFORE_OTHERS | WITHOUT_ITEMS == there


@pytest.fixture(scope="module")
def own() -> Iterator[redis.Redis]:
    """A Redis that may be lost in a script for ever."""
    with Valkey() as valkey, redis.Redis.from_url(valkey.url, socket_timeout=TIMEOUT_S) as client:
        yield client


def cpu_us(client: AnyRedis) -> float:
    """CPU time of Redis so far: that the machine is busy with other work adds nothing to it."""
    used: Any = client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"]) * 1_000_000


def takes_us(client: AnyRedis, call: Callable[[AnyRedis, str], None], item: str) -> float:
    """What a call takes Redis, at the best of three times."""
    times = []
    for _ in range(3):
        client.flushall()
        before = cpu_us(client)
        call(client, item)
        times.append(cpu_us(client) - before)
    return min(times)


@pytest.mark.parametrize("name", CALLS)
def test_it_takes_no_longer_than_in_proportion_to_its_length(own: redis.Redis, name: str) -> None:
    call = CALLS[name]
    slow = {}
    for kind, made in ITEMS.items():
        short, long = (takes_us(own, call, made(size)) for size in (SHORT, LONG))
        if long > RATIO * max(short, FLOOR_US):
            slow[kind] = (short, long)
    assert slow == {}
