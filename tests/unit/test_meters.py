"""What a worker counts for its metrics is exact, bounded, and says nothing that it does not know."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError
from prometheus_client import CollectorRegistry, generate_latest

from kafka_delivery.record import Record, made_at_ms, member_id, uuid7
from kafka_delivery.settings import Settings
from kafka_delivery_worker.breaker.rules import Rules
from kafka_delivery_worker.metrics.meters import BUCKETS_S, OTHER, EndToEnd, Meters, Statistics, Topics
from kafka_delivery_worker.metrics.worker import WorkerCollector
from kafka_delivery_worker.standstill import Standstill
from scraping import Scraped

NOW = 1767323045.678
"""When every record here is in its log (Unix seconds)."""


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kafka_delivery_worker.metrics.meters.time", lambda: NOW)


def uuid_of(age_s: float) -> str:
    """A UUIDv7 that was made so long before."""
    milliseconds = f"{int((NOW - age_s) * 1000):012x}"
    return f"{milliseconds[:8]}-{milliseconds[8:]}-7{uuid7()[15:]}"


class TestWhenAnIdWasMade:
    def test_ours_say_so(self) -> None:
        before = time.time_ns() // 1_000_000
        ours = (Record("orders", "v", timestamp=1).id, uuid7(), member_id(uuid7(), 7))
        assert all(before <= (made_at_ms(one) or 0) <= time.time_ns() // 1_000_000 for one in ours)

    @pytest.mark.parametrize(
        "own",
        ["", "order-42", "2c5ea4c0-4067-4fe9-8bad-9b1deb4d3b7d", "zzzzzzzz-zzzz-7zzz-8bad-9b1deb4d3b7d", "7" * 37],
    )
    def test_others_do_not(self, own: str) -> None:
        assert made_at_ms(own) is None


class TestTopics:
    def test_the_first_keep_their_names(self) -> None:
        topics = Topics(2)
        assert [topics.label(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", OTHER, "a", OTHER]

    def test_what_has_no_topic_is_none_of_them(self) -> None:
        topics = Topics(1)
        assert [topics.label(name) for name in ("", "a", "", "b")] == ["", "a", "", OTHER]


class TestEndToEnd:
    def test_each_record_is_in_the_bucket_of_its_age(self) -> None:
        spread = EndToEnd()
        for age_s in (0.3, 45.0, 86_400.0):
            spread.arrived(uuid_of(age_s))
        counts, seconds = spread.read()
        ends = [*BUCKETS_S, float("inf")]
        assert {ends[place]: count for place, count in enumerate(counts) if count} == {0.5: 1, 60.0: 1, ends[-1]: 1}
        assert seconds == pytest.approx(86_445.3, abs=0.01)

    def test_a_clock_that_is_ahead_takes_nothing_away(self) -> None:
        spread = EndToEnd()
        spread.arrived(uuid_of(-60))
        counts, seconds = spread.read()
        assert (counts[0], seconds) == (1, 0)

    def test_an_id_that_says_nothing_is_not_counted(self) -> None:
        spread = EndToEnd()
        for own in ("order-42", "00000000-0000-7000-8000-000000000000"):
            spread.arrived(own)
        assert spread.read() == ([0] * (len(BUCKETS_S) + 1), 0)


def statistics(client: str = "one", **of_broker: Any) -> str:
    """As librdkafka tells them, with what is read of them."""
    empty = {"cnt": 0, "sum": 0, "p99": 0}
    broker = {
        "nodeid": 1, "state": "UP", "txretries": 0, "req_timeouts": 0, "disconnects": 0,
        "rtt": empty, "int_latency": empty, "throttle": empty,
    }  # fmt: skip
    return json.dumps(
        {
            "name": client,
            "msg_cnt": 25,
            "msg_max": 100,
            "msg_size": 10,
            "msg_size_max": 1000,
            "brokers": {"seed": broker | {"nodeid": -1, "txretries": 1000}, "one": broker | of_broker},
        }
    )


class TestStatistics:
    def test_totals_are_taken_as_they_are_and_windows_added_up(self) -> None:
        told = Statistics()
        told.take(statistics(txretries=3, rtt={"cnt": 2, "sum": 500, "p99": 400}))
        told.take(statistics(txretries=4, rtt={"cnt": 1, "sum": 100, "p99": 100}))
        totals, slowest = told.read()
        assert (totals["txretries", "1"], totals["rtt.cnt", "1"], totals["rtt.sum", "1"]) == (4, 3, 600)
        assert slowest == {"1": 100}
        assert told.buffer_used == 0.25
        assert {broker for _, broker in totals} == {"1"}, "an address to begin with is no broker"

    def test_a_client_that_was_replaced_stays_counted(self) -> None:
        told = Statistics()
        told.take(statistics(txretries=3))
        told.take(statistics("two", txretries=5))
        assert told.read()[0]["txretries", "1"] == 8

    def test_a_broker_that_was_forgotten_stays_counted_and_was_a_disconnect(self) -> None:
        told = Statistics()
        told.take(statistics(txretries=3, disconnects=2))
        for _ in range(2):
            told.take(statistics(nodeid=-1))
        told.take(statistics(state="CONNECT"))
        told.take(statistics(txretries=1))
        totals, _ = told.read()
        assert (totals["txretries", "1"], totals["disconnects", "1"]) == (4, 3)

    def test_a_quiet_broker_keeps_its_last_answer(self) -> None:
        told = Statistics()
        told.take(statistics(rtt={"cnt": 1, "sum": 100, "p99": 100}))
        told.take(statistics())
        assert told.read()[1] == {"1": 100}

    def test_a_buffer_without_limits_is_never_full(self) -> None:
        told = Statistics()
        told.take(statistics().replace("1000,", "0,").replace("100,", "0,"))
        assert told.buffer_used == 0

    def test_what_cannot_be_read_is_said_and_breaks_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        Statistics().take("{}")
        assert "metrics.statistics_not_read" in caplog.text


class TestMeters:
    def test_topics_beyond_the_bound_are_counted_together(self) -> None:
        meters = Meters(Settings(metrics_topics=1))
        meters.counted({"delivered:a": 2, "delivered:b": 3, "retried:c": 1, "parked:": 1})
        meters.counted({"delivered:c": 4})
        meters.failed("b", KafkaError._MSG_TIMED_OUT)
        meters.failed("c", KafkaError._MSG_TIMED_OUT)
        records, errors = meters.read()
        assert records == {
            ("delivered", "a"): 2,
            ("delivered", OTHER): 7,
            ("retried", OTHER): 1,
            ("parked", ""): 1,
        }
        assert errors == {("_MSG_TIMED_OUT", OTHER): 2}

    def test_what_a_stopping_worker_gives_back_is_no_error(self) -> None:
        meters = Meters(Settings())
        meters.failed("a", KafkaError._PURGE_QUEUE)
        meters.failed("a", KafkaError._PURGE_INFLIGHT)
        assert meters.read()[1] == {}


class TestWorkerCollector:
    """Each number of the process is told under its own name."""

    @pytest.fixture
    def told(self) -> Scraped:
        meters = Meters(Settings())
        meters.counted({"delivered:orders": 5, "parked:": 1})
        meters.failed("orders", KafkaError._MSG_TIMED_OUT)
        meters.end_to_end.arrived(uuid_of(0.3))
        meters.end_to_end.arrived(uuid_of(7))
        window = {"cnt": 2, "sum": 500, "p99": 400}
        meters.statistics.take(
            statistics(
                txretries=11, req_timeouts=12, disconnects=13, rtt=window,
                int_latency={"cnt": 4, "sum": 700, "p99": 1}, throttle={"cnt": 1, "sum": 1500, "p99": 1},
            )
        )  # fmt: skip
        meters.statistics_alone.take(statistics("alone", txretries=100, rtt={"cnt": 1, "sum": 100, "p99": 900}))
        producers = [
            SimpleNamespace(waited_s=1.5, in_flight=21, bytes_in_flight=22, replaced=2),
            SimpleNamespace(waited_s=0.5, in_flight=1, bytes_in_flight=2, replaced=1),
        ]
        standstill = Standstill()
        standstill.client("main", "no key")
        breaker = SimpleNamespace(
            standstill=standstill,
            paused=True,
            view_age_s=31.0,
            probed=Counter(ok=3, fail=2, ignore=1),
            rules=Rules.of(Settings()),
        )
        engine: Any = SimpleNamespace(producers=producers, breaker=breaker)
        registry = CollectorRegistry()
        registry.register(WorkerCollector(engine, meters))
        return Scraped(generate_latest(registry).decode())

    @pytest.mark.parametrize(
        ("name", "labels", "value"),
        [
            ("records_total", {"outcome": "delivered", "topic": "orders"}, 5),
            ("records_total", {"outcome": "parked", "topic": ""}, 1),
            ("record_errors_total", {"error": "_MSG_TIMED_OUT", "topic": "orders"}, 1),
            ("end_to_end_seconds_count", {}, 2),
            ("end_to_end_seconds_bucket", {"le": "0.5"}, 1),
            ("end_to_end_seconds_bucket", {"le": "10.0"}, 2),
            ("end_to_end_seconds_bucket", {"le": "+Inf"}, 2),
            ("record_retries_total", {"broker": "1"}, 111),
            ("request_timeouts_total", {"broker": "1"}, 12),
            ("broker_disconnects_total", {"broker": "1"}, 13),
            ("throttle_seconds_total", {"broker": "1"}, 1.5),
            ("request_latency_seconds_count", {"broker": "1"}, 3),
            ("request_latency_seconds_sum", {"broker": "1"}, 0.0006),
            ("request_latency_seconds", {"broker": "1", "quantile": "0.99"}, 0.0004),
            ("record_queue_seconds_count", {"broker": "1"}, 4),
            ("record_queue_seconds_sum", {"broker": "1"}, 0.0007),
            ("bufferpool_used_ratio", {}, 0.25),
            ("bufferpool_wait_seconds_total", {}, 2.0),
            ("in_flight_records", {}, 22),
            ("in_flight_bytes", {}, 24),
            ("producer_rebuilds_total", {}, 3),
            ("breaker_paused", {}, 1),
            ("process_standstill", {"reason": "client"}, 1),
            ("process_standstill", {"reason": "failures"}, 0),
            ("breaker_view_age_seconds", {}, 31),
            ("breaker_probes_total", {"outcome": "ok"}, 3),
            ("breaker_probes_total", {"outcome": "fail"}, 2),
            ("breaker_probes_total", {"outcome": "ignore"}, 1),
        ],
    )
    def test_it_is_told(self, told: Scraped, name: str, labels: dict[str, str], value: float) -> None:
        assert told.sum(f"kafka_delivery_{name}", **labels) == pytest.approx(value)

    def test_a_topic_that_is_known_has_every_outcome(self, told: Scraped) -> None:
        """So that the first of its dead letters is an increase, and not the beginning."""
        zero = [one.labels["outcome"] for one in told.samples if one.labels.get("topic") == "orders" and not one.value]
        assert zero == ["retried", "deferred", "dead-lettered", "parked"]

    def test_the_rules_of_two_workers_can_be_compared(self, told: Scraped) -> None:
        (digest,) = [one.labels["digest"] for one in told.samples if one.name == "kafka_delivery_breaker_rules_info"]
        assert re.fullmatch("[0-9a-f]{12}", digest)
