"""Attended time goes on while somebody looks, and stands still with the process."""

from __future__ import annotations

import pytest

from kafka_delivery_worker.breaker.attendance import GAP_S, STEP_S, Attendance


class Watched(Attendance):
    """By a clock of the test's; counts gaps."""

    def __init__(self) -> None:
        self.moment = 100.0
        self.gaps = 0
        super().__init__(lambda: self.moment, self._gap)

    def _gap(self) -> None:
        self.gaps += 1

    def looks_after(self, seconds: float) -> None:
        self.moment += seconds
        self.collected()


@pytest.fixture
def attendance() -> Watched:
    return Watched()


def test_it_goes_on_with_each_look(attendance: Watched) -> None:
    for _ in range(8):
        attendance.looks_after(STEP_S / 2)
    assert (attendance.now, attendance.gaps) == (4 * STEP_S, 0)


def test_between_two_looks_it_stands_still(attendance: Watched) -> None:
    attendance.looks_after(STEP_S)
    attendance.moment += 1_000
    assert attendance.now == STEP_S
    attendance.tick()
    assert attendance.now == STEP_S, "somebody else collects the reports"


def test_a_gap_counts_for_one_step_and_is_told_once(attendance: Watched) -> None:
    attendance.looks_after(3_600)
    assert (attendance.now, attendance.gaps) == (STEP_S, 1)
    attendance.looks_after(STEP_S)
    assert (attendance.now, attendance.gaps) == (2 * STEP_S, 1)


@pytest.mark.parametrize(("after", "gap"), [(GAP_S, False), (GAP_S + 0.1, True)])
def test_what_is_collected_after_a_gap_is_known_to_be_so(attendance: Watched, after: float, gap: bool) -> None:
    attendance.moment += after
    assert attendance.in_gap is gap
    attendance.collected()
    assert (attendance.in_gap, attendance.gaps) == (False, int(gap))


def test_where_nothing_is_collected_a_tick_is_a_look(attendance: Watched) -> None:
    for _ in range(3):
        attendance.moment += STEP_S
        attendance.tick()
    assert attendance.now == 3 * STEP_S
