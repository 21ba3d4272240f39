"""A request that is due does not wait for Celery's timer, and what Celery fails with is not charged to its record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import kombu
import pytest
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.solo import TaskPool as SoloPool
from celery.exceptions import Ignore, InvalidTaskError, Reject, Retry
from celery.worker.request import Request as CeleryRequest
from celery.worker.request import create_request_cls

from kafka_delivery import KafkaDeliveryError, RejectedError, app, send, settings
from kafka_delivery.base import GiveBack
from kafka_delivery.errors import SettingsError
from kafka_delivery.names import REDRIVES
from kafka_delivery_worker import engine, request
from kafka_delivery_worker.application import _started, check_time_limits
from kafka_delivery_worker.failures import Failed
from kafka_delivery_worker.parked_items import Call

LEAST = settings.current().attempt_timeout_s


def received(asked: dict[str, Any] | None = None, **headers: Any) -> Any:
    """A request as Celery's strategy makes it; the pool notes in `asked` what it is asked."""
    sent = kombu.Message(
        body='[[[2, "", "t", "v"]], {}, {}]', content_type="application/json", content_encoding="utf-8",
        headers={"id": "one", "task": send.name} | headers, delivery_info={},
    )  # fmt: skip
    pool = SimpleNamespace(apply_async=lambda *_, **options: None if asked is None else asked.update(options))
    made = create_request_cls(request.Request, send, pool, "host", None, app=app)
    return made(sent, app=app, task=send, headers=sent.headers, body=sent.body, decoded=False, utc=True)


def made_of(sent: kombu.Message) -> request.Request:
    return request.Request(sent, app=app, task=send, headers=sent.headers, body=sent.body, decoded=False, utc=True)


def message(**headers: Any) -> kombu.Message:
    return kombu.Message(
        body='[[[2, "", "t", "v"]], {}, {}]', content_type="application/json", content_encoding="utf-8",
        headers={"id": "one", "task": send.name, **headers}, delivery_info={},
    )  # fmt: skip


def failure(error: BaseException, wrapped: bool) -> ExceptionInfo:
    """What a pool says of a task that failed; a child of prefork wraps the error for its way through the pipe."""
    try:
        raise error
    except BaseException:
        info = ExceptionInfo()
    info.exception = ExceptionWithTraceback(error, error.__traceback__) if wrapped else error
    return info


@pytest.mark.parametrize("wrapped", [False, True], ids=["threads", "prefork"])
class TestFailures:
    @pytest.fixture(autouse=True)
    def told(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What becomes of the message."""
        told: list[Any] = []
        monkeypatch.setattr(request.Request, "_put_off", lambda self, fault: told.append(("put off", fault)))
        monkeypatch.setattr(CeleryRequest, "on_failure", lambda self, info, *_: told.append(("Celery", info.exception)))
        return told

    @pytest.mark.parametrize("error", [ValueError("x"), ConnectionResetError(), kombu.exceptions.OperationalError("x")])
    def test_what_celery_fails_with_beside_the_task_is_not_charged_to_it(
        self, told: list[Any], wrapped: bool, error: Exception
    ) -> None:
        """Celery would acknowledge it."""
        assert made_of(message()).on_failure(failure(error, wrapped)) is None
        assert told == [("put off", error)]

    @pytest.mark.parametrize(
        "error",
        [
            RejectedError("no", "t", "one", 44, "POLICY_VIOLATION", "topic"),
            KafkaDeliveryError("parked"),
            Retry(exc=ValueError("x")),
            Reject("x", requeue=True),
            Ignore(),
            Terminated("15"),
            WorkerLostError("x"),
            TimeLimitExceeded(1),
            MemoryError(),
            SystemExit(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_what_is_meant_is_left_to_celery(self, told: list[Any], wrapped: bool, error: Exception) -> None:
        info = failure(error, wrapped)
        made_of(message()).on_failure(info)
        assert told == [("Celery", info.exception)]


class TestDeadProcesses:
    """The parent hears that the child died which worked on the record."""

    DIED = (WorkerLostError("x"), SystemExit(3), KeyboardInterrupt())

    @pytest.fixture(autouse=True)
    def engine_(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        told: Any = SimpleNamespace(parked=[], failed=Failed(1, 2.5), blamed=lambda _: None)
        told.died = lambda *_: told.failed
        told.park_call = lambda call, error, kind, why: told.parked.append((call.id, kind, why))
        monkeypatch.setattr(engine, "current", lambda: told)
        monkeypatch.setattr(CeleryRequest, "on_failure", lambda self, info, *_: self.reject(requeue=True))
        return cast("SimpleNamespace", told)

    @pytest.fixture
    def rejected(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        rejected: list[bool] = []
        monkeypatch.setattr(CeleryRequest, "reject", lambda self, requeue=False: rejected.append(requeue))
        return rejected

    @pytest.mark.parametrize("error", DIED, ids=lambda error: type(error).__name__)
    def test_a_leased_message_goes_back_with_that_word(self, rejected: list[bool], error: BaseException) -> None:
        sent = message()
        made_of(sent).on_failure(failure(error, wrapped=False))
        assert (sent.child_died, rejected) == (True, [True])

    @pytest.mark.parametrize("error", [GiveBack("x", 1.0), TimeLimitExceeded(1)], ids=lambda e: type(e).__name__)
    def test_of_nothing_else(self, rejected: list[bool], error: Exception) -> None:
        sent = message()
        made_of(sent).on_failure(failure(error, wrapped=False))
        assert (hasattr(sent, "child_died"), rejected) == (False, [True])

    def test_nor_of_a_worker_that_stops(self, monkeypatch: pytest.MonkeyPatch, rejected: list[bool]) -> None:
        """A supervisor's signal reaches the children too."""
        monkeypatch.setattr(engine, "stopping", SimpleNamespace(sent=True))
        sent = message()
        made_of(sent).on_failure(failure(WorkerLostError("x"), wrapped=False))
        assert (hasattr(sent, "child_died"), rejected) == (False, [True])

    @pytest.fixture
    def unleased(self, monkeypatch: pytest.MonkeyPatch) -> None:
        s = dataclasses.replace(settings.current(), transport="celery", max_deaths=4)
        monkeypatch.setattr(settings, "current", lambda: s)

    @pytest.mark.usefixtures("unleased")
    def test_another_message_waits_in_the_worker(self, monkeypatch: pytest.MonkeyPatch, rejected: list[bool]) -> None:
        waits: list[float] = []

        def waited(_: Any, pause_s: float, reject: Callable[[], None]) -> None:
            waits.append(pause_s)
            reject()

        monkeypatch.setattr(request, "give_back", waited)
        made_of(message()).on_failure(failure(WorkerLostError("x"), wrapped=False))
        assert (waits, rejected) == ([2.5], [True])

    @pytest.mark.usefixtures("unleased")
    @pytest.mark.parametrize(("processes", "parked"), [(3, False), (4, True)])
    def test_and_is_parked_after_as_many_deaths(
        self,
        monkeypatch: pytest.MonkeyPatch,
        engine_: SimpleNamespace,
        rejected: list[bool],
        processes: int,
        parked: bool,
    ) -> None:
        engine_.failed = Failed(processes, 2.5)
        acknowledged: list[Any] = []
        monkeypatch.setattr(CeleryRequest, "acknowledge", lambda self: acknowledged.append(self))
        monkeypatch.setattr(request, "give_back", lambda _, __, reject: reject())
        made_of(message()).on_failure(failure(WorkerLostError("x"), wrapped=False))
        why = "4 processes died while they worked on it"
        assert engine_.parked == ([("one", "poison", why)] if parked else [])
        assert (len(acknowledged), rejected) == ((1, []) if parked else (0, [True]))

    @pytest.mark.usefixtures("unleased")
    def test_one_that_cannot_be_parked_stays(
        self, monkeypatch: pytest.MonkeyPatch, engine_: SimpleNamespace, rejected: list[bool]
    ) -> None:
        def refuses(*_: Any) -> None:
            raise ConnectionError

        engine_.failed, engine_.park_call = Failed(4, 2.5), refuses
        monkeypatch.setattr(request, "give_back", lambda _, __, reject: reject())
        made_of(message()).on_failure(failure(WorkerLostError("x"), wrapped=False))
        assert rejected == [True]


class TestRevoked:
    @pytest.mark.parametrize(
        ("error", "becomes"), [(kombu.exceptions.OperationalError("x"), "put off"), (None, "told")]
    )
    def test_one_whose_chord_cannot_be_told_goes_back(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception | None, becomes: str
    ) -> None:
        told: list[str] = []

        def announced(*_: Any) -> None:
            if error is not None:
                raise error
            told.append("told")

        monkeypatch.setattr(CeleryRequest, "_announce_revoked", announced)
        monkeypatch.setattr(request.Request, "_put_off", lambda self, fault: told.append("put off"))
        monkeypatch.setattr(engine, "current", lambda: SimpleNamespace(park_call=lambda *_: "one", outcomes={}))
        made_of(message())._announce_revoked("expired", False, None, True)
        assert told == [becomes]


class TestRequest:
    @pytest.mark.parametrize(("countdown", "waits"), [(-1, False), (60, True)])
    def test_what_is_due_does_not_wait_for_celerys_timer(self, countdown: float, waits: bool) -> None:
        """That one does ten a turn; a topic that refuses thousands of records has thousands of retries due at once."""
        eta = (datetime.now(UTC) + timedelta(seconds=countdown)).isoformat()
        made = received(eta=eta)
        assert (made.eta is not None) is waits
        assert made.request_dict["eta"] == eta


class TestTimeLimits:
    """What ends an attempt before its report is there does so again and again, and each time it may be written."""

    @pytest.fixture(autouse=True)
    def nothing_said_yet(self) -> None:
        request._tell.cache_clear()

    @staticmethod
    def limits(**headers: Any) -> tuple[Any, Any]:
        asked: dict[str, Any] = {}
        received(asked, **headers).execute_using_pool(None)
        return asked["timeout"], asked["soft_timeout"]

    @pytest.mark.parametrize(
        ("given", "used"),
        [
            (None, (None, None)),
            ([None, None], (None, None)),
            ([1, None], (LEAST, None)),
            ([None, 0.5], (None, LEAST)),
            ([2, 1], (LEAST, LEAST)),
            ([LEAST - 1, LEAST], (LEAST, LEAST)),
            ([LEAST + 2, LEAST + 1], (LEAST + 2, LEAST + 1)),
        ],
    )
    def test_of_a_message(self, given: Any, used: tuple[Any, Any]) -> None:
        assert self.limits(timelimit=given) == used

    def test_of_the_task(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(send, "time_limit", 3)
        monkeypatch.setattr(send, "soft_time_limit", LEAST + 1)
        assert self.limits() == (LEAST, LEAST + 1)
        assert self.limits(timelimit=[LEAST + 5, None]) == (LEAST + 5, LEAST + 1)

    @pytest.mark.parametrize("given", [[1], [1, 2, 3], 5])
    def test_what_is_no_pair(self, given: Any) -> None:
        with pytest.raises(InvalidTaskError):
            received(timelimit=given)

    def test_it_is_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        for _ in range(3):
            self.limits(timelimit=[1, None])
        (line,) = caplog.messages
        assert f"time_limit.raised limit_s=1 to_s={LEAST:g}" in line

    @pytest.mark.parametrize(("hard", "soft", "option"), [(LEAST - 1, None, "--time-limit"), (None, 1, "--soft-time")])
    def test_of_a_worker(self, hard: float | None, soft: float | None, option: str) -> None:
        with pytest.raises(SettingsError, match=f"{option}.*sent again and again.*at least {LEAST:g}"):
            check_time_limits(settings.current(), PreforkPool, hard, soft)
        check_time_limits(settings.current(), SoloPool, hard, soft)  # which has none
        check_time_limits(settings.current(), PreforkPool, LEAST, None)

    def test_a_worker_with_one_that_is_too_short_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kafka_delivery_worker.application._refuse_redis_cluster", lambda _: None)
        worker = SimpleNamespace(pool_cls=PreforkPool, time_limit=1, soft_time_limit=None)
        with pytest.raises(SystemExit, match="kafka-delivery: --time-limit=1"):
            _started(instance=worker)


def test_a_call_that_will_never_run_keeps_what_it_asked_of_celery() -> None:
    link = [{"task": "app.tell"}]
    body = json.dumps([[[2, "", "t", "v"]], {}, {"callbacks": link, "chain": None}])
    sent = kombu.Message(
        body=body, content_type="application/json", content_encoding="utf-8", delivery_info={},
        headers={"id": "one", "task": send.name, "root_id": "r", "group": "g", "retries": 2, REDRIVES: 1, "args": "x"},
    )  # fmt: skip
    made = request.Request(sent, app=app, task=send, headers=sent.headers, body=body, decoded=False, utc=True)
    call = Call.of(made._as_call())
    assert call.asked == {"callbacks": link, "root_id": "r", "group": "g"}
    assert (call.id, call.retries, call.redrives, call.args) == ("one", 2, 1, [[2, "", "t", "v"]])
