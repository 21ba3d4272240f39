"""A sample is all of a little, and a number a second of much, spread evenly."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from kafka_delivery.names import DEFERRALS, RELEASED
from kafka_delivery_worker.lane import Lane
from kafka_delivery_worker.sampling import ALL, Sample


def taken(sample: Sample, per_second: int, seconds: float, start: float = 1_000.0) -> list[float]:
    """Moments of those that were taken of a steady flow."""
    moments = (start + n / per_second for n in range(int(per_second * seconds)))
    return [moment for moment in moments if sample.takes(moment)]


def test_of_little_all_is_taken() -> None:
    assert len(taken(Sample(100), 50, 10)) == 500


def test_of_much_so_many_a_second_are_taken_evenly() -> None:
    sample = Sample(100)
    taken(sample, 20_000, 2)  # what was saved up is used
    moments = taken(sample, 20_000, 10, start=1_002.0)
    assert len(moments) == pytest.approx(1_000, abs=1)
    assert max(later - earlier for earlier, later in pairwise(moments)) < 0.011


def test_a_second_is_saved_up_and_no_more() -> None:
    sample = Sample(10)
    sample.takes(0.0)
    assert sum(sample.takes(3_600.0) for _ in range(100)) == 10


def test_of_many_at_once_as_many_are_taken_as_one_by_one() -> None:
    sample = Sample(10)
    assert [sample.takes(1_000.0, of=4) for _ in range(4)] == [4, 4, 2, 0]
    assert sample.takes(1_000.25, of=100) == 2
    assert [Sample(per_second).takes(1_000.0, of=100) for per_second in (0, ALL)] == [0, 100]


@pytest.mark.parametrize(("per_second", "share"), [(0, 0), (ALL, 1)])
def test_none_and_all(per_second: int, share: int) -> None:
    assert len(taken(Sample(per_second), 5_000, 1)) == share * 5_000


def lane(per_second: int, groups: set[str] | None = None, owed: tuple[int, int] = (0, 0)) -> Lane:
    """As much of one as decides what events tell of."""
    made = object.__new__(Lane)
    made._sample, made._owed, made.eventer = Sample(per_second), list(owed), SimpleNamespace(groups=groups)
    return made


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({"retries": 0}, False),
        ({"retries": 1}, True),
        ({"redelivered": True}, True),
        ({DEFERRALS: 1}, True),
        ({RELEASED: True}, False),
    ],
    ids=lambda value: str(value),
)
def test_the_story_of_an_earlier_attempt_gets_its_end(headers: dict[str, Any], told: bool) -> None:
    assert lane(0)._is_told(headers, 0.0) is told


def test_after_a_deferral_as_many_are_told_as_may_have_been_deferred() -> None:
    ours = lane(0, owed=(2, 1))
    assert [ours._is_told({}, 0.0) for _ in range(3)] == [True, True, False]
    assert [ours._is_told({RELEASED: True}, 0.0) for _ in range(2)] == [True, False]


def test_without_e_nothing_is_told_until_flower_asks() -> None:
    groups = {"worker"}
    ours = lane(ALL, groups)
    assert not ours._is_told({"retries": 1}, 0.0)
    groups.add("task")  # what its `enable_events` does
    assert ours._is_told({}, 0.0)
