"""A request that is due does not wait for Celery's timer, and what Celery fails with is not charged to its record."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import kombu
import pytest
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry
from celery.worker.request import Request as CeleryRequest

from kafka_delivery import KafkaDeliveryError, RejectedError, app, send
from kafka_delivery_worker import engine, request


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
        monkeypatch.setattr(engine, "current", lambda: SimpleNamespace(park_call=lambda *_: "one"))
        made_of(message())._announce_revoked("expired", False, None, True)
        assert told == [becomes]


class TestRequest:
    @pytest.mark.parametrize(("countdown", "waits"), [(-1, False), (60, True)])
    def test_what_is_due_does_not_wait_for_celerys_timer(self, countdown: float, waits: bool) -> None:
        """That one does ten a turn; a topic that refuses thousands of records has thousands of retries due at once."""
        eta = (datetime.now(UTC) + timedelta(seconds=countdown)).isoformat()
        sent = message(eta=eta)
        made = made_of(sent)
        assert (made.eta is not None) is waits
        assert made.request_dict["eta"] == eta
