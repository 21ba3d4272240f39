"""The pool collects the reports of what is in flight, whoever handed it over, and settles what its threads leave."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery.worker import state
from kombu.asynchronous import Hub

from kafka_delivery_worker import pool
from kafka_delivery_worker.lease import Lease
from kafka_delivery_worker.producer import Outgoing, Report
from kafka_delivery_worker.standstill import MAKING
from servers import wait_until

OUTGOING = Outgoing("topic", b"", None, [], None, 1)


class Producer:
    """As much of a producer as the pool uses."""

    def __init__(self) -> None:
        self.in_flight = self.looks = 0
        self.has_client = True
        self.reports: list[Callable[[Report], None]] = []
        self.fault: Exception | None = None
        self.begun: list[Any] = []

    def collected(self) -> None:
        self.looks += 1

    def told(self, which: str, missing: str) -> None:
        self.begun.append((which, missing))

    def start(self) -> None:
        self.begun.append("start")

    def wait_for_client(self, timeout_s: float) -> None:
        self.begun.append(timeout_s)

    def poll_by_caller(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def produce(self, outgoing: Outgoing, on_report: Callable[..., None], *what: Any) -> None:
        if self.fault:
            raise self.fault
        self.in_flight += 1
        self.reports.append(partial(on_report, *what))
        self.wake()

    def serve(self, timeout_s: float) -> None:
        while self.reports:
            self.in_flight -= 1
            self.reports.pop()(Report(None))


class TestPool:
    @pytest.fixture
    def lease(self) -> Iterator[Lease]:
        yield Lease(lambda: None, 30)
        state.reset_state()

    @pytest.fixture
    def producer(self, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> Producer:
        monkeypatch.setattr(pool, "process_lease", lambda: lease)
        made = Producer()
        attendance = SimpleNamespace(collected=made.collected)
        known = SimpleNamespace(shut=False, stuck=0, client=made.told, attendance=attendance)
        worker = SimpleNamespace(producer=made, breaker=known)
        monkeypatch.setattr("kafka_delivery_worker.engine.current", lambda: worker)
        return made

    @pytest.fixture
    def hub(self) -> Iterator[Hub]:
        hub = Hub()
        yield hub
        hub.close()

    @pytest.fixture
    def ours(self, producer: Producer, hub: Hub) -> Iterator[pool.TaskPool]:
        ours = pool.TaskPool(2, app=SimpleNamespace(conf=SimpleNamespace()))
        ours.register_with_event_loop(hub)
        yield ours
        ours.on_stop()

    def test_it_says_what_celery_must_not_do_after_a_broken_connection(self, ours: pool.TaskPool, lease: Lease) -> None:
        assert ours.app.conf.worker_enable_prefetch_count_reduction is False
        assert lease.pool_keeps_reserved

    def test_it_begins_with_a_client_if_that_is_made_in_time(self, ours: pool.TaskPool, producer: Producer) -> None:
        ours.on_start()
        # It stands still first: the producer says when there is a client.
        assert producer.begun == [("main", MAKING), "start", pool.FIRST_CLIENT_S]

    def test_reports_are_collected_by_one_timer(self, ours: pool.TaskPool, producer: Producer, hub: Hub) -> None:
        """However many wake it, of whatever thread, and however often a connection broke."""
        laters: list[float] = []
        later = hub.call_later

        def call_later(delay: float, *args: Any) -> Any:
            laters.append(delay)
            return later(delay, *args)

        hub.call_later = call_later
        reported: list[Report] = []

        def report(_: str, one: Report) -> None:
            ours.landed(1, 1)
            reported.append(one)

        for _ in range(3):
            ours.launch(OUTGOING, 1, report, "what")
            ours._polling = False
            producer.wake()
            ours.register_with_event_loop(hub)
        loop = hub.create_loop()
        deadline = time.monotonic() + 60
        while not reported:
            assert time.monotonic() < deadline
            next(loop)
        assert laters == [pool.POLL_S]
        assert (len(reported), ours.in_flight, ours.bytes_in_flight) == (3, 0, 0)
        for _ in range(3):
            next(loop)
        assert laters == [pool.POLL_S]

    def test_reports_are_collected_whatever_else_is_due(
        self, ours: pool.TaskPool, producer: Producer, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Kombu fires ten timers a turn, and a turn may take a second: behind a thousand nobody would look."""
        fired: list[int] = []
        for number in range(1_000):
            hub.timer.call_at(time.monotonic() - 60, fired.append, (number,))
        reported: list[Report] = []
        now = [time.monotonic()]
        monkeypatch.setattr(pool, "monotonic", lambda: now[0])
        ours.launch(OUTGOING, 1, lambda _, report: reported.append(report), "what")
        loop = hub.create_loop()
        next(loop)
        assert reported == []
        now[0] += pool.POLL_S
        next(loop)
        assert len(reported) == 1
        assert len(fired) <= 20

    def test_after_each_poll_the_lanes_settle_what_was_reported(
        self, ours: pool.TaskPool, producer: Producer, hub: Hub
    ) -> None:
        reported: dict[str, Report] = {}
        settled: list[set[str]] = []
        ours.lanes = {"task": SimpleNamespace(settle=lambda: settled.append(set(reported)))}
        ours.launch(OUTGOING, 1, reported.__setitem__, "one")
        ours._poll_on()
        ours.launch(OUTGOING, 1, reported.__setitem__, "two")
        ours._poll()
        ours.launch(OUTGOING, 1, reported.__setitem__, "three")
        ours.on_stop()
        assert settled == [{"one"}, {"one", "two"}, {"one", "two", "three"}]

    def test_what_librdkafka_does_not_take_is_not_in_flight(self, ours: pool.TaskPool, producer: Producer) -> None:
        producer.fault = OverflowError("no such timestamp")
        with pytest.raises(OverflowError):
            ours.launch(OUTGOING, 10, lambda *_: None, "what")
        with pytest.raises(OverflowError):
            ours.launch_all([OUTGOING] * 3, 10, lambda *_: None)
        assert (ours.in_flight, ours.bytes_in_flight) == (0, 0)

    def test_a_batch_for_which_there_is_no_room_begins_when_there_is_in_order(
        self, ours: pool.TaskPool, producer: Producer, hub: Hub
    ) -> None:
        begun: list[int] = []
        producer.in_flight = pool.BATCHED
        producer.reports = [lambda _: None] * pool.BATCHED
        for number in range(3):
            ours.when_room(partial(begun.append, number))
        assert begun == []
        ours._poll_on()
        assert begun == [0, 1, 2]
        ours.when_room(partial(begun.append, 3))
        assert begun == [0, 1, 2, 3]

    def test_batches_that_are_stuck_leave_their_room_to_others(self, ours: pool.TaskPool, producer: Producer) -> None:
        """But not more than as many again."""
        begun: list[int] = []
        producer.in_flight = pool.BATCHED
        producer.reports = [lambda _: None] * 2 * pool.BATCHED
        ours._breaker.stuck = 3 * pool.BATCHED
        ours.when_room(partial(begun.append, 1))
        assert begun == [1]
        producer.in_flight = 2 * pool.BATCHED
        ours.when_room(partial(begun.append, 2))
        assert begun == [1]

    def test_one_that_cannot_begin_does_not_keep_the_next_from_it(
        self, ours: pool.TaskPool, producer: Producer, hub: Hub
    ) -> None:
        begun: list[int] = []

        def fail() -> None:
            raise redis.ConnectionError

        producer.in_flight = pool.BATCHED
        ours.when_room(fail)
        ours.when_room(partial(begun.append, 1))
        producer.in_flight = 0
        with pytest.raises(redis.ConnectionError):
            ours._poll_on()
        loop = hub.create_loop()
        deadline = time.monotonic() + 60
        while not begun:
            assert time.monotonic() < deadline
            next(loop)

    @pytest.mark.parametrize("fails", ["on_accepted", "on_success"])
    def test_a_message_whose_thread_fails_outside_of_its_task_goes_back(
        self, ours: pool.TaskPool, hub: Hub, fails: str
    ) -> None:
        """Events could not be sent, say. A thread's error is nobody's; the message would be held for ever."""
        calls: list[str] = []

        class Failing:
            id = name = "one"

            def on_accepted(self, *_: Any) -> None:
                state.task_accepted(self)
                if fails == "on_accepted":
                    raise redis.ConnectionError

            def on_success(self, *_: Any) -> None:
                raise redis.ConnectionError

            def reject(self, requeue: bool) -> None:
                calls.append(f"reject requeue={requeue} {self in state.active_requests}")

        failing = Failing()
        ours.apply_async(
            lambda: (0, None, 0.0), (), {}, accept_callback=failing.on_accepted, callback=failing.on_success
        )
        wait_until(lambda: bool(hub._ready), 60, "the event loop to be told")
        for callback in hub._pop_ready():
            callback()
        assert calls == ["reject requeue=True False"]


class TestWorkWithoutAThread:
    """The executor queues work first, and starts a thread for it then. That may fail for want of threads."""

    @pytest.fixture
    def starved(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """A pool of two threads, one of which is there and busy until it is let go."""
        made: Any = object.__new__(pool.TaskPool)
        made.executor = ThreadPoolExecutor(2)
        made.busy = Event()
        made._does_debug = False
        made.executor.submit(made.busy.wait)

        def start(*_: Any) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(Thread, "start", start)
        yield made
        made.busy.set()
        made.executor.shutdown()

    def test_is_given_up_and_never_done(self, starved: Any) -> None:
        done: list[str] = []
        with pytest.raises(RuntimeError, match="can't start new thread"):
            starved.on_apply(
                lambda: done.append("work"), (), {}, accept_callback=lambda *_: done.append("accepted"), callback=print
            )
        starved.busy.set()  # the thread comes to it now
        starved.executor.shutdown()
        assert done == []

    def test_that_another_thread_has_begun_is_done_once(self, starved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """It must not go back to its queue as well."""
        begun, done = Event(), Event()

        def begin_first(*_: Any) -> None:
            starved.busy.set()
            assert begun.wait(60)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(Thread, "start", begin_first)
        starved.on_apply(lambda: None, (), {}, accept_callback=lambda *_: begun.set(), callback=lambda _: done.set())
        assert done.wait(60)
