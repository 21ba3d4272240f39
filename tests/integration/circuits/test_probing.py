"""One probe at a time shows whether a circuit may close, and of many who look there is one winner."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable

import pytest
import redis

from integration.circuits.fleet import (
    BASE,
    CLUSTER,
    OPEN_MS,
    RULES,
    SLOW,
    Worker,
    closed_again,
    history,
    opened,
    passes,
    stays,
)


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
        stays(client, "two")
        one.fails(RULES.threshold)
        two.fails()
        one.says(late=1)
        for n in range(RULES.successes):
            assert one.probes(f"good {n}") == "probe"
            one.settles("ok", f"good {n}")
        assert one.looks().state == "closed"
        assert two.looks().state == "closed"
        stays(client, "two")
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
        worker.probes("lost", lease_ms=250_000)
        for _ in range(14):
            assert worker.probes("next") == "denied"
            passes(client, 10_000)
        passes(client, 120_000)
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


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
class TestRaces:
    """One winner per transition, among processes and among threads."""

    def test_of_many_processes_that_fail_at_once_one_opens_it(self, client: redis.Redis) -> None:
        told = at_once(client, 12, _fail_often)
        assert sum(told) == 1
        assert history(client) == [(CLUSTER, "closed", "open")]
        assert Worker(client).looks().trips == 1

    def test_of_many_processes_one_probes(self, client: redis.Redis) -> None:
        opened(client)
        passes(client, 6_000)
        assert sorted(at_once(client, 12, _probe)).count(1) == 1
        assert [after for _, _, after in history(client)] == ["open", "half-open"]

    def test_of_many_threads_one_probes(self, client: redis.Redis) -> None:
        worker = opened(client)
        passes(client, 6_000)
        barrier, answers = threading.Barrier(16), []

        def ask(n: int) -> None:
            barrier.wait(60)
            answers.append(worker.probes(str(n)))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(answers).count("probe") == 1


def _fail_often(worker: Worker) -> int:
    return sum(worker.fails().changed for _ in range(10))


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
        barrier.wait(60)
        results.put(act(worker))

    processes = [context.Process(target=run, args=(n,)) for n in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]  # of one that failed nothing comes
    for process in processes:
        process.join(60)
    return found
