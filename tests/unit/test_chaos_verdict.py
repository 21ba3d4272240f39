"""When a run of chaos has failed: for us a loss, a record that is charged with what happened around it, one in another
installation's Kafka, or a circuit that opened without a reason; for Celery's own transport that there was no loss.
"""

from __future__ import annotations

import io
import json
import random
import signal
from base64 import b64encode
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from kafka_delivery.circuits import CLOSED, HALF_OPEN, OPEN
from kafka_delivery.names import CLUSTER_SCOPE, QUEUE, REDRIVE_COUNT, TOPIC_SCOPE
from servers import Consumed
from soak.chaos import foreign, plan
from soak.chaos.account import Accepted, Account, _is_redriven, mark_of, read_report
from soak.chaos.application import (
    CHAIN,
    DEAD,
    DEAD_LETTERED,
    DELIVERED,
    DISCARDABLE,
    FOLLOWED,
    IS_PARKED,
    LINK_ERROR,
    MISSING,
    PARKED,
    TOPIC,
    WEIGHTS,
    Application,
    Sent,
    digest,
)
from soak.chaos.circuits import AFTERWARDS_S, History, Opening, Outage, well_s
from soak.chaos.foreign import Foreign, mark_in, marked
from soak.chaos.operators import Ran
from soak.chaos.processes import Exit, Joined
from soak.chaos.run import LONG_S, MIN_KILLS, Options, Outcome, lines
from soak.chaos.trail import task_id_of

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


@pytest.mark.parametrize("kind", [one for one in WEIGHTS if one not in (PARKED, DISCARDABLE)])
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


def long(exits: list[Exit], **changes: Any) -> Outcome:
    """A run of twenty minutes in which all has happened that has to."""
    made = outcome(seconds=LONG_S, exits=exits)
    made.ran = [Ran(kind, 1, "", "", caught=True) for kind in FROZEN]
    for name, value in changes.items():
        setattr(made, name, value)
    return made


FROZEN = (plan.FROZEN_REDRIVE, plan.FROZEN_DISCARD, plan.FROZEN_DEAD_LETTERS)
ENOUGH = [*[KILLED] * MIN_KILLS, STOPPED]


def test_a_long_run_has_to_kill_many_workers() -> None:
    assert long(ENOUGH).problems() == []
    (problem,) = long([*ENOUGH[1:], NOT_HIT]).problems()
    assert problem.startswith(f"{MIN_KILLS - 1} workers were killed")
    assert outcome(seconds=LONG_S - 1).problems() == []


def test_a_long_run_has_to_leave_kafka_well_for_a_while() -> None:
    """Else no circuit could open without a reason."""
    assert long(ENOUGH, outages=[Outage(0, LONG_S / 2)]).problems() == []
    (problem,) = long(ENOUGH, outages=[Outage(0, LONG_S * 0.7)]).problems()
    assert problem.startswith(f"Kafka was well for {LONG_S * 0.3 - AFTERWARDS_S:.0f} of")


@pytest.mark.parametrize("kind", FROZEN)
def test_a_long_run_has_to_freeze_each_command_in_the_middle(kind: str) -> None:
    ran = [Ran(one, 0, "", "", caught=one != kind) for one in FROZEN]
    assert long(ENOUGH, ran=ran).problems() == [f"{kind}: none was caught in the middle: it proves too little"]


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


# -- circuits
def opened(at: float, scope: str = CLUSTER_SCOPE, before: str = CLOSED) -> Outcome:
    made = outcome()
    made.outages = [Outage(10.0, 20.0)]
    made.openings = [Opening(at, scope, before, "nothing heard", "w0")]
    return made


@pytest.mark.parametrize("scope", [CLUSTER_SCOPE, TOPIC_SCOPE + TOPIC, f"{TOPIC_SCOPE}{TOPIC}-dlq"])
@pytest.mark.parametrize("before", [CLOSED, HALF_OPEN])
def test_a_circuit_that_opens_while_kafka_is_well_fails_a_run(scope: str, before: str) -> None:
    for at in (9.9, 20.1 + AFTERWARDS_S):
        assert opened(at, scope, before).problems() == ["1 circuits opened while Kafka was well"]
    for at in (10.0, 15.0, 19.9 + AFTERWARDS_S):
        assert opened(at, scope, before).problems() == []


def test_the_circuit_of_a_topic_that_does_not_exist_may_open() -> None:
    assert opened(5.0, TOPIC_SCOPE + MISSING).problems() == []


def test_a_wrong_opening_is_shown_with_the_faults_near_it() -> None:
    bad = opened(50.0)
    bad.faults = [(45.0, plan.SLOW, "by 0.3 s"), (30.0, plan.CUT, "of all workers")]
    assert list(lines(bad)) == [
        "opened while Kafka was well: cluster at 50.0 s, was closed, 'nothing heard'",
        "    near: 45.0 s  slow Redis: by 0.3 s",
    ]


def test_outages_that_touch_count_once() -> None:
    assert well_s(0, 100, []) == 100
    assert well_s(0, 100, [Outage(10, 20)]) == 90 - AFTERWARDS_S
    assert well_s(0, 100, [Outage(22, 25), Outage(10, 20)]) == 85 - AFTERWARDS_S
    assert well_s(0, 100, [Outage(95, 130)]) == 95


class Log:
    """A stream in Redis, as a client reads it."""

    def __init__(self) -> None:
        self.entries: list[tuple[bytes, dict[bytes, bytes]]] = []

    def add(self, entry: bytes, scope: str, before: str, after: str) -> None:
        text = {"scope": scope, "from": before, "to": after, "why": "silence", "by": "w0", "trips": "1", "epoch": "2"}
        self.entries.append((entry, {name.encode(): value.encode() for name, value in text.items()}))

    def xrange(self, name: str, min: str) -> list[tuple[bytes, dict[bytes, bytes]]]:  # as in redis-py
        assert name == "kafka-delivery:cb:1:{default}:log"
        after = min.removeprefix("(").encode()
        return [one for one in self.entries if min == "-" or one[0] > after]


def test_each_opening_in_redis_is_read_once() -> None:
    log = Log()
    history = History(cast(Any, log))
    log.add(b"1700000000500-0", CLUSTER_SCOPE, CLOSED, OPEN)
    log.add(b"1700000001500-0", CLUSTER_SCOPE, OPEN, HALF_OPEN)
    history.read()
    history.read()
    log.add(b"1700000002500-0", TOPIC_SCOPE + TOPIC, HALF_OPEN, OPEN)
    log.add(b"1700000003500-0", CLUSTER_SCOPE, HALF_OPEN, CLOSED)
    history.read()
    assert history.openings == [
        Opening(1_700_000_000.5, CLUSTER_SCOPE, CLOSED, "silence", "w0"),
        Opening(1_700_000_002.5, TOPIC_SCOPE + TOPIC, HALF_OPEN, "silence", "w0"),
    ]


# -- strangers
def strangers() -> tuple[dict[str, Accepted], list[bytes]]:
    """What is put into the queue at once, and what is to become of each."""
    written: list[bytes] = []
    accepted: dict[str, Accepted] = {}

    def note(kind: str, sent: Sent) -> None:
        accepted[sent.id] = Accepted(sent.id, kind, sent.id, 0.0, 1, sent.due, sent.digest)

    def write(queue: str, items: list[bytes]) -> None:
        assert queue == QUEUE
        written.extend(items)

    zoo = {"small": b"no message", "an object": b'{"id": "stranger x"}', "large": b"x" * 1_000_000}
    made = Foreign(zoo, write, note)
    assert made.some() + made.large() == len(written)
    return accepted, written


def test_each_stranger_is_known_by_its_mark() -> None:
    accepted, written = strangers()
    assert [mark_in(item) for item in written] == list(accepted)
    assert [task_id_of(item).decode() for item in written] == list(accepted)
    assert {one.kind for one in accepted.values()} == set(foreign.KINDS)


def test_a_mark_leaves_the_rest_as_it_was() -> None:
    assert marked(b"", "stranger-000001") == b"stranger-000001"
    assert marked(b'{"a": {"id": "stranger x"}}', "m") == b'{"mark":"m","a": {"id": "m x"}}'
    assert marked(b"{no object", "m") == b"{no objectm"


@pytest.mark.parametrize("data", ["no message stranger-000007", {"base64": b64encode(b"\0stranger-000007").decode()}])
def test_a_mark_is_found_in_what_is_parked(data: Any) -> None:
    """Also where the store keeps bytes that are no text."""
    assert mark_of(json.dumps({"id": "garbage-1", "kind": "undecodable", "data": json.dumps(data)}).encode())
    record = json.dumps({"id": "m1", "kind": "expired", "data": json.dumps([1, "default", "base64", "stranger"])})
    assert mark_of(record.encode()) == ""


def test_a_compact_send_is_one_without_a_space() -> None:
    accepted, written = strangers()
    due = [one for one in accepted.values() if one.kind == foreign.COMPACT]
    assert due
    assert all(one.due == DELIVERED and one.digest for one in due)
    for item in written[: len(due)]:
        assert item == json.dumps(json.loads(item), separators=(",", ":")).encode()


def test_a_stranger_that_vanishes_fails_a_run() -> None:
    accepted, _ = strangers()
    assert problems(accepted) == []
    for kind in foreign.KINDS:
        missing = next(one for one in accepted.values() if one.kind == kind)
        rest = {one.id for one in accepted.values() if one.id != missing.id}
        delivered = Counter(one for one in rest if accepted[one].due == DELIVERED)
        parked = {one for one in rest if accepted[one].due == IS_PARKED}
        found = problems(accepted, delivered=delivered, parked={"undecodable": parked})
        assert found == ["1 foreign messages are nowhere"]


def test_a_compact_send_that_is_parked_fails_a_run() -> None:
    accepted, _ = strangers()
    first = next(one.id for one in accepted.values() if one.kind == foreign.COMPACT)
    due = {one.id for one in accepted.values() if one.due == IS_PARKED}
    assert problems(accepted, parked={"undecodable": due, "poison": {first}}) == ["1 records are parked wrongly"]


# -- other installations
def test_a_record_in_the_wrong_kafka_fails_a_run(tmp_path: Path) -> None:
    """Also when it is delivered as well."""
    accepted = called(CHAIN, tmp_path)
    first = next(iter(accepted))
    assert problems(accepted, strayed=Counter({first: 2})) == ["2 records are in the wrong Kafka"]


@pytest.mark.parametrize(("code", "good"), [(1, True), (0, False), (None, False), (-9, False)])
def test_a_worker_of_another_installation_has_to_end_by_itself_as_a_failure(code: int | None, good: bool) -> None:
    made = outcome()
    made.joined = [Joined(code, 3.0, "its last words"), Joined(1, 3.0, "refused")]
    assert made.problems() == ([] if good else ["1 workers of another installation were let in"])
    assert ("its last words" in lines(made)) is not good


def test_one_that_stands_still_is_not_let_in() -> None:
    made = outcome()
    made.joined = [Joined(None, 3.0, "its last words", stood_still=True)]
    assert made.problems() == []


# -- operators
def test_a_command_that_fails_fails_a_run() -> None:
    for bad in (Ran("status", None, "", ""), Ran("status", 1, "", "Traceback (most recent call last):\n  ...")):
        made = outcome()
        made.ran = [bad, Ran("status", 1, "", "the lock was lost")]
        assert made.problems() == ["1 commands of operators failed"]


def test_what_a_redrive_calls_delivered_has_to_be_there(tmp_path: Path) -> None:
    accepted = called(DEAD, tmp_path)
    (dead,) = accepted
    made = outcome()
    made.ran = [Ran(plan.FROZEN_DEAD_LETTERS, 0, "2 delivered, 0 dead letters again, 0 parked, 0 left.\n", "")]
    given: dict[str, Any] = {"delivered": Counter({dead: 2}), "dead": Counter([dead]), "parked": {}, "waiting": set()}
    made.account = Account(accepted, {}, 0, redriven=Counter({dead: 2}), **given)
    assert made.problems() == []
    assert made.account.totals["twice"] == 0
    assert made.account.totals["redriven twice"] == 1
    made.account = Account(accepted, {}, 0, redriven=Counter({dead: 1}), **given)
    assert made.problems() == ["1 records that a redrive calls delivered are not there"]


def test_what_an_operator_has_discarded_is_not_lost(tmp_path: Path) -> None:
    accepted = called(DISCARDABLE, tmp_path)
    (gone,) = accepted
    audit = f"kafka_delivery.audit parked.discarded parked_id={gone}~0a1b2c3d topic=unwanted kind=dead-letter"
    assert problems(accepted, parked={}, discarded=Ran(plan.FROZEN_DISCARD, 0, "", audit).discarded) == []
    assert problems(accepted, parked={}) == ["1 accepted records are nowhere"]


def test_a_record_of_a_redrive_is_known_by_its_header() -> None:
    def record(*names: str) -> Consumed:
        return Consumed(TOPIC, 0, 0, None, b"", [(name, b"1") for name in names], 0)

    assert _is_redriven(record("message-id", REDRIVE_COUNT))
    assert not _is_redriven(record("message-id", "own", REDRIVE_COUNT))
    assert not _is_redriven(record("message-id"))


# -- the plan
def test_each_kind_comes_once_before_any_comes_twice() -> None:
    for lane in plan.LANES:
        drawn = lane.draw(7, 2, 60)
        first = [next(drawn).kind for _ in lane.kinds]
        assert set(first) == set(lane.kinds)


def test_a_plan_is_its_seeds() -> None:
    for lane in plan.LANES:
        one, same, other = (lane.draw(seed, 2, 60) for seed in (7, 7, 8))
        some = [next(one) for _ in range(20)]
        assert some == [next(same) for _ in range(20)] != [next(other) for _ in range(20)]


def test_a_run_may_have_some_kinds_only() -> None:
    assert [list(lane.kinds) for lane in plan.lanes([plan.CUT, plan.KILL])] == [[plan.KILL], [plan.CUT]]
    assert plan.lanes() == plan.LANES
    assert {kind for lane in plan.lanes(stock=True) for kind in lane.kinds} < set(plan.ALL)


def test_the_plan_of_a_long_run_leaves_kafka_well_for_most_of_it() -> None:
    """A start takes some eight seconds."""
    (lane,) = plan.lanes([plan.KAFKA_KILL])
    for seed in range(20):
        at, outages = 0.0, []
        for fault in lane.draw(seed, 2, LONG_S):
            at += fault.pause
            if at > LONG_S:
                break
            outages.append(Outage(at, at + fault.hold + 8))
            at = outages[-1].ended
        assert well_s(0, LONG_S, outages) > LONG_S / 2
        assert len(outages) > 10
