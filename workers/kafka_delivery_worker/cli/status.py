"""``kafka-delivery status``: what waits, what is in flight, who works, and what became of records."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any, NamedTuple

import click
from kombu.transport.redis import Channel

from kafka_delivery import app, settings
from kafka_delivery.names import DEAD_LETTER_QUEUE, DELAYED, HELD, LEASES, QUEUE, WAITING
from kafka_delivery.redis_client import RedisClient

from .. import broker, counts
from ..parking import ParkingStore
from .breaker import circuits
from .output import console, json_option, moment, print_json, table

QUEUES = (QUEUE, DEAD_LETTER_QUEUE)

REDIS_TIMEOUT_S = 2.0
"""For each answer of Redis. Kombu connects a second time, 2 s later: a hung Redis is given up after 6 s."""

WORKERS_TIMEOUT_S = 1.0
"""For the workers' answers. Nobody knows how many will come, so it is always waited for."""

MOST_PARKED = 10_000
"""Of so many parked items, the oldest, the kinds are counted: each is read for that, with its payload."""


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Show what waits, what is in flight, which workers answer, and what became of records so far.

    Delayed is what waits for its time; below it stands when the first of it is due. In flight is what workers hold: it
    is being sent, or waits there for its time.
    """
    found = status(RedisClient(settings.current(), REDIS_TIMEOUT_S))
    if as_json:
        print_json(found)
    else:
        _show(found)


def status(redis: RedisClient) -> dict[str, Any]:
    """The state of the service.

    Returns:
        ``queues``: messages that wait, by queue; ``priorities``: those of them with a Celery priority other than 0, by
        queue and priority; ``delayed``: messages that wait for their time, by queue; ``next_due``: of the first of
        these, by queue, the time it is due ``at`` (ISO 8601, UTC) and the seconds until then by the clock of Redis,
        ``in_s``, below 0 when it is late, or None; ``put_aside``: messages that wait for their topic's circuit, by
        topic; ``in_flight``: messages that workers hold, of all Celery apps that use this database; ``parked``:
        ``total`` and ``kinds``, by kind, of the oldest MOST_PARKED; ``workers``: names of those that answered and serve
        one of our queues; ``circuits``: states by scope, see `kafka_delivery.Circuit`; ``topics``: counts by topic and
        outcome, topic "" for what has none.

        Another broker than Redis does not tell what workers hold, which there includes what waits for its time:
        ``delayed``, ``next_due`` and ``in_flight`` are None.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached or refuses.
        BrokerError: the same of another broker.
    """
    messages = _messages(redis) if settings.current().queue_on_redis else _messages_elsewhere()
    store = ParkingStore(redis.client, redis.prefix)
    topics = counts.read(redis.client, redis.prefix)
    return {
        "queues": {name: sum(by_priority.values()) for name, by_priority in messages.waiting.items()},
        "priorities": {
            name: {str(step): count for step, count in by_priority.items() if step and count}
            for name, by_priority in messages.waiting.items()
        },
        "delayed": messages.delayed,
        "next_due": messages.next_due,
        "put_aside": messages.put_aside,
        "in_flight": messages.in_flight,
        "parked": {
            "total": store.count(),
            "kinds": dict(Counter(item.kind for item in islice(store.list(), MOST_PARKED))),
        },
        "workers": _workers(),
        "circuits": {one.scope: one.state for one in circuits(redis)},
        "topics": {
            topic: {outcome: topics[topic].get(outcome, 0) for outcome in counts.OUTCOMES} for topic in sorted(topics)
        },
    }


class _Messages(NamedTuple):
    waiting: dict[str, dict[int, int]]  # by queue and priority
    delayed: dict[str, int] | None
    next_due: dict[str, dict[str, Any] | None] | None
    in_flight: int | None
    put_aside: dict[str, int]


def _messages_elsewhere() -> _Messages:
    return _Messages({queue: {0: broker.waiting(queue) or 0} for queue in QUEUES}, None, None, None, {})


def _messages(redis: RedisClient) -> _Messages:
    prefix = redis.prefix
    lists = [(queue, step, f"{queue}{Channel.sep}{step}" if step else queue)
             for queue in QUEUES for step in Channel.priority_steps]  # fmt: skip
    aside = sorted(member.decode() for member in redis.client.smembers(prefix + WAITING))
    owners = [owner.decode() for owner in redis.client.zrange(prefix + LEASES, 0, -1)]
    with redis.client.pipeline(transaction=True) as pipe:  # at one moment: what moves meanwhile is counted once
        pipe.time()
        for _, _, name in lists:
            pipe.llen(prefix + name)
            pipe.zcard(prefix + DELAYED + name)
            pipe.zrange(prefix + DELAYED + name, 0, 0, withscores=True)
        for key in (Channel.unacked_key, *(HELD + owner for owner in owners)):
            pipe.hlen(prefix + key)
        for member in aside:
            pipe.llen(f"{prefix}{WAITING}:{member}")
        (seconds, microseconds), *answers = pipe.execute()
    now_ms = seconds * 1000 + microseconds // 1000
    found = iter(answers)
    waiting: dict[str, dict[int, int]] = {queue: {} for queue in QUEUES}
    delayed = dict.fromkeys(QUEUES, 0)
    due: dict[str, list[int]] = {queue: [] for queue in QUEUES}
    for queue, step, _ in lists:
        waiting[queue][step] = next(found)
        delayed[queue] += next(found)
        due[queue] += [int(at) for _, at in next(found)]
    in_flight = sum(next(found) for _ in range(1 + len(owners)))
    put_aside: Counter[str] = Counter()
    for member, count in zip(aside, found, strict=True):
        put_aside[member.partition(":")[0]] += count
    next_due = {queue: _next(times, now_ms) for queue, times in due.items()}
    return _Messages(waiting, delayed, next_due, in_flight, dict(put_aside))


def _next(due: list[int], now_ms: int) -> dict[str, Any] | None:
    return {"at": moment(min(due)), "in_s": (min(due) - now_ms) / 1000} if due else None


def _workers() -> list[str]:
    """Names of the workers that serve our queues."""
    # Not `ping`: the workers of every Celery app in this database answer it.
    served = app.control.inspect(timeout=WORKERS_TIMEOUT_S).active_queues() or {}
    return sorted(worker for worker, queues in served.items() if any(queue["name"] in QUEUES for queue in queues or ()))


def _show(found: dict[str, Any]) -> None:
    out = console()
    rows: list[tuple[str, Any]] = []
    for queue, waiting in found["queues"].items():
        rows.append((f"waiting in {queue}", waiting))
        rows += [(f"- of priority {step}", count) for step, count in found["priorities"][queue].items()]
        if found["delayed"] and found["delayed"][queue]:
            rows.append((f"delayed in {queue}", found["delayed"][queue]))
        if found["next_due"] and (due := found["next_due"][queue]) is not None:
            until = f"in {due['in_s']:,.0f} s" if due["in_s"] >= 0 else f"{-due['in_s']:,.0f} s late"
            rows.append(("- the next is due", f"{due['at']}, {until}"))
    rows += [(f"put aside until {topic} is well", count) for topic, count in found["put_aside"].items()]
    told = found["in_flight"] is not None
    rows.append(("in flight", found["in_flight"] if told else "this broker does not tell, nor what is delayed"))
    rows.append(("parked", found["parked"]["total"]))
    rows += [(f"- {kind}", count) for kind, count in found["parked"]["kinds"].items()]
    rows.append(("workers", ", ".join(found["workers"]) or "none answered"))
    rows += [(f"circuit of {scope}", state) for scope, state in found["circuits"].items()]
    out.print(table("Now", ("what", "how many"), rows))
    by_topic = [(topic or "(none)", *outcomes.values()) for topic, outcomes in found["topics"].items()]
    out.print(table("Since the beginning", ("topic", *counts.OUTCOMES), by_topic))
