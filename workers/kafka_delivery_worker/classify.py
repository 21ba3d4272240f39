"""What a Kafka error means for the record it hit: whose fault it is, whether to try again, whether a copy may exist.

`errors.csv` beside this module is the only source of that policy: a change of mind is a change of its row.

librdkafka's own verdict cannot be used. `KafkaError.retriable()` and `.fatal()` are filled in for transactional calls
only; on the error of a delivery report both are always False, whatever the code. What librdkafka retries internally
is not the answer either: it treats several codes as final that pass by themselves, such as NETWORK_EXCEPTION.

Two traps of `KafkaError`: `== None` raises TypeError and `hash()` raises SystemError, so use `is None` and `.code()`.
"""

from __future__ import annotations

import csv
import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from confluent_kafka import KafkaError, KafkaException

from kafka_delivery.errors import DeliveryError, ProducerError, RejectedError, RetriableError, UnavailableError

FEW_RETRIES = 2  # enough for a topic that is about to exist; more only delays the dead letter


class Kind(enum.StrEnum):
    RETRIABLE = "retriable"  # may pass; the record or its topic is looked at first
    UNAVAILABLE = "unavailable"  # nobody's record would get through
    REJECTED = "rejected"  # a verdict on this record or topic
    FATAL = "fatal"  # this process's client is finished and must be rebuilt


class Scope(enum.StrEnum):
    RECORD = "record"  # others to the same topic may succeed
    TOPIC = "topic"  # the topic or one of its partitions; other topics may succeed
    CLUSTER = "cluster"  # brokers, network, login: every record of every worker
    PRODUCER = "producer"  # this process's client; other workers may succeed


class Retry(enum.StrEnum):
    FULL = "full"  # the normal budget, attempts counted, then dead letter
    FEW = "few"  # FEW_RETRIES with a long pause, then dead letter
    ALONE = "alone"  # once more in a batch of its own, since a batch fails as a whole, then dead letter
    NONE = "none"  # dead letter at once
    HOLD = "hold"  # waits, no attempt used, never a dead letter
    RESEND = "resend"  # the record is innocent: sent again, no attempt used


@dataclass(frozen=True, slots=True)
class Verdict:
    """One row of the table; `duplicate` says that the record may be in the topic already, `reason` is for people."""

    code: int
    name: str
    kind: Kind
    scope: Scope
    retry: Retry
    duplicate: bool
    reason: str

    @property
    def of_topic(self) -> bool:
        """Whether it says that a topic is in trouble: what counts for the topic's circuit."""
        return self.scope is Scope.TOPIC and self.retry is Retry.FULL


# For a code newer than the table; `verdict` fills in its number. It may well be the record's own fault, and such a
# record must not circle for ever: few retries, then dead letter.
UNKNOWN_CODE = Verdict(0, "CODE_?", Kind.RETRIABLE, Scope.RECORD, Retry.FEW, True, "This version knows no such error")

_ERROR_CLASS: Mapping[Retry, type[DeliveryError]] = {
    Retry.FULL: RetriableError,
    Retry.FEW: RetriableError,
    Retry.ALONE: RejectedError,
    Retry.NONE: RejectedError,
    Retry.HOLD: UnavailableError,
    Retry.RESEND: ProducerError,
}


def verdict(code: int) -> Verdict:
    """The policy for a code of `KafkaError.code()`. Raises ValueError for 0, which is not an error."""
    if code == KafkaError.NO_ERROR:
        raise ValueError("code 0 means no error: there is nothing to judge")
    return _table().get(code) or replace(UNKNOWN_CODE, code=code, name=f"CODE_{code}")


def code_of(name: str) -> int | None:
    """The code of an error's name, as in ``MSG_SIZE_TOO_LARGE``; None if there is none such."""
    return next((row.code for row in _table().values() if row.name == name), None)


def delivery_error(error: KafkaError, topic: str, message_id: str, cause: KafkaError | None = None) -> DeliveryError:
    """The error of our tree for a failed delivery, with Kafka's as its `__cause__`.

    `cause` is the producer's last broker error: `_MSG_TIMED_OUT` does not say why no broker answered. It is named in
    the text and decides nothing. Kafka's own sentence stays in `__cause__`: it holds addresses and varies per broker.
    """
    found = verdict(error.code())
    problem = found.reason if cause is None else f"{found.reason}; last broker error: {cause.name()}"
    max_retries = FEW_RETRIES if found.retry is Retry.FEW else None
    cls = _ERROR_CLASS[found.retry]
    built = cls(problem, topic, message_id, found.code, found.name, found.scope.value, max_retries)
    built.__cause__ = KafkaException(error)
    return built


@cache
def _table() -> Mapping[int, Verdict]:
    lines = files("kafka_delivery_worker").joinpath("errors.csv").read_text("utf-8").splitlines()
    return {int(row["code"]): _parse(row) for row in csv.DictReader(lines)}


def _parse(row: Mapping[str, str]) -> Verdict:
    kind, scope, retry = Kind(row["kind"]), Scope(row["scope"]), Retry(row["retry"])
    duplicate = {"yes": True, "no": False}[row["duplicate"]]
    return Verdict(int(row["code"]), row["name"], kind, scope, retry, duplicate, row["reason"])
