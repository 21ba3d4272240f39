"""Dead letters for tests, written as a worker writes them, and `kafka-delivery dead-letters`, which acts on them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

import command_line
from kafka_delivery import Record
from kafka_delivery.dead_letters import reason
from kafka_delivery_worker.dead_letter_headers import PRESETS
from servers import wait_until
from stack import Stack


def bury(
    system: Stack,
    topic: str,
    count: int,
    *,
    first: int = 0,
    original: str = "",
    error_class: Callable[[int], str] = lambda _: "Mine",
    retry_count: int = 0,
    **fields: Any,
) -> None:
    """Dead letters of `original` in the dead-letter topic of `topic`, as a worker writes them; ids ``<topic>-<n>``."""
    letters = []
    for n in range(first, first + count):
        values = {"value": f"value {n}", "key": f"key {n % 7}"} | fields
        record = Record(original or topic, **values, message_id=f"{topic}-{n}")
        why = reason(error_class(n), KafkaError.MSG_SIZE_TOO_LARGE, "why", retry_count)
        letters.append((record.value_bytes, record.key_bytes, PRESETS["ours"](record, why)))
    produce(system, f"{topic}-dlq", letters)


def produce(system: Stack, topic: str, records: list[tuple[Any, ...]]) -> None:
    """Records as value, key, headers, and time in ms."""
    producer = Producer({"bootstrap.servers": system.kafka.bootstrap_servers, "linger.ms": 5})
    for value, key, headers, *timestamp in records:
        producer.produce(topic, value, key, headers=headers, timestamp=timestamp[0] if timestamp else 0)
    assert producer.flush(60) == 0


def command(system: Stack, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `kafka-delivery dead-letters` in this process; `env` are settings by their full names."""
    done = command_line.run(["dead-letters", *arguments], system.env() | env)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def redrive(system: Stack, topic: str, *arguments: str, fails: bool = False, **env: str) -> dict[str, Any]:
    done = command(system, "redrive", topic, *arguments, "--yes", "--json", check=False, **env)
    assert done.returncode == (1 if fails else 0), done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def listed(system: Stack, topic: str, *arguments: str, **env: Any) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in command(system, "list", topic, "--json", *arguments, **env).stdout.splitlines()
    ]


def wait_listed(system: Stack, topic: str, count: int) -> list[dict[str, Any]]:
    """Wait until so many wait: a record that was refused again is a dead letter a moment later."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = listed(system, topic)
        return len(found) == count

    wait_until(there, 60, f"{count} dead letters of {topic}")
    return found


def waiting(system: Stack, topic: str) -> int:
    """As the command says."""
    found = [json.loads(line) for line in command(system, "topics", "--json").stdout.splitlines()]
    return int(next(one["waiting"] for one in found if one["topic"] == [topic]))


def lag(system: Stack, topic: str) -> int:
    """As Kafka's own tools say."""
    letters = f"{topic}-dlq"
    servers: dict[str, Any] = {"bootstrap.servers": system.kafka.bootstrap_servers}
    group, partitions = f"kafka-delivery-redrive.{letters}", [TopicPartition(letters, n) for n in range(4)]
    admin = AdminClient(servers)
    asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group, partitions)])
    committed = {one.partition: one.offset for one in asked[group].result(60).topic_partitions}
    consumer = Consumer(servers | {"group.id": "watermarks"})
    try:
        return sum(consumer.get_watermark_offsets(one, timeout=60)[1] - committed[one.partition] for one in partitions)
    finally:
        consumer.close()
