"""What a worker process does with a record: produce it, wait for its report, and say what it means.

One engine per process, made after the fork. The tasks in `kafka_delivery` call it; it calls nobody back.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from time import monotonic, time_ns
from typing import Any

from confluent_kafka import KafkaError

from kafka_delivery import settings
from kafka_delivery.errors import CircuitBreakerOpen, DeliveryError, InvalidRecordError
from kafka_delivery.faults import QUEUE_FAULTS
from kafka_delivery.marks import mark_of
from kafka_delivery.names import PROBE
from kafka_delivery.record import Record
from kafka_delivery.redis_client import RedisClient

from . import breaker, parked_items
from .breaker import Admission
from .broadcast import Broadcast
from .classify import Retry, delivery_error, verdict
from .counts import Counts
from .dead_letter_headers import PRESETS
from .dotted import load
from .failures import Failed, Failures
from .hook import DeadLettered, Hook
from .installation import Installation
from .metrics import Meters
from .parked_items import Call, Reason
from .parking import Parked, ParkingStore
from .producer import NoClientError, Outgoing, Producer, Report
from .sampling import Sample
from .standstill import NO_CLIENT_S
from .topics import DeadLetterTopics

log = logging.getLogger("kafka_delivery.engine")

NO_PROBE: Admission = 0
"""Of a record that was admitted before and is sent again: late, whatever becomes of it."""

HOOK_CLOSE_S = 5.0
"""How long the end of a worker waits for the application's own function."""

stopping = Broadcast()
"""The worker was told to stop: records in flight may finish."""

hurrying = Broadcast()
"""It was told twice: they may not."""


class Engine:
    """The producer of this process and what belongs to it."""

    def __init__(self, s: settings.Settings) -> None:
        self._settings = s
        self._redis = RedisClient(s)
        self.meters = meters = Meters(s) if s.metrics_port else None
        self._counts = Counts(self._redis, s.counts_interval_s, meters.counted if meters else None)
        self.breaker = breaker.current()
        failed, stats = (meters.failed, meters.statistics.properties(s)) if meters else (None, {})
        admit = Installation(self._redis, s).admit
        on_client, collected = partial(self.breaker.client, "main"), self.breaker.attendance.collected
        self.producer = Producer(s, self.breaker.broker_error, failed, on_client, collected, admit, **stats)
        self.outcomes: dict[str, list[Report]] = {}
        """By delivery tag: reports of records that the event loop produced, for the task that goes on where one failed.
        Not by message id: one id may be in flight twice, say on two topics."""
        self._failures = Failures(self._redis, breaker.WORKER)
        # Makes batches of one, for a record whose batch was refused: that one may have had bad company.
        # It connects when it is first used, which is hardly ever.
        stats = meters.statistics_alone.properties(s) if meters else {}
        self._alone = Producer(s, None, failed, admit=admit, **{"batch.num.messages": 1, "linger.ms": 0, **stats})
        self._topics = DeadLetterTopics(s, self.producer)
        self._hook = Hook(load("KAFKA_DELIVERY_ON_DEAD_LETTER", s.on_dead_letter)) if s.on_dead_letter else None
        self._logged = Sample(s.success_logs_per_s if log.isEnabledFor(logging.INFO) else 0)
        self.breaker.answers = self.producer.answers
        self.breaker.in_flight = lambda: self.producer.in_flight_by_topic() + self._alone.in_flight_by_topic()
        threading.Thread(target=self._stop_in_time, name="kafka-delivery-stop", daemon=True).start()

    # -- one attempt
    def deliver(
        self, record: Record, probe: str | None = None, redrives: int = 0, tag: str | None = None
    ) -> dict[str, Any]:
        """Deliver one record; return where it is.

        Args:
            record: what to deliver.
            probe: mark of the probe that it is, if it is one.
            redrives: how often it was sent again from its dead-letter topic; consumers see it in a header.
            tag: delivery tag of its message, under which the event loop may have left its report.

        Raises:
            DeliveryError: classified; see `classify.delivery_error`. `CircuitBreakerOpen`: it was not tried.
        """
        return self._one(record, Outgoing.of(record, redrives), probe, self._known(tag))

    def _known(self, tag: str | None) -> list[Report] | None:
        return None if tag is None else self.outcomes.pop(tag, None)

    def deliver_many(
        self, records: list[Record], tag: str | None = None, probe: str | None = None
    ) -> list[dict[str, Any] | DeliveryError]:
        """Deliver records side by side; for each, in order, where it is or why not."""
        sends = [(record, Outgoing.of(record)) for record in records]
        known = self._known(tag)
        return self._deliver(sends, probe) if known is None else self._after(sends, known, count=True)

    def deliver_dead_letter(self, record: Record, why: dict[str, Any], probe: str | None = None) -> dict[str, Any]:
        """Publish a dead letter; return where it is.

        Raises:
            DeliveryError: classified. A missing topic is made first, where the settings allow it.
        """
        letter = self._dead_letter(record, why)
        try:
            if probe is None and not self.breaker.is_shut(letter.topic) and self._topics.missing(letter.topic):
                raise delivery_error(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART), letter.topic, record.id)
            metadata = self._one(record, letter, probe, count=False)
        except DeliveryError as error:
            if not self._topics.create(letter.topic, error):
                raise
            metadata = self._one(record, letter, None, count=False)
        with self._done(record.id):
            self.count("dead-lettered", record.topic)
        with self._done(record.id):
            log.warning(
                "record.dead_lettered topic=%s message_id=%s attempt=%d error_class=%s error_code=%s "
                "dead_letter_topic=%s partition=%s offset=%s",
                record.topic, record.id, why["retry_count"] + 1, why["error_class"], why["error_code"], letter.topic,
                metadata["partition"], metadata["offset"],
            )  # fmt: skip
        self._tell(record, why, partition=metadata["partition"], offset=metadata["offset"])
        return metadata

    def _tell(self, record: Record, why: dict[str, Any], **where: Any) -> None:
        """Let the application's own function know, if it has named one."""
        if self._hook is None:
            return
        with self._done(record.id):
            reason = {name: why[name] for name in DeadLettered.__slots__ if name in why}
            there = self._settings.dead_letter_topic(record.topic)
            self._hook.tell(
                DeadLettered(topic=record.topic, dead_letter_topic=there, message_id=record.id, **reason, **where)
            )

    def _one(
        self,
        record: Record,
        outgoing: Outgoing,
        probe: str | None,
        known: list[Report] | None = None,
        count: bool = True,
    ) -> dict[str, Any]:
        if known is not None:  # the event loop has sent it
            outcome = self._after([(record, outgoing)], known, count)[0]
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
        """Produce all and wait for all reports; a missing one is a timeout: the record may be in the log.

        Without a client the records are reported as not sent, which is this process's fault and not theirs.
        """
        if not batch:
            return []
        reports: list[Report] = [Report(KafkaError(KafkaError._MSG_TIMED_OUT))] * len(batch)
        arrived, all_there = itertools.count(1), threading.Event()

        def put(place: int, topic: str, admission: Admission, report: Report) -> None:
            reports[place] = report
            self.tell_breaker(admission, topic, [report])
            if next(arrived) == len(batch):  # one wake-up for all: each takes the interpreter's lock
                all_there.set()

        has_client = True
        for place, (outgoing, admission) in enumerate(batch):
            if has_client:  # each record would wait for one
                try:
                    producer.produce(outgoing, put, place, outgoing.topic, admission)
                    continue
                except NoClientError as error:
                    has_client = False
                    log.warning("engine.no_client records=%d reason=%r", len(batch) - place, str(error))
            put(place, outgoing.topic, admission, Report(KafkaError(KafkaError._PURGE_QUEUE)))
        all_there.wait(self._settings.report_timeout_s)
        return list(reports)

    def tell_breaker(self, admission: Admission, topic: str, reports: Sequence[Report]) -> None:
        """What became of records of one topic, sent under one admission, counts for the circuits.

        In the order in which it came: what counts is also whether the last one failed.
        """
        codes = [None if report.error is None else report.error.code() for report in reports]
        for code, run in itertools.groupby(codes):
            records = len(list(run))
            if code is None:
                self.breaker.delivered(admission, topic, records)
            else:
                for _ in range(records):
                    self.breaker.failed(admission, topic, code)

    def _outcome(
        self, record: Record, outgoing: Outgoing, report: Report, count: bool
    ) -> dict[str, Any] | DeliveryError:
        if report.error is not None:
            return delivery_error(report.error, outgoing.topic, record.id, report.cause)
        if count:
            self.delivered(record.topic, [(record.id, report)])
        return {
            "topic": outgoing.topic,
            "partition": report.partition,
            "offset": report.offset,
            "timestamp": report.timestamp_ms,
            "message_id": record.id,
        }

    def _dead_letter(self, record: Record, why: dict[str, Any]) -> Outgoing:
        headers = PRESETS[self._settings.dead_letter_headers](record, why)
        topic = self._settings.dead_letter_topic(record.topic)
        # Not the record's time, which is a header: of what happened long ago Kafka's retention would take the dead
        # letter within minutes.
        return Outgoing(topic, record.value_bytes, record.key_bytes, headers, None, time_ns() // 1_000_000)

    # -- parking; each of these raises `ParkingFullError` where there is no room, and nothing is kept
    @cached_property
    def _parking(self) -> ParkingStore:
        return ParkingStore.of(self._redis, self._settings)

    def park(self, record: Record, why: dict[str, Any], error: DeliveryError) -> str:
        """Keep a record whose dead-letter topic refused it; return the id under which it lies.

        Raises:
            redis.exceptions.RedisError: it is not kept.
        """
        reason = Reason(
            kind="dead-letter",
            error_class=why["error_class"],
            error_code=why["error_code"],
            error_message=f"{why['error_message']}; then its dead letter was refused: {error}",
        )
        (kept,) = self._park(
            [
                parked_items.of_record(
                    record, reason, retries=why["retry_count"], redrives=why["redrive_count"]
                )
            ]
        )  # fmt: skip
        self._tell(record, why, parked_id=kept)
        return kept

    def park_call(self, request: Any, error: Exception, kind: str | None = None, why: str | None = None) -> str:
        """Keep a call that failed in a way that nobody planned, or that will never run.

        Of a batch each record is an item of its own.

        Args:
            request: Celery's request or context: `id`, `task`, `args`, `kwargs`, `retries`, and what its message asked
                of Celery besides.
            error: what happened.
            kind: see `Parked.kind`; found from the error by default.
            why: the reason in words; by default what a traceback of the error ends with.

        Returns:
            The id under which it lies; of a batch, its first record's.

        Raises:
            redis.exceptions.RedisError: it is not kept.
        """
        mark = mark_of(request, PROBE)
        if mark is not None:
            self.breaker.not_sent(mark)
        kind = kind or ("invalid" if isinstance(error, InvalidRecordError) else "bug")
        reason = Reason(kind=kind, error_class=type(error).__name__, error_message=why or _last_line(error))
        kept = self._park(parked_items.of_call(Call.of(request), reason))[0]
        if kind == "bug":
            self.blamed(request.id)
        return kept

    def blamed(self, message_id: str) -> None:
        """Forget the failures at a message that is parked: its redrive begins anew."""
        self._failures.forget(message_id)

    def park_message(self, items: Sequence[Parked]) -> None:
        """Keep a message that never reached a task: its records, or the whole.

        Raises:
            redis.exceptions.RedisError: not all of it is kept.
        """
        self._park(items)

    def _park(self, items: Sequence[Parked]) -> list[str]:
        kept = self._parking.park_all(items)
        for item, item_id in zip(items, kept, strict=True):
            with self._done(item.id):
                self.count("parked", item.topic or "")
            with self._done(item.id):
                log.error(
                    "record.parked kind=%s topic=%s message_id=%s parked_id=%s error_class=%s error_code=%s",
                    item.kind, item.topic, item.id, item_id, item.error_class, item.error_code,
                )  # fmt: skip
        return kept

    # -- what became of a record: counted and logged
    @contextmanager
    def _done(self, message_id: str) -> Iterator[None]:
        """Around what only tells of a record that is elsewhere already: its failure changes nothing for the record.

        The task would fail with it, and the record be sent again, or parked beside where it is.
        """
        try:
            yield
        except Exception as error:
            with suppress(Exception):  # it may be the log itself that fails
                log.error("record.not_told message_id=%s error=%s", message_id, type(error).__name__)

    def count(self, outcome: str, topic: str, records: int = 1) -> None:
        """Count records of one topic; see `counts.OUTCOMES`."""
        self._counts.add(outcome, topic, records)

    def delivered(self, topic: str, records: Sequence[tuple[str, Report]]) -> None:
        """Records, by their ids, are in their topic. Of these a sample is logged."""
        if not records:
            return
        with self._done(records[0][0]):
            self._counts.add("delivered", topic, len(records))
        with self._done(records[0][0]):
            if self.meters is not None:
                for message_id, _ in records:
                    self.meters.end_to_end.arrived(message_id)
        with self._done(records[0][0]):
            for message_id, report in records[: self._logged.takes(monotonic(), len(records))]:
                log.info(
                    "record.delivered topic=%s message_id=%s partition=%s offset=%s",
                    topic, message_id, report.partition, report.offset,
                )  # fmt: skip

    def sent_again(self, outcome: str, error: DeliveryError, retries: int) -> None:
        """It is ``retried``, or ``deferred`` without using an attempt; for the time being it failed."""
        with self._done(error.message_id):
            self._counts.add(outcome, error.topic)
        with self._done(error.message_id):
            log.warning(
                f"record.{outcome} topic=%s message_id=%s attempt=%d error_class=%s error_code=%s error=%s",
                error.topic, error.message_id, retries + 1, type(error).__name__, error.code, error.name,
            )  # fmt: skip

    # -- the rest
    @property
    def producers(self) -> tuple[Producer, Producer]:
        """The one that all records take, and the one for records that were refused with their batch."""
        return self.producer, self._alone

    @property
    def stopping(self) -> bool:
        """Whether this worker was told to stop."""
        return stopping.sent

    def pause(self, seconds: float) -> None:
        """Wait before a message goes back to its queue; not when the worker stops."""
        stopping.wait(seconds)

    def failed_here(self, message_id: str | None, error: BaseException) -> Failed:
        """Note a failure that is this process's fault; the process pauses itself if that goes on.

        Args:
            message_id: of the message that it failed at; None if the message cannot be the reason.
            error: what happened.
        """
        if isinstance(error, NoClientError):  # the producer has said so
            return Failed(pause_s=NO_CLIENT_S)
        if isinstance(error, QUEUE_FAULTS):
            return Failed()
        self.breaker.stand_still(_last_line(error), message_id or "")
        log.error("record.failed_here message_id=%s error=%s", message_id, _last_line(error))
        return Failed() if message_id is None else self._failures.count(message_id)

    def died(self, message_id: str, pid: int | None) -> Failed:
        """Note that a child of this process died while it worked on a message.

        Args:
            message_id: of the message.
            pid: of the child.
        """
        log.error("record.child_died message_id=%s pid=%s", message_id, pid)
        return self._failures.count(message_id, pid)

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
        if self._hook is not None:
            self._hook.close(min(timeout, HOOK_CLOSE_S))
        self.breaker.stop()
        self._counts.stop()


def _had_company(report: Report) -> bool:
    """Whether the record may have failed for a neighbour in its batch: librdkafka fails a batch as a whole."""
    return report.error is not None and verdict(report.error.code()).retry is Retry.ALONE


def _last_line(error: BaseException) -> str:
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
