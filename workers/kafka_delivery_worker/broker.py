"""Another Celery broker than Redis, as the command line sees it: what waits there, and how a message returns to it."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from amqp.exceptions import AMQPError, NotFound
from kombu.exceptions import KombuError

from kafka_delivery import app, settings
from kafka_delivery.errors import KafkaDeliveryError

from .parked_items import as_it_lay

FAULTS = (KombuError, AMQPError, OSError)


class BrokerError(KafkaDeliveryError):
    """Raised when the broker cannot be reached, or refuses."""


def waiting(queue: str) -> int | None:
    """How many messages wait in `queue` and are with no worker; None if there is no such queue.

    Raises:
        BrokerError: the broker does not say.
    """
    with _channel() as channel:
        try:
            return int(channel.queue_declare(queue=queue, passive=True).message_count)
        except NotFound:
            return None


def put_back(queue: str, message: dict[str, Any]) -> None:
    """Publish a parked message to the queue that it came from, as it was.

    Args:
        queue: its name.
        message: what `Parked.data` holds of it: its envelope, or what never was one.

    Raises:
        BrokerError: it is not in the queue, or the broker did not say so.
    """
    with _channel() as channel:
        channel.queue_declare(queue=queue, passive=True)  # to a queue that is gone it would go unnoticed
        channel.basic_publish(
            _prepared(channel, message),
            exchange="",
            routing_key=queue,
            mandatory=True,
            confirm_timeout=settings.current().worker_socket_timeout_s,
        )


def _prepared(channel: Any, message: dict[str, Any]) -> Any:
    if "envelope" not in message:
        return channel.prepare_message(as_it_lay(message))
    envelope = message["envelope"]
    # What describes the envelope is the transport's, which makes its own.
    properties = {
        name: value
        for name, value in envelope.get("properties", {}).items()
        if name not in ("body_encoding", "delivery_info", "delivery_tag", "priority")
    }
    body = envelope.get("body") or ""
    encoded = envelope.get("properties", {}).get("body_encoding") == "base64"
    return channel.prepare_message(
        b64decode(body) if encoded else body,
        priority=envelope.get("properties", {}).get("priority"),
        content_type=envelope.get("content-type"),
        content_encoding=envelope.get("content-encoding"),
        headers=envelope.get("headers"),
        properties=properties,
    )


@contextmanager
def _channel() -> Iterator[Any]:
    try:
        options = {"confirm_publish": True} if settings.current().queue_on_amqp else {}
        with app.connection_for_write(transport_options=options) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
            yield connection.default_channel
    except FAULTS as error:
        raise BrokerError(
            f"the broker at {settings.masked_url(settings.current().broker_url)}: {type(error).__name__}: {error}; "
            "is KAFKA_DELIVERY_BROKER_URL right?"
        ) from error
