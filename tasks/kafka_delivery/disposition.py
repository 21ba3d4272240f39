"""What becomes of a record after an attempt: the one place that decides it.

Whose fault is a failure? There are four kinds, and each has one answer.

The record's:
    a broker refused it, its shape is invalid, or it used up its attempts. It becomes a dead letter, or is parked.
The topic's or the cluster's:
    it is tried again. It uses an attempt only if no circuit is open for what it failed of.
This process's:
    no client, no thread, a bug of ours, a queue that takes nothing now. The message goes back to its queue and uses no
    attempt, and the process pauses itself. Only a message that failed so in several processes is parked, as ``bug``.
    A process that died decides nothing. Scripts count the deaths while they take the message out of its hands, and
    move it to poison (deaths.lua); where messages have no lease, the parent asks here, with its own number of deaths.
Nobody's yet:
    the outcome is unknown, say after a timeout. It is sent again under the same id.

`disposition` is a pure function. Whoever calls it applies its answer: the event loop's short way, the batch, Celery's
way, the consumer and the requests.
"""

from __future__ import annotations

import enum

from .errors import (
    DeliveryError,
    InvalidRecordError,
    ProducerError,
    RejectedError,
    RetriableError,
    RetriesExhaustedError,
    UnavailableError,
)

BLAMED_AFTER = 3
"""Processes that must have failed at a message, each by its own fault, before the message is blamed for it."""


class Circuit(enum.Enum):
    """The outermost circuit that a record has to pass and that is open."""

    CLOSED = "closed"
    TOPIC = "topic"
    CLUSTER = "cluster"


class Asker(enum.Enum):
    """What was asked for."""

    SEND = "send"
    MEMBER = "member"
    """One record of a batch. The batch is one message, so a member cannot go back to the queue by itself."""
    DEAD_LETTER = "dead letter"


class Move(enum.Enum):
    """Where a record goes."""

    ACKNOWLEDGE = "acknowledge"
    """It is delivered."""
    RETRY = "retry"
    """It is queued again, for later, and has used an attempt."""
    DEFER = "defer"
    """It is queued again, for later, and has used no attempt."""
    RETURN = "return"
    """Its message goes back to the front of its queue. No attempt is used."""
    PUT_ASIDE = "put aside"
    """Its message waits in a list of its topic's own until that circuit closes. No attempt is used."""
    RETURN_AND_PAUSE = "return and pause"
    """Its message goes back and waits there. No attempt is used, and the process pauses itself."""
    DEAD_LETTER = "dead letter"
    """It is handed to the task that publishes dead letters."""
    PARK = "park"
    """It is kept in the parking store until a person decides."""


def disposition(
    error: BaseException | None,
    *,
    asker: Asker,
    attempts: int,
    max_retries: int,
    circuit: Circuit = Circuit.CLOSED,
    leased: bool = False,
    stopping: bool = False,
    processes: int = 0,
    blamed_after: int | None = None,
) -> Move:
    """Return what becomes of a record.

    Args:
        error: why it is not delivered; None if it is. A `DeliveryError` is classified, see
            `kafka_delivery_worker.classify`.
        asker: what was asked for.
        attempts: retries that it has used.
        max_retries: retries that the settings allow. An error may be worth fewer.
        circuit: the circuit that is open for it now.
        leased: whether its message is in hand and can wait in Redis as it is. If not, a copy of it is queued.
        stopping: whether this worker was told to stop.
        processes: how many processes have failed at it by their own fault, this one included; 0 where nobody counts,
            because the reason is known and passes.
        blamed_after: how many of these blame the message; `BLAMED_AFTER` by default.
    """
    if error is None:
        return Move.ACKNOWLEDGE
    if isinstance(error, InvalidRecordError):
        return Move.PARK
    if isinstance(error, RejectedError | RetriesExhaustedError):
        return _given_up(asker)
    if isinstance(error, RetriableError | UnavailableError):
        return _outside(error, asker, attempts, max_retries, circuit, leased, stopping)
    # This process's.
    if processes >= (BLAMED_AFTER if blamed_after is None else blamed_after):
        return Move.PARK
    if stopping and asker is not Asker.MEMBER:
        return Move.RETURN
    return Move.DEFER if asker is Asker.MEMBER and isinstance(error, ProducerError) else Move.RETURN_AND_PAUSE


def waits_for_circuit(error: DeliveryError) -> bool:
    """Return whether `error` counts for a circuit: while that is open, a record that fails so uses no attempt."""
    if isinstance(error, UnavailableError):
        return True
    return isinstance(error, RetriableError) and error.scope == "topic" and error.max_retries is None


def has_attempts(error: RetriableError, attempts: int, max_retries: int) -> bool:
    """Return whether the record has attempts left that `error` is worth."""
    return attempts < (max_retries if error.max_retries is None else min(error.max_retries, max_retries))


def _outside(
    error: RetriableError | UnavailableError,
    asker: Asker,
    attempts: int,
    max_retries: int,
    circuit: Circuit,
    leased: bool,
    stopping: bool,
) -> Move:
    waits = circuit is not Circuit.CLOSED and waits_for_circuit(error)
    if isinstance(error, RetriableError) and not waits and not has_attempts(error, attempts, max_retries):
        return _given_up(asker)
    if stopping and asker is not Asker.MEMBER:
        return Move.RETURN
    if waits and leased:
        return Move.RETURN if circuit is Circuit.CLUSTER else Move.PUT_ASIDE
    return Move.DEFER if waits or isinstance(error, UnavailableError) else Move.RETRY


def _given_up(asker: Asker) -> Move:
    return Move.PARK if asker is Asker.DEAD_LETTER else Move.DEAD_LETTER
