"""Other tools put a dictionary into the headers of our messages, under which Celery hides ours: outages end anyway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_delivery_worker.embedded import MockKafka
from scenarios.circuits import QUICK
from sentry_outage import TOPIC, outage
from stack import Stack, stack
from watching import emptied

pytest.importorskip("sentry_sdk")

pytestmark = pytest.mark.long


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
def test_an_outage_ends_where_sentry_is_set_up(
    system: Stack, mock: MockKafka, tmp_path: Path, caller: bool, worker: bool
) -> None:
    outage(system, mock, tmp_path, "", caller, worker)
