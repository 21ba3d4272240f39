"""Everything that this package raises.

::

    KafkaDeliveryError
    ├── SettingsError               a setting is unknown, malformed or contradicts another
    ├── InvalidRecordError          the record was refused; `field` says which part of it
    ├── NotInWorkerError            a task was called like a function outside a worker
    ├── EnqueueError                `.delay()` failed; whether the record is queued is unknown
    │   ├── BacklogFullError        Redis holds as much as it may; nothing was queued
    │   └── BulkEnqueueError        `send.bulk()` failed on its way; says which records are queued
    ├── DeliveryTimeoutError        `send_and_wait()` did not hear in time; the record is on its way
    ├── ParkingFullError            the parking store has no room; what was to be parked waits in its queue
    └── DeliveryError               what became of a record in the worker
        ├── RetriableError          may pass: tried again, attempts counted
        ├── UnavailableError        the cluster, not the record: tried again, no attempt used
        │   └── CircuitBreakerOpen  it is known to be down: not even tried now
        ├── ProducerError           this process's client, not the record: sent again, no attempt used
        ├── RejectedError           Kafka's verdict on this record or topic: dead letter
        └── RetriesExhaustedError   a RetriableError that stayed: dead letter

This module imports nothing of ours. The Kafka error, where there is one, is the `__cause__`.

A delivery error crosses process borders (prefork's pipe, the result backend, a `link_error` callback) and must
come back as it left: everything it knows is in its `args`, as plain values.
"""

from __future__ import annotations


class KafkaDeliveryError(Exception):
    """Raised for any failure of this package; catch it to catch them all."""


class SettingsError(KafkaDeliveryError, ValueError):
    """Raised when a setting is unknown, malformed or contradicts another one; the text says what to change."""


class InvalidRecordError(KafkaDeliveryError, ValueError):
    """Raised when a record cannot be sent as it is; nothing was queued.

    Attributes:
        field: the argument at fault: ``"topic"``, ``"value"``, ``"key"``, ``"headers"``, ``"partition"``,
            ``"timestamp"``, ``"message_id"``, or ``"record"`` for the whole (its size, its shape).
        problem: what is wrong with it, without the user's data.
        message_id: the id of the record where it has one.
    """

    def __init__(self, field: str, problem: str, message_id: str | None = None) -> None:
        super().__init__(field, problem, message_id)
        self.field = field
        self.problem = problem
        self.message_id = message_id

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class NotInWorkerError(KafkaDeliveryError, RuntimeError):
    """Raised when a task is called like a function in an application: use `.delay()`."""


class EnqueueError(KafkaDeliveryError):
    """Raised when `.delay()` could not confirm that Redis took the message. Whether it did is unknown.

    Repeating the call with the same `message_id` is safe: a consumer sees the same ``message-id`` header twice at
    most, and drops the second.

    Attributes:
        message_id: of the record, or of the batch for `send_many`.
        reason: what failed, from Celery or Redis.
    """

    def __init__(self, message_id: str, reason: str) -> None:
        super().__init__(message_id, reason)
        self.message_id = message_id
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"could not confirm that message {self.message_id} was queued ({self.reason}); "
            f"send it again with message_id={self.message_id!r}: repeating is safe"
        )


class BacklogFullError(EnqueueError):
    """Raised when Redis holds as much as it may. Nothing was queued; there is room again when records are delivered.

    Attributes:
        message_id: of the record, or of the batch for `send_many`.
        reason: how much it holds, or what it said.
    """

    def __str__(self) -> str:
        return (
            f"message {self.message_id} was not queued: too much waits already ({self.reason}); "
            "send it later, and find out why records wait"
        )


class BulkEnqueueError(EnqueueError):
    """Raised when `send.bulk()` could not queue all of its records.

    Attributes:
        accepted: message ids of those that are queued.
        unknown: of those of which Redis did not confirm; sending them again with their ids is safe.
        unsent: of those that were not tried.
        reason: what failed.
    """

    def __init__(self, accepted: list[str], unknown: list[str], unsent: list[str], reason: str) -> None:
        super().__init__(unknown[0] if unknown else "", reason)
        self.args = (accepted, unknown, unsent, reason)
        self.accepted = accepted
        self.unknown = unknown
        self.unsent = unsent

    def __str__(self) -> str:
        return (
            f"{len(self.accepted)} records are queued, of {len(self.unknown)} it is unknown ({self.reason}), "
            f"{len(self.unsent)} were not tried; send the last two again with their message ids: repeating is safe"
        )


class DeliveryTimeoutError(KafkaDeliveryError):
    """Raised when `send_and_wait()` did not hear in time what became of a record. It is queued and on its way.

    It will end as any other: delivered, dead-lettered or parked. Sending it again would make a second record of it.

    Attributes:
        topic: that it is for.
        message_id: its id, under which logs, Flower, Kafka and ``send.AsyncResult(message_id)`` know it.
        timeout_s: how long was waited, in seconds.
        reason: why it takes so long, where that is known; else "".
        retry_after: seconds until an open circuit is looked at again; None if none is open.
    """

    def __init__(
        self, topic: str, message_id: str, timeout_s: float, reason: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(topic, message_id, timeout_s, reason, retry_after)
        self.topic = topic
        self.message_id = message_id
        self.timeout_s = timeout_s
        self.reason = reason
        self.retry_after = retry_after

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return (
            f"message {self.message_id} for topic {self.topic} is on its way, and after {self.timeout_s:g} s it is not "
            f"known where it is{reason}; it needs no second send"
        )


class ParkingFullError(KafkaDeliveryError):
    """Raised when the parking store has no room left. What was to be parked waits in its queue; nothing is thrown away.

    Attributes:
        max_bytes: what parked items may take together.
        retry_after: seconds until it is worth another look.
    """

    def __init__(self, max_bytes: int, retry_after: float) -> None:
        super().__init__(max_bytes, retry_after)
        self.max_bytes = max_bytes
        self.retry_after = retry_after

    def __str__(self) -> str:
        return (
            f"parked items take all of KAFKA_DELIVERY_PARKED_MAX_BYTES={self.max_bytes}: send some again or discard "
            "some (`kafka-delivery parked summary`), or raise it where Redis has the memory"
        )


class DeliveryError(KafkaDeliveryError):
    """Raised in a worker when a record did not reach its topic, and handed to `link_error` and `send_and_wait()`.

    Attributes:
        problem: what happened and, where it is known, why; never a payload, key or header value.
        topic: the topic that the record was for.
        message_id: of the record.
        code: Kafka's numeric error code (negative: librdkafka's own), or None where Kafka gave no verdict.
        name: the code's name, as in ``UNKNOWN_TOPIC_OR_PART``, or None.
        scope: whom it concerns: ``"record"``, ``"topic"``, ``"cluster"`` or ``"producer"``.
        max_retries: retries that this error is worth, where fewer than the setting allows; else None.
    """

    def __init__(
        self,
        problem: str,
        topic: str,
        message_id: str,
        code: int | None = None,
        name: str | None = None,
        scope: str = "record",
        max_retries: int | None = None,
    ) -> None:
        super().__init__(problem, topic, message_id, code, name, scope, max_retries)
        self.problem = problem
        self.topic = topic
        self.message_id = message_id
        self.code = code
        self.name = name
        self.scope = scope
        self.max_retries = max_retries

    def __str__(self) -> str:
        verdict = f" [{self.name}]" if self.name else ""
        return f"{self.problem}{verdict} (topic {self.topic}, message {self.message_id})"

    def __repr__(self) -> str:
        # What Flower and Celery's log show beside the task's arguments, which say topic and id; a column is narrow.
        verdict = f"{self.name}: " if self.name else ""
        return f"{type(self).__name__}({verdict}{self.problem})"


class RetriableError(DeliveryError):
    """Raised when the same record may succeed later; Celery retries it and counts the attempt."""


class UnavailableError(DeliveryError):
    """Raised when the cluster cannot be reached or cannot serve anyone. It is never the record's fault.

    The record waits and is sent again without using an attempt; it never ends in a dead letter.
    """


class CircuitBreakerOpen(UnavailableError):
    """Raised when the record was not even tried, because the circuit of its cluster or topic is open.

    Attributes:
        retry_after: seconds until it is worth another look; 0 where that moment has come.
    """

    def __init__(self, problem: str, topic: str, message_id: str, retry_after: float = 0.0) -> None:
        super().__init__(problem, topic, message_id, scope="cluster")
        self.args = (problem, topic, message_id, retry_after)
        self.retry_after = retry_after


class ProducerError(DeliveryError):
    """Raised when this process's Kafka client failed or was shut down with the record still in it.

    The record is sent again, by another client, without using an attempt.
    """


class RejectedError(DeliveryError):
    """Raised when Kafka refused this record or this topic for good; the record becomes a dead letter."""


class RetriesExhaustedError(DeliveryError):
    """Raised when a retriable error outlived the retries it was worth; the record becomes a dead letter."""
