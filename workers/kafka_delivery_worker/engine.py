"""What a worker process does with a record: produce it, wait for its report, and say what it means.

One engine per process, made after the fork. The tasks in `kafka_delivery` call it; it calls nobody back.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from typing import Any

from confluent_kafka import KafkaError

from kafka_delivery import settings
from kafka_delivery.errors import CircuitBreakerOpen, DeliveryError, InvalidRecordError
from kafka_delivery.names import DEAD_LETTER, PROBE, SEND, DeadLetterHeaders
from kafka_delivery.record import Record
from kafka_delivery.redis_client import RedisClient

from . import breaker
from .breaker import Admission
from .broadcast import Broadcast
from .classify import Retry, delivery_error, verdict
from .counts import Counts
from .lease import REQUEUE_PAUSE_S
from .parking import Parked, ParkingStore
from .producer import Outgoing, Producer, Report
from .topics import TopicCreator

log = logging.getLogger("kafka_delivery.engine")

NO_PROBE: Admission = 0
"""Of a record that was admitted before and is sent again: late, whatever becomes of it."""

stopping = Broadcast()
"""The worker was told to stop: records in flight may finish."""

hurrying = Broadcast()
"""It was told twice: they may not."""


class Engine:
    """The producer of this process and what belongs to it."""

    def __init__(self, s: settings.Settings) -> None:
        self._settings = s
        self._redis = RedisClient(s)
        self._counts = Counts(self._redis, s.counts_interval_s)
        self.breaker = breaker.current()
        self.producer = Producer(s, on_error=self.breaker.broker_error)
        self.outcomes: dict[str, Report] = {}
        """Reports of records that the event loop produced and that failed, for the task that goes on with them."""
        # Makes batches of one, for a record whose batch was refused: that one may have had bad company.
        # It connects when it is first used, which is hardly ever.
        self._alone = Producer(s, None, **{"batch.num.messages": 1, "linger.ms": 0})
        self._topics = TopicCreator(s)
        self.breaker.in_flight = lambda: self.producer.in_flight + self._alone.in_flight
        threading.Thread(target=self._stop_in_time, name="kafka-delivery-stop", daemon=True).start()

    # -- one attempt
    def deliver(self, record: Record, probe: str | None = None) -> dict[str, Any]:
        """Deliver one record; return where it is.

        Args:
            record: what to deliver.
            probe: mark of the probe that it is, if it is one.

        Raises:
            DeliveryError: classified; see `classify.delivery_error`. `CircuitBreakerOpen`: it was not tried.
        """
        return self._one(record, Outgoing.of(record), probe, self.outcomes.pop(record.id, None))

    def deliver_many(self, records: list[Record], probe: str | None = None) -> list[dict[str, Any] | DeliveryError]:
        """Deliver records side by side; for each, in order, where it is or why not."""
        return self._deliver([(record, Outgoing.of(record)) for record in records], probe)

    def deliver_dead_letter(self, record: Record, why: dict[str, Any], probe: str | None = None) -> dict[str, Any]:
        """Publish a dead letter; return where it is.

        Raises:
            DeliveryError: classified. A missing topic is made first, where the settings allow it.
        """
        letter = self._dead_letter(record, why)
        try:
            metadata = self._one(record, letter, probe, count=False)
        except DeliveryError as error:
            if not self._topics.create(letter.topic, error):
                raise
            metadata = self._one(record, letter, None, count=False)
        self.count("dead-lettered", record.topic)
        log.warning(
            "record.dead_lettered topic=%s message_id=%s error_class=%s error_code=%s dead_letter_topic=%s",
            record.topic, record.id, why["error_class"], why["error_code"], letter.topic,
        )  # fmt: skip
        return metadata

    def _one(
        self, record: Record, outgoing: Outgoing, probe: str | None, known: Report | None = None, count: bool = True
    ) -> dict[str, Any]:
        if known is not None:  # the event loop has sent it
            outcome = self._after([(record, outgoing)], [known], count)[0]
        else:
            outcome = self._deliver([(record, outgoing)], probe, count)[0]
        if isinstance(outcome, DeliveryError):
            raise outcome
        return outcome

    def _deliver(
        self, sends: list[tuple[Record, Outgoing]], probe: str | None, count: bool = True
    ) -> list[dict[str, Any] | DeliveryError]:
        admissions = [self._admission(outgoing.topic, probe) for _, outgoing in sends]
        admitted = [
            (send, admission) for send, admission in zip(sends, admissions, strict=True) if admission is not None
        ]
        reports = self._produce(self.producer, [(outgoing, admission) for (_, outgoing), admission in admitted])
        outcomes = iter(self._after([send for send, _ in admitted], reports, count))
        return [
            self._not_tried(record, outgoing) if admission is None else next(outcomes)
            for (record, outgoing), admission in zip(sends, admissions, strict=True)
        ]

    def _admission(self, topic: str, probe: str | None) -> Admission | None:
        admission = self.breaker.admission(topic, probe)
        return self.breaker.ask(topic) if admission is None else admission

    def _not_tried(self, record: Record, outgoing: Outgoing) -> CircuitBreakerOpen:
        return CircuitBreakerOpen(
            "the circuit is open", outgoing.topic, record.id, self.breaker.retry_after(outgoing.topic)
        )

    def _after(
        self, sends: list[tuple[Record, Outgoing]], reports: list[Report], count: bool
    ) -> list[dict[str, Any] | DeliveryError]:
        """What the first reports come to: those that may have failed for a neighbour are sent once more, alone."""
        refused = [place for place, report in enumerate(reports) if _had_company(report)]
        again = self._produce(self._alone, [(sends[place][1], NO_PROBE) for place in refused])
        for place, report in zip(refused, again, strict=True):
            reports[place] = report
        return [
            self._outcome(record, outgoing, report, count)
            for (record, outgoing), report in zip(sends, reports, strict=True)
        ]

    def _produce(self, producer: Producer, batch: list[tuple[Outgoing, Admission]]) -> list[Report]:
        """Produce all and wait for all reports; a missing one is a timeout: the record may be in the log."""
        if not batch:
            return []
        reports: list[Report] = [Report(KafkaError(KafkaError._MSG_TIMED_OUT))] * len(batch)
        arrived, all_there = itertools.count(1), threading.Event()

        def on_report(place: int, topic: str, admission: Admission) -> Any:
            def put(report: Report) -> None:
                reports[place] = report
                self.tell_breaker(admission, topic, report)
                if next(arrived) == len(batch):  # one wake-up for all: each takes the interpreter's lock
                    all_there.set()

            return put

        for place, (outgoing, admission) in enumerate(batch):
            producer.produce(outgoing, on_report(place, outgoing.topic, admission))
        all_there.wait(self._settings.report_timeout_s)
        return list(reports)

    def tell_breaker(self, admission: Admission, topic: str, report: Report) -> None:
        """What became of a record counts for the circuits."""
        if report.error is None:
            self.breaker.delivered(admission, topic)
        else:
            self.breaker.failed(admission, topic, report.error.code())

    def _outcome(
        self, record: Record, outgoing: Outgoing, report: Report, count: bool
    ) -> dict[str, Any] | DeliveryError:
        if report.error is not None:
            return delivery_error(report.error, outgoing.topic, record.id, report.cause)
        if count:
            self.count("delivered", record.topic)
        return {
            "topic": outgoing.topic,
            "partition": report.partition,
            "offset": report.offset,
            "timestamp": report.timestamp_ms,
            "message_id": record.id,
        }

    def _dead_letter(self, record: Record, why: dict[str, Any]) -> Outgoing:
        names = DeadLetterHeaders
        code = why["error_code"]
        headers: list[tuple[str, str | bytes | None]] = [
            (names.ORIGINAL_TOPIC, record.topic.encode()),
            (names.ERROR_MESSAGE, why["error_message"].encode()),
            (names.ERROR_CLASS, why["error_class"].encode()),
            (names.ERROR_CODE, b"" if code is None else str(code).encode()),
            (names.TIMESTAMP, why["failed_at"].encode()),
            (names.RETRY_COUNT, str(why["retry_count"]).encode()),
            (names.MESSAGE_ID, record.id.encode()),
            *((names.OWN_PREFIX + name, value) for name, value in record.header_pairs),
        ]
        topic = self._settings.dead_letter_topic(record.topic)
        return Outgoing(topic, record.value_bytes, record.key_bytes, headers, None, record.timestamp_ms)

    # -- parking
    def park(self, record: Record, why: dict[str, Any], error: DeliveryError) -> str:
        """Keep a record whose dead-letter topic refused it; return the id under which it lies.

        Raises:
            redis.exceptions.RedisError: it is not kept.
        """
        text = f"{why['error_message']}; then its dead letter was refused: {error}"
        return self._park(
            Parked(
                id=record.id,
                kind="dead-letter",
                error_class=why["error_class"],
                error_code=why["error_code"],
                error_message=text,
                retry_count=why["retry_count"],
                topic=record.topic,
                content="record",
                data=record.to_wire(self._settings.cluster),
            )
        )

    def park_call(self, request: Any, error: Exception, kind: str | None = None, why: str | None = None) -> str:
        """Keep a call that failed in a way that nobody planned, or that will never run; return its id.

        Args:
            request: Celery's request or context: `id`, `task`, `args`, `kwargs`, `retries`.
            error: what happened.
            kind: see `Parked.kind`; found from the error by default.
            why: the reason in words; by default what a traceback of the error ends with.

        Raises:
            redis.exceptions.RedisError: it is not kept.
        """
        mark = (getattr(request, "headers", None) or {}).get(PROBE)
        if mark is not None:
            self.breaker.not_sent(mark)
        kind = kind or ("invalid" if isinstance(error, InvalidRecordError) else "bug")
        record = _record_of(request, self._settings.cluster)
        return self._park(
            Parked(
                id=record.id if record else request.id,
                kind=kind,
                error_class=type(error).__name__,
                error_message=why or _last_line(error),
                retry_count=request.retries or 0,
                topic=record.topic if record else None,
                content="record" if record else "call",
                data=record.to_wire(self._settings.cluster)
                if record
                else {
                    "task": request.task,
                    "id": request.id,
                    "args": list(request.args or ()),
                    "kwargs": dict(request.kwargs or {}),
                },
            )
        )

    def park_message(self, item: Parked) -> str:
        """Keep a message that never reached a task.

        Raises:
            redis.exceptions.RedisError: it is not kept.
        """
        return self._park(item)

    def _park(self, item: Parked) -> str:
        kept = ParkingStore(self._redis.client, self._redis.prefix).park(item)
        self.count("parked", item.topic or "")
        log.error(
            "record.parked kind=%s topic=%s parked_id=%s error_class=%s", item.kind, item.topic, kept, item.error_class
        )
        return kept

    # -- the rest
    def count(self, outcome: str, topic: str) -> None:
        """Count one record; see `counts.OUTCOMES`."""
        self._counts.add(outcome, topic)

    @property
    def stopping(self) -> bool:
        """Whether this worker was told to stop."""
        return stopping.sent

    def pause(self) -> None:
        """Wait before a message goes back to its queue; not when the worker stops."""
        stopping.wait(REQUEUE_PAUSE_S)

    def _stop_in_time(self) -> None:
        stopping.wait()
        in_time = not hurrying.wait(self._settings.shutdown_timeout_s)
        log.info("engine.giving_back in_flight=%d hurried=%s", self.producer.in_flight, not in_time)
        self.producer.give_back()
        self._alone.give_back()

    def close(self) -> None:
        """Deliver or give back what is in flight, end the clients, write the counters."""
        timeout = 0.0 if hurrying.sent else self._settings.shutdown_timeout_s
        self.producer.close(timeout)
        self._alone.close(timeout)
        self.breaker.stop()
        self._counts.stop()


def _had_company(report: Report) -> bool:
    """Whether the record may have failed for a neighbour in its batch: librdkafka fails a batch as a whole."""
    return report.error is not None and verdict(report.error.code()).retry is Retry.ALONE


def _record_of(request: Any, cluster: str) -> Record | None:
    """The one record that a call was about, if it can be made out."""
    args, task = request.args or (), request.task
    if task not in (SEND, DEAD_LETTER) or not args or not isinstance(args[0], list):
        return None
    try:
        return Record.from_wire(args[0], cluster)
    except InvalidRecordError:
        return None


def _last_line(error: Exception) -> str:
    """What a traceback ends with. Of an unplanned error only its type: its text may quote what it choked on."""
    if isinstance(error, InvalidRecordError | DeliveryError):
        return str(error)
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" in {frame.tb_frame.f_code.co_qualname}, line {frame.tb_lineno}" if frame is not None else ""
    return f"{type(error).__name__}{where}"


_engine: Engine | None = None
_engine_pid: int | None = None
_lock = threading.Lock()
_inherited: list[Engine] = []


def current() -> Engine:
    """The engine of this process; made on first use, and anew after a fork."""
    global _engine, _engine_pid
    if _engine is None or _engine_pid != os.getpid():
        with _lock:
            if _engine is not None and _engine_pid != os.getpid():
                # librdkafka's threads did not survive the fork; ending its handle would wait for them for ever.
                _inherited.append(_engine)
                _engine = None
            if _engine is None:
                _engine, _engine_pid = Engine(settings.current()), os.getpid()
    return _engine


def close() -> None:
    """Close this process's engine, if it has one."""
    if _engine is not None and _engine_pid == os.getpid():
        _engine.close()
