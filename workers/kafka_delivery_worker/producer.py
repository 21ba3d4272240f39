"""One Kafka client per process; a record is delivered when its own delivery report says so.

librdkafka does the work: batches, order, its own resends, idempotence. This module adds what it leaves to its users:
a report for every record come what may, back-pressure instead of an error when its buffer is full, the reason behind
a timeout, and a new client when one has failed for good.

Concurrency: `produce` may be called from any thread; reports arrive in whichever thread polls, mostly the producer's
own, so `on_report` must not block.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import Producer as Client

from kafka_delivery.errors import SettingsError
from kafka_delivery.names import REDRIVE_COUNT
from kafka_delivery.record import Record
from kafka_delivery.settings import DEAD_LETTER_HEADROOM_BYTES, Settings

from .classify import Kind, verdict
from .dotted import load

log = logging.getLogger("kafka_delivery.producer")
librdkafka_log = logging.getLogger("kafka_delivery.librdkafka")

POLL_S = 0.5
"""How long the polling thread sleeps in librdkafka, which wakes it for a report; only closing waits for it."""

MAX_RESENDS = 2
"""How often a record is handed to a new client by itself. A client that fails at once would otherwise loop."""

LOST_REPORT_WAIT_S = 1.0
"""After a client failed and was purged, its reports are there within milliseconds; what is missing is lost."""

COLLECTED_S = 2.0
"""Who polls for its reports does so ten times a second at least; what keeps it longer keeps these from being seen."""

MISSING = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC)

REPEATED_ERROR_S = 30.0
"""A broker that is down is reported every two seconds; the same error is logged once in this time."""


NO_CLIENT = -1

new_tuple = tuple.__new__
"""Makes a NamedTuple without its own constructor, which is a Python function: there are two for each record."""


class NoClientError(Exception):
    """Raised when there is no client now; nothing was handed over."""


class Outgoing(NamedTuple):
    """A record as librdkafka takes it."""

    topic: str
    value: bytes | None
    key: bytes | None
    headers: list[tuple[str, str | bytes | None]]
    partition: int | None
    timestamp_ms: int

    @classmethod
    def of(cls, record: Record, redrives: int = 0) -> Outgoing:
        """`record`, for its own topic; with `redrives`, how often it was sent again from its dead-letter topic."""
        headers: list[tuple[str, str | bytes | None]] = [*record.kafka_headers]
        if redrives:
            headers.insert(1, (REDRIVE_COUNT, str(redrives)))  # before the record's own of that name, if it has one
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
    """A record between `produce` and its report, which librdkafka delivers by calling this."""

    __slots__ = ("generation", "on_report", "outgoing", "producer", "resends", "what")

    def __init__(
        self,
        producer: Producer,
        outgoing: Outgoing,
        on_report: Callable[..., None],
        what: tuple[Any, ...],
        resends: int = 0,
    ) -> None:
        self.producer = producer
        self.outgoing = outgoing
        self.on_report = on_report
        self.what = what
        self.generation = NO_CLIENT
        self.resends = resends

    def __call__(self, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            self.producer._failed(self, error, message.latency())
            return
        where = (None, None, message.partition(), message.offset(), message.timestamp()[1])
        self.producer._finish(self, new_tuple(Report, where))


class Producer:
    """A librdkafka producer that is made on first use, so that it is born after the fork.

    Args:
        settings: of the worker.
        on_error: called with the code of each error of the client itself or of its brokers.
        on_failure: called with topic and code of each record that is reported as failed.
        **properties: librdkafka properties that differ from them.
    """

    def __init__(
        self,
        settings: Settings,
        on_error: Callable[[int], None] | None = None,
        on_failure: Callable[[str, int], None] | None = None,
        on_client: Callable[[str], None] | None = None,
        **properties: Any,
    ) -> None:
        self._told = on_error
        self._on_failure = on_failure
        self._properties = librdkafka_properties(settings) | properties
        self._lock = threading.RLock()
        self._generation = 0
        self._made: tuple[Client, int] | None = None
        """The client, and which it is."""
        self._pending: set[_Pending] = set()
        self._closing = False
        self._wake: Callable[[], None] | None = None
        self._served_at = monotonic()
        self._last_error: tuple[float, KafkaError] | None = None
        self._logged: dict[int, float] = {}
        self.replaced = 0
        self.waited_s = 0.0
        """For room in the client's buffer."""

    def produce(self, outgoing: Outgoing, on_report: Callable[..., None], *what: Any) -> None:
        """Hand a record over. Waits while the buffer is full.

        Args:
            outgoing: the record.
            on_report: called once, with `what` and then the `Report`.
            what: tells its reports apart; a function made for each record would cost more than the call.
        """
        pending = _Pending(self, outgoing, on_report, what)
        self._pending.add(pending)
        self._hand_over(pending)

    def poll_by_caller(self, wake: Callable[[], None]) -> None:
        """Say, before the first record, that the caller will `serve` while records are in flight.

        Args:
            wake: called, in any thread, for each record that is handed over.
        """
        self._wake = wake

    def serve(self, timeout_s: float) -> None:
        """Collect reports for up to `timeout_s`; they are delivered in this thread."""
        made = self._made
        if made is None:
            return
        client, generation = made
        failure = self._serve(partial(client.poll, timeout_s))
        self._served_at = monotonic()
        if failure is not None:
            self._replace(generation, failure)

    def answers(self, topic: str, timeout_s: float) -> bool:
        """Whether any broker says within `timeout_s` what it knows of a topic; it is not created by asking."""
        made = self._made
        if self._wake is not None and monotonic() - self._served_at > COLLECTED_S:
            return False  # nobody collects the reports, which may all be there: this process is silent, not the topic
        try:
            return made is not None and bool(made[0].list_topics(topic, timeout_s))
        except (KafkaException, RuntimeError):  # it cannot be reached, or the client was closed meanwhile
            return False

    def lacks(self, topic: str, timeout_s: float) -> bool:
        """Whether the cluster says, within `timeout_s`, that there is no such topic; it is not created by asking."""
        client, _ = self._current()
        try:
            error = client.list_topics(topic, timeout_s).topics[topic].error
        except (KafkaException, RuntimeError):  # it cannot be reached, or the client was closed meanwhile
            return False
        return error is not None and error.code() in MISSING

    @property
    def in_flight(self) -> int:
        """Records without a report yet."""
        return len(self._pending)

    def in_flight_by_topic(self) -> Counter[str]:
        """The same for each topic."""
        return Counter(one.outgoing.topic for one in list(self._pending))

    @property
    def bytes_in_flight(self) -> int:
        """Of their keys and values."""
        return sum(len(one.outgoing.value or b"") + len(one.outgoing.key or b"") for one in list(self._pending))

    def give_back(self) -> None:
        """Take no more records, and report those in flight as purged. For those Kafka has already, that is unknown."""
        self._closing = True
        made = self._made
        if made is not None:
            self._serve(made[0].purge)

    def close(self, timeout_s: float) -> None:
        """Deliver what is in flight within `timeout_s`, report the rest as purged, and end the client."""
        with self._lock:
            made = self._made
        if made is None:
            self._closing = True
            return
        client, _ = made
        if not self._closing:
            self._serve(partial(client.flush, timeout_s))
        self.give_back()
        self._serve(partial(client.flush, LOST_REPORT_WAIT_S))
        for pending in self._pending.copy():
            self._finish(pending, Report(KafkaError(KafkaError._PURGE_INFLIGHT)))
        self._serve(client.close)

    # -- the client and its failures
    def _hand_over(self, pending: _Pending) -> None:
        while pending in self._pending:  # another thread may find that its client has failed, and send it again
            if self._closing:
                self._finish(pending, Report(KafkaError(KafkaError._PURGE_QUEUE)))
                return
            client, pending.generation = self._made or self._current()
            topic, value, key, headers, partition, timestamp_ms = pending.outgoing
            try:  # all by position: names would double what the call costs
                client.produce(
                    topic, value, key, -1 if partition is None else partition, pending, None, timestamp_ms, headers
                )
                if self._wake is not None:
                    self._wake()
                return
            except BufferError:
                since = monotonic()
                self._serve(partial(client.poll, 0.1))  # back-pressure: reports make room
                with self._lock:
                    self.waited_s += monotonic() - since
            except KafkaException as failure:
                error: KafkaError = failure.args[0]
                if error.code() == KafkaError._UNKNOWN_TOPIC:
                    # It remembers what a broker said. Whether a record gets that code or the broker's is chance; under
                    # two names half of them would be missing from a summary, a filter, an alert.
                    error = KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)
                if verdict(error.code()).kind is not Kind.FATAL:
                    self._finish(pending, Report(error))
                    return
                generation, pending.generation = pending.generation, NO_CLIENT  # this one is sent again here
                self._replace(generation, error)
                pending.resends += 1
                if pending.resends > MAX_RESENDS:
                    self._finish(pending, Report(error))
            except RuntimeError:  # closed meanwhile, in another thread
                self._closing = True
            except BaseException:  # nothing was handed over, and no report will come
                self._pending.discard(pending)
                raise

    def _current(self) -> tuple[Client, int]:
        current = self._made  # read once: another thread may replace it
        if current is None:
            with self._lock:
                current = self._made = self._made or self._make()
        return current

    def _make(self) -> tuple[Client, int]:
        client = Client(self._properties | {"error_cb": self._on_error}, logger=librdkafka_log)
        if self._wake is None:
            threading.Thread(
                target=self._poll,
                args=(client, self._generation),
                name=f"kafka-delivery-reports-{self._generation}",
                daemon=True,
            ).start()
        return client, self._generation

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
            if generation != self._generation or self._closing or self._made is None:
                return
            (failed, _), self._made = self._made, None
            self._generation += 1
            self.replaced += 1
        log.error("producer.replaced code=%s in_flight=%d", error.name(), len(self._pending))
        failed.purge()
        deadline = monotonic() + LOST_REPORT_WAIT_S
        while len(failed) and monotonic() < deadline:
            self._serve(partial(failed.flush, 0.1))
        for pending in [p for p in self._pending.copy() if p.generation == generation]:
            self._resend(pending, error)

    def _resend(self, pending: _Pending, error: KafkaError) -> None:
        """Send it again as a new one, once, whichever threads ask for it; a late report is then nobody's."""
        if pending.resends >= MAX_RESENDS:
            self._finish(pending, Report(error))
            return
        again = _Pending(self, pending.outgoing, pending.on_report, pending.what, pending.resends + 1)
        self._pending.add(again)  # first: the record is in flight all the time
        if self._take(pending):
            self._hand_over(again)
        else:
            self._pending.discard(again)

    # -- reports
    def _failed(self, pending: _Pending, error: KafkaError, waited_s: float | None) -> None:
        if pending.generation != self._generation and not self._closing:
            self._resend(pending, error)
            return
        cause = None
        if error.code() == KafkaError._MSG_TIMED_OUT and self._last_error:
            at, last = self._last_error
            cause = last if at >= monotonic() - (waited_s or 0) else None
        self._finish(pending, Report(error, cause))

    def _finish(self, pending: _Pending, report: Report) -> None:
        if not self._take(pending):
            return
        try:
            if report.error is not None and self._on_failure is not None:
                self._on_failure(pending.outgoing.topic, report.error.code())
            pending.on_report(*pending.what, report)
        except Exception:  # it would end the polling, and librdkafka would be taken for broken
            log.exception("producer.report_failed")

    def _take(self, pending: _Pending) -> bool:
        """Whether it is in flight, which it is no longer then; of several threads one is told so."""
        try:
            self._pending.remove(pending)
        except KeyError:
            return False
        return True

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
        "queue.buffering.max.messages": 20_000,  # the queue in Redis is the buffer
        # What is stuck besides, and at least one record with its neighbours; never what makes the event loop wait.
        "queue.buffering.max.kbytes": max(65_536, 2 * max(s.max_in_flight_bytes, s.max_record_bytes) // 1024),
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
        properties["oauth_cb"] = load("KAFKA_DELIVERY_OAUTH_CB", s.oauth_cb)
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
