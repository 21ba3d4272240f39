"""A worker process as Redis sees it, the messages it claims, and time that goes by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

import redis

from kafka_delivery import names
from kafka_delivery_worker.lease import Lease, Settling, script
from servers import AnyRedis

QUEUE = "kafka-delivery"
OTHER = "kafka-delivery-dlq"
NOTHING, CLAIMED, SUSPECT, RAMP, SHUT = 0, 1, 2, 3, -1


NOTHING_TO_SETTLE = Settling.nothing()


RELEASED = -1
DEATHS = 5
"""What a message may cause by default before it is parked."""


class Answer(NamedTuple):
    """What a claim answers."""

    status: int
    items: list[bytes]
    tags: list[bytes]
    suspected: list[int]
    next_due: int
    holding: int


class Worker:
    """A worker process as Redis sees it."""

    def __init__(self, client: redis.Redis, seconds: float = 30, prefix: str = "", max_bytes: int = 2**40) -> None:
        self.client: AnyRedis = client
        self.lease = Lease(lambda: client, seconds, prefix, max_bytes)

    def claim(
        self,
        room: int = 500,
        lists: tuple[str, ...] = (QUEUE,),
        acks: Sequence[bytes] = (),
        returns: Sequence[bytes] = (),
    ) -> Answer:
        settling = Settling([*acks], [*returns], [], [], [])  # type: ignore[list-item]
        arguments = self.lease.claim_arguments(room, list(lists), settling)
        answer = Answer(*self.client.eval(script("claim"), *arguments))
        self.lease.claimed([tag.decode() for tag in answer.tags], answer.items)
        return answer

    @property
    def holds(self) -> list[bytes]:
        """Of its messages, in the order in which they were claimed."""
        held = self.client.hgetall(self.lease.held_key)
        return [held[tag] for tag in sorted(held, key=lambda t: [int(n) for n in t.partition(b":")[0].split(b".")])]

    def dies(self) -> None:
        """Its lease is over, long after any other died, and others have been renewing theirs all the time."""
        self.client.delete(names.LEASES_ENDED)
        self.client.zadd(self.lease.leases, {self.lease.owner: now(self.client) - 1})

    def reaps(self, dead: Worker) -> tuple[int, int]:
        return self.lease._reap(dead.lease.owner, died=True)


def now(client: redis.Redis) -> int:
    seconds, microseconds = client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def message(name: Any, *, eta: str | None = None, size: int = 0, **more: Any) -> bytes:
    """An envelope as Celery writes it."""
    headers = {
        "lang": "py",
        "task": "kafka_delivery.send",
        "id": str(name),
        "eta": eta,
        "expires": None,
    }
    return json.dumps(
        {
            "body": "x" * size,
            "content-type": "application/json",
            "headers": {**headers, "retries": 0, "argsrepr": "('topic', 3 bytes)", "kwargsrepr": "{}", **more},
            "properties": {"correlation_id": str(name), "delivery_info": {}, "delivery_tag": f"tag of {name}"},
        }
    ).encode()


def digest(item: bytes | str) -> str:
    """By what deaths are remembered, of a message that is not long."""
    return hashlib.sha1(item.encode() if isinstance(item, str) else item).hexdigest()  # noqa: S324  # Redis's own


def points(deaths: int) -> int:
    """What is remembered of so many deaths that say something."""
    return 10 * deaths


def has_killed(client: AnyRedis, item: bytes, deaths: int) -> None:
    """As if so many workers had died with a message."""
    client.hset(names.DEATHS, digest(item), points(deaths))


def publish(client: redis.Redis, *messages: bytes, queue: str = QUEUE) -> list[bytes]:
    client.lpush(queue, *messages)
    return list(messages)


def queued(client: AnyRedis, queue: str = QUEUE) -> list[bytes]:
    """What waits in a list, the next one first."""
    return list(reversed(client.lrange(queue, 0, -1)))


def delayed(client: AnyRedis, queue: str = QUEUE) -> list[bytes]:
    return list(client.zrange(names.DELAYED + queue, 0, -1))


def ends(client: redis.Redis, owner: str) -> float:
    """When a lease is over, in milliseconds."""
    score = client.zscore(names.LEASES, owner)
    assert score is not None
    return score


def delayed_pass(client: redis.Redis, ms: int) -> None:
    """For what is delayed, so much time goes by."""
    for item in delayed(client):
        client.zincrby(names.DELAYED + QUEUE, -ms, item)


def in_future(seconds: float, zone: timezone = UTC) -> datetime:
    return datetime.now(zone) + timedelta(seconds=seconds)


def long_renewed(client: redis.Redis, since_ms: int = 600_000) -> None:
    """As if workers had been renewing without a gap for so long."""
    at = now(client)
    client.hset(names.LEASE_CLOCK, mapping={"beat": at, "since": at - since_ms})


def leases_pass(client: AnyRedis, ms: int) -> None:
    """For leases, and for who has been renewing them, so much time goes by."""
    for name in ("beat", "since"):
        client.hincrby(names.LEASE_CLOCK, name, -ms)
    for owner in client.zrange(names.LEASES, 0, -1):
        client.zincrby(names.LEASES, -ms, owner)
