"""What a stranger's message may take of a channel: counted bytes, and no more depth than can be written again."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import redis

from kafka_delivery_worker.decompression import most_bytes
from kafka_delivery_worker.lease import Lease
from kafka_delivery_worker.parked_items import as_it_lay
from kafka_delivery_worker.parking import ParkingStore

from .channels import QUEUE, Broker, held, message, publish, queued

DELAYED = f"kafka-delivery:delayed:1:{QUEUE}"


def compressed(name: str, size: int) -> bytes:
    body = base64.b64encode(zlib.compress(b"[" + b" " * (size - 2) + b"]")).decode()
    headers = {"id": name, "task": "kafka_delivery.send", "compression": "gzip"}
    return message(name, body=body, headers=headers)


def test_what_is_decompressed_counts_as_what_it_is(broker: Broker, redis_client: redis.Redis, lease: Lease) -> None:
    raw = compressed("a", 5_000_000)
    redis_client.lpush(QUEUE, raw)
    broker.turn(lambda: broker.got)
    assert len(broker.got[0].body) == 5_000_000
    assert [*lease.held.values()] == [len(raw) + 5_000_000]
    broker.got[0].ack()
    broker.turn(lambda: not held(redis_client))
    assert lease._bytes == 0


def test_what_finds_no_room_is_not_decompressed_but_waits(
    broker: Broker, redis_client: redis.Redis, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten of a hundred kilobytes took two gigabytes. What one takes is not known before: it counts as the most."""
    monkeypatch.setattr(lease, "_max_bytes", 2 * most_bytes())
    redis_client.lpush(QUEUE, *(compressed(f"{number}", 6_000_000) for number in range(6)))
    broker.turn(lambda: redis_client.zcard(DELAYED) == 4)
    assert len(broker.got) == 2
    assert lease._bytes <= 2 * most_bytes()
    while len(broker.got) < 6:  # as the first ones are done, the others come
        for one in broker.got:
            if not one.acknowledged:
                one.ack()
        waiting: Any = redis_client.zrange(DELAYED, 0, -1)
        if waiting:
            redis_client.zadd(DELAYED, dict.fromkeys(waiting, 0))
        before = len(broker.got)
        broker.turn(lambda: len(broker.got) > before)  # noqa: B023  # called before it changes
    assert sorted(broker.names) == [str(number) for number in range(6)]


def test_one_that_is_alone_always_has_room(
    broker: Broker, redis_client: redis.Redis, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_max_bytes", 1_000_000)
    redis_client.lpush(QUEUE, compressed("large", 6_000_000))
    broker.turn(lambda: broker.got)
    assert queued(redis_client) == []


def test_a_bomb_is_an_error_of_the_message(redis_url: str, redis_client: redis.Redis, lease: Lease) -> None:
    broken: list[Any] = []
    broker = Broker(redis_url, on_decode_error=lambda message, error: broken.append(error))
    redis_client.lpush(QUEUE, compressed("bomb", 50_000_000))
    broker.turn(lambda: broken)
    assert type(broken[0]).__name__ == "BodyTooLargeError"
    assert max(lease.held.values()) < 100_000, "nothing of it is kept"
    broker.close()


def _deep(where: str, depth: int) -> bytes:
    raw = json.loads(message("deep"))
    raw[where]["deep"] = "DEEP"
    return json.dumps(raw).replace('"DEEP"', "[" * depth + "]" * depth).encode()


@pytest.mark.parametrize("depth", [70, 500, 900, 990, 1_000, 1_030, 10_000])
@pytest.mark.parametrize("where", ["headers", "properties"])
def test_what_is_nested_too_deeply_is_parked_as_it_lay(
    broker: Broker, redis_client: redis.Redis, where: str, depth: int
) -> None:
    raw = _deep(where, depth)
    redis_client.lpush(QUEUE, raw)
    publish(redis_client, "next")
    broker.turn(lambda: broker.got)
    (parked,) = ParkingStore(redis_client).list()
    assert (parked.kind, as_it_lay(parked.data)) == ("undecodable", raw)
    broker.got[0].ack()
    broker.turn(lambda: not held(redis_client))


def test_what_is_nested_as_a_tracers_header_may_be_is_taken(broker: Broker, redis_client: redis.Redis) -> None:
    redis_client.lpush(QUEUE, _deep("headers", 50))
    broker.turn(lambda: broker.got)
    assert ParkingStore(redis_client).count() == 0


@pytest.mark.parametrize("make", [lambda: b"\xff" * 200_000, lambda: b"\0" * 200_000, lambda: b"x\x1b" * 100_000])
def test_bytes_that_json_would_make_long_are_kept_short(
    broker: Broker, redis_client: redis.Redis, make: Callable[[], bytes]
) -> None:
    raw = make()
    redis_client.lpush(QUEUE, raw)
    store = ParkingStore(redis_client)
    broker.turn(store.count)
    (parked,) = store.list()
    assert as_it_lay(parked.data) == raw
    assert store.usage().bytes < 1.5 * len(raw)


def test_the_same_bytes_are_parked_once(broker: Broker, redis_client: redis.Redis) -> None:
    store = ParkingStore(redis_client)
    redis_client.lpush(QUEUE, b"garbage", b"garbage", b"other")
    broker.turn(lambda: store.count() == 2 and not held(redis_client) and not queued(redis_client))
