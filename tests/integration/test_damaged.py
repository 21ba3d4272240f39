"""No item blinds the tools: what anybody wrote into the parking store is listed as damaged, shown, and discarded, and
what lies beside it is found, sent and discarded as before.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from kafka_delivery.names import COUNTS, DELAYED, PARKED, PARKED_INDEX, PARKED_ROOM, PAUSED, QUEUE
from kafka_delivery_worker.parking import DAMAGED, ParkingStore
from parked_items import park, queued, run
from stack import Stack

NOW_MS = 1_767_323_045_678

STORED: dict[bytes, bytes] = {
    b"no JSON": b"no JSON",
    b"nothing": b"",
    b"a list": b"[]",
    b"a number": b"9" * 5_000,
    b"no UTF-8": b'{"kind": "\xff"}',
    b"deep": b"[" * 100_000,
    b"deep objects": b'{"data":' * 900 + b"1" + b"}" * 900,
    b"no fields": b"{}",
    b"wrong types": b'{"kind": 1, "data": 2, "parked_at_ms": "x"}',
    b"compact": b'{"kind":"bug","error_class":"E","error_message":"m","content":"call","data":"1","parked_at_ms":1}',
    b"\xff\xfe": b"of an id that is no UTF-8",
    b"two\nlines": b"of an id with a line feed",
    "\x1b[2J\x9b31m".encode(): b"of an id that moves a terminal",
    "\u202e\u2028".encode(): b"of an id that turns text around",
    b"a\0b": b"of an id with a NUL",
    b"x" * 10_000: b"of a long id",
    b"large": b"\0" * 1_000_000,
}
"""What lies under an id."""

SCORES = {
    b"infinite": float("inf"),
    b"below": float("-inf"),
    b"huge": 1e300,
    b"negative": -1.0,
    b"orphan": float(NOW_MS),
}
"""In the index, of which nothing lies in the store."""

UNINDEXED = {b"not in the index": b"no JSON"}

ALL = len(STORED) + len(SCORES) + len(UNINDEXED)


@pytest.fixture
def system(delivery: Stack) -> Stack:
    """Damage of every kind around one good item."""
    store, client = ParkingStore(delivery.redis), delivery.redis
    park(store, "good")
    good = json.loads(client.hget(PARKED, "good") or b"")
    for name, changes in {
        b"time": {"parked_at_ms": 2**70},
        b"code": {"error_code": "x"},
        b"record": {"data": json.dumps([1, 2, 3])},
        b"interpreted": {"data": '{"__type__": "uuid", "__value__": 7}'},
    }.items():
        client.hset(PARKED, name, json.dumps(good | changes))
        client.zadd(PARKED_INDEX, {name: NOW_MS})
    for name, raw in STORED.items():
        client.hset(PARKED, name, raw)
        client.zadd(PARKED_INDEX, {name: NOW_MS})
    client.zadd(PARKED_INDEX, SCORES)
    client.hset(PARKED, mapping=UNINDEXED)
    return delivery


def damaged(system: Stack) -> list[dict[str, Any]]:
    return [one for line in run("list", "--json").stdout.splitlines() if (one := json.loads(line))["kind"] == DAMAGED]


def test_all_are_listed_and_the_good_one_too(system: Stack) -> None:
    assert len(damaged(system)) == ALL + 4
    listed = run("list", "--json").stdout
    assert len(listed.splitlines()) == ALL + 5
    assert "good" in [json.loads(line)["id"] for line in listed.splitlines()]
    for text in (listed, run("list", "--limit", "100").stdout, run("summary").stdout):
        assert all(one.isprintable() or one == "\n" for one in text)


def test_what_watches_the_store_goes_on(system: Stack) -> None:
    told = json.loads(system.command("status", "--json").stdout)["parked"]
    assert (told["total"], told["kinds"][DAMAGED]) == (len(STORED) + len(UNINDEXED) + 5, ALL + 4)
    assert system.command("status").returncode == 0
    counted = json.loads(run("summary", "--json").stdout)
    assert sum(one["count"] for one in counted["kinds"] if one["kind"] == DAMAGED) == ALL + 4
    assert system.command("trace", "good", "--json", check=False).returncode == 4
    assert system.command("trace", "nowhere", "--topic", "t", check=False).returncode == 5


def test_each_is_shown_and_discarded_under_the_id_that_is_shown(system: Stack) -> None:
    ids = [one["id"] for one in damaged(system)]
    for item_id in ids:
        if "\0" in item_id or not item_id.isprintable():  # which nobody can type, or give
            continue
        assert json.loads(run("show", item_id, "--json").stdout)["kind"] == DAMAGED
        run("discard", item_id, "--reason", "a test", "--yes")
    shown = ["\\udcff\\udcfe", "two\nlines", "\\x1b[2J\\x9b31m", "\\u202e\\u2028", "a\\x00b"]
    assert len(damaged(system)) == len(shown)
    for item_id in shown:
        assert "damaged" in run("show", item_id).stdout
        run("discard", item_id, "--reason", "a test", "--yes")
    assert damaged(system) == []
    assert [item.id for item in ParkingStore(system.redis).list()] == ["good"]


def test_all_of_the_kind_are_discarded_at_once(system: Stack) -> None:
    run("discard", "--kind", DAMAGED, "--reason", "a test", "--yes")
    store = ParkingStore(system.redis)
    assert [item.id for item in store.list()] == ["good"]
    assert (store.count(), system.redis.zcard(PARKED_INDEX)) == (1, 1)


def test_a_redrive_of_all_sends_what_can_be_sent(system: Stack) -> None:
    done = run("redrive", "--all", "--yes", ok=False)
    assert done.exit_code == 1
    assert "damaged" in done.output
    assert queued(system) == ["good"]
    assert len(damaged(system)) == ALL + 4


def test_an_export_has_them_as_they_lie(system: Stack) -> None:
    lines = [json.loads(line) for line in run("export", "-").stdout.splitlines()]
    assert {one["data"]["stored"] for one in lines if one["id"] == "no JSON"} == {"no JSON"}
    assert len(lines) == ALL + 5


def test_what_came_into_the_place_of_a_damaged_item_is_not_discarded_for_it(delivery: Stack) -> None:
    store, client = ParkingStore(delivery.redis), delivery.redis
    client.hset(PARKED, "a", "no JSON")
    client.zadd(PARKED_INDEX, {"a": NOW_MS, "b": NOW_MS})
    first, second = store.list()
    client.hset(PARKED, "a", "another")
    park(store, "b")
    assert not store.discard(first)
    assert not store.discard(second)
    assert client.hget(PARKED, "a") == b"another"
    assert store.get("b") is not None


def test_a_stretch_of_time_has_what_the_index_does_not_know(delivery: Stack) -> None:
    store, client = ParkingStore(delivery.redis), delivery.redis
    park(store, "good")
    at_ms = next(store.list()).at_ms
    client.zrem(PARKED_INDEX, "good")
    assert [item.id for item in store.list(at_ms, at_ms + 1)] == ["good"]
    assert [item.id for item in store.list(at_ms + 1)] == []
    assert store.discard(next(store.list()))
    assert store.count() == 0


@pytest.mark.parametrize("room", ["x", "-1", "1e400", "nan", "1.5", "9" * 30])
def test_the_room_is_counted_anew_where_no_worker_counted_it(delivery: Stack, room: str) -> None:
    store = ParkingStore(delivery.redis, max_bytes=100_000)
    park(store, "one")
    taken = store.usage().bytes
    for field in ("bytes", "items", "counted_at"):
        delivery.redis.hset(PARKED_ROOM, field, room)
        assert store.usage().bytes == taken, field
    park(store, "two")
    assert store.count() == 2


def test_what_else_strangers_write_does_not_end_status(delivery: Stack) -> None:
    client: redis.Redis = delivery.redis
    client.hset(COUNTS, mapping={b"delivered:t": b"x", b"\xff": b"1", b"delivered:u": b"2"})
    client.zadd(DELAYED + QUEUE, {"x": float("inf"), "y": float("-inf")})
    client.sadd("kafka-delivery:waiting:1", b"\xff:\xfe")
    client.zadd("kafka-delivery:leases:1", {b"\xff": 1})
    client.lpush(QUEUE, b'"correlation_id": "\xff\x1b"')
    for value in (b"no JSON", b"[]", b'{"at": "x"}', b"[" * 100_000, b'{"at": 9e99, "why": 1, "since_ms": []}'):
        client.hset(PAUSED, value[:20], value)
    told = json.loads(delivery.command("status", "--json").stdout)
    assert told["topics"]["u"]["delivered"] == 2
    assert told["paused"] == []
    assert delivery.command("status").returncode == 0
