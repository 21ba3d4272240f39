"""An outage ends where an application has a Sentry SDK of the last major version, which nests headers differently."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_delivery_worker.embedded import MockKafka
from scenarios.circuits import QUICK
from sentry_outage import TOPIC, outage
from servers import missing
from stack import Stack, stack
from watching import emptied

OLDER = "sentry-sdk==1.45.1"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with nothing but this SDK; what it depends on is here already."""
    folder = tmp_path_factory.mktemp("sentry")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), OLDER]
    done = subprocess.run(install, capture_output=True, text=True, timeout=120)
    if "No matching distribution found" in done.stdout + done.stderr:
        missing("a package index that has sentry-sdk")
    assert done.returncode == 0, done.stderr
    return str(folder)


@pytest.fixture
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC, 1)
        kafka.create_topic(f"{TOPIC}-dlq", 1)
        yield kafka


@pytest.fixture
def system(redis_url: str, mock: MockKafka) -> Iterator[Stack]:
    with stack(emptied(redis_url), mock, **QUICK) as system:
        yield system


@pytest.mark.parametrize(
    ("caller", "worker"), [(True, False), (False, True), (True, True)], ids=["caller", "worker", "both"]
)
def test_an_outage_ends(system: Stack, mock: MockKafka, older: str, tmp_path: Path, caller: bool, worker: bool) -> None:
    outage(system, mock, tmp_path, older, caller, worker)
