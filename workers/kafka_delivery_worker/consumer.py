"""Celery's consumer, but a message that cannot become a task is parked instead of acknowledged and forgotten.

Celery's own handlers also log the message's body, which here is somebody's payload.
"""

from __future__ import annotations

import logging
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import signals
from celery.concurrency.base import BasePool
from celery.worker import state
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.exceptions import ContentDisallowed

from kafka_delivery import settings
from kafka_delivery.base import pause_of, words_of
from kafka_delivery.disposition import Asker, Circuit, Move, disposition
from kafka_delivery.errors import CircuitBreakerOpen
from kafka_delivery.faults import QUEUE_FAULTS
from kafka_delivery.marks import drop_fleeting, mark_of
from kafka_delivery.names import DEAD_LETTER, PROBE, RELEASED, SEND, SEND_MANY, is_topic_name

from . import breaker, engine, parked_items
from .giving_back import give_back, wait_for_circuit
from .parked_items import Reason
from .shape import fault_of, forged
from .transport import Channel

log = logging.getLogger("kafka_delivery.consumer")

CELERYS_OWN = "celery."
"""With what the names of Celery's built-in tasks begin."""


class Consumer(CeleryConsumer):
    """Named by the setting ``worker_consumer``."""

    def __init__(self, *args: Any, pool: Any = None, initial_prefetch_count: int = 2, **kwargs: Any) -> None:
        # Celery counts concurrency x multiplier, which is for threads; a pool may hold far more in flight.
        count = max(initial_prefetch_count, getattr(pool, "max_in_flight", 0))
        super().__init__(*args, pool=pool, initial_prefetch_count=count, **kwargs)

    def cancel_active_requests(self) -> None:
        """What a cold stop does to what runs: the engine gives it back. Threads are not cancelled.

        Only a process can be. For threads Celery's raises in the middle of its signal handler
        (celery/concurrency/base.py, terminate_job), which then neither stops the pool nor tells anybody.
        """
        if type(self.pool).terminate_job is BasePool.terminate_job:
            engine.hurrying.send()
            engine.stopping.send()
        else:
            super().cancel_active_requests()

    def update_strategies(self) -> None:
        """As Celery's, without its own tasks: who puts them into our queues is a stranger.

        Executed, `celery.accumulate` and its like vanish, or run others' tasks for whoever can write to Redis.
        """
        super().update_strategies()
        for name in [name for name in self.strategies if name.startswith(CELERYS_OWN)]:
            del self.strategies[name]

    celerys_way: Callable[[Any], None]
    """For a message whose lane finds out late that it is none of its own."""

    def create_task_handler(self) -> Callable[[Any], None]:
        """As Celery's; what is too broken even for its error handlers would end the worker, again and again."""
        handle = super().create_task_handler()
        lanes = getattr(self.pool, "lanes", {})

        def settled(way: Callable[[Any], None], message: Any) -> None:
            try:
                way(message)
            except QUEUE_FAULTS:  # not Celery's connection errors: for kombu, a KeyError is one
                raise
            except Exception as exc:
                self.failed_here(message, exc)

        def celerys_way(message: Any) -> None:
            if self._waits(message):
                return
            fault = forged(message)
            if fault is not None:
                self._quarantine(message, fault.kind, fault.why, None)
                return
            self._begins(message)
            handle(message)

        def on_task_received(message: Any) -> None:
            if not isinstance(message.channel, Channel):
                drop_fleeting(message.headers)  # no other gives a message any
            lane = lanes.get(message.headers.get("task"))
            if lane is None or not lane.take(message):
                celerys_way(message)

        self.celerys_way = partial(settled, celerys_way)
        return partial(settled, on_task_received)

    def _waits(self, message: Any) -> bool:
        """Whether the circuit that the message needs is open; it is back in Redis then, where it waits.

        With another transport it is the task that finds out, and is put back with a delay.
        """
        if not isinstance(message.channel, Channel) or message.headers.get("task") not in (
            SEND,
            SEND_MANY,
            DEAD_LETTER,
        ):
            return False
        known, mark = breaker.current(), mark_of(message.headers, PROBE)
        if not (known.shut or known.shut_topics):
            return False
        circuit, topic = Circuit.CLUSTER, ""
        if not known.shut or mark is not None:
            topic = target_of(message) or ""
            released = mark_of(message.headers, RELEASED) is not None
            if not topic or known.admission(topic, mark, released=released, begin=False) is not None:
                return False
            circuit = Circuit.TOPIC
            if mark is not None:
                known.not_sent(mark)
        untried = CircuitBreakerOpen("the circuit is open", topic, "")
        move = disposition(untried, asker=Asker.SEND, attempts=0, max_retries=0, circuit=circuit, leased=True)
        wait_for_circuit(message, move, topic)
        return True

    def _begins(self, message: Any) -> None:
        """Celery goes on with a probe; a stranger's task is none."""
        mark = mark_of(message.headers, PROBE)
        if mark is None:
            return
        if message.headers.get("task") in (SEND, SEND_MANY, DEAD_LETTER):
            breaker.current().begun(mark)
        else:
            breaker.current().not_sent(mark)

    def failed_here(self, message: Any, exc: Exception) -> None:
        """This process failed at a message that it was about to take, which says nothing about the message yet."""
        headers = message.headers if isinstance(message.headers, dict) else {}
        task_id = str(headers.get("id") or "")
        request = state.requests.get(task_id)
        if request is not None and getattr(request, "_message", None) is message:
            state.task_ready(request)
        mark = mark_of(headers, PROBE)
        if mark is not None:
            breaker.current().not_sent(mark)
        if message.acknowledged:
            log.error("message.failed_late id=%s error=%s", task_id, type(exc).__name__)
            return
        fault = fault_of(message)
        if fault is not None:
            self._quarantine(message, fault.kind, fault.why, exc)
            return
        failed = engine.current().failed_here(task_id or None, exc)
        move = disposition(exc, asker=Asker.SEND, attempts=0, max_retries=0, processes=failed.processes)
        if move is Move.PARK:
            self._quarantine(message, "bug", words_of(exc), exc)
            engine.current().blamed(task_id)
        elif breaker.current().paused and isinstance(message.channel, Channel):  # another process may take it at once
            wait_for_circuit(message, Move.RETURN, "")
        else:
            give_back(message, failed.pause_s, partial(message.reject_log_error, log, QUEUE_FAULTS, True))

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Kombu or Celery could not decode the body, or tripped while it tried."""
        self.failed_here(message, exc)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """It is not a task message at all."""
        self._quarantine(message, "invalid", "it names no task: not a Celery message", None)
        signals.task_rejected.send(sender=self, message=message, exc=None)

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """This worker does not know the task: a newer caller's, or a stranger's."""
        headers = message.headers or {}
        name = str(headers.get("task"))[:200]
        self._quarantine(message, "unknown-task", f"this worker does not know the task {name!r}", exc)
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=name, id=headers.get("id"))

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """The arguments are malformed, or the content type is not accepted."""
        kind = "undecodable" if isinstance(exc, ContentDisallowed) else "invalid"
        self._quarantine(message, kind, f"it is not a valid task message: {type(exc).__name__}", exc)
        signals.task_rejected.send(sender=self, message=message, exc=exc)

    def _quarantine(self, message: Any, kind: str, why: str, exc: Exception | None) -> None:
        headers = message.headers if isinstance(message.headers, dict) else {}
        mark = mark_of(headers, PROBE)
        if mark is not None:
            breaker.current().not_sent(mark)
        reason = Reason(kind=kind, error_class=type(exc).__name__ if exc else "UnknownMessage", error_message=why)
        try:
            engine.current().park_message(
                parked_items.of_message(
                    self._queue_of(message), _envelope(message), headers, parked_items.body_of(message), reason
                )
            )
        except Exception as error:  # not parked: then it must stay in the queue
            log.error("message.not_parked id=%s error=%s", parked_items.id_of(message), type(error).__name__)
            give_back(message, pause_of(error), partial(message.reject_log_error, log, QUEUE_FAULTS, True))
            return
        message.ack_log_error(log, self.connection_errors)

    def _queue_of(self, message: Any) -> Any:
        """The queue that a message came from. Its routing key is its sender's, and may be another name."""
        queues = {tag: queue for queue, tag in self.task_consumer._active_tags.items()}
        return queues.get(message.delivery_info.get("consumer_tag")) or message.delivery_info.get("routing_key")


def _envelope(message: Any) -> dict[str, Any]:
    """A message as kombu's own transports write it in a queue; an AMQP message never had that form."""
    if hasattr(message, "serializable"):
        whole: dict[str, Any] = message.serializable()
        return whole
    body = message.body  # decoded, if its encoding says how, and decompressed, unless that failed
    if isinstance(body, str):
        body = body.encode(message.content_encoding or "utf-8")
    own = ("application_headers", "content_type", "content_encoding")
    route = {name: message.delivery_info.get(name) for name in ("exchange", "routing_key")}
    return {
        "body": b64encode(body or b"").decode(),
        "content-type": message.content_type,
        "content-encoding": message.content_encoding,
        "headers": {k: v for k, v in message.headers.items() if k != "compression" or message.errors},
        "properties": {
            **{name: value for name, value in message.properties.items() if name not in own},
            "body_encoding": "base64",
            "delivery_info": route,
            "delivery_tag": None,
        },
    }


def target_of(message: Any) -> str | None:
    """The topic that the record of a message goes to; None where it has none or several, or is not understood."""
    task = message.headers.get("task")
    if task not in (SEND, DEAD_LETTER):
        return None
    try:
        args, kwargs, _ = message.decode()
        topic = args[0][2] if args and isinstance(args[0], list) else args[0] if args else kwargs["topic"]
    except Exception:  # whatever is wrong with it, its task finds out and says so
        return None
    if not isinstance(topic, str) or not is_topic_name(topic):
        return None
    return settings.current().dead_letter_topic(topic) if task == DEAD_LETTER else topic
