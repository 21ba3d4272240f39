"""Celery's request for our tasks: revoked and expired records are parked, and nobody is shown a payload."""

from __future__ import annotations

import functools
import logging
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, InvalidTaskError, Reject, Retry, TaskRevokedError
from celery.worker import state
from celery.worker.request import Request as CeleryRequest
from kombu.utils.encoding import safe_repr, safe_str

from kafka_delivery import settings
from kafka_delivery.base import Deferral, GiveBack, pause_of
from kafka_delivery.disposition import Asker, Move, disposition
from kafka_delivery.errors import KafkaDeliveryError
from kafka_delivery.faults import is_publish_fault
from kafka_delivery.marks import is_revived, mark_of
from kafka_delivery.names import DEFERRED_EVENT, PROBE, REDRIVES

from . import breaker, engine
from .giving_back import give_back
from .parked_items import EMBEDDED, RELATIONS

log = logging.getLogger("kafka_delivery.request")

FORESEEN = (
    KafkaDeliveryError,  # our tasks', on purpose: their record is elsewhere
    *(Retry, Reject, Ignore),
    *(Terminated, WorkerLostError, TimeLimitExceeded, MemoryError, SystemExit, KeyboardInterrupt),  # of the process
)
"""Errors of a task that are left to Celery."""

OF_A_DEAD_PROCESS = (WorkerLostError, SystemExit, KeyboardInterrupt)
"""What the parent hears of a child that died, or is about to."""


class Request(CeleryRequest):
    """Named by `DeliveryTask.Request`; lives in the worker's main process."""

    time_limits: tuple[Any, Any]
    _process_died = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, list | tuple) or not isinstance(self.kwargs, dict):
            # Celery finds out only when it calls the task, outside of its body, and acknowledges.
            raise InvalidTaskError("arguments must be a list and a mapping")
        if not _encoded(self.args, self.kwargs):  # called by name: its representation is the caller's, payload and all
            self._argsrepr, self._kwargsrepr = "(...)", "{...}"
            self._request_dict |= {"argsrepr": self._argsrepr, "kwargsrepr": self._kwargsrepr}
        # Celery takes the task's where the message has none. A shorter one than an attempt takes would kill the process
        # before the report is there; the message would go back, again and again, and each time be written, perhaps.
        if not isinstance(self.time_limits, list | tuple) or len(self.time_limits) != 2:
            raise InvalidTaskError("time limits must be a pair")
        hard, soft = self.time_limits
        self.time_limits = (
            _long_enough(hard or self.task.time_limit),
            _long_enough(soft or self.task.soft_time_limit),
        )
        if self.eta is not None and self.eta <= datetime.now(UTC):
            # It has waited in Redis. Celery's timer fires ten entries for each turn of the event loop, which may take a
            # second (kombu/asynchronous/hub.py, fire_timers), and of retries thousands are due at a time.
            self._eta = None

    def revoked(self) -> bool:
        """As Celery's, which remembers a revoked id for hours; what an operator sends again is meant."""
        if is_revived(self._request_dict):
            return False
        return bool(super().revoked())

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Park before Celery acknowledges. The one place through which expiry, revoke and terminate all pass."""
        mark = mark_of(self.request_dict, PROBE)
        if mark is not None:
            breaker.current().not_sent(mark)
        engine.current().outcomes.pop(self._message.delivery_tag, None)  # its task will not run
        why = "its `expires` has passed" if expired else "it was revoked by remote control"
        if terminated:
            why += " while it was being sent; it may have been delivered"
        try:
            engine.current().park_call(self._as_call(), TaskRevokedError(why), "expired" if expired else "revoked", why)
        except Exception as error:  # not parked: then it must stay in the queue, revoked as it is
            log.error("record.not_parked message_id=%s error=%s", self.id, type(error).__name__)
            self._already_revoked = True
            self._put_off(error)
            return
        try:
            super()._announce_revoked(reason, terminated, signum, expired)
        except Exception as error:
            if not is_publish_fault(error):
                raise
            log.error("record.not_announced message_id=%s error=%s: it goes back", self.id, type(error).__name__)
            self._already_revoked = True
            self._put_off(error)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """As Celery's; a message that goes back waits in Redis, where it holds up nobody."""
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):  # a child's
            error = error.exc
        if not isinstance(error, FORESEEN):
            return self._failed_outside(error)
        if isinstance(error, GiveBack) and settings.current().leases:
            self._message.put_off_s = error.pause_s
        # A stop ends children too, which says nothing about what they worked on.
        self._process_died = isinstance(error, OF_A_DEAD_PROCESS) and not engine.stopping.sent
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def _failed_outside(self, error: Exception) -> None:
        """Give a message back whose task failed with what its body never raises: Celery failed beside it."""
        log.error("task.failed_outside message_id=%s error=%s: it goes back", self.id, type(error).__name__)
        state.task_ready(self)
        self._put_off(error)

    def _put_off(self, fault: Exception) -> None:
        """Back to the queue, but not at once: it would come back as often as it can."""
        give_back(self._message, pause_of(fault), partial(self.reject, True))

    def on_retry(self, exc_info: Any) -> None:
        """As Celery's, but what is deferred is told as such: an outage would look like a thousand failed attempts.

        And the reason is the error itself; Celery's, in a thread, is its own control signal.
        """
        reason = exc_info.exception
        if isinstance(reason, ExceptionWithTraceback):
            reason = reason.exc
        self.acknowledge()
        if isinstance(reason, Deferral):
            self.send_event(DEFERRED_EVENT, exception=safe_repr(reason.exc))
        else:
            traceback = safe_str(exc_info.traceback)
            self.send_event("task-retried", exception=safe_repr(reason.exc), traceback=traceback)

    def reject(self, requeue: bool = False) -> None:
        """As Celery's, but what it would drop, for a time that no clock has, is parked. A lease parks it itself."""
        leased = settings.current().leases
        if requeue and self._process_died:
            if leased:
                self._message.child_died = True  # Redis counts it while it puts the message off
            else:
                self._count_death()
                return
        if not requeue and not self.acknowledged and not leased:
            requeue = not self._parked(Reject("Celery rejected it"), "invalid", "Celery rejected it")
        super().reject(requeue)

    def _count_death(self) -> None:
        """Count the death of a child at a message without a lease. It waits, longer each time, until it is parked."""
        lost = WorkerLostError(f"{settings.current().max_deaths} processes died while they worked on it")
        known = engine.current().died(self.id, self.worker_pid)
        asker, most = Asker.SEND, settings.current().max_deaths
        move = disposition(lost, asker=asker, attempts=0, max_retries=0, processes=known.processes, blamed_after=most)
        if move is Move.PARK and self._parked(lost, "poison", str(lost)):
            engine.current().blamed(self.id)
            self.acknowledge()
        else:
            give_back(self._message, known.pause_s, partial(super().reject, True))

    def _parked(self, error: Exception, kind: str, why: str) -> bool:
        """Park the call; return False if it must stay in its queue."""
        try:
            engine.current().park_call(self._as_call(), error, kind, why)
        except Exception as fault:
            log.error("record.not_parked message_id=%s error=%s", self.id, type(fault).__name__)
            return False
        return True

    def _as_call(self) -> SimpleNamespace:
        embed = self._payload[2] if isinstance(self._payload[2], dict) else {}
        asked = {name: embed.get(name) for name in EMBEDDED}
        asked |= {name: self.request_dict.get(name) for name in RELATIONS}
        return SimpleNamespace(
            id=self.id,
            task=self.task.name,
            args=self.args,
            kwargs=self.kwargs,
            retries=self.request_dict.get("retries"),
            headers={REDRIVES: self.request_dict.get(REDRIVES)},
            **asked,
        )

    def info(self, safe: bool = False) -> Any:
        """What ``inspect active`` and its like show: always the representation, never the arguments."""
        return super().info(safe=True)


def _long_enough(limit: Any) -> Any:
    """`limit` in seconds, or what an attempt takes at most if that is longer; None for none."""
    least = settings.current().attempt_timeout_s
    if not isinstance(limit, int | float) or not 0 < limit < least:
        return limit
    _tell(limit, least)
    return least


@functools.lru_cache(maxsize=100)  # once for each limit, and not for each message of a caller that varies it
def _tell(limit: float, least: float) -> None:
    log.warning(
        "time_limit.raised limit_s=%g to_s=%g reason=%r",
        limit, least, "the report of a record may take so long; a shorter limit sends it again and again",
    )  # fmt: skip


def _encoded(args: Any, kwargs: Any) -> bool:
    """Whether a call was made by `DeliveryTask.encode`, whose representation shows no payload."""
    return not kwargs and bool(args) and isinstance(args[0], list) and isinstance((args[0] or [0])[0], int | list)
