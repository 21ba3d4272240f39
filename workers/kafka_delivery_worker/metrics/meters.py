"""The numbers that a worker process keeps for its metrics: plain ones, cheap to add to.

A metric of prometheus_client costs microseconds for each record; these are made into metrics when somebody asks.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from math import inf
from time import time
from typing import Any

from confluent_kafka import KafkaError

from kafka_delivery.record import made_at_ms
from kafka_delivery.settings import Settings

from ..classify import verdict
from ..decoding import loads

log = logging.getLogger("kafka_delivery.metrics")

OTHER = "other"
"""Stands for all topics that have no numbers of their own."""

BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 7200.0
)  # fmt: skip
"""Upper ends, in seconds: an idle system takes 8 ms, a retry seconds, an outage minutes or hours."""

LONGEST_S = 90 * 86_400
"""An id that says more was not made by a clock, or not for this send."""

STATISTICS_MS = 10_000
"""How often librdkafka tells its statistics: at least once between two scrapes of Prometheus's usual 15 s."""

GIVEN_BACK = (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT)
"""No failures: a worker that stops reports what is in flight so, and returns it to the queue."""

TOTALS = ("txretries", "req_timeouts", "disconnects")
"""Statistics of a broker that only grow while a client lives."""

WINDOWS = ("rtt", "int_latency", "throttle")
"""Statistics of a broker about the time since the last statistics: count and sum."""


class Topics:
    """Names of topics for labels, of which there must not be too many: first come, first served.

    Args:
        most: how many topics keep their names; the others are OTHER.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._named: set[str] = set()

    def label(self, topic: str) -> str:
        """`topic`, if it has or gets numbers of its own; "" stands for records without one."""
        if topic in self._named or not topic:
            return topic
        if len(self._named) >= self._most:
            return OTHER
        self._named.add(topic)
        return topic


class EndToEnd:
    """A histogram of the time from the call of a send until its record was in the log.

    Of records whose id is a UUIDv7, which is the default: it says when it was made. It needs the clocks of applications
    and workers to agree.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self._sum_s = 0.0

    def arrived(self, message_id: str) -> None:
        """A record was delivered just now."""
        called_at = made_at_ms(message_id)
        if called_at is None:
            return
        seconds = time() - called_at / 1000
        if seconds > LONGEST_S:
            return
        with self._lock:
            self._counts[bisect_left(BUCKETS_S, seconds)] += 1
            if seconds > 0:
                self._sum_s += seconds

    def read(self) -> tuple[list[int], float]:
        """Records in each bucket, the last one without end; seconds of all of them."""
        with self._lock:
            return list(self._counts), self._sum_s


class Statistics:
    """What librdkafka says of its brokers, added up over the clients of one producer.

    A client that is replaced begins from nothing; what the earlier one counted stays counted. So it is with a broker: a
    client that has lost its last connection forgets all brokers, what it counted, and that this was a disconnect.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client = ""
        self._last: dict[tuple[str, str], int] = {}
        self._up: set[str] = set()
        self._totals: Counter[tuple[str, str]] = Counter()
        self._slowest: dict[str, float] = {}
        self.buffer_used = 0.0
        """The share of the client's buffer that is taken, in messages or in bytes."""

    def properties(self, s: Settings) -> dict[str, Any]:
        """What makes librdkafka tell them."""
        interval = s.producer.get("statistics.interval.ms", STATISTICS_MS)
        return {"stats_cb": self.take, "statistics.interval.ms": interval}

    def take(self, text: str) -> None:
        """Called by librdkafka, which would take an error here for one of its own."""
        try:
            self._take(loads(text))
        except Exception:
            log.exception("metrics.statistics_not_read")

    def _take(self, found: dict[str, Any]) -> None:
        with self._lock:
            if found["name"] != self._client:
                self._client, self._last, self._up = found["name"], {}, set()
            messages, size = found["msg_max"] or inf, found["msg_size_max"] or inf  # 0 is no limit
            self.buffer_used = max(found["msg_cnt"] / messages, found["msg_size"] / size)
            # Those without a number are addresses to begin with.
            brokers = {str(one["nodeid"]): one for one in found["brokers"].values() if one["nodeid"] >= 0}
            for forgotten in self._up - brokers.keys():
                self._totals["disconnects", forgotten] += 1
            self._up = {name for name, broker in brokers.items() if broker["state"] == "UP"}
            for name, broker in brokers.items():
                self._take_broker(name, broker)

    def _take_broker(self, name: str, found: dict[str, Any]) -> None:
        for statistic in TOTALS:
            before, now = self._last.get((statistic, name), 0), found[statistic]
            self._totals[statistic, name] += now - before if now >= before else now
            self._last[statistic, name] = now
        for statistic in WINDOWS:
            window = found[statistic]
            self._totals[f"{statistic}.cnt", name] += window["cnt"]
            self._totals[f"{statistic}.sum", name] += window["sum"]
        if found["rtt"]["cnt"]:
            self._slowest[name] = found["rtt"]["p99"]

    def read(self) -> tuple[Counter[tuple[str, str]], dict[str, float]]:
        """Totals by statistic and broker, of a window two, as ``rtt.cnt`` and ``rtt.sum`` (us); and by broker the 99th
        percentile of `rtt` (us) in the last window in which it answered."""
        with self._lock:
            return Counter(self._totals), dict(self._slowest)


class Meters:
    """All of them, of one process."""

    def __init__(self, s: Settings) -> None:
        self._lock = threading.Lock()
        self._topics = Topics(s.metrics_topics)
        self._records: Counter[tuple[str, str]] = Counter()
        self._errors: Counter[tuple[str, str]] = Counter()
        self.end_to_end = EndToEnd()
        self.statistics = Statistics()
        self.statistics_alone = Statistics()
        """Of the client that sends records one by one."""

    def counted(self, counts: Mapping[str, int]) -> None:
        """Records by ``<outcome>:<topic>``, since the last time."""
        with self._lock:
            for field, count in counts.items():
                outcome, _, topic = field.partition(":")
                self._records[outcome, self._topics.label(topic)] += count

    def failed(self, topic: str, code: int) -> None:
        """Kafka, or the client, reported a record as failed, with that code."""
        if code in GIVEN_BACK:
            return
        with self._lock:
            self._errors[verdict(code).name, self._topics.label(topic)] += 1

    def read(self) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
        """Records by outcome and topic; failures by name and topic."""
        with self._lock:
            return dict(self._records), dict(self._errors)
