"""A consuming channel on kombu's event loop, and what it finds in Redis."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import kombu
import redis
from kombu.asynchronous import Hub

from kafka_delivery.names import HELD
from servers import AnyRedis

QUEUE = "kafka-delivery"
OTHER = "kafka-delivery-dlq"


class Broker:
    """A consuming channel on kombu's event loop, as a worker has it."""

    def __init__(self, url: str, queues: tuple[str, ...] = (QUEUE,), prefetch: int = 1000, **options: Any) -> None:
        self.connection = kombu.Connection(
            url, transport="kafka_delivery_worker.transport:Transport", transport_options={"socket_timeout": 5}
        )
        self.connection.connect()
        self.hub = Hub()
        self.connection.transport.register_with_event_loop(self.connection.connection, self.hub)
        self.channel = self.connection.default_channel
        self.got: list[Any] = []
        self.on_message: Callable[[Any], None] = self.got.append
        self.consumer = kombu.Consumer(
            self.channel,
            [kombu.Queue(name, kombu.Exchange(name), routing_key=name) for name in queues],
            on_message=lambda message: self.on_message(message),
            **options,
        )
        self.consumer.qos(prefetch_count=prefetch)
        self.consumer.consume()
        self.loop = self.hub.create_loop()

    def turn(self, until: Callable[[], Any], timeout: float = 60) -> None:
        """Let the event loop turn until something is true."""
        deadline = time.monotonic() + timeout
        while not until():
            assert time.monotonic() < deadline
            next(self.loop)

    def turn_at_once(self) -> None:
        """Let the event loop turn once, and wait for nothing."""
        if self.hub._waker is not None:
            self.hub._waker.wake()
        next(self.loop)

    def look(self, times: int = 5) -> None:
        """Let the channel ask so often, if it wants to, and have each answer."""
        for _ in range(times):
            self.channel._look()  # as if no pause were left
            self.turn_at_once()
            self.turn(lambda: not self.channel._asked)

    def asks(self) -> list[str]:
        """What the channel asks from now on: "claim" or "wait"."""
        asked: list[str] = []
        ask = self.channel._ask

        def noted(what: str, *command: Any) -> None:
            asked.append(what)
            ask(what, *command)

        self.channel._ask = noted
        return asked

    def close(self) -> None:
        self.connection.close()
        self.hub.close()

    @property
    def names(self) -> list[str]:
        return [message.headers["id"] for message in self.got]


def message(name: str, **more: Any) -> bytes:
    body = base64.b64encode(json.dumps([[name], {}, {}]).encode()).decode()
    properties = {"body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": QUEUE}}
    return json.dumps(
        {
            "body": body,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"id": name, "task": "kafka_delivery.send"},
            "properties": {"correlation_id": name, "delivery_tag": f"tag of {name}", **properties},
            **more,
        }
    ).encode()


def publish(client: redis.Redis, *names: str, queue: str = QUEUE) -> list[bytes]:
    sent = [message(name) for name in names]
    client.lpush(queue, *sent)
    return sent


def queued(client: AnyRedis, queue: str = QUEUE) -> list[bytes]:
    return list(reversed(client.lrange(queue, 0, -1)))


def held(client: AnyRedis) -> list[bytes]:
    return [item for key in client.scan_iter(HELD + "*") for item in client.hvals(key)]


class Held:
    """As much of a request as a channel looks at."""

    def __init__(self, message: Any) -> None:
        self._message = message
