"""What is confirmed stays so when counting, logging or the application's own function fails: only the telling is lost.

Otherwise the task would fail, and a record that is in its topic would be parked besides, or sent again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kafka_delivery import Record, settings
from kafka_delivery.dead_letters import reason
from kafka_delivery.errors import RejectedError, RetriableError
from kafka_delivery_worker import breaker
from kafka_delivery_worker.counts import Counts
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.engine import Engine
from kafka_delivery_worker.hook import Hook
from kafka_delivery_worker.parked_items import Call, Reason, of_call
from stack import Stack, stack
from watching import emptied

TOPIC = "told"
WHY = reason("RejectedError", 10, "too large", 3)
ERROR = RejectedError("too large", TOPIC, "id-1", 10, "MSG_SIZE_TOO_LARGE")
AGAIN = RetriableError("later", TOPIC, "id-1", 7, "REQUEST_TIMED_OUT")


@pytest.fixture(scope="module")
def system(redis_url: str) -> Iterator[Stack]:
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, ON_DEAD_LETTER="builtins:repr") as system:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield system


@pytest.fixture(scope="module")
def engine(system: Stack) -> Iterator[Engine]:
    made = Engine(settings.current())
    yield made
    made.close()
    breaker.current().stop()


def no_thread(*_: object, **__: object) -> None:
    raise RuntimeError("can't start new thread")


def failing_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("kafka_delivery.engine")
    monkeypatch.setattr(log, "filters", [no_thread])  # a filter that raises reaches the caller; a handler does not


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "counting": lambda patch: patch.setattr(Counts, "add", no_thread),
    "logging": failing_log,
    "the application's function": lambda patch: patch.setattr(Hook, "tell", no_thread),
}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> str:
    FAULTS[request.param](monkeypatch)
    return str(request.param)


def test_a_dead_letter_that_is_written(system: Stack, engine: Engine, fault: str) -> None:
    record = Record(TOPIC, "v", message_id=f"letter-{fault}")
    assert engine.deliver_dead_letter(record, WHY)["topic"] == f"{TOPIC}-dlq"
    assert system.ids(f"{TOPIC}-dlq").count(record.id) == 1


def test_a_record_that_is_delivered(system: Stack, engine: Engine, fault: str) -> None:
    record = Record(TOPIC, "v", message_id=f"record-{fault}")
    assert engine.deliver(record)["topic"] == TOPIC
    assert system.ids(TOPIC).count(record.id) == 1


@pytest.mark.usefixtures("fault")
def test_what_is_parked_or_queued_again(system: Stack, engine: Engine) -> None:
    record = Record(TOPIC, "v", message_id="parked")
    assert engine.park(record, WHY, ERROR).startswith("parked")
    engine.park_message(of_call(Call(task="t", id="call"), Reason(kind="bug", error_class="E", error_message="m")))
    engine.sent_again("retried", AGAIN, 1)
    assert {"parked", "call"} <= {item.id for item in system.parked()}


def test_the_others_are_told_all_the_same_and_the_log_says_what_was_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(Counts, "add", no_thread)
    monkeypatch.setattr(Hook, "tell", lambda self, letter: told.append(letter.message_id))
    engine.deliver_dead_letter(Record(TOPIC, "v", message_id="told"), WHY)
    assert told == ["told"]
    assert "record.not_told message_id=told error=RuntimeError" in caplog.text
    assert "record.dead_lettered" in caplog.text
