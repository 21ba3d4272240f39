"""Attempts count while the circuit of what failed is closed; a record that has none left is not lost over it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import Retry

from kafka_delivery import Record, base, send
from kafka_delivery.disposition import Circuit, Move
from kafka_delivery.errors import RetriableError

TOPICS = RetriableError("too few replicas", "orders", "m", 19, "NOT_ENOUGH_REPLICAS", "topic")
RARE = RetriableError("no such topic", "orders", "m", 3, "UNKNOWN_TOPIC_OR_PART", "topic", 2)


class Worker:
    """What `DeliveryTask` asks its engine, and what it told it."""

    def __init__(self) -> None:
        self.shut = False
        self.told: list[str] = []
        self.stopping = False
        self.breaker = SimpleNamespace(
            circuit=lambda topic: Circuit.CLUSTER if self.shut else Circuit.CLOSED, retry_after=lambda topic: 1.0
        )

    def sent_again(self, outcome: str, error: Any, retries: int) -> None:
        self.told.append(outcome)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker in whose hands a send is that has no attempt left."""
    made = Worker()
    monkeypatch.setattr(base, "engine", lambda: made)
    monkeypatch.setattr(type(send), "defer", lambda self, wire, exc: Retry(exc=exc))
    send._get_app()  # binds the task
    wire = Record("orders", "x", message_id="m").to_wire("default")
    task: Any = send  # has methods of Celery's that no caller needs, and that its type does not name
    task.push_request(id="m", retries=send.max_retries, args=[wire], kwargs={}, called_directly=False)
    yield made
    task.pop_request()


def test_the_last_attempt_is_not_the_last_one_while_the_circuit_is_open(worker: Worker) -> None:
    assert send.move(TOPICS) is Move.DEAD_LETTER
    worker.shut = True
    assert send.move(TOPICS) is Move.DEFER
    assert send.move(RARE) is Move.DEAD_LETTER


def test_a_circuit_that_closes_in_between_costs_no_record(worker: Worker) -> None:
    """Celery's own retry would raise the error, and the message would be acknowledged."""
    worker.shut = True
    assert send.move(TOPICS) is Move.DEFER
    worker.shut = False
    with pytest.raises(Retry):
        send.retry(exc=TOPICS)
    assert worker.told == ["deferred"]
