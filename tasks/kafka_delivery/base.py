"""What all our tasks share: how a call becomes a message, how a retry is paced, and why nothing is lost.

Celery acknowledges a message whose task failed, and drops one whose retry could not be published. Both lose records.
Here a task ends in one of four ways only: it succeeded; it put its record elsewhere and that was confirmed; the
message goes back to its queue (`GiveBack`); or the message is parked with what went wrong. `disposition` decides which.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, TypeVar, Unpack, cast, overload

from celery.exceptions import Ignore, Reject, Retry
from celery.states import FAILURE
from celery.utils.time import get_exponential_backoff_interval
from kombu.exceptions import EncodeError
from redis.exceptions import OutOfMemoryError

from . import settings
from .aftermath import failed, leave_nothing, retried, succeeded
from .backlog import refuse_if_full
from .celery_app import app
from .celery_types import Options, Task
from .disposition import Asker, Circuit, Move, disposition
from .errors import (
    BacklogFullError,
    DeliveryError,
    EnqueueError,
    InvalidRecordError,
    KafkaDeliveryError,
    NotInWorkerError,
    ParkingFullError,
    ProducerError,
    RetriableError,
    UnavailableError,
)
from .faults import QUEUE_FAULTS, is_publish_fault, said_by, text_of
from .marks import count_of, mark_of, marked_again
from .names import DEFERRALS, PROBE, REDRIVES
from .publisher import is_plain, publish
from .record import MAX_MESSAGE_ID, Record, member_id
from .results import Result, TaskResult
from .tracing import traced

if TYPE_CHECKING:
    from kafka_delivery_worker.engine import Engine

log = logging.getLogger("kafka_delivery.task")

T = TypeVar("T")
"""What a task returns, and a wanted result holds."""

REQUEUE_PAUSE_S = 2.0
"""How long a message waits that goes back because something around it refused, in seconds. Without a pause the queue
would hand it out again at once."""

BATCH_BYTES = 700_000
"""Of records as JSON in one message of `send_many`: in Redis, where that lies in base64, less than a megabyte."""

MAX_MEMBERS = 20_000
"""Of one message of `send_many`. No more records than 16,000, the shortest that there are, have so few bytes; what is
called by name may have some more. A larger one is parked whole, and not member by member."""


def engine() -> Engine:
    """This worker process's engine."""
    # Late, and the only import of worker code here: an application that calls .delay() must not load librdkafka.
    from kafka_delivery_worker.engine import current

    return current()


class Deferral(Retry):
    """Raised instead of Celery's, and treated as it: the same attempt is queued again, for later."""

    def __str__(self) -> str:
        return f"Deferred, no attempt used, {self.humanize()}: {self.exc}"


class GiveBack(Reject):
    """Raised to give a message back to its queue, where it waits before it is handed out again.

    Args:
        reason: why, in words; it holds no payload.
        pause_s: how long it waits, in seconds.
    """

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason, requeue=True)
        self.pause_s = pause_s

    def __reduce__(self) -> tuple[Any, ...]:  # it crosses the pipe of a prefork child
        return type(self), (self.reason, self.pause_s)


class DeliveryTask(Task, Generic[T]):
    """Base of `send`, `send_many` and `dead_letter`."""

    abstract = True
    asker = Asker.SEND
    _app = app  # not the current app: that is the application's
    typing = False  # `encode` checks the arguments, and says more than "missing positional argument"
    ignore_result = True
    acks_late = True
    reject_on_worker_lost = True
    acks_on_timeout = False  # a time limit ends the process that waits, not the record
    throws = (DeliveryError, InvalidRecordError)  # expected: one line in the log, no traceback
    autoretry_for = (RetriableError, UnavailableError, ProducerError)
    Request = "kafka_delivery_worker.request:Request"

    @property
    def queue_name(self) -> str:
        """The queue of sends; a call may name another one."""
        return settings.current().queue

    # Read when the worker registers the task, not at import.
    @property
    def max_retries(self) -> int:
        return settings.current().max_retries

    @property
    def retry_backoff(self) -> int:
        return settings.current().retry_backoff_s

    @property
    def retry_backoff_max(self) -> int:
        return settings.current().retry_backoff_max_s

    @property
    def retry_jitter(self) -> bool:
        return settings.current().retry_jitter

    # -- a call becomes a message
    def encode(self, args: Any, kwargs: Any, task_id: str | None) -> tuple[list[Any], str, str]:
        """Arguments for the wire, the task id, and a representation that shows nothing of a payload.

        Raises:
            InvalidRecordError: the record is refused.
        """
        raise NotImplementedError

    @overload  # type: ignore[override]  # narrower than Celery's, which takes any option
    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        task_id: str | None = None,
        *,
        ignore_result: Literal[True] = True,
        **options: Unpack[Options],
    ) -> Result[None]: ...
    @overload
    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        task_id: str | None = None,
        *,
        ignore_result: Literal[False],
        **options: Unpack[Options],
    ) -> Result[T]: ...
    @overload
    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        task_id: str | None = None,
        *,
        ignore_result: bool,
        **options: Unpack[Options],
    ) -> Result[T] | Result[None]: ...
    def apply_async(self, args: Any = None, kwargs: Any = None, task_id: str | None = None, **options: Any) -> Any:
        """Queue a call; Celery's options (`countdown`, `expires`, `link`, `ignore_result`...) work as usual.

        Raises:
            InvalidRecordError: the record was refused; nothing was queued.
            EnqueueError: Redis did not confirm; whether the message is queued is unknown.
        """
        if options.get("queue") == self.queue_name:  # it goes there anyway, and then the short way
            del options["queue"]
        return self.call(args or (), kwargs or {}, task_id, options)

    def signature(self, args: Any = None, *starargs: Any, **starkwargs: Any) -> Any:
        """As Celery's, with our queue: another app, whose chain it is part of, would send it to its own."""
        made = super().signature(args, *starargs, **starkwargs)
        if made.options.keys().isdisjoint({"queue", "exchange", "routing_key"}):  # a retry goes where it came from
            made.set(queue=self.queue_name)
        return made

    def call(self, args: Any, kwargs: Any, task_id: str | None, options: dict[str, Any]) -> Result[Any]:
        """What `apply_async` does."""
        return self.enqueue(*self.encode(args, kwargs, task_id), options)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> TaskResult[T]:  # noqa: N802  # Celery's name
        """The result of the message with this id."""
        found: TaskResult[T] = super().AsyncResult(task_id, **kwargs)
        return found

    def enqueue(
        self, wire: list[Any], task_id: str, shown: str, options: dict[str, Any], listening: bool = False
    ) -> Result[Any]:
        """Queue what `encode` made.

        Args:
            wire, task_id, shown: what `encode` made.
            options: Celery's.
            listening: the caller listens for the result by itself; without this Celery subscribes too.

        Raises:
            EnqueueError: Redis did not confirm.
        """
        options |= {"argsrepr": shown, "kwargsrepr": "{}"}
        try:
            if not isinstance(app.current_worker_task, DeliveryTask):  # what a worker puts back or hands over must go
                refuse_if_full(self.message_id_of(task_id))
            if is_plain(app, options):
                publish(app, self, self.queue_name, task_id, wire, shown, "{}", ignore_result=not listening)
                result: Any = self.AsyncResult(task_id)
                result.ignored = True  # so that get() does not wait for what will not come
                return cast("Result[Any]", result)
            if listening:
                # Of the message; the option of that name subscribes.
                options["headers"] = {**(options.get("headers") or {}), "ignore_result": False}
            return cast("Result[Any]", super().apply_async(wire, {}, task_id=task_id, **options))
        except EncodeError:  # a fault in the call, which stays one however often it is repeated
            raise
        except QUEUE_FAULTS as error:
            if OutOfMemoryError in (type(error), type(error.__cause__)):
                raise BacklogFullError(self.message_id_of(task_id), text_of(error)) from error
            raise EnqueueError(self.message_id_of(task_id), said_by(error)) from error
        except AttributeError as error:
            if error.obj is not None:
                raise
            # Kombu's, where another thread found the connection broken and took it away.
            raise EnqueueError(self.message_id_of(task_id), "the connection was lost meanwhile") from error
        except RuntimeError as error:  # Celery's, when it cannot subscribe to a wanted result
            if not isinstance(error.__cause__, QUEUE_FAULTS):
                raise
            raise EnqueueError(self.message_id_of(task_id), text_of(error)) from error

    def enqueue_on_commit(self, records: list[Record], args: tuple[Any], task_id: str, using: str | None) -> None:
        """Call `apply_async` when Django's transaction on the database `using` is committed.

        Raises:
            ImportError: Django is not installed.
        """
        # Late, as in `engine`: only an application that is Django's has it.
        try:
            from .contrib.django.on_commit import queue_on_commit
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "django":
                raise
            raise ImportError("delay_on_commit() needs Django, which is not installed; call delay()") from error
        queue_on_commit(type(self), partial(self.apply_async, args, task_id=task_id), records, task_id, using)

    def message_id_of(self, task_id: str) -> str:
        """The message id that a task id stands for."""
        return task_id

    # -- a message becomes a call
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:  # a stranger's argument may be called self
        """Run in a worker; park what fails in a way that is nobody's plan (Celery would acknowledge it)."""
        self._get_app()  # binds the task, which in an application nothing else may have done yet
        if self.request.called_directly:
            raise NotInWorkerError(f"{self.name} runs in a worker; in an application call .delay() or .apply_async()")
        try:
            value = self.run(*args, **kwargs)
        except Retry as again:
            self.note_retry(again)
            raise
        except (Reject, Ignore):
            raise
        except DeliveryError as error:
            self.conclude(failed, error)
            raise
        except InvalidRecordError as error:
            self.park_call(error)
            self.conclude(failed, error, parked=True)
            raise
        except Exception as error:
            self.failed_here(error)
            self.park_call(error)
            unplanned = type(error).__name__
        else:
            self.conclude(succeeded, value)
            return value
        # Not the error itself: Celery logs its text, which may quote what it choked on.
        unexpected = KafkaDeliveryError(f"parked after an unexpected {unplanned}")
        self.conclude(failed, unexpected, parked=True)
        raise unexpected

    def failed_here(self, error: Exception) -> None:
        """Give the message back after a failure that is this process's; return only if it is to be parked.

        Raises:
            GiveBack: few processes have failed at it yet.
        """
        known = engine().failed_here(self.request.id, error)
        if self.move(error, processes=known.processes) is not Move.PARK:
            self.give_back(error, known.pause_s)

    def conclude(self, ends: Callable[[Task, Any], None], how: Any, parked: bool = False) -> None:
        """Do what Celery would do after the body, where a failure still puts the message back.

        The record is safe by then; a repeat sends it again, under the same id. What can never be published, say a
        callback that is no signature, is parked with the record: a message that comes back for ever sends for ever.

        Args:
            ends: does it.
            how: what the task returned, or its error.
            parked: whether the record is parked already, which is with all that was to follow it.
        """
        if self.request.is_eager:
            return
        try:
            ends(self, how)
        except Exception as fault:  # of whatever a callback or Celery raises; none of it may acknowledge the message
            if is_publish_fault(fault):
                log.warning(
                    "task.not_concluded message_id=%s error=%s: it goes back to its queue",
                    self.request.id, type(fault).__name__,
                )  # fmt: skip
                self.give_back(fault)
            leave_nothing(self)
            if not parked:
                self.park_call(fault, f"what was to follow it could not be queued: {type(fault).__name__}")

    def note_retry(self, again: Retry) -> None:
        """Store for who waits for the result that another attempt is queued; it is, whether or not that succeeds."""
        if self.request.is_eager:
            return
        try:
            retried(self, again.exc)
        except Exception as fault:  # sorted at once: a fault that is not the queue's goes on
            if not is_publish_fault(fault):
                raise
            self.request.ignore_result = True
            log.warning("result.not_stored message_id=%s error=%s", self.request.id, type(fault).__name__)

    def park_call(self, error: Exception, why: str | None = None) -> None:
        try:
            engine().park_call(self.request, error, why=why)
        except Exception as fault:  # Redis is away, or no engine could be made: the queue still has the message
            self.give_back(fault)

    # -- what becomes of a record
    def move(self, error: Exception, processes: int = 0) -> Move:
        """Return what becomes of the record at hand."""
        topic = error.topic if isinstance(error, DeliveryError) else None
        return disposition(
            error,
            asker=self.asker,
            attempts=self.request.retries or 0,
            max_retries=self.max_retries,
            circuit=Circuit.CLOSED if topic is None else engine().breaker.circuit(topic),
            stopping=engine().stopping,
            processes=processes,
        )

    # -- retries
    def pause_before_retry(self, error: RetriableError, retries: int) -> int:
        """Seconds until attempt number `retries` + 2: Celery's backoff, or a long pause where it rarely helps."""
        if error.max_retries is not None:
            pause = settings.current().few_backoff_s
            return pause + (random.randint(0, pause // 3) if self.retry_jitter else 0)
        return int(
            get_exponential_backoff_interval(self.retry_backoff, retries, self.retry_backoff_max, self.retry_jitter)
        )

    def pause_before_resend(self, deferrals: int, topic: str) -> int:
        """Seconds until a record is tried again that waits for the cluster; until its circuit is due, if it is open."""
        s = settings.current()
        if engine().breaker.is_shut(topic):
            pause = min(s.defer_max_s, math.ceil(engine().breaker.retry_after(topic)))
        else:
            pause = int(
                get_exponential_backoff_interval(s.defer_s, min(deferrals, 60), s.defer_max_s, full_jitter=False)
            )
        return pause + (random.randint(0, s.defer_s) if s.retry_jitter else 0)

    def retry(self, args: Any = None, kwargs: Any = None, exc: Any = None, **options: Any) -> Any:
        """Called by autoretry. Only a `RetriableError` uses an attempt; a failed publish puts the message back.

        Raises:
            celery.exceptions.Retry: the next attempt is queued.
            GiveBack: it could not be queued, the worker is stopping, or the fault is this process's.
        """
        move = self.move(exc)
        if move in (Move.RETURN, Move.RETURN_AND_PAUSE):
            self.give_back(exc, 0.0 if move is Move.RETURN else engine().failed_here(None, exc).pause_s)
        wire, _, _ = self.encode(self.request.args, self.request.kwargs, self.request.id)
        # A circuit may have closed since the body raised: what has no attempt left is deferred all the same.
        counted = move is Move.RETRY
        try:
            if counted:
                options["countdown"] = self.pause_before_retry(exc, self.request.retries)
                options["headers"] = marked_again(self.request)
                again = super().retry(wire, {}, exc=exc, throw=False, **options)
            else:
                again = self.defer(wire, exc)
        except (Reject, EnqueueError) as fault:
            self.give_back(fault)
        engine().sent_again("retried" if counted else "deferred", exc, self.request.retries)
        raise again

    @property
    def probe(self) -> str | None:
        """Mark of the probe that the message at hand is, see `kafka_delivery_worker.breaker`."""
        mark: str | None = mark_of(self.request, PROBE)
        return mark

    @property
    def tag(self) -> str | None:
        """Delivery tag of the message at hand."""
        tag: str | None = (self.request.properties or {}).get("delivery_tag")
        return tag

    @property
    def redrives(self) -> int:
        """How often the record at hand was sent again from its dead-letter topic, this time included."""
        return count_of(self.request, REDRIVES)

    def defer(self, wire: list[Any], exc: DeliveryError) -> Deferral:
        """Queue the same attempt again, later."""
        deferrals = count_of(self.request, DEFERRALS)
        countdown = self.pause_before_resend(deferrals, exc.topic)
        signature = self.signature_from_request(
            self.request,
            wire,
            {},
            countdown=countdown,
            retries=self.request.retries,
            headers=marked_again(self.request, {DEFERRALS: deferrals + 1}),
        )
        signature.apply_async()
        return Deferral(exc=exc, when=countdown, sig=signature)

    def remember(self, error: DeliveryError) -> None:
        """Keep the final error as the task's result, where a `link_error` callback will ask for it.

        A callback that lives in another app gets only the id (celery/backends/base.py, `_call_task_errbacks`).
        """
        if self.request.errbacks:
            try:
                self.backend.store_result(self.request.id, error, FAILURE, request=self.request)
            except QUEUE_FAULTS as fault:  # the record is safe; the callback will not find its reason
                log.warning("result.not_stored message_id=%s error=%s", self.request.id, type(fault).__name__)

    # -- hand-overs
    def publish(
        self, task: DeliveryTask[Any], record: Record, *, error: DeliveryError | None = None, **options: Any
    ) -> None:
        """Queue `record` for `task` before the message at hand is acknowledged."""
        try:
            why = () if error is None else (error, options.pop("retry_count"), self.redrives)
            task.apply_async((record, *why), **options)
        except EnqueueError as fault:
            self.give_back(fault)

    def give_back(self, fault: Exception, pause_s: float | None = None) -> NoReturn:
        """Give the message back to its queue.

        A leased message makes its pause in Redis. Any other makes it here: its queue would hand it out again at once.

        Args:
            fault: why.
            pause_s: how long it waits, in seconds; by default what the fault asks for.

        Raises:
            GiveBack: always.
        """
        pause = pause_of(fault) if pause_s is None else pause_s
        try:
            if pause and not settings.current().leases:
                engine().pause(pause)
        finally:
            raise GiveBack(words_of(fault), pause) from None  # Celery logs whatever is chained, each time


def pause_of(fault: Exception) -> float:
    """Return how long a message waits that goes back because of `fault`, in seconds."""
    return fault.retry_after if isinstance(fault, ParkingFullError) else REQUEUE_PAUSE_S


def words_of(fault: Exception) -> str:
    """Return what may be said of `fault`. The text of an unplanned error may quote the payload that it choked on."""
    if isinstance(fault, (KafkaDeliveryError, Reject, *QUEUE_FAULTS)):
        return said_by(fault)
    return type(fault).__name__


def wire_of(record: Record) -> list[Any]:
    """`record` for the wire; with the context of the trace in which it is sent, unless a delivery task sends it on."""
    if not isinstance(app.current_worker_task, DeliveryTask):
        record = traced(record)
    return record.to_wire(settings.current().cluster)


def record_from(args: Any, kwargs: Any, task_id: str | None) -> Record:
    """The record of a call: made already, from the wire, or from plain arguments as `send_task` and beat give them.

    Raises:
        InvalidRecordError: it is none, or the task id and the message id differ.
    """
    if len(args) == 1 and not kwargs and isinstance(args[0], Record):
        record = args[0]
    elif len(args) == 1 and not kwargs and isinstance(args[0], list):
        record = Record.from_wire(args[0], settings.current().cluster)
    else:
        record = _plain(args, kwargs, task_id)
    if task_id is not None and record.id != task_id:
        raise InvalidRecordError(
            "message_id",
            f"{record.id!r} is not the task id {str(task_id)[:MAX_MESSAGE_ID]!r}: give one of them, they are the same",
            record.id,
        )
    return record


@dataclass(frozen=True, slots=True)
class Refused:
    """A member of a batch that is no valid record.

    Attributes:
        id: its message id, or one made from the batch's and its place.
        member: what it is, as it came.
        error: why it is none; its field names the place in the batch.
    """

    id: str
    member: Any = field(repr=False)
    error: InvalidRecordError

    def as_call(self, task: str) -> SimpleNamespace:
        """It, as a call of `task` that failed."""
        plain = isinstance(self.member, Mapping)
        args, kwargs = ((), dict(self.member)) if plain else ((self.member,), {})
        return SimpleNamespace(id=self.id, task=task, args=args, kwargs=kwargs, retries=0)


def batch_from(args: Any, kwargs: Any, task_id: str | None) -> list[Record | Refused]:
    """The members of a `send_many` call, each a record or refused.

    A member without a message id gets one from the batch's id, so that a redelivered batch is the same batch.

    Raises:
        InvalidRecordError: it is no batch at all.
    """
    if kwargs and kwargs.keys() != {"records"}:
        raise InvalidRecordError("records", "is the only argument of send_many")
    records = kwargs.get("records") if kwargs else args[0] if len(args) == 1 else None
    if records is None or isinstance(records, str | bytes | Mapping | Record) or not hasattr(records, "__iter__"):
        raise InvalidRecordError("records", "must be an iterable of Records or mappings")
    return [_member(position, member, task_id) for position, member in enumerate(records)]


def is_too_many(records: Any) -> bool:
    """Whether a batch has more members than a message of ours: a stranger wrote it."""
    return isinstance(records, list | tuple | dict) and len(records) > MAX_MEMBERS


def member_or_raise(member: Record | Refused) -> Record:
    """The record, or why there is none."""
    if isinstance(member, Refused):
        raise member.error
    return member


def _member(position: int, member: Any, task_id: str | None) -> Record | Refused:
    made_up = None if task_id is None else member_id(task_id, position)
    try:
        if isinstance(member, Mapping):
            return _plain((), member, member.get("message_id") or made_up)
        return record_from((member,), {}, None)
    except InvalidRecordError as error:
        named = InvalidRecordError(f"records[{position}].{error.field}", error.problem, error.message_id)
        named.__cause__ = error
        return Refused(error.message_id or made_up or "", member, named)


def _plain(args: Any, kwargs: Mapping[str, Any], task_id: str | None) -> Record:
    if task_id is not None:
        kwargs = {**kwargs, "message_id": kwargs.get("message_id") or task_id}
    try:
        return Record(*args, **kwargs)
    except TypeError as error:
        # Python's own text names arguments, never their values.
        raise InvalidRecordError("record", str(error).replace("Record.__init__()", "send")) from None
