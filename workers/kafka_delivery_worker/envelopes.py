"""What Celery would write into the queues in Redis for a call, without writing it.

A command that may lose its lock in any moment puts a message into its queue by a script that checks the lock in the
same step. So it needs the message as text, whatever the call asks of Celery.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kombu import Connection
from kombu.transport import virtual
from kombu.utils.json import dumps

from kafka_delivery import app


class _Channel(virtual.Channel):
    """Notes what is put into a queue, in the form that kombu's Redis transport gives it."""

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        self.connection.written.append((queue, dumps(message)))

    def _size(self, queue: str) -> int:
        return 0


class _Transport(virtual.Transport):
    Channel = _Channel
    driver_type, driver_name = "redis", "none"

    def __init__(self, client: Any, **options: Any) -> None:
        super().__init__(client, **options)
        self.state = virtual.BrokerState()
        self.written: list[tuple[str, str]] = []


def written_by(publish: Callable[[Any], object]) -> list[tuple[str, str]]:
    """Queue and message, for each that `publish` writes by the producer that it is given."""
    written: list[tuple[str, str]]
    with Connection(transport=_Transport) as connection:
        publish(app.amqp.Producer(connection, auto_declare=False))
        transport = connection.transport
        written, transport.written = transport.written, []  # what is left of it is a cycle, and stays for a while
        return written
