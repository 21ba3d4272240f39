"""When a run of chaos has failed: for us a loss, for Celery's own transport that there was none."""

from __future__ import annotations

import signal
from collections import Counter

import pytest

from soak.chaos import plan
from soak.chaos.account import Accepted, Account
from soak.chaos.processes import Exit
from soak.chaos.run import LONG_S, MIN_KILLS, Options, Outcome

KILLED = Exit(0, -signal.SIGKILL, plan.KILL, 0.0, "")
STOPPED = Exit(0, 0, plan.TERMINATE, 1.0, "")
NOT_HIT = Exit(0, 1, plan.KILL, 0.0, "")
"""It ended by itself a moment before the signal."""


def outcome(
    *, lost: int = 0, seconds: float = 60, stock: bool = False, exits: list[Exit] | None = None, **changes: int
) -> Outcome:
    accepted = {str(place): Accepted(str(place), "plain", str(place), 0.0, 1) for place in range(lost + 1)}
    found = Account(accepted, {}, changes.get("not_accepted", 0), Counter({"0": 1}), Counter(), {}, set())
    left = {"kafka-delivery": changes["left"]} if "left" in changes else {}
    options = Options(seconds, 7, 2, 150, stock)
    return Outcome(options, seconds, 1.0, found, [], exits or [], left, changes.get("idle", 0), {}, 0.0)


def test_a_run_that_lost_nothing_is_good() -> None:
    assert outcome().problems() == []


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (outcome(lost=2), "2 accepted records are nowhere"),
        (outcome(left=3), "left in Redis: kafka-delivery 3"),
        (outcome(not_accepted=1), "1 sends were never accepted"),
        (outcome(idle=1), "1 workers stopped consuming"),
    ],
    ids=["lost", "left", "not accepted", "idle"],
)
def test_what_fails_a_run(bad: Outcome, problem: str) -> None:
    assert bad.problems() == [problem]


def test_a_long_run_has_to_kill_many_workers() -> None:
    enough = [*[KILLED] * MIN_KILLS, STOPPED]
    assert outcome(seconds=LONG_S, exits=enough).problems() == []
    (problem,) = outcome(seconds=LONG_S, exits=[*enough[1:], NOT_HIT]).problems()
    assert problem.startswith(f"{MIN_KILLS - 1} workers were killed")
    assert outcome(seconds=LONG_S - 1).problems() == []


def test_celerys_own_transport_has_to_lose_something() -> None:
    assert outcome(stock=True, lost=1, left=3).problems() == []
    (problem,) = outcome(stock=True).problems()
    assert problem == "nothing was lost: the harness would not notice a loss"


def test_the_plan_of_a_long_run_kills_enough() -> None:
    """Each fault takes its pause, and its lane as long as it lasts; stopping under a backlog takes some seconds."""
    for seed in range(20):
        took, kills = 0.0, 0
        for fault in plan.LANES[0].draw(seed, 2, LONG_S):
            took += fault.pause + fault.hold + (5 if fault.kind == plan.TERMINATE else 0)
            if took > LONG_S:
                break
            kills += fault.kind == plan.KILL
        assert kills > MIN_KILLS
