"""The benchmark measures every row that it promises; what it finds is for people to judge, on a quiet machine."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from servers import have_real_kafka, have_real_redis, missing

BENCH = Path(__file__).parents[2] / "benchmarks" / "bench.py"

WANTED = {
    "single": (15, 25),
    "redis-cpu": (0.1, None),
    "tutorial": (20, None),
    "bare": (0.6, 0.9),
    "events": (8, None),
    "send-many": (0.4, 0.6),
    "delay": (2, 3),
    "bulk": (10, None),
    "latency-p50": (10, None),
    "latency-p99": (20, None),
    "idle-cpu": (1, None),
    "idle-calls": (20, None),
    "breaker": (2, None),
    "metrics": (1, None),
    "memory": (30, None),
}
"""What is wanted of each row, and what is aimed at. It is chosen, not measured: a change here needs a reason."""

ALONE = {"latency-p50", "latency-p99", "idle-cpu", "idle-calls", "breaker", "metrics", "memory"}
"""Rows whose numbers are judged as they are, without a peer."""


GROWTH = {"workers-2", "workers-4", "value-1000", "value-10000", "value-100000", "topics-8", "topics-64"}
"""Rows that compare us with ourselves: nothing is wanted of them."""


MEASUREMENTS = (
    *("singles", "tutorial", "bare", "events", "batches", "calls", "bulk", "idle", "breaker", "metrics", "memory"),
    *("more-workers", "larger-values", "more-topics"),
)


def measure(output: Path, *arguments: str) -> dict[str, Any]:
    """Run the benchmark; what it wrote."""
    if not (have_real_kafka() and have_real_redis()):
        missing("java, Maven or TEST_KAFKA_LIB, and redis-server")
    done = subprocess.run(
        [sys.executable, BENCH, *arguments, "--output", output], capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    assert found["faults"] == []
    assert found["setup"]["cores"] > 0
    assert "do not believe" in found["caveats"][0]
    return found


def check_ratio(row: dict[str, Any]) -> None:
    for number in (row["ours"], row["peers"]):
        assert math.isfinite(number)
        assert number > 0
    assert row["ratio"] == pytest.approx(row["ours"] / row["peers"])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Those of one short run of all measurements, by name: most of its time goes into starting servers and workers."""
    output = tmp_path_factory.mktemp("bench") / "found.json"
    found = measure(output, "--short", "--only", *MEASUREMENTS, "--scale", "0.01")
    return {row["name"]: row for row in found["rows"]}


@pytest.mark.real
@pytest.mark.timeout(600)  # a minute; on a busy machine as long as it takes
def test_a_short_run_has_every_row(rows: dict[str, dict[str, Any]]) -> None:
    assert rows.keys() == WANTED.keys() | GROWTH
    for name in WANTED:
        row = rows[name]
        assert row["met"] in (True, False)
        assert (row["wanted"], row["aim"]) == WANTED[name]
        if name in ALONE:
            assert math.isfinite(row["ours"])
            assert row["peers"] is row["ratio"] is None
        else:
            check_ratio(row)
    assert rows["idle-calls"]["more"]["commands_per_second"] > rows["idle-calls"]["ours"]


@pytest.mark.real
@pytest.mark.timeout(600)
def test_rows_of_growth(rows: dict[str, dict[str, Any]]) -> None:
    for row in (rows[name] for name in GROWTH):
        assert row["wanted"] is row["met"] is None
        check_ratio(row)
    assert rows["value-100000"]["more"]["our_redis_bytes"] > 100_000
