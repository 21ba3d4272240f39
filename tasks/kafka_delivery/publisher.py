"""The short way of a plain message into its queue: Celery's own format, one write.

Celery's `apply_async` makes a Redis client for each message and asks a router, a serializer registry and a dozen
options that a plain send does not have. What it writes in the end is written here at once. The envelope is Celery's own
for the same task, taken once and filled in; a test compares the two.
"""

from __future__ import annotations

import functools
import json
import uuid
from base64 import b64encode
from typing import TYPE_CHECKING, Any

from celery import signals
from celery.utils.nodenames import anon_nodename
from redis.exceptions import ConnectionError as RedisConnectionError

from . import settings
from .redis_client import kept_client

if TYPE_CHECKING:
    from .base import DeliveryTask

PLAIN_OPTIONS = frozenset({"argsrepr", "kwargsrepr"})
"""Options of a call that the short way knows; any other takes Celery's."""

_dumps = json.JSONEncoder(separators=(", ", ": ")).encode


def is_plain(app: Any, options: dict[str, Any]) -> bool:
    """Whether a call asks nothing of Celery but to be queued, and nobody listens."""
    conf = app.conf
    return (
        options.keys() <= PLAIN_OPTIONS
        and settings.current().queue_on_redis
        and not signals.before_task_publish.receivers
        and not signals.after_task_publish.receivers
        and not conf.task_always_eager
        and not conf.task_send_sent_event
        and app.current_worker_task is None
    )


def publish(
    app: Any,
    task: DeliveryTask[Any],
    queue: str,
    task_id: str,
    wire: list[Any],
    argsrepr: str,
    kwargsrepr: str,
    ignore_result: bool = True,
) -> None:
    """Queue one message.

    Raises:
        redis.exceptions.RedisError: Redis did not confirm; whether the message is queued is unknown.
    """
    write(queue, [envelope(app, task, queue, task_id, wire, argsrepr, kwargsrepr, ignore_result)])


def write(queue: str, envelopes: list[str]) -> None:
    """Queue messages, in order, all or none.

    Raises:
        redis.exceptions.RedisError: Redis did not confirm; whether they are queued is unknown.
    """
    redis = kept_client(settings.current())
    try:
        redis.client.lpush(redis.prefix + queue, *envelopes)
    except RedisConnectionError:
        # A connection that lay idle may be gone, which shows at its next use only. Once more, on another one.
        redis.client.lpush(redis.prefix + queue, *envelopes)


def envelope(
    app: Any,
    task: DeliveryTask[Any],
    queue: str,
    task_id: str,
    wire: list[Any],
    argsrepr: str,
    kwargsrepr: str,
    ignore_result: bool = True,
) -> str:
    """A message as Celery would write it."""
    headers = _headers(app, task.name) | {
        "id": task_id,
        "root_id": task_id,
        "argsrepr": argsrepr,
        "kwargsrepr": kwargsrepr,
        "origin": anon_nodename(),
        "ignore_result": ignore_result,
    }
    properties = {
        "correlation_id": task_id,
        "reply_to": app.thread_oid,
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid.uuid4()),
    }
    return _dumps(
        {
            "body": b64encode(_dumps([wire, {}, _EMBED]).encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": properties,
        }
    )


_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


@functools.lru_cache(maxsize=8)
def _headers(app: Any, name: str) -> dict[str, Any]:
    """Headers of a plain call of a task, as this Celery makes them."""
    message = app.amqp.create_task_message("", name, [], {}, ignore_result=True, argsrepr="", kwargsrepr="")
    return dict(message.headers)
