"""How an error is found by its name, and what is assumed of one that nobody knows."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError

from kafka_delivery_worker.classify import FEW_RETRIES, Kind, Retry, Scope, code_of, delivery_error, verdict


@pytest.mark.parametrize(("name", "code"), [("MSG_SIZE_TOO_LARGE", 10), ("_TRANSPORT", -195), ("NO_SUCH_NAME", None)])
def test_an_error_is_found_by_its_name(name: str, code: int | None) -> None:
    assert code_of(name) == code


def test_one_that_nobody_knows_gets_few_retries_and_may_be_a_duplicate() -> None:
    found = verdict(9_999)
    assert (found.code, found.name, found.kind, found.scope, found.retry, found.duplicate) == (
        9_999, "CODE_9999", Kind.RETRIABLE, Scope.RECORD, Retry.FEW, True,
    )  # fmt: skip


@pytest.mark.parametrize(("code", "max_retries"), [(3, FEW_RETRIES), (19, None), (10, None)])
def test_few_retries_are_two(code: int, max_retries: int | None) -> None:
    assert FEW_RETRIES == 2
    assert delivery_error(KafkaError(code), "orders", "m").max_retries == max_retries
