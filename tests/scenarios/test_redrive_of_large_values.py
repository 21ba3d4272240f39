"""Large dead letters are summarised and redriven in bounded memory."""

from __future__ import annotations

import os
import subprocess

import pytest
from confluent_kafka import KafkaError, Producer

from kafka_delivery import Record
from kafka_delivery.dead_letters import reason
from kafka_delivery_worker.dead_letter_headers import PRESETS
from servers import RealKafka
from stack import BIN, Stack, stack
from watching import ALONE, emptied

pytestmark = [pytest.mark.long, pytest.mark.real]


@pytest.mark.timeout(300)
def test_large_values_take_bounded_memory(redis_url: str, real_kafka: RealKafka) -> None:
    """Sixty of 10 MB are summarised in the memory of ten, and redriven in less than their own size."""
    size = 10_000_000
    with stack(emptied(redis_url), real_kafka, MAX_RECORD_BYTES=size + 1_000) as system:
        for topic, count in (("few-large", 10), ("large", 60)):
            for name in (topic, f"{topic}-dlq"):
                real_kafka.create_topic(name, partitions=1, max_message_bytes=2 * size)
            bury(system, topic, count, size)
        system.worker(*ALONE)
        # One or two of them are in hand in any case: now this many, now that.
        before = max(peak_kib(system, "summary", "few-large") for _ in range(2))
        assert peak_kib(system, "summary", "large") < before + 20_000
        assert peak_kib(system, "redrive", "large", "--yes") < 500_000
        assert len(system.ids("large")) == 60


def bury(system: Stack, topic: str, count: int, size: int) -> None:
    """Dead letters of a topic with values of this size."""
    producer = Producer({"bootstrap.servers": system.kafka.bootstrap_servers, "message.max.bytes": 2 * size})
    why, value = reason("Mine", KafkaError.MSG_SIZE_TOO_LARGE, "why"), os.urandom(size)
    for n in range(count):
        headers = PRESETS["ours"](Record(topic, "v", message_id=f"{topic}-{n}"), why)
        producer.produce(f"{topic}-dlq", value, headers=headers)
        assert producer.flush(60) == 0


def peak_kib(system: Stack, *arguments: str) -> int:
    """The most memory that a command had, as the kernel counts it."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    argv = [str(BIN / "python"), "-c", code, str(BIN / "kafka-delivery"), "dead-letters", *arguments]
    done = subprocess.run(argv, env=system.env(), capture_output=True, text=True, timeout=280)
    returned, peak = done.stdout.split()
    assert returned == "0", done.stderr
    return int(peak)
