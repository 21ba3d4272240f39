"""The story of `scenarios/test_five_kinds.py` with twenty thousand dead letters."""

from __future__ import annotations

from pathlib import Path

import pytest

from scenarios.test_five_kinds import seen_understood_and_sent_again
from servers import RealKafka


@pytest.mark.real
@pytest.mark.timeout(1_800)
def test_twenty_thousand_dead_letters_of_five_kinds(redis_url: str, real_kafka: RealKafka, tmp_path: Path) -> None:
    seen_understood_and_sent_again(redis_url, real_kafka, tmp_path, 4_000, "500/s")
