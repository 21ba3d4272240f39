"""What the commands that act on many things have in common."""

from __future__ import annotations

import pytest

from kafka_delivery_worker.cli.acting import counted


@pytest.mark.parametrize(("count", "told"), [(0, [0]), (3, [3]), (2_500, [1_000, 2_000, 2_500])])
def test_a_bar_ends_where_the_work_ends(count: int, told: list[int]) -> None:
    seen: list[int] = []
    assert list(counted(range(count), seen.append)) == list(range(count))
    assert seen == told
