"""One Kafka client per process; a record is delivered when its own delivery report says so.

librdkafka does the work: batches, order, its own resends, idempotence. This module adds what it leaves to its users:
a report for every record come what may, back-pressure instead of an error when its buffer is full, the reason behind
a timeout, and a new client when one has failed for good.

Concurrency: `produce` may be called from any thread; reports arrive in whichever thread polls, mostly the producer's
own, so `on_report` must not block.
"""

from __future__ import annotations

import importlib
import logging
import re
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import Producer as Client

from kafka_delivery.errors import SettingsError
from kafka_delivery.record import Record
from kafka_delivery.settings import DEAD_LETTER_HEADROOM_BYTES, Settings

from .classify import Kind, verdict

log = logging.getLogger("kafka_delivery.producer")
librdkafka_log = logging.getLogger("kafka_delivery.librdkafka")

POLL_S = 0.5
"""How long the polling thread sleeps in librdkafka, which wakes it for a report; only closing waits for it."""

MAX_RESENDS = 2
"""How often a record is handed to a new client by itself. A client that fails at once would otherwise loop."""

LOST_REPORT_WAIT_S = 1.0
"""After a client failed and was purged, its reports are there within milliseconds; what is missing is lost."""

REPEATED_ERROR_S = 30.0
"""A broker that is down is reported every two seconds; the same error is logged once in this time."""


class Outgoing(NamedTuple):
    """A record as librdkafka takes it."""

    topic: str
    value: bytes | None
    key: bytes | None
    headers: list[tuple[str, str | bytes | None]]
    partition: int | None
    timestamp_ms: int

    @classmethod
    def of(cls, record: Record) -> Outgoing:
        """`record`, for its own topic."""
        headers: list[tuple[str, str | bytes | None]] = [*record.kafka_headers]
        return cls(record.topic, record.value_bytes, record.key_bytes, headers, record.partition, record.timestamp_ms)

    def __repr__(self) -> str:
        return f"Outgoing(topic={self.topic!r})"


class Report(NamedTuple):
    """What became of a record.

    Attributes:
        error: None when it is in the log.
        cause: for a timeout, the last error of a broker while the record waited: the timeout itself says nothing.
        partition, offset, timestamp_ms: where and when, if it is in the log.
    """

    error: KafkaError | None
    cause: KafkaError | None = None
    partition: int | None = None
    offset: int | None = None
    timestamp_ms: int | None = None


class _Pending:
    """A record between `produce` and its report."""

    __slots__ = ("done", "generation", "on_report", "outgoing", "resends", "started")

    def __init__(self, outgoing: Outgoing, on_report: Callable[[Report], None]) -> None:
        self.outgoing = outgoing
        self.on_report = on_report
        self.started = monotonic()
        self.generation = -1
        self.resends = 0
        self.done = False


class Producer:
    """A librdkafka producer that is made on first use, so that it is born after the fork.

    Args:
        settings: of the worker.
        on_error: called with the code of each error of the client itself or of its brokers.
        **properties: librdkafka properties that differ from them.
    """

    def __init__(self, settings: Settings, on_error: Callable[[int], None] | None = None, **properties: Any) -> None:
        self._told = on_error
        self._properties = librdkafka_properties(settings) | properties
        self._lock = threading.RLock()
        self._generation = 0
        self._client: Client | None = None
        self._pending: set[_Pending] = set()
        self._closing = False
        self._wake: Callable[[], None] | None = None
        self._last_error: tuple[float, KafkaError] | None = None
        self._logged: dict[int, float] = {}
        self.replaced = 0

    def produce(self, outgoing: Outgoing, on_report: Callable[[Report], None]) -> None:
        """Hand a record over; `on_report` is called once, with what became of it. Waits while the buffer is full."""
        self._hand_over(_Pending(outgoing, on_report))

    def poll_by_caller(self, wake: Callable[[], None]) -> None:
        """Say, before the first record, that the caller will `serve` while records are in flight.

        Args:
            wake: called, in any thread, for each record that is handed over.
        """
        self._wake = wake

    def serve(self, timeout_s: float) -> None:
        """Collect reports for up to `timeout_s`; they are delivered in this thread."""
        if self._client is None:
            return
        client, generation = self._current()
        failure = self._serve(partial(client.poll, timeout_s))
        if failure is not None:
            self._replace(generation, failure)

    @property
    def in_flight(self) -> int:
        """Records without a report yet."""
        return len(self._pending)

    def give_back(self) -> None:
        """Take no more records, and report those in flight as purged. For those Kafka has already, that is unknown."""
        self._closing = True
        if self._client is not None:
            self._serve(self._client.purge)

    def close(self, timeout_s: float) -> None:
        """Deliver what is in flight within `timeout_s`, report the rest as purged, and end the client."""
        with self._lock:
            client = self._client
        if client is None:
            self._closing = True
            return
        if not self._closing:
            self._serve(partial(client.flush, timeout_s))
        self.give_back()
        self._serve(partial(client.flush, LOST_REPORT_WAIT_S))
        for pending in list(self._pending):
            self._finish(pending, Report(KafkaError(KafkaError._PURGE_INFLIGHT)))
        self._serve(client.close)

    # -- the client and its failures
    def _hand_over(self, pending: _Pending) -> None:
        while not pending.done:
            if self._closing:
                self._finish(pending, Report(KafkaError(KafkaError._PURGE_QUEUE)))
                return
            client, generation = self._current()
            pending.generation = generation
            self._pending.add(pending)
            topic, value, key, headers, partition, timestamp_ms = pending.outgoing
            try:
                client.produce(
                    topic,
                    value,
                    key,
                    -1 if partition is None else partition,
                    partial(self._on_delivery, pending, generation),
                    timestamp=timestamp_ms,
                    headers=headers,
                )
                if self._wake is not None:
                    self._wake()
                return
            except BufferError:
                self._serve(partial(client.poll, 0.1))  # back-pressure: reports make room
            except KafkaException as failure:
                error: KafkaError = failure.args[0]
                if verdict(error.code()).kind is not Kind.FATAL:
                    self._finish(pending, Report(error))
                    return
                self._pending.discard(pending)
                self._replace(generation, error)
                if not self._may_resend(pending):
                    self._finish(pending, Report(error))
            except RuntimeError:  # closed meanwhile, in another thread
                self._closing = True
            except BaseException:  # nothing was handed over, and no report will come
                self._pending.discard(pending)
                raise

    def _current(self) -> tuple[Client, int]:
        with self._lock:
            if self._client is None:
                self._client = Client(self._properties | {"error_cb": self._on_error}, logger=librdkafka_log)
                if self._wake is None:
                    threading.Thread(
                        target=self._poll,
                        args=(self._client, self._generation),
                        name=f"kafka-delivery-reports-{self._generation}",
                        daemon=True,
                    ).start()
            return self._client, self._generation

    def _poll(self, client: Client, generation: int) -> None:
        while generation == self._generation and (self._pending or not self._closing):
            failure = self._serve(partial(client.poll, POLL_S))
            if failure is not None:
                self._replace(generation, failure)

    def _serve(self, call: Callable[[], Any]) -> KafkaError | None:
        """Let librdkafka call back. Returns the error if it has failed for good, which it raises here.

        When a report is due in the same moment, its callback runs with that exception pending and dies of it with a
        SystemError; `_replace` finds its record (confluent-kafka-python, error_cb).
        """
        try:
            call()
        except KafkaException as failure:
            error: KafkaError = failure.args[0]
            if error.fatal() or verdict(error.code()).kind is Kind.FATAL:
                return error
            log.warning("producer.poll_failed code=%s", error.name())
        except SystemError:
            return KafkaError(KafkaError._FATAL)
        except RuntimeError:
            self._closing = True
        return None

    def _replace(self, generation: int, error: KafkaError) -> None:
        """Drop the client of `generation`, once, and send again what it held.

        The next record makes the new client; without one there is none, so that a client which fails at once (say, for
        want of a permission) is not made again and again.
        """
        with self._lock:
            if generation != self._generation or self._closing or self._client is None:
                return
            failed, self._client = self._client, None
            self._generation += 1
            self.replaced += 1
        log.error("producer.replaced code=%s in_flight=%d", error.name(), len(self._pending))
        failed.purge()
        deadline = monotonic() + LOST_REPORT_WAIT_S
        while len(failed) and monotonic() < deadline:
            self._serve(partial(failed.flush, 0.1))
        for pending in [p for p in list(self._pending) if p.generation == generation]:
            self._resend(pending, error)

    def _resend(self, pending: _Pending, error: KafkaError) -> None:
        if self._may_resend(pending):
            self._hand_over(pending)
        else:
            self._finish(pending, Report(error))

    def _may_resend(self, pending: _Pending) -> bool:
        pending.resends += 1
        return pending.resends <= MAX_RESENDS

    # -- callbacks of librdkafka
    def _on_delivery(self, pending: _Pending, generation: int, error: KafkaError | None, message: Any) -> None:
        if generation != pending.generation or pending not in self._pending:
            return None  # a late report of a client that was replaced: the record is on its way again
        if error is None:
            timestamp_ms = message.timestamp()[1]
            return self._finish(pending, Report(None, None, message.partition(), message.offset(), timestamp_ms))
        if generation != self._generation and not self._closing:
            return self._resend(pending, error)
        cause = None
        if error.code() == KafkaError._MSG_TIMED_OUT and self._last_error and self._last_error[0] >= pending.started:
            cause = self._last_error[1]
        return self._finish(pending, Report(error, cause))

    def _finish(self, pending: _Pending, report: Report) -> None:
        with self._lock:  # a record that two threads send again, when a client fails, is reported once
            self._pending.discard(pending)
            if pending.done:
                return
            pending.done = True
        pending.on_report(report)

    def _on_error(self, error: KafkaError) -> None:
        now = monotonic()
        self._last_error = (now, error)
        if self._told is not None:
            self._told(error.code())
        if now - self._logged.get(error.code(), -REPEATED_ERROR_S) >= REPEATED_ERROR_S:
            self._logged[error.code()] = now
            log.warning("producer.error code=%s detail=%r", error.name(), error.str())


def librdkafka_properties(s: Settings) -> dict[str, Any]:
    """The client's configuration. What the owner of the worker may not change comes last."""
    properties: dict[str, Any] = {
        "client.id": "kafka-delivery",
        "partitioner": "murmur2_random",  # keys land where Java's producer puts them
        "compression.type": "lz4",
        "socket.keepalive.enable": True,
        "reconnect.backoff.max.ms": 2_000,  # librdkafka's 10 s would be added to every outage
        "queue.buffering.max.messages": 10_000,  # the queue in Redis is the buffer
        "queue.buffering.max.kbytes": max(65_536, 2 * s.max_record_bytes // 1024),  # at least one record has to fit
        "allow.auto.create.topics": False,  # a typo is an error, not a topic
        **s.producer,
        "bootstrap.servers": s.bootstrap_servers,
        "acks": "all",
        "enable.idempotence": True,
        "linger.ms": s.linger_ms,
        "request.timeout.ms": s.request_timeout_ms,
        "message.timeout.ms": s.message_timeout_ms,
        "topic.metadata.propagation.max.ms": s.topic_propagation_ms,
        "message.max.bytes": s.max_record_bytes + DEAD_LETTER_HEADROOM_BYTES,
    }
    if s.oauth_cb:
        properties["oauth_cb"] = _by_path(s.oauth_cb)
    return properties


def check_properties(s: Settings) -> None:
    """Ask librdkafka whether it knows and accepts all properties, without connecting anywhere.

    Raises:
        SettingsError: it does not; the text names the property, never its value.
    """
    properties = librdkafka_properties(s) | {"log_level": 0}
    del properties["bootstrap.servers"]
    try:
        Client(properties)
    except KafkaException as error:
        # librdkafka quotes the value of some; the name is enough to find it.
        named = re.search(r'property[: ]+"([^"]+)"', error.args[0].str())
        what = f"{named[1]} is unknown or has a value that it does not take" if named else error.args[0].name()
        raise SettingsError(f"KAFKA_DELIVERY_PRODUCER: librdkafka refuses it: {what}") from None
    except (TypeError, ValueError) as error:
        raise SettingsError(f"KAFKA_DELIVERY_PRODUCER: {type(error).__name__}: a property has the wrong type") from None


def _by_path(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"KAFKA_DELIVERY_OAUTH_CB={path!r} cannot be imported: {error}") from error
