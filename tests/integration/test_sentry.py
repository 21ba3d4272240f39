"""The ready hook for Sentry: an event says topic, error and message id, is grouped by the first two, and nothing of a
task, which Sentry's integrations would gather, comes along.

What is sent is caught where Sentry's own SDK hands it to its transport.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from unit.test_hook import LETTER

sentry_sdk = pytest.importorskip("sentry_sdk")

DSN = "http://key@127.0.0.1:9/1"
PAYLOAD = "secret-payload"


class Caught(sentry_sdk.transport.Transport):  # type: ignore[name-defined,misc]
    """What the SDK would send."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.envelopes: list[Any] = []

    def capture_envelope(self, envelope: Any) -> None:
        self.envelopes.append(envelope)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for event in (envelope.get_event() for envelope in self.envelopes) if event]


@pytest.fixture
def caught() -> Iterator[Caught]:
    """Sentry set up by an application, as it does by default, with everything that it gathers."""
    transport = Caught({"dsn": DSN})
    sentry_sdk.init(DSN, transport=transport, traces_sample_rate=1.0)
    yield transport
    sentry_sdk.get_global_scope().set_client(None)


def test_an_event_says_topic_error_and_message_id(caught: Caught) -> None:
    from kafka_delivery_worker.sentry import report

    report(LETTER)

    (event,) = caught.events
    assert event["level"] == "error"
    assert event["logentry"]["formatted"] == "Dead letter of orders: RejectedError"
    assert event["tags"] == {
        "topic": "orders",
        "error_class": "RejectedError",
        "error_code": "10",
        "message_id": "id-1",
    }
    assert event["extra"]["error_message"] == LETTER.error_message
    assert event["extra"]["where"] == "3:42"
    assert event["extra"]["dead_letter_topic"] == "orders-dlq"


def test_they_are_grouped_by_topic_and_error_class(caught: Caught) -> None:
    from kafka_delivery_worker.sentry import report

    for change in ({}, {"message_id": "id-2", "offset": 43}, {"topic": "payments"}, {"error_class": "Mine"}):
        report(dataclasses.replace(LETTER, **change))
    groups = [tuple(event["fingerprint"]) for event in caught.events]
    assert groups[0] == groups[1] == ("kafka-delivery", "orders", "RejectedError")
    assert len(set(groups)) == 3


def test_a_parked_one_says_under_which_id(caught: Caught) -> None:
    from kafka_delivery_worker.sentry import report

    report(dataclasses.replace(LETTER, partition=None, offset=None, parked_id="id-1~abcd"))
    assert caught.events[0]["extra"]["where"] == "parked as id-1~abcd"


def test_nothing_that_sentry_gathers_of_a_task_comes_along(caught: Caught) -> None:
    """As in a thread that was started within a task: its scope knows the task's arguments."""
    from kafka_delivery_worker.sentry import report

    with sentry_sdk.isolation_scope() as scope:
        scope.set_extra("celery-job", {"args": [PAYLOAD]})
        scope.set_user({"id": PAYLOAD})
        scope.add_event_processor(lambda event, hint: {**event, "extra": {"args": PAYLOAD}})
        sentry_sdk.add_breadcrumb(message=PAYLOAD)
        key_of_a_record = PAYLOAD
        report(LETTER)
        del key_of_a_record
    assert len(caught.events) == 1
    assert PAYLOAD not in json.dumps(caught.events, default=str)


def test_without_sentry_of_the_applications_the_environment_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    from kafka_delivery_worker import sentry

    sentry._our_own.cache_clear()
    monkeypatch.setenv("SENTRY_DSN", DSN)
    client = sentry._client()
    client.transport = Caught({"dsn": DSN})
    sentry.report(LETTER)
    (event,) = client.transport.events
    assert event["tags"]["message_id"] == "id-1"
    assert client.integrations == {}
    sentry._our_own.cache_clear()


def test_without_any_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from kafka_delivery_worker import sentry

    sentry._our_own.cache_clear()
    monkeypatch.delenv("SENTRY_DSN", raising=False)
    with pytest.raises(RuntimeError, match="set SENTRY_DSN"):
        sentry.report(LETTER)
