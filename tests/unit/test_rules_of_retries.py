"""What becomes of a record that was not delivered, rule by rule: tried again, deferred, dead-lettered or parked.

The engine, Celery's own retry and the queue are stand-ins that note what they are told.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry

from kafka_delivery import base, delivery, settings
from kafka_delivery.base import REQUEUE_PAUSE_S, Deferral, GiveBack, words_of
from kafka_delivery.dead_letters import dead_letter
from kafka_delivery.delivery import final, send, send_many
from kafka_delivery.disposition import Circuit
from kafka_delivery.errors import (
    DeliveryError,
    EnqueueError,
    InvalidRecordError,
    KafkaDeliveryError,
    NotInWorkerError,
    ParkingFullError,
    ProducerError,
    RejectedError,
    RetriableError,
    RetriesExhaustedError,
    UnavailableError,
)
from kafka_delivery.names import DEFERRALS, PROBE, REDRIVES
from kafka_delivery.record import Record
from kafka_delivery_worker.failures import Failed

FULL = RetriableError("too few replicas", "orders", "m", 19, "NOT_ENOUGH_REPLICAS", "topic")
FEW = RetriableError("no such topic", "orders", "m", 3, "UNKNOWN_TOPIC_OR_PART", "topic", 2)
HELD = UnavailableError("no broker", "orders", "m", -195, "_TRANSPORT", "cluster")
CLIENTS = ProducerError("queue full", "orders", "m", -184, "_QUEUE_FULL", "producer")
REJECTED = RejectedError("too large", "orders", "m", 10, "MSG_SIZE_TOO_LARGE", "record")


SEND: Any = send
BATCH: Any = send_many
"""The tasks as Celery's, whose methods mypy does not know."""


def body(task: Any) -> Any:
    """Return what the class of the task runs: once an app is finalized, Celery's autoretry stands before it."""
    return partial(type(task).run, task)


class Engine:
    """What the tasks ask their engine, and what they tell it."""

    def __init__(self) -> None:
        self.stopping = False
        self.shut: set[str] = set()
        self.retry_after = 4.2
        self.told: list[Any] = []
        self.outcome: Any = {"topic": "orders", "partition": 0}
        self.outcomes: list[Any] = []
        self.fault: Exception | None = None
        self.breaker = SimpleNamespace(
            is_shut=lambda topic: topic in self.shut,
            retry_after=lambda topic: self.retry_after,
            circuit=lambda topic: Circuit.TOPIC if topic in self.shut else Circuit.CLOSED,
        )
        self.processes = 0

    def failed_here(self, message_id: str | None, error: Exception) -> Failed:
        self.told.append(("failed here", message_id, type(error).__name__))
        return Failed(self.processes, 4.0)

    def deliver(self, record: Record, probe: str | None, redrives: int, tag: str | None) -> Any:
        self.told.append(("deliver", record.id, probe, redrives, tag))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def deliver_many(self, records: list[Record], tag: str | None, probe: str | None) -> list[Any]:
        self.told.append(("deliver_many", [record.id for record in records], tag, probe))
        return self.outcomes

    def park_call(self, request: Any, error: Exception, why: str | None = None) -> None:
        if self.fault:
            raise self.fault
        self.told.append(("park", request.id, type(error).__name__))

    def sent_again(self, outcome: str, error: Any, retries: int) -> None:
        self.told.append((outcome, error, retries))

    def pause(self, seconds: float) -> None:
        self.told.append(("pause", seconds))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    for module in (base, delivery):
        monkeypatch.setattr(module, "engine", lambda: made)
    return made


@pytest.fixture(autouse=True)
def configured(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch)


def configure(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    values: dict[str, Any] = {
        "max_retries": 5, "retry_backoff_s": 2, "retry_backoff_max_s": 60, "retry_jitter": False,
        "few_backoff_s": 30, "defer_s": 3, "defer_max_s": 20, "transport": "celery", **changes,
    }  # fmt: skip
    made = replace(settings.Settings(), **values)
    monkeypatch.setattr(settings, "current", lambda: made)


@pytest.fixture
def request_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Gives the task `send` a message in hand; returns its request."""
    pushed = 0

    def push(**fields: Any) -> Any:
        nonlocal pushed
        send._get_app()
        wire = Record("orders", "x", message_id="m").to_wire("default")
        given = {"id": "m", "retries": 0, "args": [wire], "kwargs": {}, "called_directly": False, **fields}
        SEND.push_request(**given)
        pushed += 1
        return send.request

    yield push
    for _ in range(pushed):
        SEND.pop_request()


class TestPauses:
    @pytest.mark.parametrize(("retries", "pause"), [(0, 2), (1, 4), (3, 16), (5, 60)])
    def test_grow_up_to_a_limit(self, retries: int, pause: int) -> None:
        assert send.pause_before_retry(FULL, retries) == pause

    def test_are_long_where_a_retry_rarely_helps(self) -> None:
        assert send.pause_before_retry(FEW, 0) == 30

    def test_differ_from_record_to_record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        configure(monkeypatch, retry_jitter=True)
        monkeypatch.setattr("kafka_delivery.base.random.randint", lambda low, high: 1_000 * low + high)
        assert send.pause_before_retry(FEW, 0) == 40
        assert send.pause_before_resend(0, "orders") == 6

    @pytest.mark.parametrize(("deferrals", "pause"), [(0, 3), (1, 6), (2, 12), (3, 20)])
    def test_of_deferred_records_grow_too(self, engine: Engine, deferrals: int, pause: int) -> None:
        assert send.pause_before_resend(deferrals, "orders") == pause

    @pytest.mark.parametrize(("retry_after", "pause"), [(4.2, 5), (0.0, 0), (100.0, 20)])
    def test_last_until_the_circuit_is_due(self, engine: Engine, retry_after: float, pause: int) -> None:
        engine.shut = {"orders"}
        engine.retry_after = retry_after
        assert send.pause_before_resend(0, "orders") == pause

    @pytest.fixture(autouse=True)
    def with_an_engine(self, engine: Engine) -> None:
        """The pauses ask its breaker."""


class TestRetry:
    @pytest.fixture(autouse=True)
    def celerys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Celery's retry and our deferral, which note how they were called."""
        self.retried: list[dict[str, Any]] = []
        self.deferred: list[Any] = []
        self.fault: Exception | None = None

        def retry(task: Any, args: Any, kwargs: Any, **options: Any) -> Any:
            if self.fault:
                raise self.fault
            self.retried.append({"args": args, "kwargs": kwargs, **options})
            return Retry(exc=options["exc"])

        def defer(task: Any, wire: Any, error: Any) -> Any:
            if self.fault:
                raise self.fault
            self.deferred.append((wire, error))
            return Retry(exc=error)

        monkeypatch.setattr("celery.app.task.Task.retry", retry)
        monkeypatch.setattr(type(send), "defer", defer)

    def test_uses_an_attempt_of_a_retriable_error(self, engine: Engine, request_of: Any) -> None:
        request_of(retries=2)
        with pytest.raises(Retry):
            send.retry(exc=FULL)
        (call,) = self.retried
        assert (call["countdown"], call["throw"], call["exc"], call["kwargs"]) == (8, False, FULL, {})
        assert call["args"][0][2] == "orders"
        assert engine.told == [("retried", FULL, 2)]

    @pytest.mark.parametrize(("error", "retries", "shut"), [(HELD, 0, set()), (FULL, 5, set()), (FULL, 0, {"orders"})])
    def test_uses_none_for_what_is_nobodys_fault(
        self, engine: Engine, request_of: Any, error: Any, retries: int, shut: set[str]
    ) -> None:
        request_of(retries=retries)
        engine.shut = shut
        with pytest.raises(Retry):
            send.retry(exc=error)
        assert (len(self.deferred), self.retried) == (1, [])
        assert engine.told == [("deferred", error, retries)]

    def test_in_a_worker_that_stops_gives_the_message_back(self, engine: Engine, request_of: Any) -> None:
        request_of()
        engine.stopping = True
        with pytest.raises(GiveBack) as caught:
            send.retry(exc=FULL)
        assert (caught.value.requeue, caught.value.reason, caught.value.pause_s) == (True, words_of(FULL), 0.0)
        assert engine.told == []

    def test_for_this_process_gives_the_message_back_with_a_pause(self, engine: Engine, request_of: Any) -> None:
        request_of()
        with pytest.raises(GiveBack) as caught:
            send.retry(exc=CLIENTS)
        assert (caught.value.requeue, caught.value.pause_s) == (True, 4.0)
        assert engine.told == [("failed here", None, "ProducerError"), ("pause", 4.0)]
        assert (self.retried, self.deferred) == ([], [])

    @pytest.mark.parametrize("error", [FULL, HELD])
    @pytest.mark.parametrize("fault", [Reject("not published", requeue=False), EnqueueError("m", "Redis is away")])
    def test_that_cannot_be_queued_gives_the_message_back(
        self, engine: Engine, request_of: Any, error: Any, fault: Exception
    ) -> None:
        request_of()
        self.fault = fault
        with pytest.raises(Reject) as caught:
            send.retry(exc=error)
        assert caught.value.requeue is True
        assert engine.told == [("pause", REQUEUE_PAUSE_S)]


class TestDeferral:
    @pytest.fixture(autouse=True)
    def signature(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[dict[str, Any]] = []
        self.queued = 0

        def apply_async() -> None:
            self.queued += 1

        def signature_from_request(task: Any, request: Any, args: Any, kwargs: Any, **options: Any) -> Any:
            self.made.append({"args": args, "kwargs": kwargs, **options})
            return SimpleNamespace(apply_async=apply_async)

        monkeypatch.setattr(type(send), "signature_from_request", signature_from_request)

    def test_is_the_same_attempt_later(self, engine: Engine, request_of: Any) -> None:
        request_of(retries=4, headers={"mine": 1, PROBE: "cluster|t", DEFERRALS: 1})
        found = send.defer(["wire"], HELD)
        assert self.made == [
            {"args": ["wire"], "kwargs": {}, "countdown": 6, "retries": 4, "headers": {"mine": 1, DEFERRALS: 2}}
        ]
        assert self.queued == 1
        assert isinstance(found, Deferral)
        assert (found.when, found.exc) == (6, HELD)

    def test_of_a_message_without_headers_is_its_first(self, engine: Engine, request_of: Any) -> None:
        request_of(headers=None)
        send.defer(["wire"], HELD)
        assert self.made[0]["headers"] == {DEFERRALS: 1}
        assert self.made[0]["countdown"] == 3


class TestHeaders:
    @pytest.mark.parametrize(
        ("headers", "redrives", "probe"),
        [
            (None, 0, None),
            ({}, 0, None),
            ({REDRIVES: 2, PROBE: "cluster|t"}, 2, "cluster|t"),
            ({REDRIVES: "2"}, 0, None),
            ({REDRIVES: True}, 0, None),
        ],
    )
    def test_say_what_a_message_is(self, request_of: Any, headers: Any, redrives: int, probe: str | None) -> None:
        request_of(headers=headers)
        assert (send.redrives, send.probe) == (redrives, probe)


class TestFinalErrors:
    @pytest.fixture(autouse=True)
    def backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stored: list[Any] = []
        self.fault: Exception | None = None

        def store_result(task_id: str, error: Any, state: str, request: Any) -> None:
            self.stored.append((task_id, error, state))
            if self.fault:
                raise self.fault

        monkeypatch.setattr(type(send), "backend", SimpleNamespace(store_result=store_result))

    def test_are_kept_for_a_callback(self, request_of: Any) -> None:
        request_of(errbacks=["callback"])
        send.remember(REJECTED)
        assert self.stored == [("m", REJECTED, "FAILURE")]

    def test_are_not_kept_for_nobody(self, request_of: Any) -> None:
        request_of(errbacks=None)
        send.remember(REJECTED)
        assert self.stored == []

    def test_that_cannot_be_kept_hurt_nobody(self, request_of: Any) -> None:
        request_of(errbacks=["callback"])
        self.fault = OSError()
        send.remember(REJECTED)
        assert len(self.stored) == 1


class TestGivingBack:
    @pytest.mark.parametrize(("transport", "pauses"), [("leased", []), ("celery", [("pause", 5)])])
    def test_a_leased_message_makes_its_pause_in_redis(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, transport: str, pauses: list[Any]
    ) -> None:
        configure(monkeypatch, transport=transport)
        full = ParkingFullError(1_000, 5)
        with pytest.raises(GiveBack) as caught:
            send.give_back(full)
        assert (caught.value.requeue, caught.value.pause_s) == (True, 5)
        assert engine.told == pauses

    @pytest.mark.parametrize(
        ("fault", "said"),
        [(OSError("no route"), "OSError: no route"), (ValueError("hunter2"), "ValueError")],
    )
    def test_it_quotes_nothing_that_nobody_planned(self, engine: Engine, fault: Exception, said: str) -> None:
        with pytest.raises(GiveBack) as caught:
            send.give_back(fault)
        assert (caught.value.reason, caught.value.pause_s) == (said, REQUEUE_PAUSE_S)
        assert caught.value.__suppress_context__

    def test_a_pause_that_fails_changes_nothing(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "pause", lambda seconds: 1 / 0)
        with pytest.raises(GiveBack):
            send.give_back(OSError())

    def test_it_crosses_a_pipe(self) -> None:
        found = pickle.loads(pickle.dumps(GiveBack("why", 2.5)))
        assert (type(found), found.reason, found.requeue, found.pause_s) == (GiveBack, "why", True, 2.5)


class TestCall:
    @pytest.fixture(autouse=True)
    def runs(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self.outcome: Any = "value"

        def run(*args: Any, **kwargs: Any) -> Any:
            if isinstance(self.outcome, Exception):
                raise self.outcome
            return self.outcome

        monkeypatch.setitem(SEND.__dict__, "run", run)

    def test_returns_what_the_task_does(self, engine: Engine, request_of: Any) -> None:
        request_of()
        assert send() == "value"
        assert engine.told == []

    def test_outside_a_worker_is_refused(self, request_of: Any) -> None:
        request_of(called_directly=True)
        with pytest.raises(NotInWorkerError, match=r"call \.delay\(\)"):
            send()

    @pytest.mark.parametrize("error", [REJECTED, HELD, Retry(), Reject("r"), Ignore()])
    def test_of_an_end_that_is_planned_parks_nothing(self, engine: Engine, request_of: Any, error: Exception) -> None:
        request_of()
        self.outcome = error
        with pytest.raises(type(error)):
            send()
        assert engine.told == []

    def test_of_no_record_parks_it_and_says_so(self, engine: Engine, request_of: Any) -> None:
        request_of()
        self.outcome = InvalidRecordError("topic", "is empty", "m")
        with pytest.raises(InvalidRecordError):
            send()
        assert engine.told == [("park", "m", "InvalidRecordError")]

    def test_that_fails_here_goes_back_until_several_processes_failed(self, engine: Engine, request_of: Any) -> None:
        request_of()
        self.outcome = ValueError("hunter2")
        engine.processes = 2
        with pytest.raises(GiveBack) as caught:
            send()
        assert (caught.value.reason, caught.value.pause_s) == ("ValueError", 4.0)
        assert engine.told == [("failed here", "m", "ValueError"), ("pause", 4.0)]

    def test_that_fails_in_several_processes_is_parked_and_quotes_nothing(
        self, engine: Engine, request_of: Any
    ) -> None:
        request_of()
        self.outcome = ValueError("hunter2")
        engine.processes = 3
        with pytest.raises(KafkaDeliveryError, match=r"^parked after an unexpected ValueError$") as caught:
            send()
        assert caught.value.__context__ is None
        assert engine.told == [("failed here", "m", "ValueError"), ("park", "m", "ValueError")]

    @pytest.mark.parametrize("error", [ValueError(), InvalidRecordError("topic", "is empty", "m")])
    def test_that_cannot_be_parked_goes_back(self, engine: Engine, request_of: Any, error: Exception) -> None:
        request_of()
        self.outcome = error
        engine.fault, engine.processes = OSError(), 3
        with pytest.raises(GiveBack):
            send()
        assert engine.told[-1] == ("pause", REQUEUE_PAUSE_S)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the tasks `send` and `dead_letter` were queued with."""
    found: list[tuple[Any, ...]] = []

    def noting(name: str) -> Any:
        def apply_async(task: Any, args: Any = None, kwargs: Any = None, task_id: Any = None, **options: Any) -> None:
            found.append((name, args, options))

        return apply_async

    monkeypatch.setattr(type(send), "apply_async", noting("send"))
    monkeypatch.setattr(type(dead_letter), "apply_async", noting("dead_letter"))
    return found


class TestSend:
    def test_is_delivered(self, engine: Engine, request_of: Any) -> None:
        request = request_of(headers={PROBE: "cluster|t", REDRIVES: 3}, properties={"delivery_tag": "tag"})
        assert body(send)(*request.args) == engine.outcome
        assert engine.told == [("deliver", "m", "cluster|t", 3, "tag")]

    @pytest.mark.parametrize("error", [FULL, HELD, CLIENTS])
    def test_is_tried_again(self, engine: Engine, request_of: Any, published: list[Any], error: DeliveryError) -> None:
        request = request_of()
        engine.outcome = error
        with pytest.raises(type(error)):
            body(send)(*request.args)
        assert published == []

    def test_that_is_refused_is_a_dead_letter_first_and_then_fails(
        self, engine: Engine, request_of: Any, published: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        remembered: list[DeliveryError] = []
        monkeypatch.setattr(type(send), "remember", lambda task, error: remembered.append(error))
        request = request_of(retries=2, headers={REDRIVES: 1})
        engine.outcome = REJECTED
        with pytest.raises(RejectedError):
            body(send)(*request.args)
        ((task, (record, error, retries, redrives), options),) = published
        assert (task, record.id, error, retries, redrives, options) == ("dead_letter", "m", REJECTED, 2, 1, {})
        assert remembered == [REJECTED]

    def test_that_has_no_attempt_left_is_a_dead_letter(
        self, engine: Engine, request_of: Any, published: list[Any]
    ) -> None:
        request = request_of(retries=5)
        engine.outcome = FULL
        with pytest.raises(RetriesExhaustedError):
            body(send)(*request.args)
        ((task, (_, error, *_), _),) = published
        assert task == "dead_letter"
        assert type(error) is RetriesExhaustedError

    def test_whose_dead_letter_cannot_be_queued_goes_back(
        self, engine: Engine, request_of: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise EnqueueError("m", "Redis is away")

        monkeypatch.setattr(type(dead_letter), "apply_async", refuse)
        request = request_of()
        engine.outcome = REJECTED
        with pytest.raises(Reject) as caught:
            body(send)(*request.args)
        assert caught.value.requeue is True

    def test_that_is_exhausted_says_what_the_last_error_was(self) -> None:
        found = final(FULL)
        assert found.problem == "too few replicas; still so after all retries"
        assert (found.topic, found.message_id, found.code, found.name, found.scope) == (
            "orders", "m", 19, "NOT_ENOUGH_REPLICAS", "topic",
        )  # fmt: skip
        assert found.__cause__ is FULL


class TestBatch:
    DELIVERED: dict[str, Any] = {"message_id": "a", "topic": "orders", "partition": 0}  # noqa: RUF012

    def wires(self, *ids: str) -> list[Any]:
        return [Record("orders", "x", message_id=name).to_wire("default") for name in ids]

    def test_each_record_has_its_own_fate(self, engine: Engine, published: list[Any]) -> None:
        send_many._get_app()
        BATCH.push_request(
            id="batch",
            retries=0,
            called_directly=False,
            headers={PROBE: "cluster|t"},
            properties={"delivery_tag": "tag"},
        )
        engine.outcomes = [self.DELIVERED, FULL, FEW, REJECTED, HELD, CLIENTS]
        try:
            fates = body(send_many)(self.wires(*"abcdef"))
        finally:
            BATCH.pop_request()
        assert engine.told[0] == ("deliver_many", list("abcdef"), "tag", "cluster|t")
        assert fates[0] == {"outcome": "delivered", **self.DELIVERED}
        assert fates[3] == {
            "outcome": "dead-lettered", "message_id": "d", "topic": "orders", "error": "MSG_SIZE_TOO_LARGE",
        }  # fmt: skip
        assert [fate["outcome"] for fate in fates] == [
            "delivered", "retried", "retried", "dead-lettered", "deferred", "deferred",
        ]  # fmt: skip
        assert [(task, args[0].id, options) for task, args, options in published] == [
            ("send", "b", {"retries": 1, "countdown": 2}),
            ("send", "c", {"retries": 1, "countdown": 30}),
            ("dead_letter", "d", {}),
            ("send", "e", {"countdown": 3, "headers": {DEFERRALS: 1}}),
            ("send", "f", {"countdown": 3, "headers": {DEFERRALS: 1}}),
        ]
        assert published[2][1][1:] == (REJECTED, 0, 0)
        assert engine.told[1:] == [
            ("retried", FULL, 0), ("retried", FEW, 0), ("deferred", HELD, 0), ("deferred", CLIENTS, 0),
        ]  # fmt: skip

    def test_what_is_no_record_is_parked_before_any_is_sent(self, engine: Engine) -> None:
        send_many._get_app()
        BATCH.push_request(id="batch", retries=0, called_directly=False)
        engine.outcomes = [self.DELIVERED]
        try:
            fates = body(send_many)([{"topic": "", "value": "x"}, *self.wires("a")])
        finally:
            BATCH.pop_request()
        assert [word[0] for word in engine.told] == ["park", "deliver_many"]
        assert engine.told[1][1] == ["a"]
        assert fates[0] == {
            "outcome": "parked", "message_id": engine.told[0][1], "topic": None, "error": "InvalidRecordError",
        }  # fmt: skip
        assert fates[1]["outcome"] == "delivered"

    def test_what_cannot_be_parked_takes_the_batch_back_unsent(self, engine: Engine) -> None:
        send_many._get_app()
        BATCH.push_request(id="batch", retries=0, called_directly=False)
        engine.fault = OSError()
        try:
            with pytest.raises(Reject) as caught:
                body(send_many)([{"topic": "", "value": "x"}, *self.wires("a")])
        finally:
            BATCH.pop_request()
        assert caught.value.requeue is True
        assert engine.told == [("pause", REQUEUE_PAUSE_S)]
