"""What the scripts of leases keep and answer, rule by rule, where no worker would show it at once."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis

from integration.leases.workers import digest, points
from kafka_delivery_worker.lease import script

LEASES, HELD, DEATHS, POISON, CLOCK, BEGAN, ENDED = "leases", "held", "deaths", "poison", "clock", "began", "ended"
LEASE_MS = 60_000
"""No machine takes so long from one statement to the next."""


def now_ms() -> int:
    return int(time.time() * 1000)


def message(name: str) -> str:
    return f'{{"body": "{name}", "properties": {{"delivery_tag": "{name}"}}}}'


class TestReap:
    @pytest.fixture(autouse=True)
    def a_worker(self, redis_client: redis.Redis) -> None:
        self.client = redis_client
        self.client.zadd(LEASES, {"w": now_ms() - 1})
        self.client.hset(HELD, mapping={"1.1:list": message("a"), "1.2:list": message("b"), "2.1:list": message("c")})

    def reap(self, died: bool = True, max_deaths: int = 3, tags: tuple[str, ...] = ()) -> list[int]:
        arguments: tuple[str | int, ...] = ("w", "", max_deaths, max_deaths - 1, LEASE_MS, "1" if died else "0", *tags)
        keys = (LEASES, HELD, DEATHS, POISON, BEGAN, ENDED)
        answer: list[int] = self.client.eval(script("reap"), len(keys), *keys, *arguments)
        return answer

    def next(self) -> list[str]:
        """What the list holds, the next one first."""
        found: Any = self.client.lrange("list", 0, -1)
        return [item.decode().split('"')[3] for item in reversed(found)]

    def test_the_oldest_is_the_next(self) -> None:
        assert self.reap() == [3, 0]
        assert self.next() == ["a", "b", "c"]
        assert self.client.exists(HELD, LEASES) == 0

    def test_one_that_is_given_back_leaves_the_others_and_the_lease(self) -> None:
        assert self.reap(died=False, tags=("1.2:list",)) == [1, 0]
        assert self.next() == ["b"]
        assert sorted(self.client.hkeys(HELD)) == [b"1.1:list", b"2.1:list"]
        assert self.client.zscore(LEASES, "w") is not None

    def test_what_is_given_back_twice_is_returned_once(self) -> None:
        assert self.reap(died=False, tags=("9.9:list", "1.1:list")) == [1, 0]
        assert self.next() == ["a"]

    def test_a_worker_that_stops_causes_no_deaths(self) -> None:
        assert self.reap(died=False, max_deaths=1) == [3, 0]
        assert self.client.exists(DEATHS) == 0

    def test_each_death_counts_once(self) -> None:
        assert self.reap(max_deaths=2) == [3, 0]
        assert self.client.hgetall(DEATHS) == {digest(message(name)).encode(): b"10" for name in "abc"}

    def test_one_that_kills_too_often_is_poison(self) -> None:
        self.client.hset(DEATHS, digest(message("b")), points(1))
        assert self.reap(max_deaths=2) == [2, 1]
        assert self.client.lrange(POISON, 0, -1) == [b"list\n" + message("b").encode()]
        assert self.next() == ["a", "c"]

    def test_what_is_poison_is_not_remembered_any_more(self) -> None:
        assert self.reap(max_deaths=1) == [0, 3]
        assert self.client.exists(DEATHS) == 0

    def test_deaths_are_forgotten_after_a_day(self) -> None:
        self.client.delete(HELD)
        self.client.hset(HELD, "1.1:list", message("a"))
        self.reap()
        assert self.client.ttl(DEATHS) == pytest.approx(86_400, abs=60)

    def test_a_lease_that_lasts_is_left_alone(self) -> None:
        self.client.zadd(LEASES, {"w": now_ms() + LEASE_MS})
        assert self.reap() == [-1, 0]
        assert self.client.hlen(HELD) == 3
        assert self.reap(died=False) == [3, 0]

    def test_one_without_a_lease_is_reaped(self) -> None:
        self.client.delete(LEASES)
        assert self.reap() == [3, 0]


class TestRenew:
    @pytest.fixture(autouse=True)
    def with_redis(self, redis_client: redis.Redis) -> None:
        self.client = redis_client

    def renew(self, worker: str = "w") -> tuple[int, list[bytes]]:
        answer: Any = self.client.eval(script("renew"), 3, LEASES, CLOCK, BEGAN, worker, LEASE_MS)
        return answer[0], answer[1]

    def clock(self, beat: int, since: int) -> None:
        self.client.hset(CLOCK, mapping={"beat": now_ms() + beat, "since": now_ms() + since})

    @property
    def since(self) -> int:
        """When somebody began to renew without a gap, as seen from now."""
        found = self.client.hget(CLOCK, "since")
        assert found is not None
        return int(found) - now_ms()

    def test_a_gap_begins_anew(self) -> None:
        self.clock(beat=-LEASE_MS, since=-10 * LEASE_MS)
        self.renew()
        assert abs(self.since) < LEASE_MS / 2

    def test_no_gap_goes_on(self) -> None:
        self.clock(beat=0, since=-10 * LEASE_MS)
        self.renew()
        assert self.since < -9 * LEASE_MS

    def test_a_clock_that_was_set_back_begins_anew(self) -> None:
        self.clock(beat=10 * LEASE_MS, since=-10 * LEASE_MS)
        self.renew()
        assert abs(self.since) < LEASE_MS / 2

    def test_a_beginning_that_has_not_come_yet_begins_anew(self) -> None:
        self.clock(beat=0, since=10 * LEASE_MS)
        self.renew()
        assert abs(self.since) < LEASE_MS / 2

    def test_the_lease_of_a_clock_that_was_wrong_is_cut(self) -> None:
        self.clock(beat=10 * LEASE_MS, since=0)
        self.client.zadd(LEASES, {"dead": now_ms() + 10 * LEASE_MS})
        self.renew()
        assert self.client.zscore(LEASES, "dead") == pytest.approx(now_ms() + LEASE_MS, abs=LEASE_MS / 2)

    def test_a_lease_of_more_than_a_day_is_cut_whatever_the_clock_says(self) -> None:
        self.client.zadd(LEASES, {"dead": now_ms() + 36 * 3_600_000, "long": now_ms() + 12 * 3_600_000})
        self.renew()
        assert self.client.zscore(LEASES, "dead") == pytest.approx(now_ms() + LEASE_MS, abs=LEASE_MS / 2)
        assert self.client.zscore(LEASES, "long") == pytest.approx(now_ms() + 12 * 3_600_000, abs=LEASE_MS / 2)

    def test_leases_are_called_over_after_a_whole_lease_of_renewals(self) -> None:
        self.client.zadd(LEASES, {"dead": now_ms() - 1})
        self.clock(beat=0, since=-LEASE_MS // 2)
        assert self.renew()[1] == []
        self.clock(beat=0, since=-LEASE_MS - 1)
        assert self.renew()[1] == [b"dead"]

    def test_the_next_look_is_when_the_next_lease_may_be_over(self) -> None:
        self.clock(beat=0, since=-10 * LEASE_MS)
        self.client.zadd(LEASES, {"other": now_ms() + LEASE_MS // 3})
        assert self.renew()[0] == pytest.approx(LEASE_MS / 3, abs=LEASE_MS / 6)

    def test_the_next_look_waits_for_a_whole_lease_of_renewals(self) -> None:
        self.client.zadd(LEASES, {"other": now_ms() + LEASE_MS // 3})
        assert self.renew()[0] == pytest.approx(LEASE_MS, abs=LEASE_MS / 6)
