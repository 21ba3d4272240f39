"""What Redis loses of the circuits the workers restore, and a full one hinders nothing."""

from __future__ import annotations

import pytest
import redis

from integration.circuits.fleet import BASE, CLUSTER, RULES, SLOW, TOPIC, Worker, closed_again, history, opened, passes


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
        worker.store.force(CLUSTER, "open", 3_600_000, "me", "a test")
        worker.looks()
        client.flushall()
        view = worker.knows()
        assert (view.shut, view.forced) == (True, "open")
        assert 3_000_000 < view.forced_ms <= 3_600_000

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


class TestTheNewestHolds:
    """Redis loses everything. Some workers have seen that a circuit is closed again, or automatic; others have not."""

    @pytest.mark.parametrize("first", ["who knows the newest", "who does not"])
    @pytest.mark.parametrize("scope", [CLUSTER, TOPIC])
    def test_what_was_forced_and_is_automatic_again_stays_so(self, client: redis.Redis, first: str, scope: str) -> None:
        old, new = Worker(client, "old"), Worker(client, "new")
        old.store.force(scope, "open", 0, "me", "maintenance")
        old.looks()
        new.store.force(scope, "", 0, "me", "done")
        new.looks()
        client.flushall()
        for worker in (new, old) if first == "who knows the newest" else (old, new):
            worker.knows()
        for worker in new, old:
            worker.looks()
            assert not worker.views[scope].shut
            assert worker.views[scope].forced == ""

    @pytest.mark.parametrize("first", ["who knows the newest", "who does not"])
    def test_what_was_open_and_is_closed_stays_so(self, client: redis.Redis, first: str) -> None:
        old, new = opened(client, "old"), Worker(client, "new")
        closed_again(client, new)
        client.flushall()
        for worker in (new, old) if first == "who knows the newest" else (old, new):
            worker.knows()
        assert (new.looks().state, old.looks().state) == ("closed", "closed")

    def test_what_was_automatic_and_is_forced_is_forced(self, client: redis.Redis) -> None:
        old, new = Worker(client, "old"), Worker(client, "new")
        old.store.force(CLUSTER, "closed", 0, "me", "first")
        old.looks()
        new.store.force(CLUSTER, "open", 60_000, "me", "maintenance")
        new.looks()
        client.flushall()
        for worker in new, old:
            worker.knows()
        assert old.looks().forced == new.looks().forced == "open"
        assert 0 < new.views[CLUSTER].forced_ms <= 60_000

    def test_nobody_tells_it_twice(self, client: redis.Redis) -> None:
        workers = [opened(client, "one"), Worker(client, "two")]
        client.flushall()
        for worker in workers * 3:
            worker.knows()
        assert history(client) == [(CLUSTER, "closed", "open")]
