"""Two hundred thousand parked items, and values of ten megabytes: the commands on them take no more memory for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from kafka_delivery import Record, names
from kafka_delivery_worker.embedded import MockKafka, Valkey
from kafka_delivery_worker.parking import Parked, ParkingStore, fingerprint
from stack import Stack, stack

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
    pytest.mark.timeout(900),  # a minute; on a busy machine as long as it takes
]

MANY, FEW = 200_000, 2_000

COPY = """
local stored = redis.call('HGET', KEYS[1], 'first')
for number = tonumber(ARGV[1]), tonumber(ARGV[2]) - 1 do
  local id = string.format('id-%06d', number)
  redis.call('HSET', KEYS[1], id, stored)
  redis.call('ZADD', KEYS[2], 1767323045678 + number, id)
end
"""

MEASURED = """
import sys
from kafka_delivery_worker.cli import main
try:
    main(sys.argv[1:])
finally:
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            print("PEAK_KB", line.split()[1], file=sys.stderr)
"""
"""Peak memory of the command's own process; getrusage's begins with what the process had that started it."""

SLACK_KB = 40_000
"""What a hundred times as many may take more: a page, and what Python keeps of what it freed."""


@pytest.fixture(scope="module")
def system() -> Iterator[Stack]:
    changes = {"PARKED_MAX_BYTES": 4_000_000_000, "MAX_RECORD_BYTES": 12_000_000}
    with Valkey() as valkey, MockKafka() as kafka, stack(valkey.url, kafka, **changes) as system:
        yield system


def fill(client: redis.Redis, count: int, value: bytes = b"x" * 500) -> None:
    """As many parked records, all alike but for their ids."""
    client.flushall()
    record = Record("orders", value, "k", {"tenant": "t1"}, message_id="first")
    first = Parked(
        id="first",
        kind="dead-letter",
        error_class="RejectedError",
        error_code=10,
        error_message="too large",
        topic="orders",
        content="record",
        data=record.to_wire("default"),
        **fingerprint(record.value_bytes),
    )
    ParkingStore(client).park(first)
    for start in range(0, count, 10_000):
        client.eval(COPY, 2, names.PARKED, names.PARKED_INDEX, start, min(start + 10_000, count))
    ParkingStore(client).remove("first")


def run(system: Stack, *arguments: str) -> tuple[str, int]:
    """What a command prints, and its peak memory in KiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "parked", *arguments],
        env=system.env(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = next(line for line in done.stderr.splitlines() if line.startswith("PEAK_KB"))
    return done.stdout, int(peak.split()[1])


def commands(target: Path) -> dict[str, tuple[str, ...]]:
    return {
        "list": ("list", "--json"),
        "filtered": ("list", "--json", "--header", "tenant=t2"),
        "table": ("list",),
        "summary": ("summary", "--json"),
        "export": ("export", str(target)),
        "plan": ("redrive", "--all", "--dry-run"),
    }


def test_memory_is_flat_over_two_hundred_thousand(system: Stack, tmp_path: Path) -> None:
    fill(system.redis, FEW)
    few = {name: run(system, *command)[1] for name, command in commands(tmp_path / "few").items()}
    fill(system.redis, MANY)
    printed, many = {}, {}
    for name, command in commands(tmp_path / "many").items():
        printed[name], many[name] = run(system, *command)
        print(f"{name}: {few[name] / 1024:.0f} MiB for {FEW}, {many[name] / 1024:.0f} MiB for {MANY}")  # noqa: T201
    assert {name: peak for name, peak in many.items() if peak > few[name] + SLACK_KB} == {}
    assert printed["list"].count("\n") == MANY
    assert printed["filtered"] == ""
    assert json.loads(printed["summary"])["parked"] == MANY
    assert f"{MANY} planned" in printed["plan"]
    with (tmp_path / "many").open() as exported:
        assert sum(1 for _ in exported) == MANY


def test_large_values_are_read_one_after_the_other(system: Stack, tmp_path: Path) -> None:
    size = 10_000_000
    fill(system.redis, 2, b"x" * size)
    two = {name: run(system, *command)[1] for name, command in commands(tmp_path / "two").items()}
    fill(system.redis, 30, b"x" * size)
    thirty = {name: run(system, *command)[1] for name, command in commands(tmp_path / "thirty").items()}
    assert {name: peak for name, peak in thirty.items() if peak > two[name] + SLACK_KB} == {}


def test_discarding_all_leaves_nothing(system: Stack) -> None:
    fill(system.redis, FEW)
    out, _ = run(system, "discard", "--all", "--reason", "a test's", "--yes")
    assert f"{FEW} discarded, 0 still parked" in out
    assert system.redis.exists(names.PARKED, names.PARKED_INDEX, names.PARKED_ROOM) == 0
