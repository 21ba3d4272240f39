"""What opens the circuit of the cluster, and what does not."""

from __future__ import annotations

import redis

from integration.circuits.fleet import (
    CLUSTER,
    OPEN_MS,
    RULES,
    SLOW,
    Worker,
    closed_again,
    opened,
    passes,
    stays,
)


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
        stays(client, "good")
        for _ in range(20):
            assert bad.says(fail=50).state == "closed"
        assert bad.says(hard="down").state == "closed"
        assert good.looks().state == "closed"
        assert bad.alive == 2

    def test_two_that_fail_open_it(self, client: redis.Redis) -> None:
        one, two = Worker(client, "one"), Worker(client, "two")
        stays(client, "two")
        assert one.fails(10).state == "closed"
        assert two.fails().state == "open"

    def test_a_stall_that_two_see_opens_it(self, client: redis.Redis) -> None:
        one, two = Worker(client, "one"), Worker(client, "two")
        stays(client, "two")
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
        worker = opened(client, rules=SLOW)
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
        stays(client, "two")
        one.fails(10)
        assert two.fails().changed
        assert not one.looks().changed
