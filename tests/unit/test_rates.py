"""Rates of the last seconds, as `kafka-delivery status --watch` shows them."""

from __future__ import annotations

import pytest

from kafka_delivery_worker.cli.watch import OVER_S, Rates


class TestRates:
    def test_are_of_the_last_seconds(self) -> None:
        rates = Rates()
        for second in range(30):
            rates.add(100.0 + second, {"orders": {"delivered": second * 50 if second < 20 else 1_000}})
        assert rates.by_topic() == {"orders": {"delivered": pytest.approx(50 * (20 - 19) / OVER_S)}}

    def test_are_none_before_there_are_two(self) -> None:
        rates = Rates()
        rates.add(1.0, {"orders": {"delivered": 5}})
        assert rates.by_topic() == {}

    def test_of_counters_that_went_back_are_none(self) -> None:
        rates = Rates()
        rates.add(1.0, {"orders": {"delivered": 5}})
        rates.add(2.0, {"orders": {"delivered": 0}, "bills": {"delivered": 7}})
        assert rates.by_topic() == {"bills": {"delivered": 7.0}, "orders": {"delivered": 0.0}}
