"""What becomes of a record is decided in one place: each kind of failure has one answer, whoever asks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from confluent_kafka import KafkaError

from kafka_delivery.disposition import BLAMED_AFTER, Asker, Circuit, Move, disposition, waits_for_circuit
from kafka_delivery.errors import (
    CircuitBreakerOpen,
    EnqueueError,
    InvalidRecordError,
    ProducerError,
    RejectedError,
    RetriableError,
    RetriesExhaustedError,
    UnavailableError,
)
from kafka_delivery_worker.classify import Scope, _table, delivery_error

FULL = RetriableError("too few replicas", "orders", "m", 19, "NOT_ENOUGH_REPLICAS", "topic")
FEW = RetriableError("no such topic", "orders", "m", 3, "UNKNOWN_TOPIC_OR_PART", "topic", 2)
RECORDS = RetriableError("another of the batch", "orders", "m", -138, "_INVALID_DIFFERENT_RECORD", "record")
HELD = UnavailableError("no broker", "orders", "m", -195, "_TRANSPORT", "cluster")
OPEN = CircuitBreakerOpen("the circuit is open", "orders", "m")
CLIENTS = ProducerError("queue full", "orders", "m", -184, "_QUEUE_FULL", "producer")
REJECTED = RejectedError("too large", "orders", "m", 10, "MSG_SIZE_TOO_LARGE", "record")
EXHAUSTED = RetriesExhaustedError("still so", "orders", "m", 19, "NOT_ENOUGH_REPLICAS", "topic")
INVALID = InvalidRecordError("topic", "is empty", "m")
BUG = ZeroDivisionError()
QUEUE = EnqueueError("m", "Redis is away")

EVERYTHING = (FULL, FEW, RECORDS, HELD, OPEN, CLIENTS, REJECTED, EXHAUSTED, INVALID, BUG, QUEUE)


def move(error: BaseException | None, **changes: Any) -> Move:
    given: dict[str, Any] = {"asker": Asker.SEND, "attempts": 0, "max_retries": 5, **changes}
    return disposition(error, **given)


def test_a_record_that_arrived_is_acknowledged() -> None:
    assert move(None, stopping=True, circuit=Circuit.CLUSTER, processes=9) is Move.ACKNOWLEDGE


class TestTheRecordsFault:
    @pytest.mark.parametrize("error", [REJECTED, EXHAUSTED])
    @pytest.mark.parametrize("circuit", Circuit)
    def test_a_verdict_of_kafkas_makes_a_dead_letter(self, error: Exception, circuit: Circuit) -> None:
        assert move(error, circuit=circuit, leased=True, stopping=True) is Move.DEAD_LETTER
        assert move(error, circuit=circuit, asker=Asker.MEMBER) is Move.DEAD_LETTER

    @pytest.mark.parametrize("error", [REJECTED, EXHAUSTED])
    def test_of_a_dead_letter_it_parks(self, error: Exception) -> None:
        assert move(error, asker=Asker.DEAD_LETTER) is Move.PARK

    @pytest.mark.parametrize("asker", Asker)
    def test_what_is_no_record_is_parked(self, asker: Asker) -> None:
        assert move(INVALID, asker=asker, stopping=True) is Move.PARK

    @pytest.mark.parametrize("asker", [Asker.SEND, Asker.MEMBER])
    @pytest.mark.parametrize(("error", "budget"), [(FULL, 5), (RECORDS, 5), (FEW, 2)])
    def test_attempts_are_as_many_as_the_error_is_worth(self, asker: Asker, error: Exception, budget: int) -> None:
        assert move(error, asker=asker, attempts=budget - 1) is Move.RETRY
        assert move(error, asker=asker, attempts=budget) is Move.DEAD_LETTER
        assert move(error, asker=Asker.DEAD_LETTER, attempts=budget) is Move.PARK

    @pytest.mark.parametrize("asker", [Asker.SEND, Asker.MEMBER])
    @pytest.mark.parametrize("error", [FULL, FEW])
    def test_attempts_are_never_more_than_the_settings_allow(self, asker: Asker, error: Exception) -> None:
        assert move(error, asker=asker, max_retries=0) is Move.DEAD_LETTER
        assert move(error, asker=asker, max_retries=1) is Move.RETRY


class TestTheTopicsOrTheClusters:
    @pytest.mark.parametrize("error", [FULL, HELD, OPEN])
    @pytest.mark.parametrize(
        ("circuit", "leased", "wanted"),
        [
            (Circuit.CLUSTER, True, Move.RETURN),
            (Circuit.TOPIC, True, Move.PUT_ASIDE),
            (Circuit.CLUSTER, False, Move.DEFER),
            (Circuit.TOPIC, False, Move.DEFER),
        ],
    )
    def test_no_attempt_is_used_while_its_circuit_is_open(
        self, error: Exception, circuit: Circuit, leased: bool, wanted: Move
    ) -> None:
        assert move(error, circuit=circuit, leased=leased, attempts=5) is wanted

    @pytest.mark.parametrize("leased", [False, True])
    def test_nobodys_record_uses_an_attempt_for_the_cluster(self, leased: bool) -> None:
        assert move(HELD, attempts=5, leased=leased) is Move.DEFER

    @pytest.mark.parametrize("error", [FEW, RECORDS])
    @pytest.mark.parametrize("circuit", Circuit)
    def test_an_open_circuit_excuses_nothing_else(self, error: Exception, circuit: Circuit) -> None:
        assert move(error, circuit=circuit, leased=True) is Move.RETRY
        assert move(error, circuit=circuit, leased=True, attempts=5) is Move.DEAD_LETTER

    @pytest.mark.parametrize("error", [FULL, FEW, HELD, OPEN])
    def test_a_worker_that_stops_gives_the_message_back(self, error: Exception) -> None:
        assert move(error, stopping=True) is Move.RETURN
        assert move(error, stopping=True, asker=Asker.DEAD_LETTER) is Move.RETURN

    def test_a_member_of_a_batch_cannot_go_back_by_itself(self) -> None:
        for error, circuit, stopping in itertools.product((FULL, FEW, HELD, OPEN, CLIENTS), Circuit, (False, True)):
            found = move(error, asker=Asker.MEMBER, circuit=circuit, stopping=stopping)
            assert found in (Move.RETRY, Move.DEFER), (error, circuit, stopping)


class TestThisProcesss:
    @pytest.mark.parametrize("error", [CLIENTS, BUG, QUEUE, MemoryError()])
    @pytest.mark.parametrize("asker", [Asker.SEND, Asker.DEAD_LETTER])
    def test_the_message_goes_back_and_the_process_pauses(self, error: BaseException, asker: Asker) -> None:
        assert move(error, asker=asker, attempts=5) is Move.RETURN_AND_PAUSE
        assert move(error, asker=asker, processes=BLAMED_AFTER - 1) is Move.RETURN_AND_PAUSE
        assert move(error, asker=asker, stopping=True) is Move.RETURN

    @pytest.mark.parametrize("asker", Asker)
    def test_a_message_is_blamed_once_several_processes_failed_at_it(self, asker: Asker) -> None:
        assert move(BUG, asker=asker, processes=BLAMED_AFTER) is Move.PARK

    def test_several_are_three(self) -> None:
        """As the docs say. One or two may share a broken host."""
        assert BLAMED_AFTER == 3

    def test_a_member_is_sent_again_by_itself(self) -> None:
        assert move(CLIENTS, asker=Asker.MEMBER) is Move.DEFER
        assert move(BUG, asker=Asker.MEMBER) is Move.RETURN_AND_PAUSE


def test_only_verdicts_and_shapes_and_used_up_attempts_cost_a_record_its_way() -> None:
    """Whatever surrounds a record, nothing parks it or makes a dead letter of it but what is its own."""
    for error, asker, circuit, leased, stopping in itertools.product(
        EVERYTHING, Asker, Circuit, (False, True), (False, True)
    ):
        found = move(error, asker=asker, circuit=circuit, leased=leased, stopping=stopping)
        own = isinstance(error, RejectedError | RetriesExhaustedError | InvalidRecordError)
        assert (found in (Move.PARK, Move.DEAD_LETTER)) is own, (error, asker, circuit)


def test_a_record_waits_for_a_circuit_exactly_if_its_failure_counts_for_one() -> None:
    for row in _table().values():
        error = delivery_error(KafkaError(row.code), "orders", "m")
        if row.scope in (Scope.RECORD, Scope.PRODUCER):
            assert not waits_for_circuit(error), row
        else:
            counts = row.scope is Scope.CLUSTER or row.of_topic
            assert waits_for_circuit(error) is counts, row
