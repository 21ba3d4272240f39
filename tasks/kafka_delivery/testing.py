"""For an application's own tests: capture what it sends, and let chosen sends fail. No Redis and no Kafka are needed::

    from kafka_delivery.testing import capture

    with capture() as sent:
        place_order(42)
        order = sent.one(topic="orders", key="42")
        assert order.json["total"] == "9.90"

Records are validated as in production. With pytest there is a fixture, see `kafka_delivery.pytest_plugin`.
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack, cast, overload
from unittest.mock import patch

from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import EagerResult
from celery.states import FAILURE, PENDING, SUCCESS

from . import circuits, delivery, settings
from .base import DeliveryTask
from .dead_letters import DeadLetter
from .delivery import SendMany
from .errors import (
    BulkEnqueueError,
    DeliveryError,
    DeliveryTimeoutError,
    EnqueueError,
    KafkaDeliveryError,
    RejectedError,
    RetriesExhaustedError,
)
from .names import CLUSTER_SCOPE, TOPIC_SCOPE
from .outcomes import Listener
from .record import Headers, Record, Value
from .results import Delivered, Fate

SHOWN = 300
"""Characters of a value in the text of a failed assertion."""


class Match(TypedDict, total=False):
    """What a record may be asked for; given as to `send.delay`. A `dict` or `list` is compared as JSON."""

    topic: str
    value: Value
    key: str | bytes | None
    headers: Headers | None
    partition: int | None
    message_id: str | None


@dataclass(frozen=True, slots=True, repr=False)
class Sent(Record):
    """A captured record.

    Attributes:
        options: Celery's, as given to `apply_async`: ``countdown``, ``link``, ``chain``...
        error: what it failed with, if it was told to.
        reason: why it is a dead letter, if it was sent as one.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    error: KafkaDeliveryError | None = None
    reason: Mapping[str, Any] | None = None

    @property
    def json(self) -> Any:
        """The value as a consumer reads it that expects JSON."""
        return json.loads(self.value_bytes or b"")

    @property
    def text(self) -> str:
        """The value as a consumer reads it that expects text."""
        return (self.value_bytes or b"").decode()

    def matches(self, match: Match) -> bool:
        """Whether all that is given is so."""
        if unknown := match.keys() - Match.__annotations__.keys():
            raise TypeError(f"{', '.join(sorted(unknown))}: a record has {', '.join(Match.__annotations__)}")
        return all(self._is(name, wanted) for name, wanted in match.items())

    def _is(self, name: str, wanted: Any) -> bool:
        if name == "value" and isinstance(wanted, dict | list):
            try:
                return bool(self.json == json.loads(Record(self.topic, wanted).value_bytes or b""))
            except ValueError:  # the value is no JSON
                return False
        if name == "topic":
            return bool(self.topic == wanted)
        fields: dict[str, Any] = {"topic": self.topic, "value": None, name: wanted}
        return bool(getattr(self, name) == getattr(Record(**fields), name))


@dataclass(slots=True)
class _Fault:
    error: str | int | type[EnqueueError]
    match: Match
    times: int | None


class Captured(Sequence[Sent]):
    """What was sent while `capture()` was open, in order: a sequence of `Sent`, with assertions.

    Attributes:
        dead_letters: what the application sent with `dead_letter`, apart from the rest.
    """

    def __init__(self) -> None:
        self.dead_letters: list[Sent] = []
        self._sent: list[Sent] = []
        self._faults: list[_Fault] = []
        self._open: dict[str, float] = {}

    # -- assertions
    def one(self, **match: Unpack[Match]) -> Sent:
        """The only record like this.

        Raises:
            AssertionError: there is none, or more than one; the text shows what was sent.
        """
        found = self.all(**match)
        if len(found) != 1:
            raise AssertionError(f"{len(found)} records{_like(match)} were sent, not one{self._shown()}")
        return found[0]

    def all(self, **match: Unpack[Match]) -> list[Sent]:
        """All records like this, in order; perhaps none."""
        return [record for record in self._sent if record.matches(match)]

    def none(self, **match: Unpack[Match]) -> None:
        """Assert that no record like this was sent.

        Raises:
            AssertionError: one was; the text shows what was sent.
        """
        found = self.all(**match)
        if found:
            raise AssertionError(f"{len(found)} records{_like(match)} were sent, not none{self._shown()}")

    def _shown(self) -> str:
        return (
            (": all that were sent are\n" + "\n".join(map(_show, self._sent))) if self._sent else ": nothing was sent"
        )

    @overload
    def __getitem__(self, place: int) -> Sent: ...
    @overload
    def __getitem__(self, place: slice) -> list[Sent]: ...
    def __getitem__(self, place: int | slice) -> Sent | list[Sent]:
        return self._sent[place]

    def __len__(self) -> int:
        return len(self._sent)

    def clear(self) -> None:
        """Forget what was sent; what is to fail, still does."""
        self._sent.clear()
        self.dead_letters.clear()

    # -- faults
    def fail(self, error: str | int | type[EnqueueError], *, times: int | None = None, **match: Unpack[Match]) -> None:
        """Let sends like this fail from now on.

        Args:
            error: a Kafka error by name or code, as in ``"MSG_SIZE_TOO_LARGE"`` or 10: the record is accepted, and it
                becomes of it what a worker makes of that error, see `Sent.error`. `EnqueueError` or a subclass: the
                call raises it; of either `bulk` makes a `BulkEnqueueError`, which therefore stands for `EnqueueError`.
            times: how many sends; by default all.
            match: which sends; by default all.
        """
        if not isinstance(error, type):
            _verdict(error)  # now, not in the middle of the application
        elif issubclass(error, BulkEnqueueError):  # says what became of each record, which only `bulk` knows
            error = EnqueueError
        self._faults.append(_Fault(error, match, times))

    def open_circuit(self, topic: str | None = None, retry_after: float = 30.0) -> None:
        """Let `circuit()` and `send_and_wait()` find the circuit open; that of the cluster where no topic is given."""
        self._open[CLUSTER_SCOPE if topic is None else TOPIC_SCOPE + topic] = retry_after

    def close_circuits(self) -> None:
        """Let all circuits be closed again."""
        self._open.clear()

    # -- in place of Redis and of workers
    def _fault_of(self, record: Record) -> str | int | type[EnqueueError] | None:
        sent = _sent(record)
        for fault in self._faults:
            if fault.times != 0 and sent.matches(fault.match):
                if fault.times is not None:
                    fault.times -= 1
                return fault.error
        return None

    def _take(self, records: list[Record], call_id: str, options: Mapping[str, Any]) -> list[Sent]:
        faults = [self._fault_of(record) for record in records]
        for fault in faults:
            if isinstance(fault, type):
                raise fault(call_id, "a test lets it fail")
        taken = [
            _sent(record, options=options, error=None if fault is None else failure(fault, record))
            for record, fault in zip(records, faults, strict=True)
            if not isinstance(fault, type)
        ]
        self._sent += taken
        return taken

    def _place(self, sent: Sent) -> Delivered:
        same = [one for one in self._sent if one.topic == sent.topic and one.error is None]
        offset = next(place for place, one in enumerate(same) if one is sent)
        return Delivered(
            topic=sent.topic,
            partition=sent.partition or 0,
            offset=offset,
            timestamp=sent.timestamp_ms,
            message_id=sent.id,
        )

    def _fate(self, sent: Sent) -> Fate:
        if sent.error is None:
            return cast("Fate", {"outcome": "delivered", **self._place(sent)})
        name = sent.error.name if isinstance(sent.error, DeliveryError) else None
        fate = Fate(outcome="deferred", message_id=sent.id, topic=sent.topic, error=name)
        if isinstance(sent.error, RejectedError):
            fate["outcome"] = "dead-lettered"
        elif isinstance(sent.error, RetriesExhaustedError):
            fate["outcome"] = "retried"
        return fate

    def _circuits(self, redis: Any, cluster: str, scopes: Iterable[str]) -> list[circuits.Circuit]:
        return [
            circuits.Circuit(scope, circuits.OPEN, self._open[scope], "a test opened it")
            if scope in self._open
            else circuits.Circuit(scope, circuits.CLOSED)
            for scope in scopes
        ]


@contextmanager
def capture() -> Iterator[Captured]:
    """Capture all sends of this process while the block runs, from whichever thread and by whichever call.

    `delay`, `adelay`, `apply_async`, `bulk`, `send_many`, `dead_letter`, `send_and_wait`, a group, a chain's first
    task, and every one that Celery runs eagerly. What is to come later (`link`, the rest of a chain) is not run; it is
    in `Sent.options`.
    """
    sent = Captured()
    cluster = settings.current().cluster
    results: dict[str, EagerResult] = {}

    def enqueue(task: DeliveryTask[Any], wire: list[Any], task_id: str, *rest: Any, **more: Any) -> EagerResult:
        results[task_id] = result_of(task, wire, task_id, *rest, **more)
        return results[task_id]

    def result_of(
        task: DeliveryTask[Any],
        wire: list[Any],
        task_id: str,
        shown: str,
        options: dict[str, Any],
        listening: bool = False,
    ) -> EagerResult:
        wires = wire[0] if isinstance(task, SendMany) else [wire[0]]
        records = [Record.from_wire(one, cluster) for one in wires]
        if isinstance(task, DeadLetter):
            sent.dead_letters += [_sent(one, options=options, reason=wire[1]) for one in records]
            return _ignored(task_id)
        taken = sent._take(records, task.message_id_of(task_id), options)
        if not listening and options.get("ignore_result", True):
            return _ignored(task_id)
        if isinstance(task, SendMany):
            return EagerResult(task_id, [sent._fate(one) for one in taken], SUCCESS)
        (one,) = taken
        if one.error is None:
            return EagerResult(task_id, sent._place(one), SUCCESS)
        if isinstance(one.error, DeliveryTimeoutError):
            return _Waiting(task_id, one.error, PENDING)
        return EagerResult(task_id, one.error, FAILURE)

    def apply(
        task: DeliveryTask[Any], args: Any = None, kwargs: Any = None, task_id: Any = None, **options: Any
    ) -> Any:
        for name in ("link", "link_error"):
            if not options.get(name):
                options.pop(name, None)
        return task.apply_async(args, kwargs, task_id, **{"ignore_result": False} | options)

    with ExitStack() as patched:
        for where, name, instead in (
            (DeliveryTask, "enqueue", enqueue),
            (DeliveryTask, "apply", apply),
            (DeliveryTask, "AsyncResult", lambda task, task_id, **_: results.get(task_id) or _ignored(task_id)),
            (delivery, "is_plain", lambda app, options: False),  # `bulk` then sends one by one
            (circuits, "read", sent._circuits),
            (Listener, "forget", lambda listener, task_id: None),
        ):
            patched.enter_context(patch.object(where, name, instead))
        yield sent


def failure(error: str | int, record: Record) -> KafkaDeliveryError:
    """What becomes of a record that Kafka answers with this error again and again.

    Args:
        error: its name or code.
        record: whose it is.

    Returns:
        `RejectedError` or `RetriesExhaustedError`, as `send_and_wait` raises it; `DeliveryTimeoutError` for an error
        that no record is blamed for, since it then waits until Kafka is well again.
    """
    row = _verdict(error)
    told = (row["reason"], record.topic, record.id, int(row["code"]), row["name"], row["scope"])
    match row["retry"]:
        case "none" | "alone":
            return RejectedError(*told)
        case "full" | "few":
            return RetriesExhaustedError(f"{row['reason']}; still so after all retries", *told[1:])
        case _:
            return DeliveryTimeoutError(record.topic, record.id, 0.0, f"it waits: {row['name']}")


def _verdict(error: str | int) -> Mapping[str, str]:
    for row in _table():
        if error in (row["name"], int(row["code"])):
            return row
    raise ValueError(f"{error!r} is no Kafka error; docs/errors.md lists their names and codes")


@functools.cache
def _table() -> list[dict[str, str]]:
    # The worker's own table. Its package alone loads nothing that may not be installed here.
    lines = importlib.resources.files("kafka_delivery_worker").joinpath("errors.csv").read_text("utf-8").splitlines()
    return list(csv.DictReader(lines))


class _Waiting(EagerResult):
    """Of a record that waits until Kafka is well again."""

    def get(self, timeout: float | None = None, **options: Any) -> Any:
        raise CeleryTimeoutError("The operation timed out.")


def _ignored(task_id: str) -> EagerResult:
    """The result of a send that wants none: `get` returns None."""
    result = EagerResult(task_id, None, PENDING)
    result.ignored = True
    return result


def _sent(record: Record, **known: Any) -> Sent:
    parts = ("topic", "value", "key", "headers", "partition", "timestamp", "message_id")
    return Sent(**{part: getattr(record, part) for part in parts}, **known)


def _like(match: Mapping[str, Any]) -> str:
    return " with " + ", ".join(f"{name}={value!r}" for name, value in match.items()) if match else ""


def _show(record: Sent) -> str:
    value = repr(record.value_bytes)
    if len(value) > SHOWN:
        value = f"{value[:SHOWN]}... ({len(record.value_bytes or b'')} bytes)"
    rest = {"headers": record.header_pairs or None, "partition": record.partition, "error": record.error}
    shown = "".join(f" {name}={found!r}" for name, found in rest.items() if found is not None)
    return f"  topic={record.topic!r} key={record.key_bytes!r} value={value}{shown} message_id={record.id!r}"
