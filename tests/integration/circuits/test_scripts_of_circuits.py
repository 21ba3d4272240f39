"""What the scripts of circuits keep and answer, rule by rule, where no worker would show it at once."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import redis

from kafka_delivery.settings import Settings
from kafka_delivery_worker.breaker.rules import Rules
from kafka_delivery_worker.breaker.store import Counted, source

CLUSTER, TOPIC = "cluster", "topic:orders"
BASE = "kafka-delivery:cb:1:{default}:"
RULES = Rules.of(Settings(reset_timeout_s=500, reset_timeout_max_s=4_000))
LATER_MS = 60_000
"""No machine takes so long from one statement to the next."""


class Circuits:
    """The scripts, and what they keep."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client

    def call(self, operation: str, *arguments: str | int, dice: float = 0.0, rules: Rules = RULES) -> Any:
        return self.client.eval(source(operation), 1, BASE, rules.as_json(), "one", dice, *arguments)

    def admits(self, token: str = "t", scope: str = CLUSTER) -> str:  # noqa: S107  # no secret
        answer: bytes = self.call("admit", scope, token, LATER_MS)[0]
        return answer.decode()

    def settles(self, outcome: str, token: str = "t", scope: str = CLUSTER) -> int:  # noqa: S107  # no secret
        return int(self.call("settle", scope, token, outcome, "a probe failed")[0])

    def forces(self, mode: str, length_ms: int = 0, scope: str = CLUSTER) -> None:
        self.call("force", scope, mode, length_ms, "me", "why")

    def reports(self, **counted: Any) -> Any:
        """One worker's report about the cluster: workers alive, then views."""
        made = Counted(CLUSTER, int(self.get("epoch") or 0), **counted)
        return self.call("report", json.dumps([made._asdict()]))

    def reports_of_topic(self, **counted: Any) -> Any:
        """One worker's report about a topic, while the cluster is quiet."""
        of_topic = Counted(TOPIC, int(self.get("epoch", TOPIC) or 0), **counted)
        quiet = Counted(CLUSTER, int(self.get("epoch") or 0))
        return self.call("report", json.dumps([quiet._asdict(), of_topic._asdict()]))

    def set(self, scope: str = CLUSTER, **fields: str | int) -> None:
        """A circuit as it was left."""
        kept: Any = {"scope": scope, **fields}
        self.client.hset(f"{BASE}{scope}:st", mapping=kept)

    def get(self, field: str, scope: str = CLUSTER) -> str:
        found: Any = self.client.hget(f"{BASE}{scope}:st", field)
        return str((found or b"").decode())

    def probe(self, token: str = "t", ends_in_ms: int = LATER_MS, scope: str = CLUSTER) -> None:  # noqa: S107
        self.client.zadd(f"{BASE}{scope}:p", {token: now_ms() + ends_in_ms})

    def transitions(self) -> list[tuple[str, str]]:
        found: Any = self.client.xrange(BASE + "log")
        return [(fields[b"from"].decode(), fields[b"to"].decode()) for _, fields in found]


def now_ms() -> int:
    return int(time.time() * 1000)


@pytest.fixture
def circuits(redis_client: redis.Redis) -> Circuits:
    return Circuits(redis_client)


class TestAdmission:
    def test_is_free_while_it_is_closed(self, circuits: Circuits) -> None:
        assert circuits.admits() == "free"

    def test_is_free_while_a_person_holds_it_closed(self, circuits: Circuits) -> None:
        circuits.set(state="open", till=now_ms() + LATER_MS, forced="closed")
        assert circuits.admits() == "free"

    def test_is_denied_while_a_person_holds_it_open(self, circuits: Circuits) -> None:
        circuits.set(state="open", till=1, forced="open")
        assert circuits.admits() == "denied"
        circuits.set(state="closed")
        assert circuits.admits() == "denied"

    def test_of_one_that_is_not_half_open_loses_no_probes(self, circuits: Circuits) -> None:
        circuits.set(state="open", till=now_ms() + LATER_MS, lost=3, trips=1)
        assert circuits.admits() == "denied"
        assert circuits.transitions() == []

    def test_that_finds_the_last_probe_lost_opens_it(self, circuits: Circuits) -> None:
        circuits.set(state="half-open", till=1, lost=2, trips=1)
        circuits.probe("dead", ends_in_ms=-1)
        assert circuits.admits() == "denied"
        assert (circuits.get("state"), circuits.get("why")) == ("open", "3 probes in a row were lost")

    def test_after_two_lost_probes_grants_a_third(self, circuits: Circuits) -> None:
        circuits.set(state="half-open", till=1, lost=1, trips=1)
        circuits.probe("dead", ends_in_ms=-1)
        assert circuits.admits() == "probe"
        assert (circuits.get("state"), circuits.get("lost")) == ("half-open", "2")

    def test_of_a_topic_waits_for_the_cluster(self, circuits: Circuits) -> None:
        circuits.set(state="open", till=now_ms() + LATER_MS)
        circuits.set(TOPIC, state="open", till=1)
        assert circuits.admits(scope=TOPIC) == "denied"
        circuits.set(state="closed")
        assert circuits.admits(scope=TOPIC) == "probe"

    def test_of_the_same_token_stays_what_it_was(self, circuits: Circuits) -> None:
        circuits.set(state="open", till=1)
        assert [circuits.admits("a"), circuits.admits("b"), circuits.admits("a")] == ["probe", "denied", "probe"]

    def test_is_not_kept_by_the_probe_of_a_clock_that_was_wrong(self, circuits: Circuits) -> None:
        circuits.set(state="half-open", till=1)
        circuits.probe("wrong", ends_in_ms=5_400_000)
        assert circuits.admits() == "probe"

    def test_lasts_for_so_long(self, circuits: Circuits) -> None:
        circuits.set(state="open", till=1)
        circuits.admits("a")
        till = circuits.client.zscore(f"{BASE}{CLUSTER}:p", "a")
        assert till is not None
        assert abs(till - now_ms() - LATER_MS) < LATER_MS / 2


class TestSettling:
    @pytest.mark.parametrize("outcome", ["ok", "fail"])
    @pytest.mark.parametrize("state", ["closed", "open"])
    def test_a_probe_of_an_earlier_round_says_nothing(self, circuits: Circuits, state: str, outcome: str) -> None:
        circuits.set(state=state, till=now_ms() + LATER_MS)
        circuits.probe("old")
        assert circuits.settles(outcome, "old") == 0
        assert (circuits.get("state"), circuits.transitions()) == (state, [])

    def test_one_that_is_unknown_says_nothing(self, circuits: Circuits) -> None:
        circuits.set(state="half-open", till=1)
        assert circuits.settles("fail", "unknown") == 0
        assert circuits.get("state") == "half-open"

    def test_one_that_arrives_ends_the_row_of_lost_ones(self, circuits: Circuits) -> None:
        circuits.set(state="half-open", till=1, lost=2)
        circuits.probe()
        assert circuits.settles("ok") == 1
        assert (circuits.get("state"), circuits.get("good"), circuits.get("lost")) == ("half-open", "1", "0")

    def test_the_last_one_closes_it_and_is_a_success(self, circuits: Circuits) -> None:
        circuits.set(state="half-open", till=1, good=RULES.successes - 1)
        circuits.probe()
        circuits.settles("ok")
        assert circuits.get("state") == "closed"
        assert abs(int(circuits.get("ok_at")) - now_ms()) < LATER_MS

    def test_one_without_an_outcome_changes_nothing(self, circuits: Circuits) -> None:
        circuits.set(state="half-open", till=1)
        circuits.probe()
        assert circuits.settles("ignore") == 1
        assert (circuits.get("state"), circuits.get("good")) == ("half-open", "")


class TestForcing:
    def test_the_log_says_what_it_was_before(self, circuits: Circuits) -> None:
        for mode in ("open", "closed", ""):
            circuits.forces(mode)
        assert circuits.transitions() == [
            ("closed", "forced open"),
            ("forced open", "forced closed"),
            ("forced closed", "auto"),
        ]

    def test_what_is_over_gives_way_to_what_is_new(self, circuits: Circuits) -> None:
        circuits.set(forced="open", forced_till=now_ms() - 1)
        circuits.forces("closed", LATER_MS)
        assert circuits.transitions() == [("closed", "forced closed")]
        assert (circuits.get("forced"), int(circuits.get("forced_till")) > now_ms()) == ("closed", True)

    def test_without_an_end_it_has_none(self, circuits: Circuits) -> None:
        circuits.forces("open")
        assert (circuits.get("forced_till"), circuits.get("forced_by"), circuits.get("forced_why")) == (
            "0",
            "me",
            "why",
        )

    def test_each_is_a_new_generation(self, circuits: Circuits) -> None:
        circuits.forces("open")
        assert abs(int(circuits.get("epoch")) - now_ms()) < LATER_MS
        ahead = now_ms() + 10 * LATER_MS
        circuits.set(epoch=ahead)
        circuits.forces("closed")
        assert int(circuits.get("epoch")) == ahead + 1

    @pytest.mark.parametrize(("scope", "known"), [(TOPIC, [TOPIC.encode()]), (CLUSTER, [])])
    def test_a_topic_is_known_from_then_on(self, circuits: Circuits, scope: str, known: list[bytes]) -> None:
        circuits.forces("open", scope=scope)
        assert circuits.client.zrange(BASE + "topics", 0, -1) == known


class TestKeeping:
    def test_the_next_outage_lasts_longer_the_more_rounds_failed(self, circuits: Circuits) -> None:
        lasted = []
        for trips in (0, 1, 2, 3, 9):
            circuits.set(state="half-open", till=1, trips=trips)
            circuits.probe()
            circuits.settles("fail")
            lasted.append(round((int(circuits.get("till")) - now_ms()) / 1_000 / 100))
        assert lasted == [5, 10, 20, 40, 40]

    def test_chance_makes_it_longer_by_a_tenth(self, circuits: Circuits) -> None:
        circuits.set(state="half-open", till=1, trips=3)
        circuits.probe()
        circuits.call("settle", CLUSTER, "t", "fail", "why", dice=1.0)
        assert abs(int(circuits.get("till")) - now_ms() - 4_400_000) < LATER_MS

    def test_a_clock_that_was_wrong_makes_no_outage_longer_than_may_be(self, circuits: Circuits) -> None:
        circuits.set(state="open", till=now_ms() + 10**9)
        view = circuits.reports()[1]
        assert abs(view[3] - 4_400_000) < LATER_MS

    def test_each_change_is_a_new_generation(self, circuits: Circuits) -> None:
        ahead = now_ms() + 10 * LATER_MS
        circuits.set(state="closed", epoch=ahead)
        circuits.reports(hard="down")
        assert (circuits.get("state"), int(circuits.get("epoch"))) == ("open", ahead + 1)

    def test_one_that_silence_alone_opened_closes_with_the_first_arrival(self, circuits: Circuits) -> None:
        circuits.reports_of_topic(hard="silent")
        assert (circuits.get("state", TOPIC), circuits.get("silent", TOPIC)) == ("open", "1")
        circuits.reports_of_topic(late=1)
        assert (circuits.get("state", TOPIC), circuits.get("silent", TOPIC)) == ("closed", "0")

    def test_one_that_failures_opened_is_probed_at_the_first_arrival(self, circuits: Circuits) -> None:
        circuits.set(TOPIC, state="open", till=now_ms() + LATER_MS)
        circuits.client.zadd(BASE + "topics", {TOPIC: now_ms()})
        circuits.reports_of_topic(late=1)
        assert circuits.get("state", TOPIC) == "open"
        assert circuits.admits(scope=TOPIC) == "probe"

    def test_one_that_a_person_holds_closed_closes_when_records_arrive(self, circuits: Circuits) -> None:
        circuits.set(state="open", till=1, forced="closed", epoch=7)
        circuits.reports(ok=1, fail=1)
        assert circuits.get("state") == "open"
        circuits.reports(ok=1)
        assert circuits.get("state") == "closed"

    def test_a_view_says_how_long_it_lasts(self, circuits: Circuits) -> None:
        circuits.set(state="open", till=now_ms() + LATER_MS, forced="open", forced_till=now_ms() + 3 * LATER_MS)
        view = circuits.reports()[1]
        assert view[3] == pytest.approx(LATER_MS, abs=LATER_MS / 2)
        assert view[6] == pytest.approx(3 * LATER_MS, abs=LATER_MS / 2)
        circuits.set(state="closed", forced_till=0)
        assert circuits.reports()[1][3::3] == [0, 0]

    def test_workers_that_are_gone_are_forgotten(self, circuits: Circuits) -> None:
        known = {"alive": -4_000, "quiet": -50_000, "gone": -90_000, "wrong": 90_000}
        circuits.client.zadd(BASE + "workers", {name: now_ms() + after for name, after in known.items()})
        assert circuits.reports()[0] == 2
        assert set(circuits.client.zrange(BASE + "workers", 0, -1)) == {b"one", b"alive", b"quiet"}

    def test_what_has_not_been_yet_was_just_now(self, circuits: Circuits) -> None:
        circuits.set(state="closed", since=now_ms() + 10**9, ok_at=now_ms() + 10**9)
        circuits.reports(fail=1)
        assert int(circuits.get("since")) < now_ms() + LATER_MS
        assert int(circuits.get("ok_at")) < now_ms() + LATER_MS

    def test_what_is_forced_for_a_while_ends_once(self, circuits: Circuits) -> None:
        circuits.set(forced="open", forced_till=now_ms() - 1)
        assert circuits.reports()[1][5] == b""
        circuits.reports()
        assert circuits.transitions() == [("forced open", "auto")]
        assert (circuits.get("forced"), circuits.get("forced_till")) == ("", "0")

    def test_what_is_not_forced_does_not_end(self, circuits: Circuits) -> None:
        circuits.set(forced="", forced_till=now_ms() - 1)
        circuits.reports()
        assert circuits.transitions() == []

    def test_it_is_kept_for_a_week(self, circuits: Circuits) -> None:
        circuits.forces("open")
        assert circuits.client.ttl(f"{BASE}{CLUSTER}:st") == pytest.approx(7 * 86_400, abs=60)

    def test_a_circuit_that_opens_forgets_its_window(self, circuits: Circuits) -> None:
        circuits.reports(fail=1)
        assert circuits.client.exists(f"{BASE}{CLUSTER}:w", f"{BASE}{CLUSTER}:f") == 2
        circuits.reports(hard="down")
        assert circuits.client.exists(f"{BASE}{CLUSTER}:w", f"{BASE}{CLUSTER}:f") == 0

    @pytest.mark.parametrize(("forced", "shut"), [("open", "1"), ("closed", "0"), ("", "0")])
    def test_what_claims_go_by_is_kept_too(self, circuits: Circuits, forced: str, shut: str) -> None:
        circuits.forces(forced)
        assert circuits.get("shut") == shut

    def test_claims_grow_from_when_it_was_opened_to_them(self, circuits: Circuits) -> None:
        circuits.forces("open")
        assert circuits.get("ramp_at") == "0"
        circuits.forces("closed")
        assert abs(int(circuits.get("ramp_at")) - now_ms()) < LATER_MS


class TestReports:
    WIDTH_MS = RULES.window_ms // 10

    def window(self, circuits: Circuits, buckets_ago: int, fail: int, ok: int = 0, scope: str = CLUSTER) -> None:
        """Outcomes that were counted so many tenths of the window ago."""
        bucket = now_ms() // self.WIDTH_MS - buckets_ago
        circuits.client.hset(f"{BASE}{scope}:w", str(bucket % 10), f"{bucket}|{ok}|{fail}")

    @pytest.mark.parametrize(("ok", "state"), [(10, "open"), (11, "closed")])
    def test_the_rate_itself_is_too_much(self, circuits: Circuits, ok: int, state: str) -> None:
        assert (RULES.rate, RULES.min_calls) == (0.5, 20)
        self.window(circuits, 5, fail=9, ok=ok)
        circuits.reports(fail=1)
        assert circuits.get("state") == state

    @pytest.mark.parametrize(("streak", "state"), [(1, "open"), (0, "closed")])
    def test_others_succeed_if_they_have_since_the_row_began(self, circuits: Circuits, streak: int, state: str) -> None:
        circuits.set(ok_at=now_ms() - LATER_MS)
        circuits.set(TOPIC, streak=streak, streak_at=now_ms() - 2 * LATER_MS)
        self.window(circuits, 5, fail=19, scope=TOPIC)
        circuits.reports_of_topic(fail=1, row=1)
        assert circuits.get("state", TOPIC) == state

    @pytest.mark.parametrize(("buckets_ago", "state"), [(6, "open"), (11, "closed"), (-5, "closed")])
    def test_what_lies_in_the_window_counts(self, circuits: Circuits, buckets_ago: int, state: str) -> None:
        self.window(circuits, buckets_ago, RULES.min_calls - 1)
        circuits.reports(fail=1)
        assert circuits.get("state") == state

    @pytest.mark.parametrize(("before_ms", "state"), [(RULES.window_ms // 2, "open"), (LATER_MS * 10, "closed")])
    def test_of_two_workers_both_must_have_failed_of_late(self, circuits: Circuits, before_ms: int, state: str) -> None:
        circuits.client.zadd(BASE + "workers", {"other": now_ms()})
        circuits.client.hset(f"{BASE}{CLUSTER}:f", "other", now_ms() - before_ms)
        circuits.reports(hard="down")
        assert circuits.get("state") == state

    @pytest.mark.parametrize(("workers", "left"), [(60, 1), (40, 41)])
    def test_failures_of_workers_that_are_gone_are_forgotten_once_there_are_many(
        self, circuits: Circuits, workers: int, left: int
    ) -> None:
        gone = {f"gone {number}": now_ms() - 700_000 for number in range(workers)}
        circuits.client.hset(f"{BASE}{CLUSTER}:f", mapping=gone)  # type: ignore[arg-type]
        circuits.reports(fail=1)
        assert circuits.client.hlen(f"{BASE}{CLUSTER}:f") == left

    def test_failures_of_workers_that_are_there_are_not(self, circuits: Circuits) -> None:
        there = {f"there {number}": now_ms() - 500_000 for number in range(60)}
        circuits.client.hset(f"{BASE}{CLUSTER}:f", mapping=there)  # type: ignore[arg-type]
        circuits.reports(fail=1)
        assert circuits.client.hlen(f"{BASE}{CLUSTER}:f") == 61

    @pytest.mark.parametrize(
        ("known", "counted", "is_known"),
        [
            (0, {"fail": 1}, True),
            (0, {"hard": "silent"}, True),
            (0, {"ok": 1}, False),
            (199, {"fail": 1}, True),
            (200, {"fail": 1}, False),
        ],
    )
    def test_a_topic_gets_a_circuit_with_its_first_failure(
        self, circuits: Circuits, known: int, counted: dict[str, Any], is_known: bool
    ) -> None:
        if known:
            circuits.client.zadd(BASE + "topics", {f"topic:{number}": now_ms() for number in range(known)})
        circuits.reports_of_topic(**counted)
        assert (circuits.client.zscore(BASE + "topics", TOPIC) is not None) is is_known
        assert bool(circuits.client.exists(f"{BASE}{TOPIC}:st")) is is_known

    def test_a_failure_keeps_it(self, circuits: Circuits) -> None:
        circuits.client.zadd(BASE + "topics", {TOPIC: 1})
        circuits.reports_of_topic(ok=1)
        assert circuits.client.zscore(BASE + "topics", TOPIC) == 1
        circuits.reports_of_topic(fail=1)
        assert circuits.client.zscore(BASE + "topics", TOPIC) == pytest.approx(now_ms(), abs=LATER_MS)

    @pytest.mark.parametrize(
        ("age_ms", "fields", "is_kept"),
        [
            (500_000, {"state": "closed"}, True),
            (700_000, {"state": "closed"}, False),
            (700_000, {"state": "open", "till": 10**13}, True),
            (700_000, {"state": "closed", "forced": "closed"}, True),
        ],
    )
    def test_one_of_which_nothing_is_heard_is_forgotten(
        self, circuits: Circuits, age_ms: int, fields: dict[str, Any], is_kept: bool
    ) -> None:
        circuits.set(TOPIC, **fields)
        circuits.client.zadd(BASE + "topics", {TOPIC: now_ms() - age_ms})
        views = circuits.reports()[1:]
        assert ([view[0] for view in views] == [b"cluster", TOPIC.encode()]) is is_kept
        assert (circuits.client.zscore(BASE + "topics", TOPIC) is not None) is is_kept

    def test_one_that_is_open_is_kept_for_another_week(self, circuits: Circuits) -> None:
        circuits.set(TOPIC, state="open", till=now_ms() + LATER_MS)
        circuits.client.expire(f"{BASE}{TOPIC}:st", 1_000)
        circuits.client.zadd(BASE + "topics", {TOPIC: now_ms()})
        circuits.reports()
        assert circuits.client.ttl(f"{BASE}{TOPIC}:st") == pytest.approx(7 * 86_400, abs=60)

    def test_one_whose_probes_are_lost_opens_though_nobody_reports_of_it(self, circuits: Circuits) -> None:
        circuits.set(TOPIC, state="half-open", till=1, lost=2)
        circuits.probe("dead", ends_in_ms=-1, scope=TOPIC)
        circuits.client.zadd(BASE + "topics", {TOPIC: now_ms()})
        circuits.reports()
        assert circuits.get("state", TOPIC) == "open"

    @pytest.mark.parametrize("state", ["open", "closed"])
    def test_the_clusters_loses_no_probes_unless_it_is_half_open(self, circuits: Circuits, state: str) -> None:
        circuits.set(state=state, till=now_ms() + LATER_MS, lost=3)
        circuits.reports()
        assert circuits.transitions() == []

    def test_one_that_is_open_loses_no_probes(self, circuits: Circuits) -> None:
        circuits.set(TOPIC, state="open", till=now_ms() + LATER_MS, lost=3)
        circuits.client.zadd(BASE + "topics", {TOPIC: now_ms()})
        circuits.reports()
        assert circuits.transitions() == []

    def test_what_is_forced_for_a_while_ends_for_it_too(self, circuits: Circuits) -> None:
        circuits.set(TOPIC, forced="open", forced_till=now_ms() - 1)
        circuits.client.zadd(BASE + "topics", {TOPIC: now_ms()})
        circuits.reports()
        assert (circuits.get("forced", TOPIC), circuits.get("shut", TOPIC)) == ("", "0")

    @pytest.mark.parametrize(
        ("counted", "streak"),
        [
            ({"fail": 1, "row": 0}, "4"),
            ({"fail": 1, "row": 1}, "4"),
            ({"ok": 1, "fail": 1, "row": 1}, "1"),
            ({"ok": 1, "fail": 1, "row": 0}, "0"),
            ({"ok": 1}, "0"),
            ({}, "3"),
        ],
    )
    def test_a_row_of_failures_ends_with_a_success(
        self, circuits: Circuits, counted: dict[str, Any], streak: str
    ) -> None:
        circuits.set(streak=3, streak_at=7, since=now_ms() - LATER_MS)
        circuits.reports(**counted)
        assert circuits.get("streak") == streak

    def test_a_row_begins_with_its_first_failure(self, circuits: Circuits) -> None:
        circuits.reports(fail=1, row=1)
        assert int(circuits.get("streak_at")) == pytest.approx(now_ms(), abs=LATER_MS)
        circuits.set(streak=1, streak_at=7)
        circuits.reports(fail=1, row=1)
        assert circuits.get("streak_at") == "7"

    def test_what_was_counted_has_an_end(self, circuits: Circuits) -> None:
        circuits.reports(fail=1)
        assert circuits.client.pttl(f"{BASE}{CLUSTER}:w") == pytest.approx(2 * RULES.window_ms, rel=0.3)
        assert circuits.client.ttl(f"{BASE}{CLUSTER}:f") == pytest.approx(7 * 86_400, abs=60)

    @pytest.mark.parametrize(("counted", "failed"), [({"fail": 1}, True), ({"hard": "down"}, True), ({"ok": 1}, False)])
    def test_a_worker_that_failed_is_noted(self, circuits: Circuits, counted: dict[str, Any], failed: bool) -> None:
        circuits.client.zadd(BASE + "workers", {"other": now_ms()})
        circuits.reports(**counted)
        assert circuits.client.hkeys(f"{BASE}{CLUSTER}:f") == ([b"one"] if failed else [])

    def test_of_another_generation_is_heard_by_a_new_circuit_only(self, circuits: Circuits) -> None:
        circuits.set(epoch=9)
        circuits.call("report", json.dumps([Counted(CLUSTER, 8, hard="down")._asdict()]))
        assert circuits.get("state") == "closed"
        circuits.client.delete(f"{BASE}{CLUSTER}:st")
        circuits.call("report", json.dumps([Counted(CLUSTER, 8, hard="down")._asdict()]))
        assert circuits.get("state") == "open"

    @pytest.mark.parametrize(
        ("fields", "counted", "state"),
        [
            ({}, {"ok": 1}, "closed"),
            ({"till": 10**13}, {"ok": 1}, "open"),
            ({"forced": "open"}, {"ok": 1}, "open"),
            ({"forced": ""}, {"ok": 1}, "open"),
            ({"epoch": 8}, {"ok": 1}, "open"),
            ({}, {}, "open"),
            ({}, {"ok": 1, "fail": 1}, "open"),
        ],
    )
    def test_one_that_nobody_probes_closes_when_records_arrive(
        self, circuits: Circuits, fields: dict[str, Any], counted: dict[str, Any], state: str
    ) -> None:
        circuits.set(**{"state": "open", "till": 1, "forced": "closed", "epoch": 7, **fields})
        circuits.call("report", json.dumps([Counted(CLUSTER, 7, **counted)._asdict()]))
        assert circuits.get("state") == state

    @pytest.mark.parametrize(
        ("fields", "late", "till_is_over"),
        [
            ({"state": "open"}, 1, True),
            ({"state": "open"}, 0, False),
            ({"state": "half-open"}, 1, False),
        ],
    )
    def test_a_late_arrival_is_worth_a_look_at_once(
        self, circuits: Circuits, fields: dict[str, Any], late: int, till_is_over: bool
    ) -> None:
        circuits.set(till=now_ms() + LATER_MS * 5, **fields)
        circuits.reports(late=late)
        assert (int(circuits.get("till")) < now_ms() + LATER_MS) is till_is_over

    @pytest.mark.parametrize(
        ("cluster", "counted", "state"),
        [
            ({"state": "closed", "ok_at": 10**13}, {"fail": 5, "row": 1}, "open"),
            ({"state": "closed", "ok_at": 1}, {"fail": 5, "row": 1}, "closed"),
            ({"state": "open", "till": 10**13, "ok_at": 10**13}, {"fail": 5, "row": 1}, "closed"),
            ({"state": "closed", "ok_at": 1}, {"hard": "silent"}, "open"),
        ],
    )
    def test_a_topic_is_to_blame_only_while_others_succeed(
        self, circuits: Circuits, cluster: dict[str, Any], counted: dict[str, Any], state: str
    ) -> None:
        circuits.set(**cluster)
        circuits.set(TOPIC, streak=RULES.threshold - 1, streak_at=now_ms() - LATER_MS)
        circuits.reports_of_topic(**counted)
        assert circuits.get("state", TOPIC) == state

    @pytest.mark.parametrize(("hard", "silent"), [("silent", "1"), ("", "0")])
    def test_a_topic_remembers_whether_silence_opened_it(self, circuits: Circuits, hard: str, silent: str) -> None:
        circuits.set(ok_at=10**13)
        circuits.set(TOPIC, streak=RULES.threshold - 1, streak_at=now_ms() - LATER_MS)
        circuits.reports_of_topic(fail=1, row=1, hard=hard)
        assert (circuits.get("state", TOPIC), circuits.get("silent", TOPIC)) == ("open", silent)


class TestRestoring:
    def restore(self, circuits: Circuits, scope: str = CLUSTER, **known: Any) -> None:
        """One worker knows more than Redis."""
        told = [Counted(scope, 99, **known)]
        if scope != CLUSTER:
            told.insert(0, Counted(CLUSTER))
        circuits.call("report", json.dumps([one._asdict() for one in told]))

    @pytest.mark.parametrize(("open_ms", "lasts_ms"), [(LATER_MS * 5, LATER_MS * 5), (10**9, 4_000_000), (0, 0)])
    def test_an_outage_goes_on(self, circuits: Circuits, open_ms: int, lasts_ms: int) -> None:
        self.restore(circuits, open_ms=open_ms, trips=3)
        assert (circuits.get("state"), circuits.get("trips")) == ("open", "3")
        assert int(circuits.get("till")) - now_ms() == pytest.approx(lasts_ms, abs=LATER_MS)

    @pytest.mark.parametrize(("forced_ms", "ends"), [(LATER_MS * 5, True), (0, False)])
    def test_what_a_person_forced_goes_on(self, circuits: Circuits, forced_ms: int, ends: bool) -> None:
        self.restore(circuits, forced="open", forced_ms=forced_ms)
        assert (circuits.get("state"), circuits.get("forced"), circuits.get("forced_by")) == ("closed", "open", "one")
        assert (int(circuits.get("forced_till")) > now_ms()) is ends
        assert circuits.transitions() == [("closed", "forced open")]

    def test_that_it_was_well_is_no_change(self, circuits: Circuits) -> None:
        self.restore(circuits, ok=1)
        assert (circuits.get("state"), circuits.get("epoch"), circuits.transitions()) == ("closed", "99", [])

    def test_what_redis_knows_better_stays(self, circuits: Circuits) -> None:
        circuits.set(epoch=100)
        self.restore(circuits, open_ms=LATER_MS, forced="open")
        assert (circuits.get("state"), circuits.get("forced"), circuits.transitions()) == ("closed", "", [])

    def test_a_topic_is_known_again(self, circuits: Circuits) -> None:
        self.restore(circuits, TOPIC, open_ms=LATER_MS, trips=1)
        assert circuits.client.zrange(BASE + "topics", 0, -1) == [TOPIC.encode()]
        assert circuits.get("state", TOPIC) == "open"
