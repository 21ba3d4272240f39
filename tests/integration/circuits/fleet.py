"""A worker process as the circuits in Redis see it, and time that goes by."""

from __future__ import annotations

import json

import pytest
import redis

from kafka_delivery.settings import Settings
from kafka_delivery_worker.breaker import store
from kafka_delivery_worker.breaker.rules import Rules
from kafka_delivery_worker.breaker.store import CircuitStore, Counted, View
from servers import AnyRedis

CLUSTER = "cluster"
TOPIC = "topic:orders"


BASE = "kafka-delivery:cb:1:{default}:"


RULES = Rules.of(Settings(reset_timeout_s=5, reset_timeout_max_s=40))


OPEN_MS = 5_000


SLOW = Rules.of(Settings(reset_timeout_s=500, reset_timeout_max_s=4_000))
"""For what must not have come yet: no machine takes a minute from one statement to the next."""


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


_PASSES = """
local ms = tonumber(ARGV[1])
for _, key in ipairs(redis.call('KEYS', KEYS[1] .. '*')) do
  local kind = string.match(key, '([^:]*)$')
  if kind == 'st' then
    for _, name in ipairs({'since', 'till', 'ok_at', 'streak_at', 'ramp_at', 'forced_till', 'forced_at', 'probe_at'}) do
      if tonumber(redis.call('HGET', key, name) or 0) ~= 0 then redis.call('HINCRBYFLOAT', key, name, -ms) end
    end
  elseif kind == 'f' then
    for _, worker in ipairs(redis.call('HKEYS', key)) do redis.call('HINCRBYFLOAT', key, worker, -ms) end
  elseif kind == 'w' then
    local buckets = redis.call('HVALS', key)
    redis.call('DEL', key)
    for _, value in ipairs(buckets) do
      local at, counts = string.match(value, '^(%d+)(|.*)$')
      local bucket = at - ms / 1000
      redis.call('HSET', key, bucket % 10, string.format('%.0f%s', bucket, counts))
    end
  elseif redis.call('TYPE', key).ok == 'zset' then
    for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do redis.call('ZINCRBY', key, -ms, member) end
  end
end
"""


def passes(client: AnyRedis, ms: int) -> None:
    """So much time goes by."""
    assert ms % 1000 == 0, "a bucket of a window is a second"
    client.eval(_PASSES, 1, BASE, ms)


def stays(client: redis.Redis, *names: str) -> None:
    """These count as alive for most of a minute, which five seconds without a report would end."""
    client.zadd(BASE + "workers", dict.fromkeys(names, now_ms(client) + 50_000))


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


class RedisClock:
    """Redis's clock, as a test sets it: the scripts read a key instead."""

    KEY = "a test's clock"

    def __init__(self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        self._client = client
        self.ms = now_ms(client)
        self.passes(0)
        read = store.source
        monkeypatch.setattr(store, "source", lambda operation: self.set_in(read(operation)))

    def set_in(self, script: str) -> str:
        """`script`, by this clock."""
        changed = script.replace("redis.call('TIME')", f'cjson.decode(redis.call("GET", "{self.KEY}"))')
        assert changed != script
        return changed

    def passes(self, ms: int) -> None:
        """So much time goes by; or it steps, to another host's clock."""
        self.ms += ms
        self._client.set(self.KEY, json.dumps([self.ms // 1000, self.ms % 1000 * 1000]))


def now_ms(client: redis.Redis) -> int:
    seconds, microseconds = client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000
