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
from time import monotonic, time
from typing import Any

from celery import signals
from celery.utils.time import maybe_iso8601, maybe_make_aware
from celery.worker import state
from celery.worker import strategy as stock
from confluent_kafka import KafkaError

from kafka_delivery import settings
from kafka_delivery.names import MESSAGE_ID, PROBE, RELEASED, WIRE_VERSION
from kafka_delivery.record import MAX_TIMESTAMP_MS, Record, is_message_id, unpack

from . import engine
from .breaker import Admission
from .classify import Retry, Scope, verdict
from .decoding import loads
from .producer import Outgoing, Report
from .request import Request

log = logging.getLogger("kafka_delivery.lane")

WATCHED = (
    signals.task_received,
    signals.task_prerun,
    signals.task_postrun,
    signals.task_success,
)
"""Signals that a full request sends; where somebody listens, every send takes Celery's way."""

EVENT_BUFFER = 500
"""Events of task states are sent to Redis in groups of this many, or once per turn of the event loop."""


def strategy(task: Any, app: Any, consumer: Any) -> Any:
    """Named by `Send.Strategy` (celery/worker/strategy.py)."""
    default = stock.default(task, app, consumer)
    if not hasattr(consumer.pool, "launch"):
        return default  # prefork, threads, solo
    lane = Lane(task, app, consumer)
    consumer.pool.lanes[task.name] = lane
    return default


class Lane:
    """What all plain sends of one worker have in common."""

    def __init__(self, task: Any, app: Any, consumer: Any) -> None:
        eventer = consumer.event_dispatcher
        self.task = task
        self.app = app
        self.pool = consumer.pool
        self.hostname = consumer.hostname
        self.eventer = eventer
        self.events = bool(eventer and eventer.enabled and task.send_events)
        if self.events:
            eventer.buffer_limit = max(eventer.buffer_limit, EVENT_BUFFER)
        self._consumer = consumer
        self._engine = engine.current()
        self._breaker = self._engine.breaker
        self._resume = stock.default(task, app, Announced(consumer))
        self._cluster = settings.current().cluster
        self._topics: set[str] = set()
        self._small = settings.current().max_record_bytes // 2

    def take(self, message: Any) -> bool:
        """Start a plain send; False for anything else, which is then untouched."""
        try:
            outgoing = self._plain(message)
        except Exception:  # it is none; Celery's way finds out what is wrong with it, and says so
            return False
        if outgoing is None:
            return False
        headers = message.headers
        admission = self._breaker.admission(outgoing.topic, headers.get(PROBE), released=RELEASED in headers)
        if admission is None:
            return False  # the consumer finds out, too
        self._start(message, headers, outgoing, admission, len(message.body))
        return True

    def _plain(self, message: Any) -> Outgoing | None:
        """The record of a plain send; None, or any error, for anything else."""
        headers = message.headers
        if (
            _watched()
            or self._consumer.task_buckets[self.task.name] is not None  # `celery control rate_limit` sets one
            or not headers.get("ignore_result")
            or headers.get("expires")
            or headers.get("stamped_headers")
            or headers["id"] in state.revoked
            or message.content_type != "application/json"
            or (headers.get("eta") and not _is_due(headers["eta"]))
            or any(headers.get("timelimit") or ())
        ):
            return None
        args, kwargs, embed = loads(message.body)
        if kwargs != {} or len(args) != 1 or (embed and any(embed.values())):
            return None
        return self._outgoing(args[0], headers["id"], len(message.body))

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
        if not _fits(timestamp_ms, 1, MAX_TIMESTAMP_MS) or not (partition is None or _fits(partition, 0, 2**31 - 1)):
            return None
        if not is_message_id(message_id):
            return None
        return Outgoing(topic, unpack(value), unpack(key), [(MESSAGE_ID, message_id)], partition, timestamp_ms)

    def _start(
        self, message: Any, headers: dict[str, Any], outgoing: Outgoing, admission: Admission, size: int
    ) -> None:
        request = LaneRequest(message, headers, self)
        state.task_reserved(request)
        state.task_accepted(request)
        try:
            self._announce(request, headers)
            self.pool.launch(outgoing, size, partial(self._report, request, outgoing.topic, admission))
        except BaseException:  # say, events that Redis did not take
            state.task_ready(request)
            raise

    def _announce(self, request: LaneRequest, headers: dict[str, Any]) -> None:
        if self.events:
            self.eventer.send(
                "task-received",
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
            self.eventer.send("task-started", uuid=request.id)

    def _report(self, request: LaneRequest, topic: str, admission: Admission, report: Report) -> None:
        if report.error is not None:
            self._breaker.failed(admission, topic, report.error.code())
            self._failed(request, topic, report, report.error)
            return
        self._breaker.delivered(admission, topic)
        state.task_ready(request, successful=True)
        request.acknowledge()
        self._engine.count("delivered", topic)
        if self.events:
            where = {"topic": topic, "partition": report.partition, "offset": report.offset}
            self.eventer.send(
                "task-succeeded", uuid=request.id, result=repr(where), runtime=monotonic() - request.started
            )

    def _waits(self, request: LaneRequest, topic: str, error: KafkaError) -> bool:
        """Whether it failed for what a circuit is open for; then it waits in Redis like all others, no attempt used."""
        found, message = verdict(error.code()), request._message
        innocent = found.retry is Retry.HOLD
        if self._breaker.shut and innocent:
            message.channel.give_back(message.delivery_tag)
        elif topic in self._breaker.shut_topics and (
            innocent or (found.scope, found.retry) == (Scope.TOPIC, Retry.FULL)
        ):
            message.channel.put_aside(message.delivery_tag, topic)
        else:
            return False
        self._engine.count("deferred", topic)
        if self.events:
            self.eventer.send("task-retried", uuid=request.id, exception=f"{found.name}: {found.reason}", traceback="")
        return True

    def _failed(self, request: LaneRequest, topic: str, report: Report, error: KafkaError) -> None:
        state.task_ready(request)
        if self.pool.stopping:
            return  # it is not settled: the end of the lease returns it to its queue
        state.total_count[request.name] -= 1  # whoever goes on with it counts it
        state.all_total_count[0] -= 1
        if self._waits(request, topic, error):
            return
        self._engine.outcomes[request.id] = report
        message, later = request._message, self._consumer.call_soon_ack
        try:
            self._resume(
                message,
                None,
                partial(later, message.ack_log_error),  # a thread's ack belongs to the event loop's
                partial(later, message.reject_log_error),
                self._consumer.on_task_message,
            )
        except Exception as fault:  # no thread could be started, or events that Redis did not take
            log.error("record.not_resumed message_id=%s error=%s", request.id, type(fault).__name__)
            message.reject(requeue=True)
        if request.id not in state.requests:  # it was revoked meanwhile, or it is done
            self._engine.outcomes.pop(request.id, None)


class LaneRequest(Request):
    """As much of a request as `inspect`, revokes and the worker's state look at."""

    acknowledged = False

    def __init__(self, message: Any, headers: dict[str, Any], lane: Lane) -> None:
        # Not super().__init__: that is most of what a send costs.
        self.id = headers["id"]
        self.name = self._type = headers["task"]
        self.time_start = time()
        self.started = monotonic()
        self.worker_pid = os.getpid()
        self._message = message
        self._request_dict = headers
        self._args = self._kwargs = ()
        self._task = lane.task
        self._app = lane.app
        self._eventer = lane.eventer
        self._hostname = lane.hostname
        self._argsrepr = headers.get("argsrepr", "")
        self._kwargsrepr = headers.get("kwargsrepr", "")
        self._eta = self._expires = None

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

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A record in librdkafka's hands cannot be called back; its report decides."""

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """As `cancel`."""


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


def _watched() -> bool:
    received, before, after, success = WATCHED
    return bool(received.receivers or before.receivers or after.receivers or success.receivers)


def _fits(number: Any, least: int, most: int) -> bool:
    return type(number) is int and least <= number <= most


def _is_due(eta: str) -> bool:
    moment = maybe_make_aware(maybe_iso8601(eta))
    return bool(moment is not None and moment <= datetime.now(UTC))
