"""Settings: one frozen value, read once from the environment variables ``KAFKA_DELIVERY_<NAME>``.

What an application's framework is configured with comes after the environment, see `give`. Two of them everyone sets:
``KAFKA_DELIVERY_REDIS_URL`` and ``KAFKA_DELIVERY_BOOTSTRAP_SERVERS``. Every default stands beside its unit and its
reason. A wrong setting stops the process with a sentence that says what to change; a worker that starts with half of
what its owner meant would be worse.

The timeouts nest, and this is the one place that says so::

    linger < request < message timeout < wait for a report < visibility timeout of the queue
             topic propagation < message timeout
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .errors import SettingsError
from .names import CLUSTER_MAX_LENGTH, DEFAULT_CLUSTER, dead_letter_queue, is_cluster_name, is_topic_name, queue

ENV_PREFIX = "KAFKA_DELIVERY_"

REPORT_GRACE_MS = 5_000
"""How much longer than `message_timeout_ms` a worker waits for a delivery report (ms).

librdkafka looks for timed-out messages once a second; a report that is later than this will not come.
"""

DEAD_LETTER_HEADROOM_BYTES = 8_192
"""What a dead letter may add to a record: our headers, of which ``error-message`` is the longest with 1 KiB.

The prefix of the record's own headers is already counted in `Record.size`.
"""

LEAST_MAX_DEATHS = 2
"""The first death makes suspects of all that a worker held; the second, with one that was alone, shows which it is."""

MAX_PORT = 65_535

REFUSED_PROPERTIES = {
    "acks": "a send is only confirmed when all in-sync replicas have it",
    "request.required.acks": "a send is only confirmed when all in-sync replicas have it",
    "enable.idempotence": "without it a reconnect duplicates and reorders records",
    "transactional.id": "a transaction cannot span the queue and Kafka, and workers would fence each other",
    "delivery.report.only.error": "a send is only confirmed by its delivery report",
    "enable.gapless.guarantee": "one timed-out record would end the producer",
    "bootstrap.servers": "set KAFKA_DELIVERY_BOOTSTRAP_SERVERS",
    "metadata.broker.list": "set KAFKA_DELIVERY_BOOTSTRAP_SERVERS",
    "message.timeout.ms": "set KAFKA_DELIVERY_MESSAGE_TIMEOUT_MS",
    "delivery.timeout.ms": "set KAFKA_DELIVERY_MESSAGE_TIMEOUT_MS",
    "request.timeout.ms": "set KAFKA_DELIVERY_REQUEST_TIMEOUT_MS",
    "message.max.bytes": "set KAFKA_DELIVERY_MAX_RECORD_BYTES",
    "linger.ms": "set KAFKA_DELIVERY_LINGER_MS",
    "queue.buffering.max.ms": "set KAFKA_DELIVERY_LINGER_MS",
    "topic.metadata.propagation.max.ms": "set KAFKA_DELIVERY_TOPIC_PROPAGATION_MS",
    "oauthbearer_token_refresh_cb": "set KAFKA_DELIVERY_OAUTH_CB to a dotted path",
    "default.topic.config": "it would override what is refused here; name its properties themselves",
    "oauth_cb": "set KAFKA_DELIVERY_OAUTH_CB to a dotted path",
    "stats_cb": "set KAFKA_DELIVERY_METRICS_PORT, and the statistics are metrics",
}
"""librdkafka properties that would break the promise, or that have a setting of their own."""


def _setting(default: Any, unit: str, why: str, secret: bool = False) -> Any:
    metadata = {"unit": unit, "why": why, "secret": secret}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What callers and workers are told. Build it with `Settings.from_env`; `repr` hides what is secret."""

    redis_url: str = _setting(
        "redis://localhost:6379/0",
        "URL",
        "the queue, the parking store and the counters; redis://, rediss:// (certificate verified) or sentinel://",
        secret=True,
    )
    broker_url: str = _setting(
        "", "URL", "another Celery broker for the queue, with that broker's own, weaker guarantees", secret=True
    )
    redis_options: dict[str, Any] = _setting(
        {},
        "JSON object",
        "kombu's options for its Redis transport: master_name and sentinel_kwargs for Sentinel, global_keyprefix",
        secret=True,
    )
    bootstrap_servers: str = _setting("localhost:9092", "host:port,...", "where librdkafka finds the cluster")
    producer: dict[str, Any] = _setting(
        {}, "JSON object", "librdkafka properties handed through: security, compression, batching", secret=True
    )
    oauth_cb: str = _setting("", "dotted path", "a function for OAUTHBEARER tokens, which JSON cannot carry")
    cluster: str = _setting(
        DEFAULT_CLUSTER,
        "name",
        "the Kafka cluster that a message is for; each name has queues of its own, so that clusters can share a Redis",
    )

    max_record_bytes: int = _setting(
        1_000_000,
        "bytes",
        "key, value and headers; with a dead letter's own headers it stays under a broker's default of 1,048,588",
    )
    dead_letter_suffix: str = _setting("-dlq", "text", "a topic's dead letters go to the topic of this ending")
    dead_letter_topics: dict[str, str] = _setting({}, "JSON object", "dead-letter topics by topic, where not suffixed")
    create_dead_letter_topics: bool = _setting(
        False,
        "boolean",
        "a worker that may create topics may create them wrong; on in the demo, where its Kafka is a real one",
    )
    dead_letter_headers: str = _setting(
        "ours",
        "ours, spring or connect",
        "in whose words a dead letter says why; Spring Kafka's and Kafka Connect's are for tools that read those",
    )
    on_dead_letter: str = _setting(
        "", "dotted path", "a function that is told of each dead letter, as package.module:function; for error tracking"
    )
    dead_letter_partitions: int = _setting(1, "count", "of a dead-letter topic that a worker creates; order is kept")
    dead_letter_replication: int = _setting(-1, "count", "of such a topic; -1 is the cluster's default (KIP-464)")
    parked_max_bytes: int = _setting(
        512 * 1024 * 1024,
        "bytes",
        "of Redis's memory for parked items, half a million small ones; what finds no room waits in its queue",
    )

    max_redrives: int = _setting(
        3,
        "count",
        "a record that failed after so many redrives is parked: it needs a person, not another round",
    )

    enqueue_timeout_s: float = _setting(
        0.5, "seconds", "per socket operation of `.delay()`; a web request must not hang with Redis"
    )
    backlog_max_bytes: int = _setting(
        0,
        "bytes",
        "of memory that Redis uses, from which on new sends are refused, so that workers keep room to empty it: about "
        "three quarters of its maxmemory; 0 is no limit",
    )
    result_expires_s: int = _setting(3_600, "seconds", "results that a caller asked for are kept this long")
    trace_baggage: bool = _setting(
        False,
        "boolean",
        "W3C baggage of a traced caller goes into the record's headers, beside `traceparent` and `tracestate`; it may "
        "hold personal data, which consumers of the topic and of its dead letters would see",
    )

    linger_ms: float = _setting(5.0, "ms", "librdkafka's own default: batches form, a send stays interactive")
    request_timeout_ms: int = _setting(30_000, "ms", "one produce request; Kafka's default")
    message_timeout_ms: int = _setting(
        120_000, "ms", "a broker restart is ridden out inside librdkafka, in order and without duplicates"
    )
    topic_propagation_ms: int = _setting(
        10_000, "ms", "how long a topic may be unknown before it counts as missing; a new one shows within seconds"
    )

    concurrency: int = _setting(32, "threads", "sends that wait for their reports at a time; waiting costs no CPU")
    max_retries: int = _setting(
        8, "count", "with the backoff below, two minutes on average of a broker's second thoughts, four at most"
    )
    retry_backoff_s: int = _setting(1, "seconds", "first backoff; doubles (Celery takes whole seconds)")
    retry_backoff_max_s: int = _setting(300, "seconds", "longest backoff")
    retry_jitter: bool = _setting(True, "boolean", "records that failed together must not come back together")
    few_backoff_s: int = _setting(
        30, "seconds", "between the two retries of an error that rarely passes: a late topic, a late ACL"
    )
    defer_s: int = _setting(5, "seconds", "first pause of a record that waits for the cluster; doubles")
    defer_max_s: int = _setting(60, "seconds", "longest such pause: this long after the cluster's return all is sent")
    failure_threshold: int = _setting(
        5,
        "failures",
        "in a row, without a success anywhere, open the circuit: no accident; never more than max_retries, which would "
        "be used up before",
    )
    failure_rate: float = _setting(
        0.5, "share", "of the calls of a window that fails opens it; half is no accident either"
    )
    failure_min_calls: int = _setting(20, "calls", "in a window before their rate means anything")
    failure_window_s: float = _setting(10.0, "seconds", "that are looked back on; shorter than people notice")
    stall_s: float = _setting(
        10.0,
        "seconds",
        "with records in flight and no report count as a failure, of the cluster, or of a topic while others arrive: "
        "far sooner than message_timeout_ms",
    )
    reset_timeout_s: float = _setting(
        5.0, "seconds", "an open circuit waits before its first probe; a broker's restart takes about that"
    )
    reset_timeout_max_s: float = _setting(
        60.0, "seconds", "the wait doubles with each failed round up to this: what a recovery costs at most"
    )
    success_threshold: int = _setting(3, "probes", "that arrive close the circuit; one may be luck")
    ramp_s: float = _setting(
        10.0, "seconds", "in which claims grow to their full number again; a broker that has just started is cold"
    )
    pool: str = _setting("in-flight", "in-flight or threads", "what waits for reports: the event loop or threads")
    max_in_flight: int = _setting(
        1_000,
        "records",
        "in librdkafka's hands at a time, and as many again beside those of topics in trouble; more brings no more "
        "throughput",
    )
    max_in_flight_bytes: int = _setting(
        64 * 1024 * 1024, "bytes", "the same in bytes: what bounds a worker's memory with large records"
    )
    transport: str = _setting(
        "leased", "leased or celery", "how a worker takes messages from Redis: leased to it, or as Celery does"
    )
    lease_s: float = _setting(
        30.0, "seconds", "what a dead worker held comes back after this; a living one renews it every third of it"
    )
    max_deaths: int = _setting(
        5,
        "processes",
        "workers, or children of prefork, that may die while they hold a message before it is parked: a deployment may "
        "kill a few. At least 2: one death does not say which of the messages that a worker held is to blame",
    )
    visibility_timeout_s: int = _setting(
        1_800, "seconds", "what a dead worker held comes back after this; longer than any worker may hold a message"
    )
    shutdown_timeout_s: float = _setting(
        30.0, "seconds", "after SIGTERM, records in flight may take this long; the rest goes back to the queue"
    )
    worker_socket_timeout_s: float = _setting(10.0, "seconds", "a worker gives a silent Redis up after this")
    counts_interval_s: float = _setting(
        1.0, "seconds", "how often counters are written to Redis; SIGKILL loses so much"
    )
    success_events_per_s: int = _setting(
        100,
        "sends",
        "whose success Flower hears of, per second and worker; -1 for all, 0 for none. What fails, is retried or "
        "deferred is always told. Flower takes some 6,000 a second of all workers together, and keeps 100,000",
    )
    log_format: str = _setting(
        "text", "text or json", "of a worker's log: lines for people, or an object a line for what collects logs"
    )
    success_logs_per_s: int = _setting(
        1,
        "sends",
        "whose success is logged, at INFO, per second and process: enough to see that records flow; -1 for all, 0 for "
        "none. What fails, is retried, deferred or parked is always logged",
    )
    metrics_port: int = _setting(
        0,
        "port",
        "of a worker's metrics for Prometheus, 0 for none; the first free one from here on, so that workers of a host "
        "can share the setting",
    )
    metrics_address: str = _setting(
        "127.0.0.1",
        "address",
        "where that port listens; metrics ask for no password, so beyond this host on request only",
    )
    metrics_topics: int = _setting(
        100, "topics", "with numbers of their own in metrics, the rest together as `other`: each costs a dozen series"
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, Any] | None = None) -> Settings:
        """Read the settings.

        Args:
            environ: the environment; `os.environ` by default. A value may also have its setting's own type.

        Raises:
            SettingsError: a variable is unknown, malformed, or contradicts another.
        """
        environ = os.environ if environ is None else environ
        return cls(**dict(read(name, value) for name, value in environ.items() if name.startswith(ENV_PREFIX)))

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), _LEAST.get(f.name)
            if type(value) in (int, float) and not (
                math.isfinite(value) and (value > 0 if least is None else value >= least)
            ):
                bound = "greater than 0" if least is None else f"{least} or more"
                raise SettingsError(f"{_variable(f.name)}={value} must be {bound} ({f.metadata['unit']})")
        if self.max_deaths < LEAST_MAX_DEATHS:
            raise SettingsError(
                f"{_variable('max_deaths')}={self.max_deaths} would park everything that a worker held when it died, "
                f"the innocent too: give {LEAST_MAX_DEATHS} or more, so that suspects can be tried one at a time"
            )
        if self.dead_letter_replication == 0:
            raise SettingsError(f"{_variable('dead_letter_replication')}=0 must be 1 or more, or -1 for the cluster's")
        for name, choices in (
            ("transport", ("leased", "celery")),
            ("pool", ("in-flight", "threads")),
            ("dead_letter_headers", ("ours", "spring", "connect")),
            ("log_format", ("text", "json")),
        ):
            if getattr(self, name) not in choices:
                raise SettingsError(f"{_variable(name)}={getattr(self, name)!r} must be {' or '.join(choices)}")
        if self.metrics_port > MAX_PORT:
            raise SettingsError(f"{_variable('metrics_port')}={self.metrics_port} must be {MAX_PORT} or less (port)")
        self._check_redis_url()
        self._check_kafka()
        self._check_dead_letters()
        self._check_parking()
        self._check_circuit()
        self._check_nesting()

    def _check_redis_url(self) -> None:
        scheme = self.redis_url.partition("://")[0] if "://" in self.redis_url else ""
        if scheme not in ("redis", "rediss", "sentinel", "redis+socket"):
            raise SettingsError(
                f"{_variable('redis_url')} starts with {scheme or 'nothing'!r}://, which is not Redis: "
                "use redis://, rediss:// or sentinel://"
            )
        if self.broker_url.lower().startswith(("redis", "sentinel")):
            raise SettingsError(
                f"{_variable('broker_url')} is for other brokers; for Redis set {_variable('redis_url')}"
            )
        self._check_broker_address()
        for name in _OURS & self.redis_options.keys():
            raise SettingsError(f"{_variable('redis_options')}: {name} has a setting of its own; leave it out")
        if scheme == "sentinel" and not self.redis_options.get("master_name"):
            raise SettingsError(f"""{_variable("redis_options")} must name the master: {{"master_name": "mymaster"}}""")
        if scheme in ("redis", "rediss"):
            self._check_redis_address()

    def _check_broker_address(self) -> None:
        if self.broker_url and "://" not in self.broker_url:
            raise SettingsError(f"{_variable('broker_url')} must look like amqp://user:password@host:port/vhost")
        try:
            for part in self.broker_url.split(";") if self.queue_on_amqp else ():
                _ = urlsplit(part).port
        except ValueError:  # whose text quotes a piece of the password
            raise SettingsError(
                f"{_variable('broker_url')} is not an address: it must look like amqp://user:password@host:port/vhost, "
                "with what is special in a password quoted (%40 for @, %23 for #, %2F for /)"
            ) from None

    def _check_redis_address(self) -> None:
        try:
            parts = urlsplit(self.redis_url)
            database, port, query = parts.path.strip("/"), parts.port, parse_qs(parts.query)
        except ValueError:
            database, port, query = "", -1, {}
        for name in query:
            if not name.startswith("ssl_") and name != "credential_provider":
                raise SettingsError(f"{_variable('redis_url')}: {name} cannot be given in the URL, only ssl_... can")
        if port == -1 or not (database.isdigit() or not database):
            raise SettingsError(
                f"{_variable('redis_url')} is not an address: it must look like redis://host:port/number, with what is "
                "special in a password quoted (%40 for @, %23 for #, %2F for /)"
            )

    def _check_kafka(self) -> None:
        if not self.bootstrap_servers.strip():
            raise SettingsError(f"{_variable('bootstrap_servers')} is empty: name at least one host:port")
        if not is_cluster_name(self.cluster):
            raise SettingsError(
                f"{_variable('cluster')}={self.cluster!r} cannot be part of a queue's name: "
                f"use 1 to {CLUSTER_MAX_LENGTH} letters, digits, '.', '_' and '-'"
            )
        for name, value in self.producer.items():
            if value is None or isinstance(value, list | dict):
                raise SettingsError(f"{_variable('producer')}: {name} must be a string, a number or true or false")
            if name in REFUSED_PROPERTIES:
                raise SettingsError(f"{_variable('producer')}: {name} is refused: {REFUSED_PROPERTIES[name]}")

        buffer = self.producer.get("queue.buffering.max.kbytes", math.inf)
        if not isinstance(buffer, int | float) or 1024 * buffer <= self.max_record_bytes + DEAD_LETTER_HEADROOM_BYTES:
            raise SettingsError(
                f"{_variable('producer')}: queue.buffering.max.kbytes must be a number of KiB that leaves room for one "
                f"record of {_variable('max_record_bytes')}={self.max_record_bytes} and its dead-letter headers"
            )

    def _check_dead_letters(self) -> None:
        if not self.dead_letter_suffix or not is_topic_name("t" + self.dead_letter_suffix):
            raise SettingsError(
                f"{_variable('dead_letter_suffix')}={self.dead_letter_suffix!r} cannot end a topic name: "
                "use letters, digits, '.', '_' and '-'"
            )
        for topic, target in self.dead_letter_topics.items():
            if not isinstance(target, str) or not is_topic_name(topic) or not is_topic_name(target) or topic == target:
                raise SettingsError(
                    f"{_variable('dead_letter_topics')}: {topic!r} -> {target!r} must map one topic name to another"
                )

    def _check_parking(self) -> None:
        if self.parked_max_bytes < 4 * self.max_record_bytes:  # a record of quotes takes four times its size as text
            raise SettingsError(
                f"{_variable('parked_max_bytes')}={self.parked_max_bytes} must be at least four times "
                f"{_variable('max_record_bytes')}={self.max_record_bytes}: a large record would never find room"
            )

    def _check_circuit(self) -> None:
        if self.failure_rate > 1:
            raise SettingsError(f"{_variable('failure_rate')}={self.failure_rate} is a share: more than 0, at most 1")

    def _check_nesting(self) -> None:
        longest_pause = max(self.retry_backoff_max_s, self.few_backoff_s * 4 // 3, self.defer_max_s + self.defer_s)
        # A message waits behind one that is being sent (prefetch 1), is sent, and may then be put back with a pause.
        longest_hold = self.attempt_timeout_s + longest_pause
        for inner, outer, inner_name, outer_name in (
            (self.linger_ms, self.request_timeout_ms, "linger_ms", "request_timeout_ms"),
            (self.request_timeout_ms, self.message_timeout_ms, "request_timeout_ms", "message_timeout_ms"),
            (self.topic_propagation_ms, self.message_timeout_ms, "topic_propagation_ms", "message_timeout_ms"),
            (self.retry_backoff_s, self.retry_backoff_max_s + 1, "retry_backoff_s", "retry_backoff_max_s"),
            (self.defer_s, self.defer_max_s + 1, "defer_s", "defer_max_s"),
            (self.reset_timeout_s, self.reset_timeout_max_s + 1, "reset_timeout_s", "reset_timeout_max_s"),
        ):
            if inner >= outer:
                raise SettingsError(
                    f"{_variable(inner_name)}={inner} must be less than {_variable(outer_name)}"
                    f"={getattr(self, outer_name)}"
                )
        if self.visibility_timeout_s <= longest_hold:
            raise SettingsError(
                f"{_variable('visibility_timeout_s')}={self.visibility_timeout_s} must be more than "
                f"{longest_hold:.0f}: twice the wait for a report (message_timeout_ms + {REPORT_GRACE_MS} ms) and the "
                "longest pause between attempts; a shorter one delivers records twice"
            )

    @property
    def queue_url(self) -> str:
        """Where messages wait: Redis, unless another broker is named."""
        return self.broker_url or self.redis_url

    @property
    def queue(self) -> str:
        """Name of the queue of sends."""
        return queue(self.cluster)

    @property
    def dead_letter_queue(self) -> str:
        """Name of the queue of dead letters."""
        return dead_letter_queue(self.cluster)

    @property
    def queues(self) -> tuple[str, str]:
        """Names of the queues that workers of this cluster serve: sends, then dead letters."""
        return self.queue, self.dead_letter_queue

    @property
    def queue_on_redis(self) -> bool:
        """Whether messages wait in Redis, where workers can lease them."""
        return not self.broker_url

    @property
    def queue_on_amqp(self) -> bool:
        """Whether messages wait in a broker like RabbitMQ, which confirms what it was sent if asked to."""
        return self.broker_url.lower().startswith(("amqp://", "amqps://", "pyamqp://"))

    @property
    def leases(self) -> bool:
        """Whether workers lease what they take."""
        return self.transport == "leased" and self.queue_on_redis

    @property
    def report_timeout_s(self) -> float:
        """How long a worker waits for a delivery report, in seconds."""
        return (self.message_timeout_ms + REPORT_GRACE_MS) / 1000

    @property
    def attempt_timeout_s(self) -> float:
        """How long an attempt may take, in seconds: a record that was refused with its batch is sent once more alone.

        What ends an attempt before that, a time limit say, does so before anybody knows whether the record is written.
        """
        return 2 * self.report_timeout_s

    def dead_letter_topic(self, topic: str) -> str:
        """The topic that takes the dead letters of `topic`."""
        return self.dead_letter_topics.get(topic, topic + self.dead_letter_suffix)

    def __repr__(self) -> str:
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value == (f.default if f.default_factory is MISSING else f.default_factory()):
                continue
            shown.append(f"{f.name}={_mask(f, value)}")
        return f"Settings({', '.join(shown)})"


_LEAST = {
    "linger_ms": 0,
    "max_retries": 0,
    "backlog_max_bytes": 0,
    "dead_letter_replication": -1,
    "lease_s": 0.1,
    "success_events_per_s": -1,
    "success_logs_per_s": -1,
    "metrics_port": 0,
    "metrics_topics": 0,
}
"""The least value of numbers for which greater than 0 is not the rule."""

_OURS = {"visibility_timeout", "socket_timeout", "socket_connect_timeout"}
"""Options of kombu's Redis transport that have a setting of their own."""


_given: dict[str, Any] = {}


def give(given: Mapping[str, Any]) -> None:
    """Let `current` take these where the environment says nothing, in place of any that were given before.

    They are looked at when they are needed, so that a wrong one is an error of who sends, and not of this call.

    Args:
        given: an application's own configuration, by the names of the variables.
    """
    global _given
    _given = dict(given)
    current.cache_clear()


@functools.cache
def current() -> Settings:
    """The settings of this process, read when first asked for: the environment, then what `give` was given.

    Raises:
        SettingsError: a setting is wrong.
    """
    return Settings.from_env(_given | os.environ)


def read(variable: str, value: Any) -> tuple[str, Any]:
    """The name of the field that a variable sets, and what to.

    Raises:
        SettingsError: there is no such setting, or it is malformed.
    """
    known = {f.name: f for f in fields(Settings)}
    name = variable.removeprefix(ENV_PREFIX).lower()
    if name not in known or variable != _variable(name):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {_variable(near[0])}?" if near else "the settings page lists them all"
        raise SettingsError(f"{variable} is not a setting; {hint}")
    return name, _parse(variable, known[name], value)


def masked_url(url: str) -> str:
    """`url` without passwords, also where it is malformed."""
    url = re.sub(r"://([^:@/;]*):.*@", r"://\1:***@", url)
    return re.sub(r"([?&][^=&]*(?:password|secret|token)[^=&]*=)[^&]*", r"\1***", url)


def _variable(name: str) -> str:
    return ENV_PREFIX + name.upper()


def _mask(f: Field[Any], value: Any) -> str:
    if not f.metadata["secret"]:
        return repr(value)
    if isinstance(value, str):
        return repr(masked_url(value))
    return "{" + ", ".join(f"{name!r}: ***" for name in value) + "}"


def _parse(variable: str, f: Field[Any], value: Any) -> Any:
    """The value of one variable; the type of the field decides. Never quotes what may be secret."""
    shown = "(not shown)" if f.metadata["secret"] else repr(value)
    kind = str(f.type).partition("[")[0]
    try:
        return _PARSERS[kind](value) if isinstance(value, str) else _of_type(kind, value)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise SettingsError(f"{variable}={shown} must be {_WANTED[kind]} ({f.metadata['unit']})") from None


def _of_type(kind: str, value: Any) -> Any:
    if kind == "dict" and isinstance(value, Mapping):
        return json.loads(json.dumps(dict(value)))  # what the environment could not carry, a worker would not get
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value).__name__ != kind:
        raise TypeError
    return value


def _boolean(text: str) -> bool:
    return _BOOLEANS[text.strip().lower()]


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError
    return value


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": _boolean,
    "dict": _json_object,
}

_WANTED = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict": "a JSON object",
}
