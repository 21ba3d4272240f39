"""All metrics by name, with what they mean. The page of metrics is made from this, and a test holds that there are no
others, neither here nor in the dashboard and the alerts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)

FAMILIES: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
    "summary": SummaryMetricFamily,
}


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric; its name ends in its unit, a counter's in ``_total``.

    Attributes:
        name: as in queries.
        kind: one of FAMILIES.
        help: what it means.
        labels: what it is divided by.
        java: the producer metric of the Java client that people look for.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    java: str = ""

    def family(self) -> Any:
        """An empty one, to add samples to."""
        return FAMILIES[self.kind](self.name, self.help, labels=self.labels)

    def of(self, value: float) -> Any:
        """With one sample, where there are no labels."""
        family = self.family()
        family.add_metric([], value)
        return family


# -- of a worker process
RECORDS = Metric(
    "kafka_delivery_records_total",
    "counter",
    "Records by what became of them here: delivered, retried, deferred, dead-lettered, parked",
    ("outcome", "topic"),
)
RECORD_ERRORS = Metric(
    "kafka_delivery_record_errors_total",
    "counter",
    "Records that Kafka or the client reported as failed, by Kafka's name of the error; not those given back at a stop",
    ("error", "topic"),
    "record-error-rate",
)
RECORD_RETRIES = Metric(
    "kafka_delivery_record_retries_total",
    "counter",
    'Requests that librdkafka sent again by itself; retries of the worker are records of outcome "retried"',
    ("broker",),
    "record-retry-rate",
)
REQUEST_LATENCY = Metric(
    "kafka_delivery_request_latency_seconds",
    "summary",
    "Time until a broker answered a request; the quantile is of the last ten seconds with an answer",
    ("broker",),
    "request-latency-avg",
)
BUFFERPOOL_WAIT = Metric(
    "kafka_delivery_bufferpool_wait_seconds_total",
    "counter",
    "Time that records waited for room in librdkafka's buffer",
    java="bufferpool-wait-time-total",
)
BUFFERPOOL_USED = Metric(
    "kafka_delivery_bufferpool_used_ratio",
    "gauge",
    "Share of librdkafka's buffer that is taken, in messages or in bytes",
)
RECORD_QUEUE = Metric(
    "kafka_delivery_record_queue_seconds",
    "summary",
    "Time that a record spent in librdkafka's buffer before its request was made",
    ("broker",),
    "record-queue-time-avg",
)
REQUEST_TIMEOUTS = Metric(
    "kafka_delivery_request_timeouts_total", "counter", "Requests that a broker did not answer in time", ("broker",)
)
THROTTLED = Metric(
    "kafka_delivery_throttle_seconds_total",
    "counter",
    "Time by which brokers held requests back for a quota",
    ("broker",),
    "produce-throttle-time-avg",
)
DISCONNECTS = Metric(
    "kafka_delivery_broker_disconnects_total", "counter", "Connections to a broker that ended", ("broker",)
)
IN_FLIGHT = Metric("kafka_delivery_in_flight_records", "gauge", "Records that have no report yet")
IN_FLIGHT_BYTES = Metric("kafka_delivery_in_flight_bytes", "gauge", "Their keys and values")
END_TO_END = Metric(
    "kafka_delivery_end_to_end_seconds",
    "histogram",
    "Time from the call of a send until its record was in the log, retries and outages included; of records whose id "
    "is a UUIDv7, as by default",
)
REBUILDS = Metric(
    "kafka_delivery_producer_rebuilds_total", "counter", "Kafka clients that failed for good and were replaced"
)
PAUSED = Metric("kafka_delivery_breaker_paused", "gauge", "1 while this process pauses itself")
STANDSTILL = Metric(
    "kafka_delivery_process_standstill",
    "gauge",
    "1 while this process pauses itself for a fault of its own: client (it has no Kafka client) or failures",
    ("reason",),
)
VIEW_AGE = Metric(
    "kafka_delivery_breaker_view_age_seconds",
    "gauge",
    "Time since Redis last said how the circuits are; a second or two, unless Redis is away",
)
PROBES = Metric(
    "kafka_delivery_breaker_probes_total",
    "counter",
    "Records sent to see whether a circuit may close: ok, fail, or ignore where they said nothing about it",
    ("outcome",),
)
RULES = Metric(
    "kafka_delivery_breaker_rules_info",
    "gauge",
    "1, with a digest of the breaker's settings; two digests in a fleet are two opinions about one circuit",
    ("digest",),
)
BUILD = Metric("kafka_delivery_build_info", "gauge", "1, with the version of this package", ("version",))

WORKER = (
    RECORDS,
    RECORD_ERRORS,
    RECORD_RETRIES,
    REQUEST_LATENCY,
    BUFFERPOOL_WAIT,
    BUFFERPOOL_USED,
    RECORD_QUEUE,
    REQUEST_TIMEOUTS,
    THROTTLED,
    DISCONNECTS,
    IN_FLIGHT,
    IN_FLIGHT_BYTES,
    END_TO_END,
    REBUILDS,
    PAUSED,
    STANDSTILL,
    VIEW_AGE,
    PROBES,
    RULES,
    BUILD,
)

# -- of the fleet
UP = Metric(
    "kafka_delivery_up",
    "gauge",
    "1 if Redis answered, and another broker where there is one; 0 if not, or too late: then nothing else is told",
)
BACKLOG = Metric(
    "kafka_delivery_backlog_messages",
    "gauge",
    "All that workers have to do now: waiting, due, leased and put aside. The one number to scale workers by",
)
WAITING = Metric(
    "kafka_delivery_waiting_messages",
    "gauge",
    "Messages in a queue that no worker has, by Celery priority; a message of send_many holds many records",
    ("queue", "priority"),
)
DELAYED = Metric("kafka_delivery_delayed_messages", "gauge", "Messages that wait for their time", ("queue",))
DUE = Metric("kafka_delivery_due_messages", "gauge", "Those of them whose time has come", ("queue",))
NEXT_DUE = Metric(
    "kafka_delivery_next_due_seconds",
    "gauge",
    "Time until the first of the delayed is due; far below 0, no worker takes what is due",
    ("queue",),
)
LEASED = Metric("kafka_delivery_leased_messages", "gauge", "Messages that workers hold")
PUT_ASIDE = Metric(
    "kafka_delivery_put_aside_messages", "gauge", "Messages that wait until their topic's circuit closes", ("topic",)
)
OLDEST = Metric(
    "kafka_delivery_oldest_waiting_seconds",
    "gauge",
    "Age, since its send was called, of the message that waits at the front of a queue, the oldest of these; 0 if none "
    "waits. Of an id that is no UUIDv7: since the exporter first saw it there",
)
PARKED = Metric("kafka_delivery_parked_records", "gauge", "What could go nowhere and waits for a person")
PARKED_BYTES = Metric("kafka_delivery_parked_bytes", "gauge", "Memory of Redis that parked items take")
PARKED_MAX = Metric(
    "kafka_delivery_parked_max_bytes",
    "gauge",
    "What they may take, KAFKA_DELIVERY_PARKED_MAX_BYTES; then what is to be parked stays in its queue. 0: any",
)
DEAD_LETTERS = Metric(
    "kafka_delivery_dead_letters_total", "counter", "Dead letters of the fleet since the beginning, of all topics"
)
FLEET_RECORDS = Metric(
    "kafka_delivery_fleet_records_total",
    "counter",
    "Records of the whole fleet since the beginning, by what became of them; kept in Redis, as `status` shows them",
    ("outcome", "topic"),
)
CIRCUIT = Metric(
    "kafka_delivery_circuit_state",
    "gauge",
    "1 for the state in which the circuit is: closed, open or half-open; of the cluster, and of topics in trouble",
    ("scope", "state"),
)
FORCED = Metric("kafka_delivery_circuit_forced", "gauge", "1 while a person overrules the circuit", ("scope",))
WORKERS = Metric("kafka_delivery_workers", "gauge", "Workers that looked at the circuits within the last five seconds")
REDIS_USED = Metric("kafka_delivery_redis_memory_used_bytes", "gauge", "Memory that Redis uses")
REDIS_MAX = Metric(
    "kafka_delivery_redis_memory_max_bytes", "gauge", "Memory that Redis may use; no sample where it has no limit"
)

FLEET = (
    UP,
    BACKLOG,
    WAITING,
    DELAYED,
    DUE,
    NEXT_DUE,
    LEASED,
    PUT_ASIDE,
    OLDEST,
    PARKED,
    PARKED_BYTES,
    PARKED_MAX,
    DEAD_LETTERS,
    FLEET_RECORDS,
    CIRCUIT,
    FORCED,
    WORKERS,
    REDIS_USED,
    REDIS_MAX,
)
