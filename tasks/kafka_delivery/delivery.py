"""The tasks that carry a record from the queue to Kafka: `send` and `send_many`.

Read `Send.run` for the whole way of one record. What happens in a worker process (the producer, its delivery
reports, parking) is behind `engine()`; an application that only calls `.delay()` never loads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, cast
from uuid import UUID

from celery.result import GroupResult
from celery.states import FAILURE, PENDING, RETRY, REVOKED, SUCCESS
from redis.exceptions import OutOfMemoryError

from .backlog import refuse_if_full
from .base import (
    BATCH_BYTES,
    MAX_MEMBERS,
    DeliveryTask,
    Refused,
    batch_from,
    engine,
    is_too_many,
    member_or_raise,
    record_from,
    wire_of,
)
from .dead_letters import dead_letter
from .disposition import Asker, Move
from .errors import (
    BacklogFullError,
    BulkEnqueueError,
    DeliveryError,
    EnqueueError,
    InvalidRecordError,
    RetriableError,
    RetriesExhaustedError,
)
from .faults import QUEUE_FAULTS, said_by
from .marks import marked
from .names import DEFERRALS, SEND, SEND_MANY
from .publisher import envelope, is_plain, write
from .record import Headers, Key, Record, Value, uuid7
from .results import Delivered, Fate, Result
from .threads import in_thread

BULK_RECORDS = 500
BULK_BYTES = 1_000_000
"""Of one write to Redis; it serves others after each."""


FATES = {Move.DEAD_LETTER: "dead-lettered", Move.RETRY: "retried", Move.DEFER: "deferred"}
"""What becomes of a member of a batch, in the words of the batch's result."""


@dataclass(frozen=True, slots=True)
class Write:
    """A write that is not done yet, of so many records."""

    records: int
    do: Callable[[], object] = field(repr=False)

    def __call__(self) -> None:
        self.do()


class Send(DeliveryTask[Delivered]):
    """Deliver one record. Call `send.delay(topic, value, key=...)`; see `Record` for the arguments."""

    name = SEND
    Strategy = "kafka_delivery_worker.lane:strategy"

    def delay(
        self,
        topic: str,
        value: Value,
        key: Key = None,
        headers: Headers | None = None,
        *,
        partition: int | None = None,
        timestamp: datetime | int | None = None,
        message_id: str | UUID | None = None,
    ) -> Result[None]:
        """Queue a record and return at once.

        Returns:
            A Celery result whose id is the record's message id. It holds a result only if the send was queued with
            ``apply_async(..., ignore_result=False)``.

        Raises:
            InvalidRecordError: the record was refused; nothing was queued.
            EnqueueError: Redis did not confirm. Sending again with the `message_id` of the error is safe.
        """
        record = Record(topic, value, key, headers, partition, timestamp, message_id)
        return self.apply_async((record,))

    async def adelay(
        self,
        topic: str,
        value: Value,
        key: Key = None,
        headers: Headers | None = None,
        *,
        partition: int | None = None,
        timestamp: datetime | int | None = None,
        message_id: str | UUID | None = None,
    ) -> Result[None]:
        """As `delay`, from an event loop: validated in it, queued in a thread; nothing else waits meanwhile.

        Ends in bounded time also while Redis hangs and hundreds of calls are under way. When the task that awaits it
        is cancelled, it is unknown whether the record is queued, as after an `EnqueueError`.
        """
        record = Record(topic, value, key, headers, partition, timestamp, message_id)
        return await in_thread(partial(self.apply_async, (record,)), partial(EnqueueError, record.id))

    def delay_on_commit(
        self,
        topic: str,
        value: Value,
        key: Key = None,
        headers: Headers | None = None,
        *,
        partition: int | None = None,
        timestamp: datetime | int | None = None,
        message_id: str | UUID | None = None,
        using: str | None = None,
    ) -> str:
        """Queue a record when Django's transaction is committed; if it is rolled back, nothing is sent.

        Where no transaction is open the record is queued at once. If Redis does not take it, the log says so, and
        `kafka_delivery.contrib.django.signals.record_not_queued`; nothing is raised, since the transaction is done.

        Args:
            using: the alias of the database whose transaction it is; by default Django's default.

        Returns:
            The message id, which the record has from now on.

        Raises:
            InvalidRecordError: the record was refused; nothing will be queued.
            ImportError: Django is not installed.
        """
        record = Record(topic, value, key, headers, partition, timestamp, message_id)
        self.enqueue_on_commit([record], (record,), record.id, using)
        return record.id

    def bulk(self, records: Iterable[Record | Mapping[str, Any]]) -> list[str]:
        """Queue many records, each as a send of its own, in few writes.

        Returns:
            Their message ids, in order; `send.AsyncResult(id)` is the result of one.

        Raises:
            InvalidRecordError: naming the record by its place; nothing was queued.
            BulkEnqueueError: Redis failed on the way; it says which records are queued, unknown and not tried.
        """
        made = [member_or_raise(member) for member in batch_from((records,), {}, None)]
        ids = [record.id for record in made]
        done = tried = 0
        try:
            for chunk in self._chunks(made):
                refuse_if_full(ids[done])
                tried = chunk.records
                chunk()
                done, tried = done + tried, 0
        except (EnqueueError, *QUEUE_FAULTS) as error:
            last = done if isinstance(error, BacklogFullError | OutOfMemoryError) else done + tried
            reason = error.reason if isinstance(error, EnqueueError) else said_by(error)
            raise BulkEnqueueError(ids[:done], ids[done:last], ids[last:], reason) from error
        return ids

    async def abulk(self, records: Iterable[Record | Mapping[str, Any]]) -> list[str]:
        """As `bulk`, from an event loop, which it does not block; see `adelay`."""

        def not_tried(reason: str) -> BulkEnqueueError:
            made = [member_or_raise(member) for member in batch_from((records,), {}, None)]
            return BulkEnqueueError([], [], [record.id for record in made], reason)

        return await in_thread(partial(self.bulk, records), not_tried)

    def _chunks(self, records: list[Record]) -> Iterator[Write]:
        if not is_plain(self.app, {}):  # somebody listens: one by one, Celery's way
            yield from (Write(1, partial(self.apply_async, (record,))) for record in records)
            return
        envelopes: list[str] = []
        size = 0
        for record in records:
            wire, task_id, shown = self.encode((record,), {}, None)
            made = envelope(self.app, self, self.queue_name, task_id, wire, shown, "{}")
            if envelopes and (len(envelopes) == BULK_RECORDS or size + len(made) > BULK_BYTES):
                yield Write(len(envelopes), partial(write, self.queue_name, envelopes))
                envelopes, size = [], 0
            envelopes.append(made)
            size += len(made)
        if envelopes:
            yield Write(len(envelopes), partial(write, self.queue_name, envelopes))

    def encode(self, args: Any, kwargs: Any, task_id: str | None) -> tuple[list[Any], str, str]:
        record = record_from(args, kwargs, task_id)
        return [wire_of(record)], record.id, f"({record.topic!r}, {record.size} bytes, {record.id!r})"

    def run(self, /, *args: Any, **kwargs: Any) -> Delivered:
        """Deliver the record and return where it is; by then it has its place in the log.

        Raises:
            RetriableError, UnavailableError, ProducerError: caught by Celery's autoretry, see `DeliveryTask.retry`.
            RejectedError, RetriesExhaustedError: after the record was handed to `dead_letter`.
        """
        record = record_from(args, kwargs, self.request.id)
        try:
            return cast("Delivered", engine().deliver(record, self.probe, self.redrives, self.tag))
        except DeliveryError as error:
            if self.move(error) is Move.DEAD_LETTER:
                self.hand_over(record, final(error))
            raise

    def hand_over(self, record: Record, error: DeliveryError) -> NoReturn:
        """Give the record to `dead_letter`, and only then fail with `error`, which acknowledges it here."""
        self.publish(dead_letter, record, error=error, retry_count=self.request.retries)
        self.remember(error)
        raise error


class SendMany(DeliveryTask[list[Fate]]):
    """Deliver many records in one message: `send_many.delay([Record(...), {"topic": ..., "value": ...}])`.

    Each record has its own message id and its own fate; the batch only shares the way through the queue.
    """

    name = SEND_MANY
    asker = Asker.MEMBER
    Strategy = "kafka_delivery_worker.batch_lane:strategy"

    def delay(self, records: Iterable[Record | Mapping[str, Any]], *, message_id: str | None = None) -> Result[None]:
        """Queue a batch and return at once.

        Args:
            records: `Record`s, or mappings with the same fields.
            message_id: the batch's id; give that of an `EnqueueError` to repeat it safely. Members without an id of
                their own get one from it.

        Returns:
            A Celery result with an id of its own, the batch's; see `call`.

        Raises:
            InvalidRecordError: naming the record by its place in the batch; nothing was queued.
            EnqueueError: Redis did not confirm.
        """
        return self.apply_async((records,), task_id=message_id)

    async def adelay(
        self, records: Iterable[Record | Mapping[str, Any]], *, message_id: str | None = None
    ) -> Result[None]:
        """As `delay`, from an event loop, which it does not block; see `Send.adelay`."""
        batch_id = message_id or uuid7()
        return await in_thread(partial(self.delay, records, message_id=batch_id), partial(EnqueueError, batch_id))

    def delay_on_commit(
        self,
        records: Iterable[Record | Mapping[str, Any]],
        *,
        message_id: str | None = None,
        using: str | None = None,
    ) -> str:
        """Queue a batch when Django's transaction is committed, see `Send.delay_on_commit`.

        Returns:
            The batch's id.

        Raises:
            InvalidRecordError: naming the record by its place in the batch; nothing will be queued.
            ImportError: Django is not installed.
        """
        batch_id = message_id or uuid7()
        members = [member_or_raise(member) for member in batch_from((records,), {}, batch_id)]
        self.enqueue_on_commit(members, (members,), batch_id, using)
        return batch_id

    def call(self, args: Any, kwargs: Any, task_id: str | None, options: dict[str, Any]) -> Result[Any]:
        """As `DeliveryTask.call`; a large batch goes in several messages.

        Returns:
            A Celery result. Of several messages it is a `BatchResult`, whose `get` returns what became of all records,
            in order, as that of one does.
        """
        batch_id = task_id or uuid7()
        members = [member_or_raise(member) for member in batch_from(args, kwargs, batch_id)]
        parts = list(_parts(members))
        if len(parts) == 1:
            return super().call((members,), {}, batch_id, options)
        results = []
        for number, part in enumerate(parts):
            try:
                results.append(super().call((part,), {}, f"{batch_id}.part{number}", dict(options)))
            except BacklogFullError as error:
                if not results:
                    raise
                reason = f"{number} of its {len(parts)} parts are, then there was no room: {error.reason}"
                raise EnqueueError(batch_id, reason) from error
        return cast("Result[Any]", BatchResult(batch_id, results))

    def encode(self, args: Any, kwargs: Any, task_id: str | None) -> tuple[list[Any], str, str]:
        records = [member_or_raise(member) for member in batch_from(args, kwargs, task_id)]
        wires = [wire_of(record) for record in records]
        return [wires], task_id or uuid7(), f"({len(records)} records, {sum(r.size for r in records)} bytes)"

    def run(self, /, *args: Any, **kwargs: Any) -> list[Fate]:
        """Deliver all, give those that failed a message of their own, and return what became of each, in order.

        Returns:
            For each record ``message_id``, ``topic`` and ``outcome``: ``"delivered"`` with partition, offset and
            timestamp; ``"retried"`` or ``"deferred"`` (a `send` of its own is queued); ``"dead-lettered"``; or
            ``"parked"`` for what is no valid record (``topic`` is None then).
        """
        if any(map(is_too_many, (*args, *kwargs.values()))):
            raise InvalidRecordError("records", f"are more than {MAX_MEMBERS}, which no caller puts into one message")
        members = batch_from(args, kwargs, self.request.id)
        # First what is no record: if it cannot be parked now, the whole batch goes back, and nothing was sent twice.
        parked = iter([self.park_member(member) for member in members if isinstance(member, Refused)])
        records = [member for member in members if isinstance(member, Record)]
        outcomes = iter(engine().deliver_many(records, self.tag, self.probe))
        return [
            cast("Fate", self.fate(member, next(outcomes)) if isinstance(member, Record) else next(parked))
            for member in members
        ]

    def park_member(self, refused: Refused) -> dict[str, Any]:
        try:
            engine().park_call(refused.as_call(SEND), refused.error)
        except Exception as fault:  # Redis is away: the queue still has the batch
            self.give_back(fault)
        return {"outcome": "parked", "message_id": refused.id, "topic": None, "error": type(refused.error).__name__}

    def message_id_of(self, task_id: str) -> str:
        return re.sub(r"\.part\d+$", "", task_id)

    def fate(self, record: Record, outcome: dict[str, Any] | DeliveryError) -> dict[str, Any]:
        if isinstance(outcome, dict):
            return {"outcome": "delivered", **outcome}
        move = self.move(outcome)
        if move is Move.DEAD_LETTER:
            self.publish(dead_letter, record, error=final(outcome), retry_count=0)
        elif move is Move.RETRY:
            pause = self.pause_before_retry(cast("RetriableError", outcome), retries=0)
            self.publish(send, record, retries=1, countdown=pause)
        else:
            pause = self.pause_before_resend(0, record.topic)
            self.publish(send, record, countdown=pause, headers=marked({DEFERRALS: 1}))
        fate = FATES[move]
        if move is not Move.DEAD_LETTER:  # that is counted when it is true
            engine().sent_again(fate, outcome, retries=0)
        return {"outcome": fate, "message_id": record.id, "topic": record.topic, "error": outcome.name}


class BatchResult(GroupResult):
    """The results of a batch that went in several messages, as one."""

    @property
    def state(self) -> str:
        """As a single message's: of the worst part."""
        states = {part.state for part in self.results}
        worst: str = next((state for state in (FAILURE, REVOKED, RETRY, PENDING) if state in states), SUCCESS)
        return worst

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """What became of each record, in order; arguments as for Celery's `GroupResult.get`."""
        if all(part.ignored for part in self.results):  # Celery would wait for ever
            return None
        parts = super().get(*args, **kwargs)
        for part in parts:
            if isinstance(part, BaseException):  # asked for by propagate=False
                return part
        return [fate for part in parts for fate in part]


def _parts(records: list[Record]) -> Iterator[list[Record]]:
    """`records` in groups of up to BATCH_BYTES; one that is larger is a group of its own."""
    part: list[Record] = []
    total = 0
    for record in records:
        size = len(json.dumps(wire_of(record)))
        if part and total + size > BATCH_BYTES:
            yield part
            part, total = [], 0
        part.append(record)
        total += size + len(", ")
    yield part


def final(error: DeliveryError) -> DeliveryError:
    """Return the error that a dead letter names. A retriable one has used up its retries by then."""
    if not isinstance(error, RetriableError):
        return error
    left = RetriesExhaustedError(
        f"{error.problem}; still so after all retries",
        error.topic,
        error.message_id,
        error.code,
        error.name,
        error.scope,
    )
    left.__cause__ = error
    return left


send = Send()
send_many = SendMany()
