"""Clients of the servers that tests stand on: a producer as the worker has it, and a look whether a Redis is there."""

from __future__ import annotations

from typing import Any

import redis
from confluent_kafka import KafkaError, KafkaException, Producer


class Client:
    """A producer as the worker has it, and its reports: an error code for each record, 0 for one that arrived."""

    def __init__(self, bootstrap_servers: str, **settings: str | int) -> None:
        self.reports: list[int] = []
        self.producer = Producer(
            {
                "bootstrap.servers": bootstrap_servers,
                "acks": "all",
                "enable.idempotence": True,
                "allow.auto.create.topics": False,
                "topic.metadata.propagation.max.ms": 300,
                "message.timeout.ms": 60_000,
                "reconnect.backoff.max.ms": 200,
                "log_level": 0,
                "error_cb": lambda _: None,
                **{name.replace("_", "."): value for name, value in settings.items()},
            }
        )

    def produce(self, topic: str, value: bytes = b"value", **more: Any) -> None:
        def report(error: KafkaError | None, _: object) -> None:
            self.reports.append(0 if error is None else error.code())

        self.producer.produce(topic, value, on_delivery=report, **more)

    def send(self, topic: str, value: bytes = b"value", **more: Any) -> int:
        """Produce one record and wait for its report; a refusal without a report counts as one."""
        try:
            self.produce(topic, value, **more)
        except KafkaException as error:
            return int(error.args[0].code())
        assert self.producer.flush(60) == 0
        return self.reports[-1]


def refuses(url: str) -> bool:
    try:
        with redis.Redis.from_url(url, retry=None) as client:
            return not client.ping()
    except redis.exceptions.ConnectionError:
        return True
