"""The benchmark measures every row that it promises; what it finds is for people to judge, on a quiet machine."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from kafka_delivery import send
from servers import have_real_kafka, have_real_redis, missing

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench.py"

ROWS = {
    "single",
    "redis-cpu",
    "tutorial",
    "bare",
    "events",
    "send-many",
    "delay",
    "latency-p50",
    "latency-p99",
    "idle-cpu",
    "idle-calls",
    "memory",
} | ({"bulk"} if hasattr(send, "bulk") else set())

ALONE = {"latency-p50", "latency-p99", "idle-cpu", "idle-calls", "memory"}
"""Rows whose numbers are judged as they are, without a peer."""


@pytest.mark.real
@pytest.mark.timeout(600)  # a minute; on a busy machine as long as it takes
def test_a_short_run_has_every_row(tmp_path: Path) -> None:
    if not (have_real_kafka() and have_real_redis()):
        missing("java, Maven or TEST_KAFKA_LIB, and redis-server")
    output = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, BENCH, "--short", "--scale", "0.03", "--output", output],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() == ROWS
    for name, row in rows.items():
        assert math.isfinite(row["ours"])
        assert row["met"] in (True, False)
        if name in ALONE:
            assert row["peers"] is row["ratio"] is None
        else:
            assert row["ours"] > 0
            assert math.isfinite(row["peers"])
            assert row["peers"] > 0
            assert row["ratio"] == pytest.approx(row["ours"] / row["peers"])
    assert found["faults"] == []
    assert found["setup"]["cores"] > 0
