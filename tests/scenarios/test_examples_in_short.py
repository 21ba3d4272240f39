"""One order to one of the example's shops, on the embedded servers; all of them on real ones: `test_examples.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kafka_delivery_worker.embedded import MockKafka, Valkey
from scenarios.test_examples import FASTAPI, Open


@pytest.fixture
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    with MockKafka() as kafka, Valkey() as redis:
        for name in ("orders", "orders-dlq"):
            kafka.create_topic(name)
        with Open(FASTAPI, kafka, redis, tmp_path_factory.mktemp("shop"), ENQUEUE_TIMEOUT_S="10") as opened:
            yield opened


@pytest.mark.smoke
def test_an_order_is_in_kafka_under_the_id_of_the_response(shop: Open) -> None:
    identifier = shop.ordered(quantity=3)
    shop.wait_for({identifier})
    assert b'"quantity":3' in (shop.sent()[identifier] or b"")
