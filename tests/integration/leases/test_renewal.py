"""A lease is over when its worker is gone, and not when Redis, a clock or a renewal was late."""

from __future__ import annotations

import pytest
import redis

from integration.leases.workers import Worker, ends, leases_pass, long_renewed, message, now, publish, queued
from kafka_delivery import names
from servers import wait_until


class TestRenewal:
    def test_it_prolongs_the_lease_and_says_whose_is_over(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        dead, living = Worker(client), Worker(client)
        dead.claim()
        long_renewed(client)
        assert living.lease.renew().over == 0
        client.zadd(names.LEASES, {dead.lease.owner: now(client) - 1, living.lease.owner: now(client) - 1})
        before = now(client)
        assert living.lease.renew().over == 1
        assert queued(client) == sent
        assert before + 30_000 <= ends(client, living.lease.owner) <= now(client) + 30_000

    def test_without_renewals_for_a_while_no_lease_is_called_over(self, client: redis.Redis) -> None:
        """Redis was down, or hung: those who hold something could not renew, and may be alive."""
        sent = publish(client, message(1))
        silent, living = Worker(client, 300), Worker(client, 300)
        silent.claim()
        long_renewed(client)
        client.hset(names.LEASE_CLOCK, "beat", now(client) - 200_000)
        client.zadd(names.LEASES, {silent.lease.owner: now(client) - 150_000})
        # A gap of half a lease while this one renews, too, proves nothing; then a whole lease without any does.
        for passed_ms in (100_000, 100_000, 200_000, 100_000, 100_000, 100_000):
            assert living.lease.renew().over == 0
            assert silent.holds == sent
            leases_pass(client, passed_ms)
        assert living.lease.renew().over == 1
        assert queued(client) == sent

    def test_one_who_renews_late_again_and_again_proves_nothing(self, client: redis.Redis) -> None:
        publish(client, message(1))
        silent, slow = Worker(client, 200), Worker(client, 200)
        silent.claim()
        for _ in range(5):
            assert slow.lease.renew().over == 0
            leases_pass(client, 150_000)
        assert ends(client, silent.lease.owner) < now(client)

    def test_the_first_worker_of_all_waits_for_a_whole_lease(self, client: redis.Redis) -> None:
        publish(client, message(1))
        dead, first = Worker(client, 0.3), Worker(client, 0.3)
        dead.claim()
        dead.dies()
        assert first.lease.renew().over == 0
        assert client.hgetall(names.LEASE_CLOCK)

    @pytest.mark.parametrize("wrong_ms", [3_600_000, 365 * 86_400_000])
    def test_a_clock_that_was_set_back_keeps_nothing_for_as_long_as_it_was_wrong(
        self, client: redis.Redis, wrong_ms: int
    ) -> None:
        sent = publish(client, message(1))
        dead, living = Worker(client, 300), Worker(client, 300)
        dead.claim()
        before = now(client) + wrong_ms
        client.hset(names.LEASE_CLOCK, mapping={"beat": before, "since": before - 600_000})
        client.zadd(names.LEASES, {dead.lease.owner: before + 200_000, living.lease.owner: before + 300_000})
        for _ in range(3):
            assert living.lease.renew().over == 0
            assert dead.holds == sent
            leases_pass(client, 100_000)
        assert living.lease.renew().over == 1
        assert queued(client) == sent

    def test_a_clock_that_was_set_forward_calls_no_lease_over(self, client: redis.Redis) -> None:
        publish(client, message(1))
        holder, living = Worker(client), Worker(client)
        holder.claim()
        before = now(client) - 3_600_000
        client.hset(names.LEASE_CLOCK, mapping={"beat": before, "since": before - 600_000})
        client.zadd(names.LEASES, {holder.lease.owner: before + 30_000, living.lease.owner: before + 30_000})
        assert living.lease.renew().over == 0
        assert len(holder.holds) == 1

    def test_it_says_when_the_next_lease_may_be_over(self, client: redis.Redis) -> None:
        """So that what a dead worker held comes back within its lease, not at the next look after it."""
        first, second = Worker(client, 3000), Worker(client, 3000)

        def looks_after(end: int) -> bool:
            """Whether the millisecond after `end` is the next at which it looks."""
            before = now(client)
            soonest_s = first.lease.renew().soonest_s
            return (end + 1 - now(client)) / 1000 <= soonest_s <= (end + 1 - before) / 1000

        long_renewed(client, since_ms=6_000_000)
        assert first.lease.renew().soonest_s == 3000.001, "its own lease is the next"
        client.zadd(names.LEASES, {second.lease.owner: (end := now(client) + 1_000_000)})
        assert looks_after(end)
        long_renewed(client, since_ms=1_000_000)
        since = int(client.hget(names.LEASE_CLOCK, "since") or 0)
        assert looks_after(since + 3_000_000), "before a whole lease has been renewed nobody looks"

    def test_a_lease_that_lies_in_a_far_future_ends(self, client: redis.Redis) -> None:
        publish(client, message(1))
        dead, living = Worker(client), Worker(client)
        dead.claim()
        client.zadd(names.LEASES, {dead.lease.owner: now(client) + 30 * 86_400_000})
        long_renewed(client)
        living.lease.renew()
        assert ends(client, dead.lease.owner) <= now(client) + 30_000

    def test_leases_of_another_length_are_left_alone(self, client: redis.Redis) -> None:
        """A setting is changed worker by worker."""
        long, short = Worker(client, 120), Worker(client, 2)
        long.lease.renew()
        long_renewed(client)
        short.lease.renew()
        assert ends(client, long.lease.owner) > now(client) + 100_000

    def test_whatever_fails_the_renewing_goes_on(
        self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        worker = Worker(client, 0.3)
        failures: list[Exception] = [ValueError("not Redis's"), redis.ConnectionError("gone"), RuntimeError("odd")]
        monkeypatch.setattr(worker.lease, "park_poison", lambda: failures and (_ for _ in ()).throw(failures.pop()))
        worker.lease.start()
        wait_until(lambda: not failures, 60, "three failures")
        client.delete(names.LEASES)
        wait_until(lambda: bool(client.exists(names.LEASES)), 60, "another renewal")
        assert [r.message for r in caplog.records if r.name == "kafka_delivery.lease"] == [
            f"lease.not_renewed error={kind}" for kind in ("RuntimeError", "ConnectionError", "ValueError")
        ]
        worker.lease.stop()
