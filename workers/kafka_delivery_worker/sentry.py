"""A ready `on_dead_letter` for Sentry: ``KAFKA_DELIVERY_ON_DEAD_LETTER=kafka_delivery_worker.sentry:report``.

It needs the extra ``[sentry]`` and ``SENTRY_DSN``, or an application that has set up Sentry in the worker itself. An
event says topic, error and message id. It is given to the client past all of Sentry's scopes, so that nothing which an
integration gathers of a task, its arguments say, can come along.
"""

from __future__ import annotations

import atexit
import functools
import os
from typing import TYPE_CHECKING, Any

import sentry_sdk

if TYPE_CHECKING:
    from .hook import DeadLettered

FLUSH_S = 2.0
"""How long the end of a worker waits for events that are on their way."""


def report(letter: DeadLettered) -> None:
    """Send one event; Sentry groups them by topic and error class.

    Raises:
        RuntimeError: Sentry is not set up.
    """
    where = f"parked as {letter.parked_id}" if letter.parked_id else f"{letter.partition}:{letter.offset}"
    event: Any = {
        "level": "error",
        "logger": "kafka_delivery.dead_letter",
        "logentry": {"formatted": f"Dead letter of {letter.topic}: {letter.error_class}"},
        "fingerprint": ["kafka-delivery", letter.topic, letter.error_class],
        "tags": {
            "topic": letter.topic,
            "error_class": letter.error_class,
            "error_code": str(letter.error_code),
            "message_id": letter.message_id,
        },
        "extra": {
            "error_message": letter.error_message,
            "retry_count": letter.retry_count,
            "failed_at": letter.failed_at,
            "dead_letter_topic": letter.dead_letter_topic,
            "where": where,
        },
    }
    _client().capture_event(event)


def _client() -> Any:
    applications_own = sentry_sdk.get_client()
    return applications_own if applications_own.is_active() else _our_own()


@functools.cache
def _our_own() -> Any:
    if not os.environ.get("SENTRY_DSN"):
        raise RuntimeError("set SENTRY_DSN for kafka_delivery_worker.sentry:report, or set up Sentry in the worker")
    # No integration: they would report the worker's own logs and tasks, which nobody asked for here.
    client = sentry_sdk.Client(default_integrations=False, auto_enabling_integrations=False)
    atexit.register(client.flush, FLUSH_S)
    return client
