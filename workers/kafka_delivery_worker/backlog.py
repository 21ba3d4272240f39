"""What waits, and where: in a queue, for its time, in a worker's hands, or for its topic's circuit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from kombu.transport.redis import Channel

from kafka_delivery import settings
from kafka_delivery.names import DELAYED, HELD, LEASES, WAITING
from kafka_delivery.record import MAX_TIMESTAMP_MS
from kafka_delivery.redis_client import RedisClient

from . import broker, task_ids
from .lease import script


def lists_of(queues: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Return the lists of these queues, by name: the queue and the priority of each."""
    return {
        f"{queue}{Channel.sep}{step}" if step else queue: (queue, step)
        for queue in queues
        for step in Channel.priority_steps
    }


class Backlog(NamedTuple):
    """Messages at one moment. What another broker than Redis does not tell is None.

    Attributes:
        now_ms: that moment, by Redis's clock.
        waiting: by queue and priority.
        delayed, due: those that wait for their time, and those of them for which it has come, by queue.
        next_due_ms: by queue, when the first of the delayed is due; None where there is none.
        in_flight: held by workers, of all Celery apps that use this database.
        put_aside: those that wait for their topic's circuit, by topic.
        fronts: ids of the messages that are next, by list.
    """

    now_ms: int
    waiting: dict[str, dict[int, int]]
    delayed: dict[str, int] | None
    due: dict[str, int] | None
    next_due_ms: dict[str, int | None] | None
    in_flight: int | None
    put_aside: dict[str, int]
    fronts: dict[str, str]


def read(redis: RedisClient) -> Backlog:
    """Count what waits for the workers of this cluster.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached or refuses.
        BrokerError: the same of another broker.
    """
    if settings.current().queue_on_redis:
        return _in_redis(redis)
    waiting = {queue: {0: broker.waiting(queue) or 0} for queue in settings.current().queues}
    return Backlog(0, waiting, None, None, None, None, {}, {})


def count(redis: RedisClient, queues: Iterable[str]) -> int:
    """Return how many messages wait in these queues: for a worker, for their time, or for their topic's circuit.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached or refuses.
        BrokerError: the same of another broker.
    """
    if not settings.current().queue_on_redis:
        return sum(broker.waiting(queue) or 0 for queue in queues)
    prefix, lists = redis.prefix, lists_of(queues)
    aside = _texts(redis.client.smembers(prefix + WAITING))
    with redis.client.pipeline(transaction=True) as pipe:
        for name in lists:
            pipe.llen(prefix + name)
            pipe.zcard(prefix + DELAYED + name)
        for member in aside:
            if member.partition(":")[2] in lists:
                pipe.llen(f"{prefix}{WAITING}:{member}")
        return sum(pipe.execute())


def _in_redis(redis: RedisClient) -> Backlog:
    prefix = redis.prefix
    with redis.client.pipeline(transaction=False) as pipe:  # one round trip
        pipe.smembers(prefix + WAITING)
        pipe.zrange(prefix + LEASES, 0, -1)
        pipe.time()
        members, leases, (seconds, microseconds) = pipe.execute()
    queues = settings.current().queues
    lists = lists_of(queues)
    aside = [member for member in sorted(_texts(members)) if member.partition(":")[2] in lists]
    owners = list(_texts(leases))
    fronts = [*lists, *(f"{WAITING}:{member}" for member in aside)]
    now_ms = seconds * 1000 + microseconds // 1000
    with redis.client.pipeline(transaction=True) as pipe:  # at one moment: what moves meanwhile is counted once
        for name in lists:
            pipe.llen(prefix + name)
            pipe.zcard(prefix + DELAYED + name)
            pipe.zcount(prefix + DELAYED + name, "-inf", now_ms)
            pipe.zrange(prefix + DELAYED + name, 0, 0, withscores=True)
        for key in (Channel.unacked_key, *(HELD + owner for owner in owners)):
            pipe.hlen(prefix + key)
        for member in aside:
            pipe.llen(f"{prefix}{WAITING}:{member}")
        looks = (task_ids.LOOKED_AT, task_ids.LOOKS)
        pipe.eval(script("fronts"), len(fronts), *(prefix + name for name in fronts), *looks)
        *answers, ids = pipe.execute()
    found = iter(answers)
    waiting: dict[str, dict[int, int]] = {queue: {} for queue in queues}
    delayed, due = dict.fromkeys(queues, 0), dict.fromkeys(queues, 0)
    next_due: dict[str, int | None] = dict.fromkeys(queues)
    for queue, step in lists.values():
        waiting[queue][step] = next(found)
        delayed[queue] += next(found)
        due[queue] += next(found)
        for _, at in next(found):
            at_ms = int(max(0, min(at, MAX_TIMESTAMP_MS)))  # a stranger's may be infinite
            next_due[queue] = min(at_ms, next_due[queue] or at_ms)
    in_flight = sum(next(found) for _ in range(1 + len(owners)))
    put_aside: Counter[str] = Counter()
    for member, count in zip(aside, found, strict=True):
        put_aside[member.partition(":")[0]] += count
    named = {name: task_ids.read_id(one) for name, one in zip(fronts, ids, strict=True) if one is not None}
    return Backlog(now_ms, waiting, delayed, due, next_due, in_flight, dict(put_aside), named)


def _texts(members: Iterable[bytes]) -> Iterator[str]:
    """Those that can be a name of ours; others are a stranger's."""
    for member in members:
        with suppress(UnicodeDecodeError):
            yield member.decode()
