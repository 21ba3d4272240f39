"""A worker process's own metrics, on a port of its own: made of what it knows when it is asked."""

from __future__ import annotations

import errno
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

from kafka_delivery.settings import MAX_PORT, Settings

from .. import counts
from ..engine import Engine
from . import catalogue as names
from .meters import BUCKETS_S, Meters

log = logging.getLogger("kafka_delivery.metrics")

PORTS = 100
"""How many are tried, from the one that was set on: as many processes of one host can have metrics."""

US = 1e-6


class WorkerCollector(Collector):
    """Makes metrics of an engine, its producers and its breaker."""

    def __init__(self, engine: Engine, meters: Meters) -> None:
        self._engine = engine
        self._meters = meters

    def collect(self) -> Iterable[Any]:
        """All of `catalogue.WORKER`."""
        yield from self._records()
        yield from self._brokers()
        yield from self._process()
        yield from self._breaker()

    def _records(self) -> Iterable[Any]:
        records, errors = self._meters.read()
        yield outcomes(names.RECORDS, records)
        failed = names.RECORD_ERRORS.family()
        for labels, count in errors.items():
            failed.add_metric(labels, count)
        yield failed
        buckets, seconds = self._meters.end_to_end.read()
        spread = names.END_TO_END.family()
        reached, ends = 0, []
        for end, count in zip((*map(str, BUCKETS_S), "+Inf"), buckets, strict=True):
            reached += count
            ends.append((end, reached))
        spread.add_metric([], ends, seconds)
        yield spread

    def _brokers(self) -> Iterable[Any]:
        told = (self._meters.statistics, self._meters.statistics_alone)
        totals: Counter[tuple[str, str]] = Counter()
        slowest: dict[str, float] = {}
        for statistics in told:
            some, slow = statistics.read()
            totals.update(some)
            slowest = {**slow, **slowest}  # of the one that sends nearly everything, where it says something
        brokers = sorted({broker for _, broker in totals})
        for metric, statistic, unit in (
            (names.RECORD_RETRIES, "txretries", 1),
            (names.REQUEST_TIMEOUTS, "req_timeouts", 1),
            (names.DISCONNECTS, "disconnects", 1),
            (names.THROTTLED, "throttle.sum", 1e-3),  # the one window in milliseconds
        ):
            family = metric.family()
            for broker in brokers:
                family.add_metric([broker], totals[statistic, broker] * unit)
            yield family
        for metric, window in ((names.REQUEST_LATENCY, "rtt"), (names.RECORD_QUEUE, "int_latency")):
            family = metric.family()
            for broker in brokers:
                family.add_metric([broker], totals[f"{window}.cnt", broker], totals[f"{window}.sum", broker] * US)
                if window == "rtt" and broker in slowest:
                    family.add_sample(metric.name, {"broker": broker, "quantile": "0.99"}, slowest[broker] * US)
            yield family
        yield names.BUFFERPOOL_USED.of(max(statistics.buffer_used for statistics in told))

    def _process(self) -> Iterable[Any]:
        producers = self._engine.producers
        yield names.BUFFERPOOL_WAIT.of(sum(one.waited_s for one in producers))
        yield names.IN_FLIGHT.of(sum(one.in_flight for one in producers))
        yield names.IN_FLIGHT_BYTES.of(sum(one.bytes_in_flight for one in producers))
        yield names.REBUILDS.of(sum(one.replaced for one in producers))
        build = names.BUILD.family()
        build.add_metric([version("celery-kafka-delivery")], 1)
        yield build

    def _breaker(self) -> Iterable[Any]:
        breaker = self._engine.breaker
        yield names.PAUSED.of(breaker.paused)
        standstill = names.STANDSTILL.family()
        for reason in ("client", "failures"):
            standstill.add_metric([reason], breaker.standstill.reason == reason)
        yield standstill
        yield names.VIEW_AGE.of(breaker.view_age_s)
        probes = names.PROBES.family()
        for outcome in ("ok", "fail", "ignore"):
            probes.add_metric([outcome], breaker.probed[outcome])
        yield probes
        rules = names.RULES.family()
        rules.add_metric([hashlib.sha256(breaker.rules.as_json().encode()).hexdigest()[:12]], 1)
        yield rules


def outcomes(metric: names.Metric, records: dict[tuple[str, str], int]) -> Any:
    """Records by outcome and topic. Of a topic that is known each outcome is told, so that the first is an increase."""
    family = metric.family()
    for topic in sorted({topic for _, topic in records}):
        for outcome in counts.OUTCOMES:
            family.add_metric([outcome, topic], records.get((outcome, topic), 0))
    return family


def serve(engine: Engine, s: Settings) -> int | None:
    """Answer Prometheus from a thread, on the first free port; None if there is none, which stops nobody's records."""
    assert engine.meters is not None  # noqa: S101  # for the type checker: the setting that brings us here made them
    registry = CollectorRegistry()
    registry.register(WorkerCollector(engine, engine.meters))
    ProcessCollector(registry=registry)
    for port in range(s.metrics_port, min(s.metrics_port + PORTS, MAX_PORT + 1)):
        try:
            start_http_server(port, s.metrics_address, registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            log.error("metrics.not_served address=%s port=%d error=%s", s.metrics_address, port, error)
            return None
        log.warning("metrics.served address=%s port=%d", s.metrics_address, port)
        return port
    log.error("metrics.not_served address=%s first_port=%d error=all are in use", s.metrics_address, s.metrics_port)
    return None
