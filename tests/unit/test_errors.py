"""The tree of errors is the one that is drawn, and an error means the same in every process that it reaches.

A delivery error is raised in a worker and read elsewhere: through prefork's pipe, in a result, by a callback.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery

import kafka_delivery
from kafka_delivery import errors
from kafka_delivery.errors import (
    BacklogFullError,
    BulkEnqueueError,
    CircuitBreakerOpen,
    DeliveryError,
    DeliveryTimeoutError,
    EnqueueError,
    InvalidRecordError,
    KafkaDeliveryError,
    NotInWorkerError,
    ParkingFullError,
    ProducerError,
    RejectedError,
    RetriableError,
    RetriesExhaustedError,
    SettingsError,
    UnavailableError,
)

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]

OUTCOMES = [RetriableError, UnavailableError, ProducerError, RejectedError, RetriesExhaustedError]
DETAILS = ("it was refused", "orders", "id-1", -188, "_UNKNOWN_TOPIC", "topic", 2)
DETAIL_NAMES = ("problem", "topic", "message_id", "code", "name", "scope", "max_retries")

EXAMPLES: list[KafkaDeliveryError] = [
    KafkaDeliveryError("any"),
    SettingsError("KAFKA_DELIVERY_X is not a setting"),
    InvalidRecordError("topic", "is no topic"),
    InvalidRecordError("value", "is \u00fcbel \U0001f600", "id-1"),
    NotInWorkerError("call .delay()"),
    EnqueueError("id-1", "TimeoutError: Timeout reading from socket"),
    BacklogFullError("id-1", "Redis holds 7 bytes"),
    BulkEnqueueError(["id-1"], ["id-2", "id-3"], [], "TimeoutError: slow"),
    ParkingFullError(1_000_000, 2.5),
    DeliveryError(*DETAILS),
    *(outcome(*DETAILS) for outcome in OUTCOMES),
    RetriableError("it was refused", "orders", "id-1"),
    CircuitBreakerOpen("the circuit is open", "orders", "id-1", 2.5),
    DeliveryTimeoutError("orders", "id-1", 2.5, "it waits: the circuit of the cluster is open", 12.0),
]


def test_the_tree_is_the_one_that_is_drawn() -> None:
    drawn: dict[str, str | None] = {}
    branch: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│├└─ ]*)([A-Z]\w+(?:Error|Open))(?:   *(\S.*))?$", line):
            depth = len(found[1]) // 4
            assert found[3] or depth == 0, f"{found[2]} has no words"
            branch[depth:] = [found[2]]
            drawn[found[2]] = branch[depth - 1] if depth else None

    parents = {cls: cls.__mro__[1] for cls in CLASSES}
    assert drawn == {
        cls.__name__: parent.__name__ if issubclass(parent, KafkaDeliveryError) else None
        for cls, parent in parents.items()
    }
    assert len(drawn) == 16


def test_all_of_them_are_exported() -> None:
    assert {cls.__name__ for cls in CLASSES} == {
        name for name in kafka_delivery.__all__ if name.endswith(("Error", "Open"))
    }


@pytest.mark.parametrize("cls", CLASSES)
def test_each_says_when_it_is_raised(cls: type[KafkaDeliveryError]) -> None:
    assert re.match(r"Raised (when|for|in) ", cls.__doc__ or "")


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        (SettingsError, ValueError),
        (InvalidRecordError, ValueError),
        (NotInWorkerError, RuntimeError),
    ],
)
def test_misuse_is_also_what_python_calls_it(cls: type[Exception], kind: type[Exception]) -> None:
    assert issubclass(cls, kind)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SettingsError("set it"), "set it"),
        (NotInWorkerError("call .delay()"), "call .delay()"),
        (InvalidRecordError("key", "must be str", "id-1"), "key: must be str"),
        (
            EnqueueError("id-1", "TimeoutError: slow"),
            (
                "could not confirm that message id-1 was queued (TimeoutError: slow); "
                "send it again with message_id='id-1': repeating is safe"
            ),
        ),
        (
            BulkEnqueueError(["1"], ["2", "3"], ["4", "5", "6"], "slow"),
            (
                "1 records are queued, of 2 it is unknown (slow), 3 were not tried; "
                "send the last two again with their message ids: repeating is safe"
            ),
        ),
        (RejectedError(*DETAILS), "it was refused [_UNKNOWN_TOPIC] (topic orders, message id-1)"),
        (UnavailableError("nobody answers", "orders", "id-1"), "nobody answers (topic orders, message id-1)"),
    ],
)
def test_reads_as_a_sentence(error: KafkaDeliveryError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize("cls", [DeliveryError, *OUTCOMES])
def test_an_outcome_says_what_it_knows(cls: type[DeliveryError]) -> None:
    error = cls(*DETAILS)
    assert tuple(getattr(error, name) for name in DETAIL_NAMES) == DETAILS
    bare = cls("it was refused", "orders", "id-1")
    assert (bare.code, bare.name, bare.scope, bare.max_retries) == (None, None, "record", None)


def test_an_error_of_a_call_says_what_it_knows() -> None:
    invalid, unknown = InvalidRecordError("key", "must be str", "id-1"), EnqueueError("id-1", "slow")
    assert (invalid.field, invalid.problem, invalid.message_id) == ("key", "must be str", "id-1")
    assert InvalidRecordError("key", "must be str").message_id is None
    assert (unknown.message_id, unknown.reason) == ("id-1", "slow")
    bulk = BulkEnqueueError(["1"], ["2", "3"], ["4"], "slow")
    assert (bulk.accepted, bulk.unknown, bulk.unsent, bulk.reason) == (["1"], ["2", "3"], ["4"], "slow")


def _through_a_result(error: KafkaDeliveryError) -> Any:
    """As another process gets it from Celery's result backend: JSON in between."""
    backend = Celery("other", set_as_current=False, backend="cache+memory://", result_serializer="json").backend
    stored = backend.encode({"result": backend.prepare_exception(error)})
    json.loads(stored)
    return backend.exception_to_python(backend.decode(stored)["result"])


@pytest.mark.parametrize(
    "through",
    [
        *(lambda e, p=protocol: pickle.loads(pickle.dumps(e, p)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
        copy.copy,
        copy.deepcopy,
        _through_a_result,
    ],
)
@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_comes_back_from_another_process_as_it_left(
    error: KafkaDeliveryError, through: Callable[[KafkaDeliveryError], KafkaDeliveryError]
) -> None:
    returned = through(error)
    assert type(returned) is type(error)
    assert returned.args == error.args
    assert vars(returned) == vars(error)
    assert str(returned) == str(error)


def test_a_cause_that_cannot_travel_does_not_keep_the_error_back() -> None:
    error = RejectedError(*DETAILS)
    error.__cause__ = RuntimeError(lambda: None)
    assert str(pickle.loads(pickle.dumps(error))) == str(_through_a_result(error)) == str(error)


def test_this_module_imports_nothing_of_ours() -> None:
    assert not re.search(r"^\s*(from \.|import kafka_delivery|from kafka_delivery)", inspect.getsource(errors), re.M)
