"""The short way of a plain send through a worker: Celery's states and events, but no full request until one is needed.

A send is plain when nothing is asked of Celery but to run it: no expiry, no link, no wanted result, no revoke, nobody
listening to its signals. Whatever else comes takes Celery's own strategy; so does a plain send that failed, with its
outcome in hand, and from there retry, dead letter, events and results are Celery's.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from time import monotonic, time
from typing import Any, Self

from celery import signals
from celery.utils.time import maybe_iso8601, maybe_make_aware
from celery.worker import state
from celery.worker import strategy as stock
from confluent_kafka import KafkaError

from kafka_delivery import settings
from kafka_delivery.disposition import Asker, Move, disposition
from kafka_delivery.marks import is_count, mark_of
from kafka_delivery.names import DEFERRALS, DEFERRED_EVENT, MESSAGE_ID, PROBE, RELEASED, WIRE_VERSION
from kafka_delivery.record import MAX_TIMESTAMP_MS, Record, is_message_id, unpack

from . import engine
from .breaker import Admission
from .classify import delivery_error
from .decoding import loads
from .giving_back import give_back, wait_for_circuit
from .producer import Outgoing, Report, new_tuple
from .request import Request
from .sampling import Sample

log = logging.getLogger("kafka_delivery.lane")

WATCHED = (
    signals.task_received,
    signals.task_prerun,
    signals.task_postrun,
    signals.task_success,
)
"""Signals that a full request sends; where somebody listens, every send takes Celery's way."""

NO_LIMITS: tuple[Any, ...] = (None, [], [None, None])
"""How a message says that its task has no time limit."""

EVENT_BUFFER = 500
"""Events of task states are sent to Redis in groups of this many, or once per turn of the event loop."""


def strategy(task: Any, app: Any, consumer: Any) -> Any:
    """Named by `Send.Strategy` (celery/worker/strategy.py)."""
    return lane_of(Lane, task, app, consumer)


def lane_of(kind: type[Lane], task: Any, app: Any, consumer: Any) -> Any:
    """Celery's strategy, and a lane beside it where the pool has room for one."""
    lanes = getattr(consumer.pool, "lanes", None)  # prefork, threads, solo have none
    if lanes is not None:
        lanes[task.name] = kind(task, app, consumer, lanes.get(task.name))
    return stock.default(task, app, consumer)


class Lane:
    """What all plain sends of one worker have in common, while one connection to Redis lasts.

    A report is only noted when it comes. What it means is done after each poll, once for all that came: `settle`.
    """

    def __init__(self, task: Any, app: Any, consumer: Any, before: Self | None = None) -> None:
        """`before`: the lane of the connection before, whose records are settled here."""
        eventer = consumer.event_dispatcher
        self.task = task
        self._name = task.name
        self.app = app
        self.pool = consumer.pool
        self.hostname = consumer.hostname
        self.pid = os.getpid()  # a call of the kernel, which is dear where it is watched
        self.eventer = eventer
        self._reports: dict[LaneRequest, Report] = before._reports if before else {}
        self._reported = self._reports.__setitem__
        self.events = bool(eventer and eventer.enabled and task.send_events)
        if self.events:
            eventer.buffer_limit = max(eventer.buffer_limit, EVENT_BUFFER)
        self._sample = Sample(settings.current().success_events_per_s)
        self._owed = [0, 0]
        """Successes to be told whatever the sample says, from the queues and from what was put aside: who heard that
        records are deferred is to hear that they arrived. They are the next to be claimed, by whichever worker."""
        self._consumer = consumer
        self._engine = engine.current()
        self._breaker = self._engine.breaker
        self._resume = stock.default(task, app, Announced(consumer))
        self._cluster = settings.current().cluster
        self._topics: set[str] = set()
        self._small = settings.current().max_record_bytes // 2

    def take(self, message: Any) -> bool:
        """Start a plain send; False for anything else, which is then untouched."""
        headers = message.headers
        try:
            wire = self._plain(message, headers)
            size = len(message.body)
            outgoing = None if wire is None else self._outgoing(wire, headers["id"], size)
        except Exception:  # it is none; Celery's way finds out what is wrong with it, and says so
            return False
        if outgoing is None:
            return False
        released = mark_of(headers, RELEASED) is not None
        admission = self._breaker.admission(outgoing.topic, mark_of(headers, PROBE), released=released)
        if admission is None:
            return False  # the consumer finds out, too
        self._start(message, headers, outgoing, admission, size)
        return True

    def _plain(self, message: Any, headers: dict[str, Any]) -> Any:
        """The one argument of a plain call; None, or any error, for anything else."""
        if (
            _watched()
            or self._consumer.task_buckets[self._name] is not None  # `celery control rate_limit` sets one
            or not headers.get("ignore_result")
            or headers.get("expires")
            or headers.get("stamped_headers")
            or not (headers.get("retries") is None or is_count(headers["retries"]))
            or headers.get("shadow")
            or headers["id"] in state.revoked
            or message.content_type != "application/json"
            or (headers.get("eta") and not _is_due(headers["eta"]))
            or headers.get("timelimit") not in NO_LIMITS
        ):
            return None
        args, kwargs, embed = loads(message.body)
        if kwargs != {} or len(args) != 1 or (embed and any(embed.values())):
            return None
        return args[0]

    def _outgoing(self, wire: Any, task_id: str, size: int) -> Outgoing | None:
        """The record of a wire that our own `encode` wrote; None, or any error, for what Celery's way must look at.

        What is in a queue may be anybody's. A record is validated as any other; only of one without headers, for a
        topic that is known to be valid, and far from the limit of size, is there nothing left to ask but this.
        """
        version, cluster, topic, value, key, headers, partition, timestamp_ms, message_id = wire
        if version != WIRE_VERSION or cluster != self._cluster or message_id != task_id:
            return None
        if headers or topic not in self._topics or size > self._small:
            outgoing = Outgoing.of(Record.from_wire(wire, cluster))
            self._topics.add(topic)
            return outgoing
        if type(timestamp_ms) is not int or not 1 <= timestamp_ms <= MAX_TIMESTAMP_MS or not is_message_id(message_id):
            return None
        if partition is not None and (type(partition) is not int or not 0 <= partition < 2**31):
            return None
        key = None if key is None else unpack(key)
        return new_tuple(Outgoing, (topic, unpack(value), key, [(MESSAGE_ID, message_id)], partition, timestamp_ms))

    def _start(
        self, message: Any, headers: dict[str, Any], outgoing: Outgoing, admission: Admission, size: int
    ) -> None:
        request = LaneRequest(message, headers, self)
        request.topic, request.admission, request.size = outgoing.topic, admission, size
        begun(request)
        try:
            if self.events and self._is_told(headers, request.started):
                self._announce(request)
            self.pool.launch(outgoing, size, self._reported, request)
        except BaseException:  # say, events that Redis did not take
            ended(request)
            raise

    def _is_told(self, headers: dict[str, Any], now: float) -> bool:
        """Whether events tell of an attempt as it happens. If not, and it fails, all of it is told then.

        The story that was begun for an earlier attempt gets its end.
        """
        if self.eventer.groups and "task" not in self.eventer.groups:
            return False  # without -E, and no Flower has asked for them
        released = mark_of(headers, RELEASED) is not None
        if self._owed[released] > 0:
            self._owed[released] -= 1
            return True
        begun = headers.get("retries") or headers.get("redelivered") or mark_of(headers, DEFERRALS)
        return bool(begun or self._sample.takes(now))

    def _announce(self, request: LaneRequest) -> None:
        request.told = True
        headers = request._request_dict
        self.eventer.send(
            "task-received",
            timestamp=request.time_start,
            uuid=request.id,
            name=request.name,
            args=request._argsrepr,
            kwargs=request._kwargsrepr,
            root_id=headers.get("root_id"),
            parent_id=headers.get("parent_id"),
            retries=headers.get("retries", 0),
            eta=None,
            expires=None,
        )
        self.eventer.send("task-started", timestamp=request.time_start, uuid=request.id)

    def settle(self) -> None:
        """Go on with all sends that have got a report."""
        # A copy: a thread that makes room in librdkafka's buffer may add to them meanwhile.
        for (topic, admission), run in groupby(list(self._reports), key=LaneRequest.sent_under):
            requests = list(run)
            reports = [self._reports.pop(request) for request in requests]
            self.pool.landed(len(requests), sum([request.size for request in requests]))
            self._engine.tell_breaker(admission, topic, reports)
            for request, report in zip(requests, reports, strict=True):
                try:
                    self._goes_on(request, report)
                except Exception:  # say, events that Redis did not take; that is not to hold up the others
                    log.exception("lane.not_settled message_id=%s", request.id)
            arrived = [(one.id, report) for one, report in zip(requests, reports, strict=True) if report.error is None]
            self._succeeded(len(arrived))
            self._engine.delivered(topic, arrived)

    def _goes_on(self, request: LaneRequest, report: Report) -> None:
        ended(request)
        if report.error is None:
            request.acknowledge()
            if request.told:
                where = {"topic": request.topic, "partition": report.partition, "offset": report.offset}
                self._tell_success(request, repr(where))
        elif not self.pool.stopping and not self._waits(request, request.topic, report, report.error):
            self._go_on(request, [report])  # of a pool that stops, it is the end of the lease that returns it

    def _succeeded(self, requests: int) -> None:
        """Celery counts a task as it begins; here, once it has succeeded. Whoever goes on with one counts it, too."""
        state.total_count[self.task.name] += requests
        state.all_total_count[0] += requests

    def _tell_success(self, request: LaneRequest, result: str) -> None:
        self.eventer.send("task-succeeded", uuid=request.id, result=result, runtime=monotonic() - request.started)

    def _waits(self, request: LaneRequest, topic: str, report: Report, error: KafkaError) -> bool:
        """Whether it failed for what a circuit is open for; then it waits in Redis like all others, no attempt used."""
        reason, message = delivery_error(error, topic, request.id, report.cause), request._message
        move = disposition(
            reason,
            asker=Asker.SEND,
            attempts=request._request_dict.get("retries") or 0,
            max_retries=self.task.max_retries,
            circuit=self._breaker.circuit(topic),
            leased=True,
        )
        if move not in (Move.RETURN, Move.PUT_ASIDE):
            return False
        wait_for_circuit(message, move, topic)
        aside = move is Move.PUT_ASIDE
        self._engine.sent_again("deferred", reason, request._request_dict.get("retries") or 0)
        if self.events:
            self._owed[aside] = self.pool.max_in_flight
            if not request.told:
                self._announce(request)
            self.eventer.send(DEFERRED_EVENT, uuid=request.id, exception=repr(reason))
        return True

    def _go_on(self, request: LaneRequest, reports: list[Report]) -> None:
        """Run it as an ordinary Celery task that knows what became of its records."""
        message, later = request._message, self._consumer.call_soon_ack
        self._engine.outcomes[message.delivery_tag] = reports
        try:
            if self.events and not request.told:
                self._announce(request)
            self._resume(
                message,
                None,
                partial(later, message.ack_log_error),  # a thread's ack belongs to the event loop's
                partial(later, message.reject_log_error),
                self._consumer.on_task_message,
            )
        except Exception as fault:  # no thread could be started, or events that Redis did not take
            log.error("record.not_resumed message_id=%s error=%s", request.id, type(fault).__name__)
            self._engine.outcomes.pop(message.delivery_tag, None)
            if not message.acknowledged:
                pause_s = self._engine.failed_here(None, fault).pause_s
                give_back(message, pause_s, partial(message.reject, requeue=True))


class LaneRequest(Request):
    """As much of a request as `inspect`, revokes and the worker's state look at.

    Attributes:
        topic, admission, size: of a send, what it was sent under, and what it counts against the bound on bytes.
        told: whether events have told of its start.
    """

    __slots__ = (
        "_message", "acknowledged", "admission", "size", "started", "time_start", "told", "topic",
        "worker_pid",
    )  # fmt: skip

    _args = _kwargs = ()
    _eta = _expires = None

    topic: str
    admission: Admission
    size: int

    def __init__(self, message: Any, headers: dict[str, Any], lane: Lane) -> None:
        # Not super().__init__: that is most of what a send costs.
        self.id = headers["id"]
        self.name = self._type = headers["task"]
        self.time_start = time()
        self.started = monotonic()
        self.worker_pid = lane.pid
        self.acknowledged = self.told = False
        self._message = message
        self._request_dict = headers
        self._task = lane.task
        self._app = lane.app
        self._eventer = lane.eventer
        self._hostname = lane.hostname
        self._argsrepr = headers.get("argsrepr", "")
        self._kwargsrepr = headers.get("kwargsrepr", "")

    def sent_under(self) -> tuple[str, Admission]:
        """Topic and admission: reports of sends that have both in common count alike."""
        return self.topic, self.admission

    @property
    def delivery_info(self) -> dict[str, Any]:
        """As Celery's; `inspect` shows it."""
        info = self._message.delivery_info
        return {
            "exchange": info.get("exchange"),
            "routing_key": info.get("routing_key"),
            "priority": self._message.properties.get("priority"),
            "redelivered": info.get("redelivered", False),
        }

    def acknowledge(self) -> None:
        if not self.acknowledged:
            self.acknowledged = True
            self._message.ack()

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Do nothing: a record in librdkafka's hands cannot be called back, and its report decides."""


class Announced:
    """The consumer as Celery's strategy sees it when it takes over a request whose start was announced already.

    Its event dispatcher drops the two events that were sent.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self.event_dispatcher = consumer.event_dispatcher and _AnnouncedEvents(consumer.event_dispatcher)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)


class _AnnouncedEvents:
    def __init__(self, eventer: Any) -> None:
        self._eventer = eventer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._eventer, name)

    def send(self, kind: str, *args: Any, **fields: Any) -> None:
        if kind not in ("task-received", "task-started"):
            self._eventer.send(kind, *args, **fields)


def begun(request: LaneRequest) -> None:
    """As `state.task_reserved` and `state.task_accepted` in one: nothing waits here between the two.

    It is counted when it has `_succeeded`.
    """
    state.requests[request.id] = request
    state.active_requests.add(request)


def ended(request: LaneRequest) -> None:
    """As `state.task_ready`, but for its memory of successful tasks, which only deduplication of results reads."""
    state.requests.pop(request.id, None)
    state.active_requests.discard(request)


def _watched() -> bool:
    received, before, after, success = WATCHED
    return bool(received.receivers or before.receivers or after.receivers or success.receivers)


def _is_due(eta: str) -> bool:
    moment = maybe_make_aware(maybe_iso8601(eta))
    return bool(moment is not None and moment <= datetime.now(UTC))
