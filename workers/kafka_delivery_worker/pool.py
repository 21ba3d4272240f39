"""A pool that keeps sends in flight instead of in threads; everything else runs in threads.

A send needs no processor while it waits for its delivery report, so it needs no thread either. The worker's event loop
hands it to librdkafka and goes on. The same thread collects the reports, which is what makes this fast: a report that
arrived in another thread would wait for the interpreter's lock, five milliseconds at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.exceptions import Reject
from celery.worker import state

from kafka_delivery import settings

from . import engine
from .producer import Outgoing, Report
from .standstill import MAKING
from .transport import process_lease

log = logging.getLogger("kafka_delivery.pool")

POLL_S = 0.003
"""How often reports are collected while records are in flight: half of what a send takes on an idle system."""

OUTAGE_POLL_S = 0.1
"""The same while the circuit is open: what is in flight waits for the cluster, not for us."""

BATCHED = 4_000
"""Records in flight up to which another batch begins: enough that Kafka never waits for one, and librdkafka's buffer
(20,000) has room for it, and for as many records that are stuck."""

FIRST_CLIENT_S = 3.0
"""Longest wait for the first client before the worker takes messages; it starts without one, too."""

QUIET_POLL_S = 1.0
"""How often librdkafka may call back while nothing is in flight; it has only errors to tell."""


class TaskPool(ThreadPool):
    """Named by the setting ``worker_pool``."""

    task_join_will_block = False
    signal_safe = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        s = settings.current()
        self.max_in_flight = s.max_in_flight
        self.bytes_in_flight = 0
        self.in_flight = 0
        self.lanes: dict[str, Any] = {}
        self.stopping = False
        self._waiting: deque[Callable[[], None]] = deque()
        self._producer = engine.current().producer
        self._breaker = engine.current().breaker
        self._hub: Any = None
        self._polling = False
        self._next_poll: Any = None
        self._poll_at = 0.0
        self._producer.poll_by_caller(self._wake)
        # After a reconnect Celery would leave room for `concurrency` messages less those in flight: for one, and here
        # nothing raises it again. The lease counts what is in flight over all connections.
        self.app.conf.worker_enable_prefetch_count_reduction = False

    def on_start(self) -> None:
        """Begin with a client, if it is made in time: a token takes a second, and records would come back meanwhile."""
        super().on_start()
        self._breaker.client("main", MAKING)  # first: the producer says when there is one
        self._producer.start()
        self._producer.wait_for_client(FIRST_CLIENT_S)

    def register_with_event_loop(self, loop: Any) -> None:
        self._hub = loop
        self._polling = False
        if settings.current().leases:
            process_lease().pool_keeps_reserved = True
        loop.call_repeatedly(QUIET_POLL_S, self._poll)
        loop.on_tick.add(self._poll_in_time)
        self._poll_soon()  # what a broken connection to Redis left in flight

    def on_apply(self, target: Any, *args: Any, accept_callback: Any = None, **options: Any) -> Any:
        """As Celery's, but whatever the target does, or its callbacks, its message is settled.

        Raises:
            RuntimeError: no thread could be started; the work will not be done.
        """
        work = _Work(target)
        try:
            result = super().on_apply(work, *args, accept_callback=work.accepted(accept_callback), **options)
        except RuntimeError:
            # The executor queues the work first and starts a thread for it then (concurrent/futures/thread.py,
            # submit). If that fails, another thread may still come to the work, or have begun it.
            if work.drop():
                raise
            return None
        request = getattr(accept_callback, "__self__", None)
        if request is not None:
            result.f.add_done_callback(partial(self._ended, request))
        return result

    def _ended(self, request: Any, future: Any) -> None:
        if future.cancelled() or future.exception() is None or isinstance(future.exception(), _DroppedError):
            return
        log.error("task.not_settled message_id=%s error=%s", request.id, type(future.exception()).__name__)
        self._hub.call_soon(self._give_back, request)

    def _give_back(self, request: Any) -> None:
        state.task_ready(request)
        request.reject(requeue=True)  # unless it is settled

    def launch(self, outgoing: Outgoing, size: int, on_report: Callable[[Any, Report], None], what: Any) -> None:
        """Hand a record to librdkafka.

        Args:
            outgoing: the record.
            size: what it counts against the bound on bytes, until its lane says that it has `landed`.
            on_report: called once, with `what`. It only notes the report: after each poll the lanes `settle` all.
            what: that the report is of.
        """
        self.in_flight += 1
        self.bytes_in_flight += size
        try:
            self._producer.produce(outgoing, on_report, what)
        except BaseException:
            self.landed(1, size)
            raise

    def launch_all(self, outgoings: list[Outgoing], size: int, on_report: Callable[[int, Report], None]) -> None:
        """As `launch`, for many records; `on_report` is called for each, with its place. `size` is that of all."""
        self.in_flight += len(outgoings)
        self.bytes_in_flight += size
        produce = self._producer.produce
        try:
            for place, outgoing in enumerate(outgoings):
                produce(outgoing, on_report, place)
        except BaseException:  # of those before it the reports come, and find that nobody waits for them
            self.landed(len(outgoings), size)
            raise

    def landed(self, records: int, size: int) -> None:
        """They have their reports."""
        self.in_flight -= records
        self.bytes_in_flight -= size

    def when_room(self, start: Callable[[], None]) -> None:
        """Call `start`, which launches many records, as soon as few enough are in flight."""
        if self._waiting or not self._has_room:
            self._waiting.append(start)
        else:
            start()

    @property
    def _has_room(self) -> bool:
        # What is stuck for topics in trouble leaves its room to others, but no more than librdkafka's buffer has.
        return self._producer.in_flight - min(BATCHED, self._breaker.stuck) < BATCHED

    def _start_waiting(self) -> None:
        while self._waiting and self._has_room and not self.stopping:
            self._waiting.popleft()()

    def _wake(self) -> None:
        # Of any thread: a dead letter's, or a send's whose caller wants the result.
        if not self._polling and self._hub is not None:
            self._polling = True
            self._hub.call_soon(self._poll_soon)

    def _poll_soon(self) -> None:
        self._polling = False  # before looking: a record that comes now must wake
        if self._producer.in_flight or self._waiting:
            self._polling = True
            if self._next_poll is None:
                pause = OUTAGE_POLL_S if self._breaker.shut else POLL_S
                self._next_poll = self._hub.call_later(pause, self._poll_on)
                self._poll_at = monotonic() + pause

    def _poll_in_time(self) -> None:
        """On each turn of the event loop, which fires ten timers at most: thousands may be due before ours."""
        if self._next_poll is not None and monotonic() >= self._poll_at:
            self._next_poll.cancel()
            self._poll_on()

    def _poll_on(self) -> None:
        self._next_poll = None
        try:
            self._poll()
            self._start_waiting()
        finally:
            self._poll_soon()

    def _poll(self, timeout_s: float = 0) -> None:
        """Collect the reports of up to so many seconds, and let the lanes go on with them."""
        self._producer.serve(timeout_s)
        for lane in self.lanes.values():
            lane.settle()
        if self._producer.has_client:
            self._breaker.attendance.collected()

    def on_stop(self) -> None:
        """Wait for the reports of what is in flight; the event loop does no longer. The engine ends the waiting."""
        self.stopping = True
        self.executor.shutdown(wait=False, cancel_futures=True)
        deadline = monotonic() + settings.current().shutdown_timeout_s + settings.current().report_timeout_s
        while (self._producer.in_flight or self._busy()) and monotonic() < deadline:
            self._poll(0.05)
            if not self._producer.in_flight:
                time.sleep(0.01)  # a thread is not done, and may still hand over a record
        super().on_stop()

    def _busy(self) -> bool:
        return any(thread.is_alive() for thread in self.executor._threads)

    def _get_info(self) -> dict[str, Any]:
        return {
            **super()._get_info(),
            "in-flight": self.in_flight,
            "in-flight-bytes": self.bytes_in_flight,
            "max-in-flight": self.max_in_flight,
        }


class _DroppedError(Exception):
    """Ends work that was given up before it began."""


class _Work:
    """What a thread is to do once, unless it is given up before.

    Args:
        target: Celery's tracer.
    """

    def __init__(self, target: Callable[..., Any]) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._begun = self._dropped = False

    def accepted(self, callback: Callable[..., Any] | None) -> Callable[..., None]:
        """Celery's callback for the moment when a thread begins it, before which it can be given up."""
        return partial(self._begin, callback)

    def _begin(self, callback: Callable[..., Any] | None, *args: Any) -> None:
        with self._lock:
            if self._dropped:
                raise _DroppedError
            self._begun = True
        if callback is not None:
            callback(*args)

    def drop(self) -> bool:
        """Give it up; False if a thread has begun it, which then goes on."""
        with self._lock:
            self._dropped = not self._begun
            return self._dropped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _settling(self._target, *args, **kwargs)


def _settling(trace: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run Celery's tracer; what it raises itself becomes the task's failure, for which `Request` gives it back.

    A thread pool swallows such an error, and the message would be held, unsettled, as long as the worker lives.
    """
    try:
        return trace(*args, **kwargs)
    except MemoryError as error:
        return 1, ExceptionInfo((Reject, Reject(error, requeue=True), error.__traceback__)), 0.0
    except Exception as error:
        log.error("task.not_traced error=%s", type(error).__name__)
        return 1, ExceptionInfo(), 0.0
