"""Prometheus is told what there is: by every worker process on a port of its own, of the fleet by the exporter."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
import redis

from kafka_delivery import send
from kafka_delivery_worker.embedded import MockKafka, free_port
from kafka_delivery_worker.metrics import catalogue
from scraping import answers, collected, exporter, names_of, ports, scrape
from servers import OtherKafka, RealRedis, wait_until
from stack import Stack, stack
from watching import ALONE

CARD = "4111-1111"
RECORDS = "kafka_delivery_records_total"


# -- a worker
def test_a_worker_tells_what_the_catalogue_says_and_nothing_else(delivery: Stack, topic: str) -> None:
    port = free_port()
    worker = delivery.worker(*ALONE, METRICS_PORT=port, PRODUCER='{"statistics.interval.ms": 200}')
    sent = [send.delay(topic, CARD, key=CARD, headers={"h": CARD}, timestamp=1).id for _ in range(20)]
    delivery.wait_for(topic, set(sent))
    wait_until(lambda: scrape(port).sum("kafka_delivery_record_queue_seconds_count") == 20, 60, "statistics")
    wait_until(lambda: scrape(port).sum(RECORDS) == 20, 60, "all to be counted")

    found = scrape(port)
    told = {name: kind for name, kind in found.types.items() if not name.startswith("process_")}
    assert told == names_of(catalogue.WORKER)
    assert found.by(RECORDS, "outcome", "topic") == {("delivered", topic): 20}
    # The records' own time is long ago; their ids say when the sends were called.
    assert found.sum("kafka_delivery_end_to_end_seconds_count") == 20
    assert 0 < found.sum("kafka_delivery_end_to_end_seconds_sum") < 20 * 30
    assert 0 < found.sum("kafka_delivery_request_latency_seconds_sum") < 30
    assert found.sum("kafka_delivery_breaker_view_age_seconds") < 30
    assert CARD not in found.text
    assert not any(message_id in found.text for message_id in sent)
    assert f"metrics.served address=127.0.0.1 port={port}" in worker.log


def test_what_is_in_flight_and_what_failed_is_told(redis_client: redis.Redis, redis_url: str) -> None:
    port = free_port()
    with MockKafka() as kafka, stack(redis_url, kafka) as system:
        kafka.create_topic("orders")
        system.worker(*ALONE, METRICS_PORT=port, STALL_S=60)
        kafka.fail_next(44)  # POLICY_VIOLATION: a verdict on the record
        send.delay("orders", "refused")
        wait_until(lambda: scrape(port).has("kafka_delivery_record_errors_total"), 60, "an error")
        kafka.delay(-1, 60_000)  # for longer than anybody looks
        for _ in range(3):
            send.delay("orders", b"12345", key=b"123")
        wait_until(lambda: scrape(port).sum("kafka_delivery_in_flight_records") >= 3, 60, "records in flight")

        found = scrape(port)
        assert found.by("kafka_delivery_record_errors_total", "error", "topic") == {("POLICY_VIOLATION", "orders"): 1}
        assert found.sum("kafka_delivery_in_flight_bytes") >= 3 * 8
        system.workers[0].kill()


def test_workers_of_a_host_share_the_setting_and_take_the_next_port(delivery: Stack) -> None:
    first = free_port()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", first))
        stranger.listen()
        workers = [delivery.worker(*ALONE, METRICS_PORT=first) for _ in range(2)]
        places = set(ports(*workers))
        assert len(places) == 2
        assert first not in places
        assert all(answers(port) for port in places)


@pytest.mark.parametrize("change", [{"METRICS_ADDRESS": "192.0.2.1"}, {"METRICS_PORT": "65535"}])
def test_a_port_that_cannot_be_had_stops_no_records(delivery: Stack, topic: str, change: Mapping[str, str]) -> None:
    with socket.socket() as stranger:
        with suppress(OSError):  # whoever has it by now will do
            stranger.bind(("127.0.0.1", 65_535))
            stranger.listen()
        settings: dict[str, Any] = {"METRICS_PORT": free_port(), **change}
        worker = delivery.worker(*ALONE, **settings)
        delivery.wait_for(topic, {send.delay(topic, "v").id})
    assert "metrics.not_served" in worker.log


@pytest.mark.parametrize(("pool", "processes"), [("prefork", 3), ("threads", 1), ("solo", 1)])
def test_every_process_of_a_pool_tells_its_own(delivery: Stack, topic: str, pool: str, processes: int) -> None:
    """A child of prefork delivers by itself; the parent parks, and keeps the breaker."""
    worker = delivery.worker(*ALONE, "-P", pool, "-c", "2", METRICS_PORT=free_port())
    sent = {send.delay(topic, "v").id for _ in range(30)}
    delivery.wait_for(topic, sent)
    wait_until(lambda: len(ports(worker)) >= processes, 60, "all to serve")  # a child may be the last to begin
    places = ports(worker)
    assert len(places) == processes
    wait_until(lambda: sum(scrape(port).sum(RECORDS) for port in places) == 30, 60, "all to be counted")


def test_without_a_port_there_is_nothing(delivery: Stack, topic: str) -> None:
    told = delivery.application(
        """
        import sys
        from kafka_delivery_worker import app, engine
        print(engine.current().meters, "prometheus_client" in sys.modules)
        """
    )
    assert told.split() == ["None", "False"]


@pytest.mark.real
def test_a_redis_that_hangs_is_told_in_bounded_time(real_redis: RealRedis) -> None:
    with stack(real_redis.url, OtherKafka("127.0.0.1:1")) as system, exporter(system) as port:
        assert scrape(port).sum("kafka_delivery_up") == 1
        real_redis.pause()
        try:
            started = time.monotonic()
            found = scrape(port)
            assert time.monotonic() - started < 10, "Prometheus gives up after ten seconds"
            started = time.monotonic()
            assert collected(system).sum("kafka_delivery_up") == 0
            assert time.monotonic() - started < 10, "also where it was never reached before"
        finally:
            real_redis.resume()
        assert [(one.name, one.value) for one in found.samples] == [("kafka_delivery_up", 0)]
        wait_until(lambda: scrape(port).sum("kafka_delivery_up") == 1, 60, "it to answer again")


def test_the_exporter_starts_before_redis(mock_kafka: MockKafka) -> None:
    with exporter(Stack("redis://127.0.0.1:1/0", mock_kafka, {})) as port:
        assert scrape(port).sum("kafka_delivery_up") == 0
