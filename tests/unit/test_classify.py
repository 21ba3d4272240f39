"""Every Kafka error has one verdict, and no verdict sends a record to the wrong place.

The table decides who is to blame, and with it whether a record waits, is tried again or becomes a dead letter. An
outage that counted as the record's fault would empty the queue into dead-letter topics; a bad record that counted as
an outage would circle for ever.
"""

from __future__ import annotations

import copy
import csv
import pickle
from collections.abc import Callable
from importlib.resources import files

import pytest
from confluent_kafka import KafkaError, KafkaException

from kafka_delivery.errors import DeliveryError, ProducerError, RejectedError, RetriableError, UnavailableError
from kafka_delivery_worker.classify import (
    FEW_RETRIES,
    UNKNOWN_CODE,
    Kind,
    Retry,
    Scope,
    Verdict,
    delivery_error,
    verdict,
)

ROWS = list(
    csv.DictReader(files("kafka_delivery_worker").joinpath("errors.csv").read_text(encoding="utf-8").splitlines())
)
CODES = [int(row["code"]) for row in ROWS]
VERDICTS = [verdict(code) for code in CODES]

# What the installed client can report.
CLIENT_CODES = {
    name: value
    for name in dir(KafkaError)
    if isinstance(value := getattr(KafkaError, name), int) and value != KafkaError.NO_ERROR
}

UNUSED_CODE = 32_000


def build(code: int, cause: KafkaError | None = None) -> DeliveryError:
    return delivery_error(KafkaError(code), "orders", "id-1", cause)


class TestTable:
    @pytest.mark.parametrize(("name", "code"), CLIENT_CODES.items())
    def test_knows_each_code_of_the_client_by_its_name(self, name: str, code: int) -> None:
        found = verdict(code)

        assert code in CODES
        assert (found.code, found.name) == (code, name)

    def test_lists_each_code_once_and_in_order(self) -> None:
        assert sorted(set(CODES)) == CODES

    def test_leaves_out_success(self) -> None:
        assert KafkaError.NO_ERROR not in CODES

    def test_has_exactly_the_documented_columns(self) -> None:
        assert list(ROWS[0]) == ["code", "name", "kind", "scope", "retry", "duplicate", "reason"]
        assert not [row for row in ROWS if None in row or None in row.values()]

    def test_is_read_once(self) -> None:
        assert verdict(KafkaError._TRANSPORT) is verdict(KafkaError._TRANSPORT)

    def test_arrives_unchanged_in_the_verdicts(self) -> None:
        assert [
            [str(found.code), found.name, found.kind, found.scope, found.retry, found.duplicate, found.reason]
            for found in VERDICTS
        ] == [
            [
                row["code"],
                row["name"],
                row["kind"],
                row["scope"],
                row["retry"],
                row["duplicate"] == "yes",
                row["reason"],
            ]
            for row in ROWS
        ]

    def test_gives_reasons_that_read_well_inside_a_longer_sentence(self) -> None:
        reasons = [found.reason for found in [*VERDICTS, UNKNOWN_CODE]]

        assert [text for text in reasons if not 0 < len(text) <= 140] == []
        assert [text for text in reasons if text != " ".join(text.split()) or text.endswith((".", ";"))] == []


RULES: dict[str, Callable[[Verdict], bool]] = {
    "an unavailable cluster is cluster scope": lambda v: (v.kind is Kind.UNAVAILABLE) == (v.scope is Scope.CLUSTER),
    "cluster scope holds, and nothing else does": lambda v: (v.scope is Scope.CLUSTER) == (v.retry is Retry.HOLD),
    "a fatal error is the producer's": lambda v: v.kind is not Kind.FATAL or v.scope is Scope.PRODUCER,
    "the producer's fault is resent, and nothing else is": lambda v: (
        (v.scope is Scope.PRODUCER) == (v.retry is Retry.RESEND)
    ),
    "a rejection gets no budget, and all else does not skip it": lambda v: (
        (v.kind is Kind.REJECTED) == (v.retry in (Retry.ALONE, Retry.NONE))
    ),
    "a budget is for what may pass": lambda v: v.retry not in (Retry.FULL, Retry.FEW) or v.kind is Kind.RETRIABLE,
    "only one record is resent alone": lambda v: v.retry is not Retry.ALONE or v.scope is Scope.RECORD,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_every_row_obeys(rule: Callable[[Verdict], bool]) -> None:
    assert [found.name for found in [*VERDICTS, UNKNOWN_CODE] if not rule(found)] == []


def test_no_fault_of_the_cluster_or_the_producer_can_end_in_a_dead_letter() -> None:
    shared = [found for found in VERDICTS if found.scope in (Scope.CLUSTER, Scope.PRODUCER)]
    dead_letters = (RejectedError, RetriableError)

    assert shared
    assert [found.name for found in shared if isinstance(build(found.code), dead_letters)] == []


@pytest.mark.parametrize(
    ("name", "kind", "scope", "retry"),
    [
        # Brokers, network or login: everybody waits.
        ("_TRANSPORT", "unavailable", "cluster", "hold"),
        ("_ALL_BROKERS_DOWN", "unavailable", "cluster", "hold"),
        ("_MSG_TIMED_OUT", "unavailable", "cluster", "hold"),
        ("_BAD_MSG", "unavailable", "cluster", "hold"),
        ("_AUTHENTICATION", "unavailable", "cluster", "hold"),
        ("_UNSUPPORTED_FEATURE", "unavailable", "cluster", "hold"),
        ("REQUEST_TIMED_OUT", "unavailable", "cluster", "hold"),
        ("NETWORK_EXCEPTION", "unavailable", "cluster", "hold"),
        ("CLUSTER_AUTHORIZATION_FAILED", "unavailable", "cluster", "hold"),
        ("THROTTLING_QUOTA_EXCEEDED", "unavailable", "cluster", "hold"),
        ("NOT_CONTROLLER", "unavailable", "cluster", "hold"),
        # Said by a broker, but the record may be what it chokes on: holding would hide a poison record for ever.
        ("UNKNOWN", "retriable", "record", "few"),
        ("OPERATION_NOT_ATTEMPTED", "retriable", "record", "few"),
        ("UNSUPPORTED_VERSION", "retriable", "record", "few"),
        ("INVALID_REQUEST", "retriable", "record", "few"),
        # A partition in trouble passes; a topic that is missing or closed to us is given a little time.
        ("NOT_LEADER_FOR_PARTITION", "retriable", "topic", "full"),
        ("NOT_ENOUGH_REPLICAS", "retriable", "topic", "full"),
        ("KAFKA_STORAGE_ERROR", "retriable", "topic", "full"),
        ("UNKNOWN_TOPIC_OR_PART", "retriable", "topic", "few"),
        ("_UNKNOWN_TOPIC", "retriable", "topic", "few"),
        ("TOPIC_AUTHORIZATION_FAILED", "retriable", "topic", "few"),
        ("TOPIC_ALREADY_EXISTS", "retriable", "topic", "few"),
        ("_UNKNOWN_PARTITION", "retriable", "record", "few"),
        ("DUPLICATE_SEQUENCE_NUMBER", "retriable", "record", "few"),
        # A batch fails as a whole: its innocent records are resent, its suspects once more by themselves.
        ("_INVALID_DIFFERENT_RECORD", "retriable", "record", "full"),
        ("MSG_SIZE_TOO_LARGE", "rejected", "record", "alone"),
        ("RECORD_LIST_TOO_LARGE", "rejected", "record", "alone"),
        ("INVALID_RECORD", "rejected", "record", "alone"),
        ("INVALID_TIMESTAMP", "rejected", "record", "alone"),
        # Final.
        ("TOPIC_EXCEPTION", "rejected", "topic", "none"),
        ("POLICY_VIOLATION", "rejected", "topic", "none"),
        ("_VALUE_SERIALIZATION", "rejected", "record", "none"),
        ("_INVALID_ARG", "rejected", "record", "none"),
        # This process's client: the record is innocent.
        ("_QUEUE_FULL", "retriable", "producer", "resend"),
        ("_PURGE_QUEUE", "retriable", "producer", "resend"),
        ("_PURGE_INFLIGHT", "retriable", "producer", "resend"),
        ("INVALID_PRODUCER_EPOCH", "retriable", "producer", "resend"),
        ("_FATAL", "fatal", "producer", "resend"),
        ("_FENCED", "fatal", "producer", "resend"),
        ("OUT_OF_ORDER_SEQUENCE_NUMBER", "fatal", "producer", "resend"),
        ("INVALID_TRANSACTION_TIMEOUT", "fatal", "producer", "resend"),
        # A producer never sees it; if it does, it is treated like a code that nobody knows.
        ("OFFSET_OUT_OF_RANGE", "retriable", "record", "few"),
    ],
)
def test_policy_of(name: str, kind: str, scope: str, retry: str) -> None:
    found = verdict(CLIENT_CODES[name])

    assert (found.kind, found.scope, found.retry) == (kind, scope, retry)


def test_names_every_code_after_which_the_record_may_be_in_the_topic_already() -> None:
    assert {found.name for found in VERDICTS if found.duplicate} == {
        "_BAD_MSG",
        "_DESTROY",
        "_FAIL",
        "_TRANSPORT",
        "_MSG_TIMED_OUT",
        "_TIMED_OUT",
        "_SSL",
        "_PURGE_INFLIGHT",
        "_INCONSISTENT",
        "UNKNOWN",
        "REQUEST_TIMED_OUT",
        "NETWORK_EXCEPTION",
        "NOT_ENOUGH_REPLICAS_AFTER_APPEND",
        "OUT_OF_ORDER_SEQUENCE_NUMBER",
        "DUPLICATE_SEQUENCE_NUMBER",
    }


class TestVerdict:
    def test_of_an_unknown_code_is_the_declared_default_under_its_own_number(self) -> None:
        found = verdict(UNUSED_CODE)

        assert (found.code, found.name) == (UNUSED_CODE, f"CODE_{UNUSED_CODE}")
        assert (found.kind, found.scope, found.retry) == (Kind.RETRIABLE, Scope.RECORD, Retry.FEW)
        assert found.duplicate is True
        assert found.reason == UNKNOWN_CODE.reason

    def test_of_no_error_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no error"):
            verdict(KafkaError.NO_ERROR)

    def test_cannot_be_changed(self) -> None:
        with pytest.raises(AttributeError):
            verdict(KafkaError._TRANSPORT).retry = Retry.NONE  # type: ignore[misc]


class TestDeliveryError:
    @pytest.mark.parametrize(
        ("code", "retry", "expected", "max_retries"),
        [
            (KafkaError.NOT_ENOUGH_REPLICAS, Retry.FULL, RetriableError, None),
            (KafkaError.UNKNOWN_TOPIC_OR_PART, Retry.FEW, RetriableError, FEW_RETRIES),
            (KafkaError.MSG_SIZE_TOO_LARGE, Retry.ALONE, RejectedError, None),
            (KafkaError.TOPIC_EXCEPTION, Retry.NONE, RejectedError, None),
            (KafkaError._TRANSPORT, Retry.HOLD, UnavailableError, None),
            (KafkaError._PURGE_QUEUE, Retry.RESEND, ProducerError, None),
            (KafkaError._FATAL, Retry.RESEND, ProducerError, None),
            (UNUSED_CODE, Retry.FEW, RetriableError, FEW_RETRIES),
        ],
    )
    def test_class_follows_the_retry_of_the_verdict(
        self, code: int, retry: Retry, expected: type[DeliveryError], max_retries: int | None
    ) -> None:
        error = build(code)

        assert verdict(code).retry is retry
        assert type(error) is expected
        assert error.max_retries == max_retries

    def test_few_retries_are_two(self) -> None:
        assert FEW_RETRIES == 2

    @pytest.mark.parametrize("code", [KafkaError.POLICY_VIOLATION, KafkaError._QUEUE_FULL, UNUSED_CODE])
    def test_carries_the_verdict_and_the_record(self, code: int) -> None:
        error, found = build(code), verdict(code)

        assert (error.problem, error.code, error.name, error.scope) == (found.reason, code, found.name, found.scope)
        assert (error.topic, error.message_id) == ("orders", "id-1")

    def test_keeps_kafkas_error_as_its_cause_and_out_of_its_text(self) -> None:
        error = delivery_error(KafkaError(KafkaError._TRANSPORT, "kafka-7.internal:9092/7: refused"), "orders", "id-1")

        assert isinstance(error.__cause__, KafkaException)
        assert error.__cause__.args[0].code() == KafkaError._TRANSPORT
        assert error.__cause__.args[0].str() == "kafka-7.internal:9092/7: refused"
        assert "kafka-7" not in str(error)

    @pytest.mark.parametrize(
        ("cause", "name"), [(KafkaError._RESOLVE, "_RESOLVE"), (KafkaError.TOPIC_AUTHORIZATION_FAILED, "TOPIC_")]
    )
    def test_names_the_last_broker_error_which_decides_nothing(self, cause: int, name: str) -> None:
        error = build(KafkaError._MSG_TIMED_OUT, KafkaError(cause, "kafka-7.internal: no such host"))

        assert error.problem.startswith(f"{verdict(KafkaError._MSG_TIMED_OUT).reason}; last broker error: {name}")
        assert "kafka-7" not in error.problem
        assert (type(error), error.code, error.scope) == (UnavailableError, KafkaError._MSG_TIMED_OUT, "cluster")

    def test_stands_a_cause_that_nobody_knows(self) -> None:
        assert str(UNUSED_CODE) in build(KafkaError._MSG_TIMED_OUT, KafkaError(UNUSED_CODE)).problem

    def test_of_no_error_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no error"):
            build(KafkaError.NO_ERROR)

    @pytest.mark.parametrize("code", [KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._FATAL, KafkaError._MSG_TIMED_OUT])
    @pytest.mark.parametrize("through", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy])
    def test_comes_back_from_another_process_as_it_left(
        self, through: Callable[[DeliveryError], DeliveryError], code: int
    ) -> None:
        error = build(code, KafkaError(KafkaError._RESOLVE))
        returned = through(error)

        assert type(returned) is type(error)
        assert returned.args == error.args
        assert str(returned) == str(error)
        assert returned.max_retries == error.max_retries

    def test_holds_nothing_but_plain_values(self) -> None:
        error = build(KafkaError.UNKNOWN_TOPIC_OR_PART)

        assert [type(value) for value in error.args] == [str, str, str, int, str, str, int]
