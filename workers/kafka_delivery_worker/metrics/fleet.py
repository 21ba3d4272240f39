"""The metrics of the whole fleet: read from Redis when Prometheus asks, in bounded time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, time
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from kafka_delivery import circuits
from kafka_delivery.circuits import CLOSED, HALF_OPEN, OPEN
from kafka_delivery.faults import QUEUE_FAULTS
from kafka_delivery.names import CLUSTER_SCOPE
from kafka_delivery.record import made_at_ms
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings

from .. import backlog, counts
from ..backlog import Backlog
from ..breaker.store import alive
from ..broker import BrokerError
from ..parking import ParkingStore
from . import catalogue as names
from .meters import Topics
from .worker import outcomes

log = logging.getLogger("kafka_delivery.exporter")

REDIS_TIMEOUT_S = 3.0
"""For each answer of Redis, which a slow network may keep for seconds. One that hangs is given up after three of these,
before Prometheus's own ten seconds."""

UUID = 36
"""Characters; a dead letter's task id, and that of a part of a batch, have more behind it."""


class FleetCollector(Collector):
    """Makes metrics of what lies in Redis; of a Redis that does not answer, that it does not.

    Args:
        s: where Redis is.
        clock: seconds, for tests.
    """

    def __init__(self, s: Settings, clock: Callable[[], float] = monotonic) -> None:
        self._settings = s
        self._redis = RedisClient(s, REDIS_TIMEOUT_S)
        self._topics = Topics(s.metrics_topics)
        self._clock = clock
        self._first_seen: dict[str, tuple[str, float]] = {}
        self._fault = ""

    def collect(self) -> Iterable[Any]:
        """All of `catalogue.FLEET`, or only UP."""
        parts = (lambda: self._messages(backlog.read(self._redis)), self._records, self._circuits, self._memory)
        try:
            self._redis.client.ping()  # connects, or says at once that it cannot
            with ThreadPoolExecutor(
                len(parts), "kafka-delivery-exporter"
            ) as pool:  # a slow Redis counts once, not thrice
                answers = [pool.submit(lambda part=part: list(part())) for part in parts]  # type: ignore[misc]
            found = [one for answer in answers for one in answer.result()]
        except (*QUEUE_FAULTS, BrokerError) as error:
            self._say(type(error).__name__)
            return [names.UP.of(0)]
        self._say("")
        return [names.UP.of(1), *found]

    def describe(self) -> Iterable[Any]:
        """Asked for when it is registered, which must not need Redis."""
        return [metric.family() for metric in names.FLEET]

    def _say(self, fault: str) -> None:
        if fault != self._fault:  # once for each outage
            self._fault = fault
            if fault:
                log.warning("exporter.no_answer error=%s", fault)
            else:
                log.warning("exporter.answered")

    def _messages(self, found: Backlog) -> Iterable[Any]:
        waiting = names.WAITING.family()
        for queue, by_priority in found.waiting.items():
            for priority, count in by_priority.items():
                waiting.add_metric([queue, str(priority)], count)
        yield waiting
        for metric, by_queue in ((names.DELAYED, found.delayed), (names.DUE, found.due)):
            family = metric.family()
            for queue, count in (by_queue or {}).items():
                family.add_metric([queue], count)
            yield family
        next_due = names.NEXT_DUE.family()
        for queue, at in (found.next_due_ms or {}).items():
            if at is not None:
                next_due.add_metric([queue], (at - found.now_ms) / 1000)
        yield next_due
        leased = names.LEASED.family()
        if found.in_flight is not None:
            leased.add_metric([], found.in_flight)
        yield leased
        by_topic: Counter[str] = Counter()
        for topic, count in found.put_aside.items():
            by_topic[self._topics.label(topic)] += count
        put_aside = names.PUT_ASIDE.family()
        for topic, count in by_topic.items():
            put_aside.add_metric([topic], count)
        yield put_aside
        yield names.BACKLOG.of(
            sum(sum(by_priority.values()) for by_priority in found.waiting.values())
            + sum((found.due or {}).values())
            + (found.in_flight or 0)
            + sum(found.put_aside.values())
        )
        yield names.OLDEST.of(self._oldest_s(found.fronts))

    def _oldest_s(self, fronts: dict[str, str]) -> float:
        before, now = self._first_seen, self._clock()
        first_seen: dict[str, tuple[str, float]] = {}
        ages = [0.0]
        for name, task_id in fronts.items():
            seen = before.get(name)
            since = seen[1] if seen is not None and seen[0] == task_id else now
            first_seen[name] = task_id, since
            made_at = made_at_ms(task_id[:UUID])
            ages.append(now - since if made_at is None else time() - made_at / 1000)
        self._first_seen = first_seen  # whole: another scrape may be going on
        return max(ages)

    def _records(self) -> Iterable[Any]:
        records: Counter[tuple[str, str]] = Counter()
        for topic, by_outcome in sorted(counts.read(self._redis.client, self._redis.prefix).items()):
            for outcome, count in by_outcome.items():
                records[outcome, self._topics.label(topic)] += count
        yield outcomes(names.FLEET_RECORDS, records)
        yield names.DEAD_LETTERS.of(sum(n for (outcome, _), n in records.items() if outcome == "dead-lettered"))
        parked = ParkingStore.of(self._redis, self._settings).usage()
        yield names.PARKED.of(parked.items)
        yield names.PARKED_BYTES.of(parked.bytes)
        yield names.PARKED_MAX.of(parked.max_bytes)

    def _circuits(self) -> Iterable[Any]:
        cluster = self._settings.cluster
        scopes = [CLUSTER_SCOPE, *circuits.known_topics(self._redis, cluster)]
        state, forced = names.CIRCUIT.family(), names.FORCED.family()
        for one in circuits.read(self._redis, cluster, scopes):
            for each in (CLOSED, OPEN, HALF_OPEN):
                state.add_metric([one.scope, each], one.state == each)
            forced.add_metric([one.scope], bool(one.forced))
        yield from (state, forced)
        yield names.WORKERS.of(alive(self._redis, cluster))

    def _memory(self) -> Iterable[Any]:
        found = self._redis.client.info("memory")
        yield names.REDIS_USED.of(found["used_memory"])
        limit = names.REDIS_MAX.family()
        if found["maxmemory"]:
            limit.add_metric([], found["maxmemory"])
        yield limit


def registry(s: Settings) -> CollectorRegistry:
    """With the metrics of the fleet and nothing else."""
    made = CollectorRegistry()
    made.register(FleetCollector(s))
    return made
