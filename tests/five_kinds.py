"""Dead letters of five kinds, each made by the failure that it tells of, on a real Kafka with an authorizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported, not marked so
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from kafka_delivery import Record, send
from kafka_delivery_worker import counts
from servers import RealKafka, wait_until
from stack import Stack, message_id

KINDS = {
    "missing": "UNKNOWN_TOPIC_OR_PART",
    "large": "MSG_SIZE_TOO_LARGE",
    "forbidden": "TOPIC_AUTHORIZATION_FAILED",
    "keyless": "INVALID_RECORD",
    "nowhere": "_UNKNOWN_PARTITION",
}
"""Kind -> the code that its dead letters have; an id is ``<kind>-<n>``. The last is refused until its retries are used
up; the last but one has no key, which a compacted topic does not take."""

SMALL_BYTES = 2_000


class FiveKinds:
    """So many of each kind for one topic, whose dead-letter topic is there and which itself is not."""

    def __init__(self, system: Stack, kafka: RealKafka, topic: str, count: int) -> None:
        self.system, self.kafka, self.topic, self.count = system, kafka, topic, count
        self.ids = {f"{kind}-{n}" for kind in KINDS for n in range(count)}

    def make(self, timeout: float) -> None:
        """Let all of them fail; what makes them fail stays as it is, but for the topic, which is there in the end."""
        self._send("missing", timeout)
        self.kafka.create_topic(self.topic, max_message_bytes=SMALL_BYTES)
        self._send("large", timeout, value=lambda n: os.urandom(SMALL_BYTES + 1_000))
        self._send("nowhere", timeout, partition=99)
        configure(self.kafka, self.topic, "cleanup.policy", "compact")
        self._send("keyless", timeout, key=None)
        self.kafka.deny_write(self.topic)
        self._send("forbidden", timeout)

    def repair(self) -> None:
        """Take away what made them fail."""
        self.kafka.allow_write(self.topic)
        configure(self.kafka, self.topic, "cleanup.policy", "delete")
        configure(self.kafka, self.topic, "max.message.bytes", str(10 * SMALL_BYTES))

    def _send(self, kind: str, timeout: float, *, value: Callable[[int], bytes | str] = str, **fields: Any) -> None:
        before = self._dead()
        send.bulk(
            Record(
                self.topic, value(n), **{"key": f"customer-{n % 50}"} | fields, headers=[("kind", kind)],
                message_id=f"{kind}-{n}",
            )
            for n in range(self.count)
        )  # fmt: skip
        wait_until(lambda: self._dead() >= before + self.count, timeout, f"{self.count} dead letters: {kind}")

    def _dead(self) -> int:
        """As the workers count them: reading them all each time would take the time that they need."""
        return counts.read(self.system.redis).get(self.topic, {}).get("dead-lettered", 0)

    def delivered(self) -> list[str]:
        """Message ids in the topic, repeats included, by an independent consumer."""
        return [message_id(record) for record in self.system.read(self.topic)]


def configure(kafka: RealKafka, topic: str, name: str, value: str) -> None:
    """Set a topic's `name` to `value`, and wait until the broker says so."""
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    change = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    kafka.admin.incremental_alter_configs([change])[change].result(10)
    asked = ConfigResource(ResourceType.TOPIC, topic)

    def done() -> bool:
        return bool(kafka.admin.describe_configs([asked])[asked].result(10)[name].value == value)

    wait_until(done, 10, f"{name}={value} of {topic}")
