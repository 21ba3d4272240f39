"""When a run of chaos has failed: for us a loss, or a record that is charged with what happened around it; for Celery's
own transport that there was no loss.
"""

from __future__ import annotations

import io
import json
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from soak.chaos import plan
from soak.chaos.account import Accepted, Account, read_report
from soak.chaos.application import (
    CHAIN,
    DEAD,
    DEAD_LETTERED,
    DELIVERED,
    FOLLOWED,
    IS_PARKED,
    LINK_ERROR,
    PARKED,
    WEIGHTS,
    Application,
    digest,
)
from soak.chaos.processes import Exit
from soak.chaos.run import LONG_S, MIN_KILLS, Options, Outcome

KILLED = Exit(0, -signal.SIGKILL, plan.KILL, 0.0, "")
STOPPED = Exit(0, 0, plan.TERMINATE, 1.0, "")
NOT_HIT = Exit(0, 1, plan.KILL, 0.0, "")
"""It ended by itself a moment before the signal."""


LISTS: list[list[tuple[str, bytes | None]]] = [[], [("a", b"1")], [("a", b"1"), ("a", b"1")], [("a", None)]]


def outcome(
    *, lost: int = 0, seconds: float = 60, stock: bool = False, exits: list[Exit] | None = None, **changes: int
) -> Outcome:
    accepted = {str(place): Accepted(str(place), "plain", str(place), 0.0, 1) for place in range(lost + 1)}
    found = Account(accepted, {}, changes.get("not_accepted", 0), Counter({"0": 1}), Counter(), {}, set())
    left = {"kafka-delivery": changes["left"]} if "left" in changes else {}
    options = Options(seconds, 7, 2, 150, stock)
    return Outcome(options, seconds, 1.0, found, [], exits or [], left, changes.get("idle", 0), {}, 0.0)


def called(kind: str, folder: Path) -> dict[str, Accepted]:
    """What the application writes down of one accepted call of this kind, as the account reads it."""
    report = io.StringIO()
    application = Application(1, random.Random(7), report)
    application._accepted(application._call(kind))
    path = folder / "accepted.jsonl"
    path.write_text(report.getvalue() + json.dumps({"errors": {}, "not accepted": 0}) + "\n")
    return read_report(path)[0]


def problems(accepted: dict[str, Accepted], **places: Any) -> list[str]:
    """The verdict about these records: delivered, those that are due so, and in no other place, unless said."""
    due = {place: {one.id for one in accepted.values() if one.due == place} for place in (DEAD_LETTERED, IS_PARKED)}
    delivered = accepted.keys() - due[DEAD_LETTERED] - due[IS_PARKED]
    given = {
        "delivered": Counter(delivered),
        "dead": Counter(due[DEAD_LETTERED]),
        "parked": {"dead-letter": due[IS_PARKED]},
        "digests": {one: {accepted[one].digest} for one in delivered},
        **places,
    }
    made = outcome()
    made.account = Account(accepted, {}, 0, waiting=set(), **given)
    return made.problems()


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_what_is_due_is_good(kind: str, tmp_path: Path) -> None:
    assert problems(called(kind, tmp_path)) == []


@pytest.mark.parametrize("kind", FOLLOWED)
def test_each_missing_step_fails_a_run(kind: str, tmp_path: Path) -> None:
    accepted = called(kind, tmp_path)
    assert len(accepted) >= 2
    for missing in accepted:
        there = [one for one in accepted.values() if one.id != missing]
        delivered = Counter(one.id for one in there if one.due == DELIVERED)
        dead = Counter(one.id for one in there if one.due == DEAD_LETTERED)
        assert problems(accepted, delivered=delivered, dead=dead) == ["1 accepted records are nowhere"]


@pytest.mark.parametrize("kind", [one for one in WEIGHTS if one != PARKED])
def test_what_is_parked_wrongly_fails_a_run(kind: str, tmp_path: Path) -> None:
    """Also when it is delivered as well, or a dead letter by right."""
    accepted = called(kind, tmp_path)
    first = next(iter(accepted))
    assert problems(accepted, parked={"bug": {first}}) == ["1 records are parked wrongly"]
    assert problems(accepted, parked={"bug": {first}, "poison": {"a stranger"}}) == ["2 records are parked wrongly"]


@pytest.mark.parametrize("kind", [one for one in WEIGHTS if one not in (DEAD, LINK_ERROR)])
def test_what_is_a_dead_letter_wrongly_fails_a_run(kind: str, tmp_path: Path) -> None:
    accepted = called(kind, tmp_path)
    first = next(iter(accepted))
    assert problems(accepted, dead=Counter([first])) == ["1 records are dead letters wrongly"]


def test_what_arrives_changed_fails_a_run(tmp_path: Path) -> None:
    """In one of its copies, too."""
    accepted = called(CHAIN, tmp_path)
    read = {one: {accepted[one].digest} for one in accepted}
    last = list(accepted)[-1]
    read[last] = {accepted[last].digest, digest(b"k", b"x", [])}
    assert problems(accepted, digests=read) == ["1 records arrived changed"]


def test_records_are_told_apart_by_key_value_and_headers() -> None:
    records = [(key, value, headers) for key in (None, b"k") for value in (None, b"", b"v") for headers in LISTS]
    assert len({digest(*record) for record in records}) == len(records)


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
