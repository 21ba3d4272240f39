"""The task that publishes a dead letter: a record that cannot be delivered, with the reason, in a topic of its own.

It is a task so that the hand-over is as safe as the send: queued, retried, confirmed by its own delivery report. What
its topic refuses too is parked in Redis, whole.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from . import settings
from .base import DeliveryTask, engine, record_from, wire_of
from .disposition import Asker, Move
from .errors import DeliveryError, InvalidRecordError
from .names import DEAD_LETTER
from .record import Headers, Key, Record, Value
from .results import Result

TASK_ID_SUFFIX = "-dlq"
"""A dead letter's task id is its message id and this, so that Flower shows the send and the dead letter apart."""

MAX_ERROR_CLASS = 200
"""Bytes of the name of an error; with the other headers it stays within `settings.DEAD_LETTER_HEADROOM_BYTES`."""

REASON_FIELDS = {"error_class", "error_code", "error_message", "retry_count", "redrive_count", "failed_at"}


class DeadLetter(DeliveryTask[dict[str, Any]]):
    """Publish a record to its dead-letter topic. Workers call it; an application may, for reasons of its own."""

    name = DEAD_LETTER
    asker = Asker.DEAD_LETTER

    @property
    def queue_name(self) -> str:
        """The queue of dead letters."""
        return settings.current().dead_letter_queue

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
        error_class: str = "Application",
        error_code: int | None = None,
        error_message: str = "",
        retry_count: int = 0,
    ) -> Result[None]:
        """Queue a dead letter and return at once.

        Args:
            topic: the original topic; the dead-letter topic is found from it.
            value, key, headers, partition, timestamp, message_id: as for `send.delay`.
            error_class: what kind of failure it was; a name that a dashboard can group by.
            error_code: Kafka's error code, where there is one.
            error_message: why; the first 1,024 bytes are kept. Put no payload in it.
            retry_count: attempts that were used up.

        Raises:
            InvalidRecordError, EnqueueError: as `send.delay`.
        """
        record = Record(topic, value, key, headers, partition, timestamp, message_id)
        return self.apply_async((record, reason(error_class, error_code, error_message, retry_count)))

    def encode(self, args: Any, kwargs: Any, task_id: str | None) -> tuple[list[Any], str, str]:
        record, why = self.letter(args, kwargs, task_id)
        shown = f"({record.topic!r}, {record.size} bytes, {record.id!r}, {why['error_class']!r}, {why['error_code']!r})"
        return [wire_of(record), why], task_id or record.id + TASK_ID_SUFFIX, shown

    def message_id_of(self, task_id: str) -> str:
        return task_id.removesuffix(TASK_ID_SUFFIX)

    def letter(self, args: Any, kwargs: Any, task_id: str | None) -> tuple[Record, dict[str, Any]]:
        """The record and its reason: from a hand-over, from the wire, or from plain arguments."""
        if len(args) == 4 and isinstance(args[1], DeliveryError):
            record, error, retry_count, redrives = args
            return record, reason(type(error).__name__, error.code, str(error), retry_count, redrive_count=redrives)
        if len(args) == 2 and not kwargs and isinstance(args[0], Record | list) and isinstance(args[1], dict):
            # Of a newer version's reason, take what this one knows.
            return record_from(args[:1], {}, None), reason(**{k: v for k, v in args[1].items() if k in REASON_FIELDS})
        why = {name: value for name, value in kwargs.items() if name in REASON_FIELDS}
        rest = {name: value for name, value in kwargs.items() if name not in REASON_FIELDS}
        if "message_id" not in rest and len(args) < 7 and task_id is not None:
            rest["message_id"] = task_id.removesuffix(TASK_ID_SUFFIX)
        return record_from(args, rest, None), reason(**why)

    def run(self, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Publish the dead letter and return where it is, or park the record.

        Raises:
            RetriableError, UnavailableError, ProducerError: caught by Celery's autoretry, see `DeliveryTask.retry`.
        """
        record, why = self.letter(args, kwargs, self.request.id)
        try:
            return engine().deliver_dead_letter(record, why, self.probe)
        except DeliveryError as error:
            if self.move(error) is Move.PARK:
                return self.park(record, why, error)
            raise

    def park(self, record: Record, why: dict[str, Any], error: DeliveryError) -> dict[str, Any]:
        try:
            parked = engine().park(record, why, error)
        except Exception as fault:  # Redis is away: the queue still has the message
            self.give_back(fault)
        return {"outcome": "parked", "message_id": record.id, "topic": record.topic, "parked": parked}


def reason(
    error_class: Any = "Application",
    error_code: Any = None,
    error_message: Any = "",
    retry_count: Any = 0,
    failed_at: Any = None,
    redrive_count: Any = 0,
) -> dict[str, Any]:
    """Why a record is dead, as it travels; `failed_at` is ISO 8601, now by default.

    Raises:
        InvalidRecordError: a part has the wrong type.
    """
    for field, value, kinds in (
        ("error_class", error_class, (str,)),
        ("error_code", error_code, (int, type(None))),
        ("error_message", error_message, (str,)),
        ("retry_count", retry_count, (int,)),
        ("redrive_count", redrive_count, (int,)),
        ("failed_at", failed_at, (str, type(None))),
    ):
        if type(value) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise InvalidRecordError(field, f"must be {wanted}, not {type(value).__name__}")
    for field, count in (("retry_count", retry_count), ("redrive_count", redrive_count)):
        if count < 0:
            raise InvalidRecordError(field, f"{count} must not be negative")
    return {
        "error_class": _first(MAX_ERROR_CLASS, error_class),
        "error_code": error_code,
        "error_message": _first(1024, error_message),
        "retry_count": retry_count,
        "redrive_count": redrive_count,
        "failed_at": _first(MAX_ERROR_CLASS, failed_at or datetime.now(UTC).isoformat(timespec="milliseconds")),
    }


def _first(size: int, text: str) -> str:
    """At most so many bytes of `text`, whole characters."""
    return text.encode(errors="replace")[:size].decode(errors="ignore")


dead_letter = DeadLetter()
