"""Each key in Redis has a bound or an end: a thousand workers come and go, and what they leave behind does not grow.

Some stop in order, some die. The table in docs/operating.md says what bounds each key; one that it does not name fails.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from integration.circuits.fleet import RULES, Direct
from integration.leases.workers import QUEUE, Worker, message
from kafka_delivery import names
from kafka_delivery_worker import counts, paused
from kafka_delivery_worker.breaker.store import CircuitStore, Counted
from kafka_delivery_worker.counts import OTHER_TOPICS, OUTCOMES, Counts
from kafka_delivery_worker.failures import Failures
from servers import AnyRedis, wait_until

WORKERS = 1_000
LEASE_S = 0.2
DAY_MS, WEEK_MS = 86_400_000, 7 * 86_400_000

MINUTE_OF_WORKERS = 10_000
"""No test runs workers for longer than the minute in which those that reported are remembered."""

LIMITS: dict[str, tuple[str, int]] = {
    # What is left when nothing waits, as the table in docs/operating.md: "ends" within ms, or "size", or "empty".
    "kafka-delivery*": ("empty", 0),
    "kafka-delivery:delayed:1:*": ("empty", 0),
    "kafka-delivery:waiting:1": ("empty", 0),
    "kafka-delivery:waiting:1:*": ("empty", 0),
    "kafka-delivery:held:1:*": ("empty", 0),
    "kafka-delivery:leases:1": ("size", 1),
    "kafka-delivery:leases:1:*": ("size", 10),
    "kafka-delivery:leases:1:ended": ("ends", 4 * 60_000),
    "kafka-delivery:deaths:*": ("ends", DAY_MS),
    "kafka-delivery:poison:1": ("empty", 0),
    "kafka-delivery:poison:1:apart": ("ends", DAY_MS),
    "kafka-delivery:failed:1:*": ("ends", DAY_MS),
    "kafka-delivery:paused:1": ("ends", 150_000),
    "kafka-delivery:parked:1": ("empty", 0),
    "kafka-delivery:parked:1:at": ("empty", 0),
    "kafka-delivery:parked:1:room": ("size", 10),
    "kafka-delivery:parked:1:lock": ("ends", 10_000),
    "kafka-delivery:release:1:lock": ("ends", 10_000),
    "kafka-delivery:clusters:1": ("size", 10),
    "kafka-delivery:counts:1": ("size", counts.TOPICS * len(OUTCOMES) + len(OUTCOMES)),
    "kafka-delivery:redrive:1:*": ("empty", 0),
    "kafka-delivery:audit:1": ("size", 10_100),
    "kafka-delivery:gate": ("empty", 0),
    "kafka-delivery:cb:1:{*}:workers": ("size", MINUTE_OF_WORKERS),
    "kafka-delivery:cb:1:{*}:topics": ("size", 200),
    "kafka-delivery:cb:1:{*}:log": ("size", 1_200),
    "kafka-delivery:cb:1:{*}:*:st": ("ends", WEEK_MS),
    "kafka-delivery:cb:1:{*}:*:f": ("ends", WEEK_MS),
    "kafka-delivery:cb:1:{*}:*:w": ("ends", 2 * RULES.window_ms),
    "kafka-delivery:cb:1:{*}:*:p": ("ends", WEEK_MS),
    "celery-task-meta-*": ("ends", DAY_MS),
    "_kombu.binding*": ("size", 10),
    "*.pidbox": ("ends", 60_000),
    "unacked*": ("empty", 0),
}

SIZES = {"list": "llen", "hash": "hlen", "zset": "zcard", "set": "scard", "stream": "xlen", "string": "strlen"}


def kind_of(key: str) -> str:
    """The row of the table that a key belongs to: the most exact one.

    Raises:
        LookupError: the table does not name it.
    """
    found = [one for one in LIMITS if fnmatch.fnmatchcase(key, one)]
    found = [one for one in found if one != "kafka-delivery*" or ":" not in key]
    if not found:
        raise LookupError(f"{key} is not in the table of docs/operating.md: nobody has said what bounds it")
    return max(found, key=len)


def beyond(client: AnyRedis) -> list[str]:
    """Keys that are larger than they may be, or do not end."""
    wrong = []
    for raw in client.scan_iter(count=1000):
        key = raw.decode()
        how, limit = LIMITS[kind_of(key)]
        size = getattr(client, SIZES[client.type(key).decode()])(key)
        ends_ms = client.pttl(key)
        if (how == "ends" and not 0 <= ends_ms <= limit) or (how != "ends" and size > limit):
            wrong.append(f"{key}: {size} members, ends in {ends_ms} ms, {how} {limit}")
    return wrong


def come_and_go(client: redis.Redis, number: int) -> None:
    """A worker claims, reports, fails, pauses; every third dies."""
    worker = Worker(client, LEASE_S)
    direct = Direct(client)
    store = CircuitStore(direct, "default", RULES, f"host-{number}")  # type: ignore[arg-type]
    topic = f"{names.TOPIC_SCOPE}topic-{number // 4}"  # 250 in all, which is more than may have circuits
    client.lpush(QUEUE, message(f"m{number}"))
    claimed = worker.claim(1)
    failed = [Counted(topic, fail=1, row=1, hard="its replicas are away")] if number % 4 == 0 else []
    store.report([Counted(names.CLUSTER_SCOPE, ok=1), *failed])
    if failed and client.exists(circuit := f"{store.base}{topic}:st"):
        client.hset(circuit, "till", 1)  # its pause is over
    store.admit(topic, f"probe-{number}", 10)  # who dies leaves it
    Failures(direct, f"host-{number}").count(f"m{number}")  # type: ignore[arg-type]
    paused.say(direct, f"host-{number}", "its disk is full", 1)  # type: ignore[arg-type]
    if number % 3 == 0:  # dies
        return
    for tag in claimed.tags:
        worker.lease.settled(tag.decode())
    worker.lease.stop()
    store.leave()


def test_a_thousand_workers_come_and_go(redis_client: redis.Redis) -> None:
    survivor = Worker(redis_client, LEASE_S)
    left = []
    for number in range(WORKERS):
        come_and_go(redis_client, number)
        if number in (WORKERS // 2, WORKERS - 1):
            wait_until(lambda: all_over(redis_client, survivor), 60, "leases to be over")
            while (answer := survivor.claim(1_000)).tags or redis_client.llen(QUEUE):
                survivor.lease.untake_settled(survivor.lease.take_settled())
                for tag in answer.tags:
                    survivor.lease.settled(tag.decode())
                survivor.lease.flush()
            survivor.lease.flush()
            assert beyond(redis_client) == []
            left.append({kind_of(key.decode()) for key in redis_client.scan_iter(count=1000)})
    assert left[1] <= left[0]


def all_over(client: redis.Redis, survivor: Worker) -> bool:
    survivor.lease.renew()
    return client.zcard(names.LEASES) == 1


def test_every_name_of_ours_is_in_the_table() -> None:
    values = {value for value in vars(names).values() if isinstance(value, str)}
    for key in values - {names.KEY_PREFIX, names.REDRIVE_OFFSET}:  # the latter is a mark in Kafka
        if key.startswith(names.KEY_PREFIX):
            kind_of(key.format(cluster="c") + "workers" if "{" in key else key + "x" * key.endswith(":"))


def test_the_table_is_that_of_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
    section = text.partition("### What lies in Redis")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `([^`]+)` \|.*\| ([^|]+) \|$", section, re.MULTILINE))
    assert list(rows) == list(LIMITS)
    assert {one for one, bound in rows.items() if bound.startswith("ends") and "with the process" not in bound} == {
        one for one, (how, _) in LIMITS.items() if how == "ends"
    }


class TestCounts:
    def test_topics_without_end_are_counted_under_one_name(
        self, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(counts, "TOPICS", 3)
        for process in range(4):  # each has its own three
            counting = Counts(Direct(redis_client), 60)  # type: ignore[arg-type]
            for topic in range(100):
                for outcome in OUTCOMES:
                    counting.add(outcome, f"t{process}-{topic}")
            counting.stop()
        found = counts.read(redis_client)
        assert sorted(found) == [OTHER_TOPICS, "t0-0", "t0-1", "t0-2"]
        assert sum(sum(by_outcome.values()) for by_outcome in found.values()) == 4 * 100 * len(OUTCOMES)

    def test_one_that_is_counted_already_goes_on(
        self, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(counts, "TOPICS", 1)
        redis_client.hset(names.COUNTS, mapping={f"delivered:old-{n}": 1 for n in range(20)})  # by an older version
        counting = Counts(Direct(redis_client), 60)  # type: ignore[arg-type]
        counting.add("delivered", "old-7")
        counting.add("parked", "new")
        counting.stop()
        found = counts.read(redis_client)
        assert (found["old-7"], found[OTHER_TOPICS]) == ({"delivered": 2}, {"parked": 1})

    def test_a_process_remembers_no_more_names_either_while_redis_is_away(
        self, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(counts, "TOPICS", 3)
        away = Direct(redis.Redis(port=1, retry=Retry(NoBackoff(), 0)))
        counting = Counts(away, 60)  # type: ignore[arg-type]
        for topic in range(100):
            counting.add("parked", f"t{topic}")
        counting.stop()
        assert counting._unwritten == {"parked:t0": 1, "parked:t1": 1, "parked:t2": 1, f"parked:{OTHER_TOPICS}": 97}
