"""The rules of the fleet's circuits, one by one, against real servers: what opens them, what closes them, who may look.

The clock is moved, not waited for: `passes` makes everything that a circuit remembers so much older.
"""

from __future__ import annotations

import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import redis
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from examples import examples
from kafka_delivery import circuits
from kafka_delivery.settings import Settings
from kafka_delivery_worker.breaker.rules import LocalCircuit, Rules
from kafka_delivery_worker.breaker.store import CircuitStore, Counted, View, source
from servers import AnyRedis

CLUSTER = "cluster"
TOPIC = "topic:orders"
BASE = "kafka-delivery:cb:1:{default}:"
RULES = Rules.of(Settings(reset_timeout_s=5, reset_timeout_max_s=40))
OPEN_MS = 5_000
SLOW = Rules.of(Settings(reset_timeout_s=500, reset_timeout_max_s=4_000))
"""For what must not have come yet: no machine takes a minute from one statement to the next."""


@pytest.fixture(params=["wheel", pytest.param("redis-server", marks=pytest.mark.real)])
def client(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    """An empty Valkey, and an empty Redis."""
    if request.param == "wheel":
        yield request.getfixturevalue("redis_client")
        return
    with redis.Redis.from_url(request.getfixturevalue("real_redis").url, socket_timeout=5) as client:
        client.flushall()
        yield client


class Direct:
    """What `CircuitStore` needs of a `RedisClient`."""

    prefix = ""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client


class Worker:
    """A worker process as Redis sees it: a view, and what it counts under it."""

    def __init__(self, client: redis.Redis, name: str = "one", rules: Rules = RULES) -> None:
        self.store = CircuitStore(Direct(client), "default", rules, name)  # type: ignore[arg-type]
        self.views: dict[str, View] = {}
        self.looks()

    def looks(self) -> View:
        return self.says()

    def says(self, ok: int = 0, fail: int = 0, *, hard: str = "", late: int = 0, topic: tuple[int, int] | None = None,
             epoch: int | None = None) -> View:  # fmt: skip
        """Report what became of records, of the cluster and of one topic."""
        known = self.views.get(CLUSTER, View(CLUSTER))
        at = known.epoch if epoch is None else epoch
        report = [Counted(CLUSTER, at, ok, fail, row=int(fail > 0), late=late, hard=hard)]
        if topic is not None:
            its = self.views.get(TOPIC, View(TOPIC))
            report.append(Counted(TOPIC, its.epoch, *topic, row=int(topic[1] > 0)))
        self.alive, views = self.store.report(report)
        self.views = {view.scope: view for view in views}
        return self.views[CLUSTER]

    def fails(self, times: int = 1) -> View:
        """That many reports of a failure, one after the other."""
        for _ in range(times):
            view = self.says(fail=1)
        return view

    def knows(self) -> View:
        """Tell Redis what it may have lost."""
        known = [
            Counted(v.scope, v.epoch, open_ms=v.remaining_ms if v.state != "closed" else -1, trips=v.trips,
                    forced=v.forced, forced_ms=v.forced_ms)
            for v in self.views.values()
        ]  # fmt: skip
        _, views = self.store.report(known)
        return views[0]

    def probes(self, token: str = "t", scope: str = CLUSTER, lease_ms: int = 15_000) -> str:  # noqa: S107  # no secret
        return self.store.admit(scope, token, lease_ms)[0]

    def settles(self, outcome: str, token: str = "t", scope: str = CLUSTER) -> tuple[bool, View]:  # noqa: S107
        return self.store.settle(scope, token, outcome, "a probe failed")


def passes(client: AnyRedis, ms: int) -> None:
    """So much time goes by."""
    for key in client.scan_iter(BASE + "*"):
        kind = key.rpartition(b":")[2]
        if kind == b"st":
            for name in (b"since", b"till", b"ok_at", b"streak_at", b"ramp_at", b"forced_till"):
                if float(client.hget(key, name) or 0):
                    client.hincrbyfloat(key, name, -ms)
        elif kind == b"f":
            for worker in client.hkeys(key):
                client.hincrbyfloat(key, worker, -ms)
        elif kind == b"w":
            _age_window(client, key, ms)
        elif client.type(key) == b"zset":
            for member in client.zrange(key, 0, -1):
                client.zincrby(key, -ms, member)


def _age_window(client: AnyRedis, key: bytes, ms: int) -> None:
    assert ms % 1000 == 0, "a bucket is a second"
    buckets = [value.split(b"|") for value in client.hvals(key)]
    client.delete(key)
    for at, ok, fail in buckets:
        bucket = int(at) - ms // 1000
        client.hset(key, str(bucket % 10), f"{bucket}|{ok.decode()}|{fail.decode()}")


def history(client: redis.Redis) -> list[tuple[str, str, str]]:
    """Transitions, the oldest first: scope, from, to."""
    return [(t.scope, t.before, t.after) for t in reversed(Worker(client, "reader").store.history(1000))]


def opened(client: redis.Redis, name: str = "one", rules: Rules = RULES) -> Worker:
    worker = Worker(client, name, rules)
    assert worker.says(hard="down").state == "open"
    return worker


def closed_again(client: redis.Redis, worker: Worker) -> None:
    passes(client, 45_000)
    for n in range(RULES.successes):
        assert worker.probes(f"good {n}") == "probe"
        worker.settles("ok", f"good {n}")
    assert worker.looks().state == "closed"


class TestOpening:
    def test_failures_in_a_row_open_it_however_slowly_they_come(self, client: redis.Redis) -> None:
        """One send a minute is traffic, too."""
        worker = Worker(client)
        for _ in range(RULES.threshold - 1):
            assert worker.fails().state == "closed"
            passes(client, 60_000)
        view = worker.fails()
        assert (view.state, view.why, view.trips) == ("open", "5 failures in a row", 1)
        assert OPEN_MS <= view.remaining_ms <= OPEN_MS * 1.1

    def test_a_success_anywhere_ends_the_row(self, client: redis.Redis) -> None:
        one, two = Worker(client, "one"), Worker(client, "two")
        for _ in range(10):
            one.fails(RULES.threshold - 1)
            assert two.says(ok=1).state == "closed"
            passes(client, 11_000)

    def test_a_rate_opens_it_once_there_are_enough_calls(self, client: redis.Redis) -> None:
        worker = Worker(client)
        assert worker.says(ok=5, fail=4).state == "closed"
        assert worker.says(ok=4, fail=5).state == "closed", "18 calls are too few to judge"
        view = worker.says(ok=1, fail=3)
        assert view.state == "open"
        assert view.why == "55 % of 22 failed"

    def test_what_is_older_than_the_window_does_not_count(self, client: redis.Redis) -> None:
        worker = Worker(client)
        for _ in range(5):
            assert worker.says(ok=4, fail=5).state == "closed"
            passes(client, 10_000)

    def test_many_successes_hide_few_failures(self, client: redis.Redis) -> None:
        worker = Worker(client)
        for _ in range(20):
            assert worker.says(ok=900, fail=100).state == "closed"

    def test_one_failed_batch_is_not_everybodys_experience(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.says(ok=3)
        assert worker.says(fail=1_000).state == "closed"
        assert worker.says(fail=1_000).state == "open"

    def test_a_definite_signal_opens_it_at_once(self, client: redis.Redis) -> None:
        view = Worker(client).says(hard="no report for 10 s")
        assert (view.state, view.why) == ("open", "no report for 10 s")

    def test_twelve_workers_with_few_failures_each_open_it(self, client: redis.Redis) -> None:
        """None of them has seen enough to judge by itself."""
        workers = [Worker(client, str(n)) for n in range(12)]
        assert [worker.says(ok=1, fail=2).state for worker in workers][-1] == "open"


class TestQuorum:
    """Where two or more are alive, at least two must be failing."""

    def test_one_that_fails_alone_opens_nothing(self, client: redis.Redis) -> None:
        bad, good = Worker(client, "bad"), Worker(client, "good")
        for _ in range(20):
            assert bad.says(fail=50).state == "closed"
        assert bad.says(hard="down").state == "closed"
        assert good.looks().state == "closed"
        assert bad.alive == 2

    def test_two_that_fail_open_it(self, client: redis.Redis) -> None:
        one, two = Worker(client, "one"), Worker(client, "two")
        one.fails(10)
        assert two.fails().state == "open"

    def test_a_stall_that_two_see_opens_it(self, client: redis.Redis) -> None:
        one, two = Worker(client, "one"), Worker(client, "two")
        assert one.says(hard="stalled").state == "closed"
        assert two.says(hard="stalled").state == "open"

    def test_a_worker_that_is_gone_has_no_say(self, client: redis.Redis) -> None:
        Worker(client, "gone")
        passes(client, 6_000)
        assert Worker(client).says(hard="down").state == "open"


class TestEpochs:
    def test_what_was_sent_before_a_change_says_nothing_about_after_it(self, client: redis.Redis) -> None:
        worker = opened(client)
        old = 0
        before = worker.looks()
        for _ in range(10):
            worker.says(fail=50, epoch=old)
        after = worker.looks()
        assert (after.trips, after.epoch) == (1, before.epoch)
        assert after.remaining_ms <= before.remaining_ms
        closed_again(client, worker)
        for _ in range(10):
            assert worker.says(fail=50, epoch=before.epoch).state == "closed"

    def test_what_arrives_late_is_worth_a_look_at_once_and_no_more(self, client: redis.Redis) -> None:
        worker = opened(client)
        assert worker.probes() == "denied"
        assert worker.says(late=1).state == "open"
        assert worker.probes() == "probe"

    def test_epochs_grow_also_after_redis_has_lost_them(self, client: redis.Redis) -> None:
        before = opened(client).views[CLUSTER].epoch
        client.flushall()
        assert opened(client).views[CLUSTER].epoch >= before
        assert before > 1_700_000_000_000, "they go by the clock"

    def test_of_two_that_see_the_same_one_is_told_that_it_changed_it(self, client: redis.Redis) -> None:
        one, two = Worker(client, "one"), Worker(client, "two")
        one.fails(10)
        assert two.fails().changed
        assert not one.looks().changed


class TestProbes:
    def test_none_before_its_time(self, client: redis.Redis) -> None:
        worker = opened(client, rules=SLOW)
        assert worker.probes() == "denied"
        passes(client, SLOW.open_ms - 60_000)
        assert worker.probes() == "denied"
        passes(client, 120_000)
        assert worker.probes() == "probe"

    def test_one_at_a_time_and_the_same_token_gets_the_same_answer(self, client: redis.Redis) -> None:
        worker = opened(client)
        passes(client, 6_000)
        assert [worker.probes(token) for token in ("a", "a", "b", "a")] == ["probe", "probe", "denied", "probe"]
        assert client.zcard(BASE + "cluster:p") == 1

    def test_enough_that_arrive_close_it_whoever_sent_them(self, client: redis.Redis) -> None:
        opened(client)
        passes(client, 6_000)
        for n in range(RULES.successes):
            worker = Worker(client, str(n))
            assert worker.looks().state != "closed"
            assert worker.probes(str(n)) == "probe"
            assert worker.settles("ok", str(n))[0]
        assert Worker(client).looks().state == "closed"
        assert [after for _, _, after in history(client)] == ["open", "half-open", "closed"]

    def test_after_it_closed_all_failures_count_again(self, client: redis.Redis) -> None:
        closed_again(client, opened(client))
        workers = [Worker(client, str(n)) for n in range(6)]
        assert [worker.fails().state for worker in workers] == ["closed"] * 4 + ["open"] * 2

    def test_after_it_closed_nothing_counts_of_before(self, client: redis.Redis) -> None:
        """Neither the failures in a row nor who failed, however little time has passed."""
        one, two = Worker(client, "one"), Worker(client, "two")
        one.fails(RULES.threshold)
        two.fails()
        one.says(late=1)
        for n in range(RULES.successes):
            assert one.probes(f"good {n}") == "probe"
            one.settles("ok", f"good {n}")
        assert one.looks().state == "closed"
        assert two.looks().state == "closed"
        assert one.says(hard="down").state == "closed", "the other has not failed since"
        client.flushall()
        alone = Worker(client, "alone")
        alone.fails(RULES.threshold)
        closed_again(client, alone)
        assert alone.fails(RULES.threshold - 1).state == "closed"

    def test_one_that_fails_opens_it_for_longer(self, client: redis.Redis) -> None:
        worker = opened(client)
        waits = []
        for _ in range(5):
            passes(client, 45_000)
            assert worker.probes() == "probe"
            _, view = worker.settles("fail")
            waits.append(view.remaining_ms)
        assert [round(wait / OPEN_MS / 1.05) for wait in waits] == [2, 4, 8, 8, 8]
        assert worker.looks().trips == 6

    def test_one_that_says_nothing_frees_the_place_for_the_next(self, client: redis.Redis) -> None:
        worker = opened(client)
        passes(client, 6_000)
        worker.probes()
        assert worker.settles("ignore")[1].state == "half-open"
        assert worker.probes("next") == "probe"

    def test_one_whose_worker_died_is_replaced_when_its_lease_is_over(self, client: redis.Redis) -> None:
        """Also while others keep asking."""
        worker = opened(client)
        passes(client, 6_000)
        worker.probes("lost", lease_ms=150_000)
        for _ in range(14):
            assert worker.probes("next") == "denied"
            passes(client, 10_000)
        passes(client, 20_000)
        assert worker.probes("next") == "probe"
        assert not worker.settles("ok", "lost")[0]

    def test_several_that_are_lost_in_a_row_are_a_failed_round(self, client: redis.Redis) -> None:
        worker = opened(client)
        passes(client, 6_000)
        for n in range(RULES.max_lost):
            assert worker.probes(f"lost {n}") == "probe"
            passes(client, 16_000)
        view = worker.looks()
        assert (view.state, view.trips, view.why) == ("open", 2, "3 probes in a row were lost")

    def test_a_round_that_ended_forgets_what_was_lost_in_it(self, client: redis.Redis) -> None:
        worker = opened(client)
        passes(client, 6_000)
        for n in range(RULES.max_lost - 1):
            worker.probes(f"lost {n}")
            passes(client, 16_000)
        worker.probes("fails")
        worker.settles("fail", "fails")
        passes(client, 12_000)
        for n in range(RULES.max_lost - 1):
            assert worker.probes(f"again {n}") == "probe"
            passes(client, 16_000)
        assert worker.looks().state == "half-open"

    def test_one_of_an_earlier_round_says_nothing_about_this_one(self, client: redis.Redis) -> None:
        worker = opened(client)
        passes(client, 6_000)
        worker.probes("first")
        worker.settles("fail", "first")
        passes(client, 12_000)
        worker.probes("second")
        assert not worker.settles("ok", "first")[0]
        assert not worker.settles("fail", "first")[0]
        assert worker.looks().state == "half-open"
        assert client.hget(BASE + "cluster:st", "good") == b"0"

    def test_a_flapping_cluster_keeps_what_its_pauses_have_grown_to(self, client: redis.Redis) -> None:
        worker = opened(client)
        waits = []
        for _ in range(4):
            closed_again(client, worker)
            waits.append(worker.says(hard="down").remaining_ms)
        assert [round(wait / OPEN_MS / 1.05) for wait in waits] == [2, 4, 8, 8]
        closed_again(client, worker)
        passes(client, RULES.forget_ms + 1_000)
        assert worker.says(hard="down").trips == 1


class TestRaces:
    """One winner per transition, among processes and among threads."""

    def test_of_many_processes_that_fail_at_once_one_opens_it(self, client: redis.Redis) -> None:
        told = at_once(client, 24, _fail_often)
        assert sum(told) == 1
        assert history(client) == [(CLUSTER, "closed", "open")]
        assert Worker(client).looks().trips == 1

    def test_of_many_processes_one_probes(self, client: redis.Redis) -> None:
        opened(client)
        passes(client, 6_000)
        assert sorted(at_once(client, 24, _probe)).count(1) == 1
        assert [after for _, _, after in history(client)] == ["open", "half-open"]

    def test_of_many_threads_one_probes(self, client: redis.Redis) -> None:
        worker = opened(client)
        passes(client, 6_000)
        barrier, answers = threading.Barrier(16), []

        def ask(n: int) -> None:
            barrier.wait()
            answers.append(worker.probes(str(n)))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers).count("probe") == 1


def _fail_often(worker: Worker) -> int:
    return sum(worker.fails().changed for _ in range(50))


def _probe(worker: Worker) -> int:
    return int(worker.probes(worker.store._worker) == "probe")


def at_once(client: redis.Redis, count: int, act: Callable[[Worker], int]) -> list[int]:
    """What `act` returns in so many processes that begin at a barrier."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(count), context.Queue()
    address = client.connection_pool.connection_kwargs

    def run(n: int) -> None:
        own = redis.Redis(host=address["host"], port=address["port"])
        worker = Worker(own, f"worker {n}")
        barrier.wait(30)
        results.put(act(worker))

    processes = [context.Process(target=run, args=(n,)) for n in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]  # of one that failed nothing comes
    for process in processes:
        process.join(30)
    return found


class TestLoss:
    """Redis loses what it knew; the workers know."""

    def test_the_first_who_looks_restores_it_and_its_growth(self, client: redis.Redis) -> None:
        one = opened(client, rules=SLOW)
        passes(client, 600_000)
        one.probes()
        one.settles("fail")
        passes(client, 700_000)
        view = one.looks()
        assert 240_000 < view.remaining_ms <= 400_000
        two = Worker(client, "two")
        client.flushall()
        restored = one.knows()
        assert (restored.state, restored.trips, restored.changed) == ("open", 2, True)
        assert view.remaining_ms - 60_000 < restored.remaining_ms <= view.remaining_ms
        assert not two.knows().changed
        assert history(client) == [(CLUSTER, "closed", "open")]

    def test_a_replica_that_has_missed_it_learns_it(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.says(ok=1)
        before = client.dump(BASE + "cluster:st")
        worker.says(hard="down")
        client.restore(BASE + "cluster:st", 0, before, replace=True)  # type: ignore[arg-type]
        assert worker.knows().state == "open"

    def test_what_is_newer_in_redis_is_not_overwritten(self, client: redis.Redis) -> None:
        late = opened(client)
        closed_again(client, Worker(client, "other"))
        assert late.knows().state == "closed"

    def test_what_was_forced_is_restored(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.store.force(CLUSTER, "open", 60_000, "me", "a test")
        worker.looks()
        client.flushall()
        view = worker.knows()
        assert (view.shut, view.forced) == (True, "open")
        assert 50_000 < view.forced_ms <= 60_000

    def test_a_flush_of_scripts_is_not_noticed(self, client: redis.Redis) -> None:
        worker = opened(client)
        client.script_flush()
        assert worker.looks().state == "open"

    def test_a_clock_of_another_host_makes_no_outage_longer_than_it_may_be(self, client: redis.Redis) -> None:
        worker = opened(client)
        passes(client, -3_600_000)
        assert worker.looks().remaining_ms <= RULES.max_open_ms * 1.1
        passes(client, 45_000)
        assert worker.probes() == "probe"


def test_a_full_redis_hinders_nothing(client: redis.Redis) -> None:
    """It is full of what waits for the outage to end."""
    worker = opened(client)
    passes(client, 6_000)
    client.set("backlog", "x" * 3_000_000)
    client.config_set("maxmemory", 1_000_000)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("one", "more")
        for n in range(RULES.successes):
            assert worker.probes(f"good {n}") == "probe"
            assert worker.settles("ok", f"good {n}")[0]
        assert worker.looks().state == "closed"
        worker.store.force(CLUSTER, "open", 0, "me", "x")
        assert worker.looks().shut
    finally:
        client.config_set("maxmemory", 0)


class TestTopics:
    def test_a_topic_that_fails_while_the_cluster_serves_others_is_alone_in_it(self, client: redis.Redis) -> None:
        worker = Worker(client)
        for _ in range(RULES.threshold):
            worker.says(ok=5, topic=(0, 5))
        assert worker.views[TOPIC].state == "open"
        assert worker.views[CLUSTER].state == "closed"
        assert history(client) == [(TOPIC, "closed", "open")]

    def test_where_nobody_succeeds_it_is_the_clusters(self, client: redis.Redis) -> None:
        worker = Worker(client)
        for _ in range(RULES.threshold):
            worker.says(fail=5, topic=(0, 5))
        assert worker.views[CLUSTER].state == "open"
        assert worker.views[TOPIC].state == "closed"

    def test_while_the_cluster_is_open_no_topic_is_probed(self, client: redis.Redis) -> None:
        worker = Worker(client)
        for _ in range(RULES.threshold):
            worker.says(ok=5, topic=(0, 5))
        worker.says(hard="down")
        passes(client, 6_000)
        assert worker.probes("x", TOPIC) == "denied"
        assert worker.probes("y") == "probe"

    def test_everybody_learns_of_it(self, client: redis.Redis) -> None:
        worker = Worker(client)
        for _ in range(RULES.threshold):
            worker.says(ok=5, topic=(0, 5))
        other = Worker(client, "other")
        assert other.views[TOPIC].shut

    def test_there_is_a_bound_to_them(self, client: redis.Redis) -> None:
        worker = Worker(client)
        reports = [Counted(CLUSTER, ok=1), *(Counted(f"topic:t{n}", fail=1, row=1) for n in range(500))]
        worker.store.report(reports)
        assert client.zcard(BASE + "topics") == 200
        assert len(list(client.scan_iter(BASE + "topic:*:st"))) == 200

    def test_one_that_is_well_for_long_is_forgotten(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.says(ok=1, topic=(0, 1))
        passes(client, 660_000)
        worker.looks()
        assert TOPIC not in worker.views
        assert client.zcard(BASE + "topics") == 0


class TestForcing:
    def test_open_and_closed_and_automatic_again(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.store.force(CLUSTER, "open", 0, "me", "maintenance")
        assert worker.looks().shut
        assert worker.probes() == "denied", "a person's word is not looked behind"
        assert not worker.fails(10).changed or worker.looks().shut
        worker.store.force(CLUSTER, "closed", 0, "me", "it works, I know")
        assert not worker.looks().shut
        worker.store.force(CLUSTER, "", 0, "me", "done")
        assert [(before, after) for _, before, after in history(client) if "forced" in before + after] == [
            ("closed", "forced open"),
            ("forced open", "forced closed"),
            ("forced closed", "auto"),
        ] or history(client)

    def test_underneath_the_circuit_goes_on_counting(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.store.force(CLUSTER, "closed", 0, "me", "all through")
        worker.looks()
        view = worker.says(hard="down")
        assert (view.state, view.shut) == ("open", False)
        worker.store.force(CLUSTER, "", 0, "me", "done")
        assert worker.looks().shut

    def test_what_arrives_while_it_is_forced_closed_closes_it_underneath(self, client: redis.Redis) -> None:
        """Nobody probes meanwhile."""
        worker = opened(client)
        worker.store.force(CLUSTER, "closed", 0, "me", "it works")
        worker.looks()
        assert worker.says(ok=5).state == "open"
        passes(client, 6_000)
        assert worker.says(ok=5, fail=1).state == "open"
        assert worker.says(ok=5).state == "closed"

    def test_it_ends_by_itself_and_says_so(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.store.force(CLUSTER, "open", 3_600_000, "me", "for an hour")
        passes(client, 3_540_000)
        assert worker.looks().shut
        passes(client, 120_000)
        view = worker.looks()
        assert (view.shut, view.changed) == (False, True)
        assert history(client)[-1] == (CLUSTER, "forced open", "auto")


class TestGate:
    """What a claim reads."""

    def read(self, client: AnyRedis) -> tuple[str, int]:
        shut, ramp_at = client.hmget(BASE + "cluster:st", "shut", "ramp_at")
        return str(shut, "ascii"), int(float(ramp_at))

    def test_it_is_shut_while_the_circuit_is_not_closed(self, client: redis.Redis) -> None:
        worker = opened(client)
        assert self.read(client) == ("1", 0)
        passes(client, 6_000)
        worker.probes()
        assert self.read(client) == ("1", 0)

    def test_when_it_opens_it_says_since_when(self, client: redis.Redis) -> None:
        worker = opened(client)
        closed_again(client, worker)
        shut, since = self.read(client)
        assert shut == "0"
        assert abs(int(client.time()[0]) * 1000 - since) < 2_000

    def test_a_persons_word_comes_first(self, client: redis.Redis) -> None:
        worker = opened(client)
        worker.store.force(CLUSTER, "closed", 0, "me", "x")
        assert self.read(client)[0] == "0"
        worker.store.force(CLUSTER, "open", 0, "me", "x")
        assert self.read(client)[0] == "1"


def _now_ms(client: redis.Redis) -> int:
    seconds, microseconds = client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


class TestViews:
    """What an application and an operator read, without a script."""

    def read(self, client: redis.Redis, *scopes: str) -> list[circuits.Circuit]:
        return circuits.read(Direct(client), "default", scopes or (CLUSTER,))  # type: ignore[arg-type]

    def test_nothing_known_is_closed(self, client: redis.Redis) -> None:
        assert self.read(client) == [circuits.Circuit(CLUSTER, "closed")]

    def test_an_open_one_says_when_to_look_again_and_why(self, client: AnyRedis) -> None:
        opened(client, "w1", SLOW)
        before = _now_ms(client)
        (seen,) = self.read(client)
        after = _now_ms(client)
        assert (seen.state, seen.why, seen.by, seen.trips) == ("open", "down", "w1", 1)
        since, till = map(float, client.hmget(BASE + "cluster:st", "since", "till"))
        assert SLOW.open_ms <= till - since <= SLOW.open_ms * 1.1
        assert (till - after) / 1000 <= seen.retry_after <= (till - before) / 1000

    def test_one_whose_time_is_over_is_half_open_whoever_has_not_looked_yet(self, client: redis.Redis) -> None:
        opened(client)
        passes(client, 6_000)
        (seen,) = self.read(client)
        assert (seen.state, seen.retry_after) == ("half-open", 0)

    def test_a_forced_one_shows_what_was_found(self, client: redis.Redis) -> None:
        opened(client).store.force(CLUSTER, "closed", 60_000, "me", "because")
        (seen,) = self.read(client)
        assert (seen.state, seen.found, seen.forced, seen.by, seen.why) == ("closed", "open", "closed", "me", "because")
        passes(client, 61_000)
        assert self.read(client)[0].forced == ""

    def test_all_keys_lie_in_one_slot(self, client: AnyRedis) -> None:
        worker = Worker(client)
        for _ in range(RULES.threshold):
            worker.says(ok=1, topic=(0, 5))
        worker.says(hard="down")
        passes(client, 6_000)
        worker.probes()
        worker.store.force(TOPIC, "open", 0, "me", "x")
        keys = [key.decode() for key in client.keys("*")]
        assert {re.sub(r".*\{(.*)\}.*", r"\1", key) for key in keys} == {"default"}
        assert all(key.startswith(BASE) for key in keys)
        assert len(keys) >= 5

    def test_nothing_goes_by_the_clock_of_a_worker(self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        """Clocks of hosts differ: only Redis's tells when; workers only measure how long."""
        for operation in ("report", "admit", "settle", "force"):
            assert "os.time" not in source(operation)
            assert "math.random" not in source(operation)
        for hours in (-1, 1):
            with monkeypatch.context() as wrong:
                wrong.setattr(time, "time", lambda h=hours: 1_000_000 + 3600 * h)
                wrong.setattr(time, "time_ns", lambda h=hours: (1_000_000 + 3600 * h) * 10**9)
                client.flushall()
                worker = opened(client)
                assert worker.probes() == "denied"
                passes(client, 6_000)
                assert worker.probes() == "probe"


Step = tuple[int, int, int, bool, bool]
steps = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.integers(0, 30),
        st.integers(0, 30),
        st.booleans(),
        st.integers(0, 9).map(lambda n: n == 0),
    ),
    max_size=25,
)


@given(history=steps)
@hypothesis_settings(
    max_examples=examples(300, least=60),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_one_process_by_itself_judges_as_the_fleet_does(redis_client: redis.Redis, history: list[Step]) -> None:
    """The same history, seconds apart, by the rules in Python and by those in Lua."""
    redis_client.flushall()
    worker = Worker(redis_client)
    local = LocalCircuit(RULES, dice=lambda: 0.0)
    passed = 0
    for seconds, ok, fail, row, hard in history:
        passes(redis_client, seconds * 1000)
        passed += seconds * 1000
        at = _settled_moment(redis_client)
        tail = bool(fail and (row or not ok))
        report = [Counted(CLUSTER, worker.views[CLUSTER].epoch, ok, fail, int(tail), hard="down" if hard else "")]
        _, (fleet, *_) = worker.store.report(report)
        assume(int(redis_client.time()[0]) == at // 1000)  # else one may have counted it in the next bucket
        worker.views[CLUSTER] = fleet
        local.report(at + passed, ok, fail, tail, "down" if hard else "")
        assert (fleet.state, fleet.why) == (local.state, local.why)
        if fleet.state == "open":
            return


def _settled_moment(client: redis.Redis) -> int:
    """Redis's time (ms), not within a hair's breadth of the next bucket."""
    while True:
        seconds, microseconds = client.time()
        if microseconds < 980_000:
            return int(seconds) * 1000 + int(microseconds) // 1000


def test_the_twin_goes_through_the_same_states() -> None:
    local = LocalCircuit(RULES, dice=lambda: 0.0)
    assert local.report(0, 0, 1, True, "down")
    assert not local.due(OPEN_MS - 1)
    assert local.due(OPEN_MS)
    local.begin()
    local.settle(OPEN_MS, ok=False)
    assert (local.state, local.till) == ("open", OPEN_MS + 2 * OPEN_MS)
    local.arrived(OPEN_MS + 1)
    assert local.due(OPEN_MS + 1)
    local.begin()
    for _n in range(RULES.successes):
        assert local.state == "half-open"
        local.settle(20_000, ok=True)
    assert local.state == "closed"
