"""Two hundred thousand dead letters are summarised in under a minute, in the memory that two thousand take."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from kafka_delivery import Record
from kafka_delivery.dead_letters import reason
from kafka_delivery_worker.dead_letter_headers import PRESETS
from servers import RealKafka, RealRedis
from stack import BIN, Stack, stack

CODES = [3, 10, 29, 87, -190]
FEW, MANY = 2_000, 200_000

MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=sys.stderr)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.real
@pytest.mark.timeout(600)
def test_two_hundred_thousand(tmp_path: Path) -> None:
    with (
        RealKafka(tmp_path / "kafka") as kafka,
        RealRedis(tmp_path / "redis") as redis,
        stack(redis.url, kafka) as system,
    ):
        for topic, count in (("few", FEW), ("many", MANY)):
            kafka.create_topic(topic)
            kafka.create_topic(f"{topic}-dlq", partitions=3)
            _bury(system, topic, count)
        _, _, few_kib = _summary(system, "few")
        summary, seconds, many_kib = _summary(system, "many")
        print(  # noqa: T201  # what the run is for
            f"\n{MANY:,} dead letters summarised in {seconds:.1f} s; memory at most {many_kib / 1024:.0f} MiB, "
            f"{few_kib / 1024:.0f} MiB for {FEW:,}"
        )
    assert summary["dead_letters"] == MANY
    assert {one["error_code"]: one["count"] for one in summary["errors"]} == dict.fromkeys(CODES, MANY // len(CODES))
    assert many_kib < few_kib + 60 * 1024


def _summary(system: Stack, topic: str) -> tuple[dict[str, Any], float, int]:
    """What it says, the seconds that it took, and the most memory that it had (KiB)."""
    program = str(BIN / "kafka-delivery")
    argv = [str(BIN / "python"), "-c", MEASURED, program, "dead-letters", "summary", topic, "--json"]
    started = time.monotonic()
    done = subprocess.run(argv, env=system.env(), capture_output=True, text=True, timeout=60)  # a minute: the promise
    seconds = time.monotonic() - started
    returned, peak = done.stdout.split()
    assert returned == "0", done.stderr
    return json.loads(done.stderr.splitlines()[-1]), seconds, int(peak)


def _bury(system: Stack, topic: str, count: int) -> None:
    producer = Producer({"bootstrap.servers": system.kafka.bootstrap_servers, "linger.ms": 50})
    for n in range(count):
        record = Record(topic, os.urandom(500), f"key {n % 1000}", [("a", b"1"), ("b", b"2")])
        headers = PRESETS["ours"](record, reason("RejectedError", CODES[n % len(CODES)], "why " * 50))
        while True:
            try:
                producer.produce(f"{topic}-dlq", record.value_bytes, record.key_bytes, headers=headers)
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    assert producer.flush(60) == 0
