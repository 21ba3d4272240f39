"""``kafka-delivery status``: what waits, what is in flight, who works, and what became of records."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from time import monotonic
from typing import Any

import click
from celery.app.control import Control
from rich.table import Table

from kafka_delivery import app, settings
from kafka_delivery.celery_app import broker_options
from kafka_delivery.redis_client import RedisClient

from .. import backlog, counts, paused, unserved
from ..parking import ParkingStore
from .breaker import circuits
from .output import console, json_option, moment, print_json, table

REDIS_TIMEOUT_S = 5.0
"""For each answer of Redis, which a slow network may keep for seconds. Kombu connects a second time: a Redis that
hangs is given up after twice that."""

WORKERS_TIMEOUT_S = 1.0
"""For the workers' answers. Nobody knows how many will come, so it is always waited for."""

ROUND_TRIPS = 8
"""To Redis, for which the workers' answers are waited for besides: theirs, to connect and to answer, and ours."""

MOST_PARKED, WATCHED_PARKED = 10_000, 100
"""Of so many parked items, the oldest, the kinds are counted: each is read for that, with its payload. Of fewer, where
that is done every second."""


@click.command()
@click.option("--watch", is_flag=True, help="Keep looking, once a second, until Ctrl-C; with what a second brings.")
@json_option
def command(watch: bool, as_json: bool) -> None:
    """Show what waits, what is in flight, which workers answer, and what became of records so far.

    Delayed is what waits for its time; below it stands when the first of it is due. In flight is what workers hold: it
    is being sent, or waits there for its time.
    """
    redis = RedisClient(settings.current(), REDIS_TIMEOUT_S)
    if watch:
        _watch(redis, as_json)
        return
    found = status(redis)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _watch(redis: RedisClient, as_json: bool) -> None:
    from . import watch

    def look() -> dict[str, Any]:
        return status(redis, WATCHED_PARKED)

    out = console()
    if as_json:
        try:
            for answer in watch.answers(look):
                print_json({"error": watch.said(answer)} if isinstance(answer, Exception) else answer)
        except KeyboardInterrupt:
            return
    if not out.is_terminal:
        raise click.UsageError("--watch draws on a terminal, and this is none; with --json it prints a line a second")
    watch.show(out, look, _now)


def status(redis: RedisClient, most_parked: int = MOST_PARKED) -> dict[str, Any]:
    """The state of the service.

    Args:
        redis: where it is looked.
        most_parked: of so many parked items the kinds are counted.

    Returns:
        ``queues``: messages that wait, by queue; ``priorities``: those of them with a Celery priority other than 0, by
        queue and priority; ``delayed``: messages that wait for their time, by queue; ``next_due``: of the first of
        these, by queue, the time it is due ``at`` (ISO 8601, UTC) and the seconds until then by the clock of Redis,
        ``in_s``, below 0 when it is late, or None; ``put_aside``: messages that wait for their topic's circuit, by
        topic; ``in_flight``: messages that workers hold, of all Celery apps that use this database; ``parked``:
        ``total``, the ``bytes`` that these take and may take (``max_bytes``, 0 for any number), and ``kinds``, by kind,
        of the oldest `most_parked`; ``workers``: names of those that answered and serve one of our queues;
        ``paused``: processes that pause themselves for a fault of their own, each with ``worker``, ``why`` and
        ``since_ms``; ``unserved``: messages that wait for workers of a cluster's name of which none runs, each with
        ``cluster``, ``messages`` and the names of which workers run, ``served``; ``circuits``: states by scope, see
        `kafka_delivery.Circuit`; ``topics``: counts by topic and outcome, topic "" for what has none.

    Another broker than Redis does not tell what workers hold, which there includes what waits for its time:
        ``delayed``, ``next_due`` and ``in_flight`` are None.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached or refuses.
        BrokerError: the same of another broker.
    """
    # Beside the rest: a slow Redis makes it take as long as all of that.
    with ThreadPoolExecutor(1, "kafka-delivery-workers") as asking:
        answers = asking.submit(_workers, _round_trip_s(redis))
        return _status(redis, most_parked, answers)


def _status(redis: RedisClient, most_parked: int, workers: Future[list[str]]) -> dict[str, Any]:
    messages = backlog.read(redis)
    store = ParkingStore.of(redis, settings.current())
    parked = store.usage()
    topics = counts.read(redis.client, redis.prefix)
    return {
        "queues": {name: sum(by_priority.values()) for name, by_priority in messages.waiting.items()},
        "priorities": {
            name: {str(step): count for step, count in by_priority.items() if step and count}
            for name, by_priority in messages.waiting.items()
        },
        "delayed": messages.delayed,
        "next_due": messages.next_due_ms
        and {queue: _next(at, messages.now_ms) for queue, at in messages.next_due_ms.items()},
        "put_aside": messages.put_aside,
        "in_flight": messages.in_flight,
        "parked": {
            "total": parked.items,
            "bytes": parked.bytes,
            "max_bytes": parked.max_bytes,
            "kinds": dict(Counter(item.kind for item in islice(store.list(), most_parked))),
        },
        "paused": [one._asdict() for one in paused.read(redis)],
        "unserved": [one._asdict() for one in unserved.read(redis, settings.current())],
        "circuits": {one.scope: one.state for one in circuits(redis)},
        "workers": workers.result(),
        "topics": {
            topic: {outcome: topics[topic].get(outcome, 0) for outcome in counts.OUTCOMES} for topic in sorted(topics)
        },
    }


def _next(at_ms: int | None, now_ms: int) -> dict[str, Any] | None:
    return None if at_ms is None else {"at": moment(at_ms), "in_s": (at_ms - now_ms) / 1000}


def _round_trip_s(redis: RedisClient) -> float:
    redis.client.ping()  # connects
    began = monotonic()
    redis.client.ping()
    return monotonic() - began


def _workers(round_trip_s: float) -> list[str]:
    """Names of the workers that serve our queues.

    Args:
        round_trip_s: what one to Redis takes.
    """
    s = settings.current()
    patience_s = WORKERS_TIMEOUT_S + ROUND_TRIPS * round_trip_s
    # Celery's own connection is a caller's, which gives a slow Redis up sooner.
    options = broker_options(s, REDIS_TIMEOUT_S)["broker_transport_options"]
    control = Control(app)
    control.mailbox.producer_pool = None  # it asks by the connection that it is given
    with app.connection_for_write(transport_options=options) as connection:
        # Not `ping`: the workers of every Celery app in this database answer it.
        replies = control.broadcast("active_queues", reply=True, timeout=patience_s, connection=connection) or ()
    served = {worker: queues for reply in replies for worker, queues in reply.items()}
    return sorted(
        worker for worker, queues in served.items() if any(queue["name"] in s.queues for queue in queues or ())
    )


def _show(found: dict[str, Any]) -> None:
    out = console()
    out.print(_now(found))
    by_topic = [(topic or "(none)", *outcomes.values()) for topic, outcomes in found["topics"].items()]
    out.print(table("Since the beginning", ("topic", *counts.OUTCOMES), by_topic))


def _now(found: dict[str, Any]) -> Table:
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
    parked = found["parked"]
    rows.append(("parked", parked["total"]))
    if parked["total"] and parked["max_bytes"]:
        rows.append(("- of their room is taken", f"{parked['bytes'] / parked['max_bytes']:.1%}"))
    rows += [(f"- {kind}", count) for kind, count in parked["kinds"].items()]
    rows.append(("workers", ", ".join(found["workers"]) or "none answered"))
    rows += [(f"paused: {one['worker']}", one["why"]) for one in found["paused"]]
    rows += [(f"for workers of {one['cluster']}, of which none runs", one["messages"]) for one in found["unserved"]]
    rows += [(f"circuit of {scope}", state) for scope, state in found["circuits"].items()]
    return table("Now", ("what", "how many"), rows)
