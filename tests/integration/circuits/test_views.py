"""What a claim, an application and an operator read of a circuit."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import redis

from integration.circuits.fleet import (
    BASE,
    CLUSTER,
    RULES,
    SLOW,
    TOPIC,
    Direct,
    Worker,
    closed_again,
    now_ms,
    opened,
    passes,
)
from kafka_delivery import circuits
from kafka_delivery_worker.breaker.store import source
from kafka_delivery_worker.lease import script
from servers import AnyRedis


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
        before = now_ms(client)
        closed_again(client, worker)
        after = now_ms(client)
        shut, since = self.read(client)
        assert shut == "0"
        assert before <= since <= after

    def test_a_persons_word_comes_first(self, client: redis.Redis) -> None:
        worker = opened(client)
        worker.store.force(CLUSTER, "closed", 0, "me", "x")
        assert self.read(client)[0] == "0"
        worker.store.force(CLUSTER, "open", 0, "me", "x")
        assert self.read(client)[0] == "1"


class TestViews:
    """What an application and an operator read, without a script."""

    def read(self, client: redis.Redis, *scopes: str) -> list[circuits.Circuit]:
        return circuits.read(Direct(client), "default", scopes or (CLUSTER,))  # type: ignore[arg-type]

    def test_nothing_known_is_closed(self, client: redis.Redis) -> None:
        assert self.read(client) == [circuits.Circuit(CLUSTER, "closed")]

    def test_an_open_one_says_when_to_look_again_and_why(self, client: AnyRedis) -> None:
        opened(client, "w1", SLOW)
        before = now_ms(client)
        (seen,) = self.read(client)
        after = now_ms(client)
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
                worker = opened(client, rules=SLOW)
                assert worker.probes() == "denied"
                passes(client, 600_000)
                assert worker.probes() == "probe"


class TestLapsing:
    """A circuit that no worker looks at any more."""

    def test_is_told_as_one_that_the_next_record_shows(self, client: redis.Redis) -> None:
        worker = opened(client, rules=SLOW)
        (found,) = circuits.read(worker.store._redis, "default", [CLUSTER])
        assert found.state == "open"
        client.zadd(BASE + "workers", {"one": now_ms(client) - circuits.LAPSES_S * 1000 - 1_000})
        (found,) = circuits.read(worker.store._redis, "default", [CLUSTER])
        assert (found.state, found.retry_after) == ("half-open", 0)

    def test_holds_what_a_person_forced(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.store.force(CLUSTER, "open", 0, "me", "maintenance")
        client.delete(BASE + "workers")
        (found,) = circuits.read(worker.store._redis, "default", [CLUSTER])
        assert found.state == "open"

    def test_claims_and_readers_agree_on_when(self) -> None:
        (lapses,) = re.findall(r"^local LAPSES = (\d+)", script("claim"), re.MULTILINE)
        assert int(lapses) == circuits.LAPSES_S * 1000

    @pytest.mark.parametrize("operation", ["report", "admit", "settle"])
    def test_whatever_a_worker_asks_is_a_look(self, client: redis.Redis, operation: str) -> None:
        worker = opened(client)
        client.delete(BASE + "workers")
        asks: dict[str, Callable[[], object]] = {
            "report": worker.looks,
            "admit": worker.probes,
            "settle": lambda: worker.settles("ok"),
        }
        asks[operation]()
        assert client.zscore(BASE + "workers", "one") is not None

    def test_who_forces_it_is_no_worker(self, client: redis.Redis) -> None:
        worker = Worker(client)
        client.delete(BASE + "workers")
        worker.store.force(CLUSTER, "open", 0, "me", "maintenance")
        assert not client.exists(BASE + "workers")
