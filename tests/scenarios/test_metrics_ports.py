"""Prometheus is told what there is: by every worker process on a port of its own, of the fleet by the exporter."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
import redis
from prometheus_client.core import CollectorRegistry
from redis.backoff import NoBackoff
from redis.retry import Retry

from kafka_delivery import dead_letter, send, settings
from kafka_delivery.redis_client import RedisClient
from kafka_delivery_worker import counts
from kafka_delivery_worker.breaker.rules import Rules
from kafka_delivery_worker.breaker.store import CircuitStore
from kafka_delivery_worker.counts import Counts
from kafka_delivery_worker.embedded import MockKafka, free_port
from kafka_delivery_worker.metrics import catalogue
from kafka_delivery_worker.metrics.fleet import FleetCollector, registry
from kafka_delivery_worker.parking import Parked, ParkingStore
from scraping import Scraped, answers, exporter, ports, scrape
from servers import OtherKafka, RealRedis, wait_until
from stack import Stack, stack
from watching import ALONE

CARD = "4111-1111"
DAY_MS = 86_400_000
RECORDS = "kafka_delivery_records_total"


def names_of(metrics: tuple[catalogue.Metric, ...]) -> dict[str, str]:
    return {one.name: one.kind for one in metrics}


# -- a worker
def test_a_worker_tells_what_the_catalogue_says_and_nothing_else(delivery: Stack, topic: str) -> None:
    port = free_port()
    worker = delivery.worker(*ALONE, METRICS_PORT=port, PRODUCER='{"statistics.interval.ms": 200}')
    sent = [send.delay(topic, CARD, key=CARD, headers={"h": CARD}, timestamp=1).id for _ in range(20)]
    delivery.wait_for(topic, set(sent))
    wait_until(lambda: scrape(port).sum("kafka_delivery_record_queue_seconds_count") == 20, 10, "statistics")
    wait_until(lambda: scrape(port).sum(RECORDS) == 20, 10, "all to be counted")

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
        wait_until(lambda: scrape(port).has("kafka_delivery_record_errors_total"), 20, "an error")
        kafka.delay(-1, 60_000)  # for longer than anybody looks
        for _ in range(3):
            send.delay("orders", b"12345", key=b"123")
        wait_until(lambda: scrape(port).sum("kafka_delivery_in_flight_records") >= 3, 20, "records in flight")

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
    wait_until(lambda: len(ports(worker)) >= processes, 20, "all to serve")  # a child may be the last to begin
    places = ports(worker)
    assert len(places) == processes
    wait_until(lambda: sum(scrape(port).sum(RECORDS) for port in places) == 30, 10, "all to be counted")


def test_without_a_port_there_is_nothing(delivery: Stack, topic: str) -> None:
    told = delivery.application(
        """
        import sys
        from kafka_delivery_worker import app, engine
        print(engine.current().meters, "prometheus_client" in sys.modules)
        """
    )
    assert told.split() == ["None", "False"]


def test_what_redis_does_not_take_is_told_once_and_written_later(redis_url: str, redis_client: redis.Redis) -> None:
    class Away:
        prefix = ""
        client: redis.Redis = redis.Redis(port=free_port(), retry=Retry(NoBackoff(), 0))

    away, told = Away(), Counter[str]()
    counting = Counts(away, 0.01, told.update)  # type: ignore[arg-type]
    counting.add("delivered", "orders", 2)
    wait_until(lambda: told["delivered:orders"] == 2, 5, "it to be told")
    counting.add("delivered", "orders")
    wait_until(lambda: told["delivered:orders"] == 3, 5, "it to be told")
    assert counts.read(redis_client) == {}
    away.client = redis_client
    wait_until(lambda: counts.read(redis_client) == {"orders": {"delivered": 3}}, 5, "it to be written")
    counting.stop()
    assert told == {"delivered:orders": 3}


# -- the fleet
def collected(system: Stack, **changes: int) -> Scraped:
    from prometheus_client import generate_latest

    return Scraped(generate_latest(registry(settings.Settings.from_env(system.env(**changes)))).decode())


def fill(system: Stack) -> None:
    """Something of everything, and no worker to take it."""
    now_ms = int(time.time() * 1000)
    for priority in (0, 0, 3):
        send.apply_async(("orders", "value"), priority=priority)
    dead_letter.delay("orders", "value")
    put, base = system.redis, "kafka-delivery:"
    put.zadd(base + "leases:1", {"a": 1, "b": 2})
    put.hset(base + "held:1:b", mapping={"tag-1": "message", "tag-2": "message"})
    put.zadd(base + "delayed:1:kafka-delivery", {"due": now_ms - 60_000, "later": now_ms + DAY_MS})
    put.zadd(base + "delayed:1:kafka-delivery-dlq", {"later": now_ms + DAY_MS})
    for topic, count in (("orders", 2), ("bills", 1)):
        put.sadd(base + "waiting:1", f"{topic}:kafka-delivery")
        put.lpush(f"{base}waiting:1:{topic}:kafka-delivery", *["message"] * count)
    store = ParkingStore(put)
    store.park(Parked(id="p", kind="bug", error_class="E", error_message="m", content="call", data={}))
    put.hset(base + "counts:1", mapping={"delivered:orders": 7, "dead-lettered:orders": 1, "dead-lettered:bills": 2})
    circuits = CircuitStore(RedisClient(settings.current()), "default", Rules.of(settings.current()), "worker-1")
    circuits.force("topic:orders", "open", 0, "somebody", "a test")
    put.zadd(circuits.base + "workers", {"w1": now_ms, "w2": now_ms - 1_000, "gone": now_ms - 8_000})


def test_the_exporter_tells_all_that_lies_in_redis(delivery: Stack) -> None:
    fill(delivery)
    found = collected(delivery)
    assert found.types == names_of(catalogue.FLEET)
    assert found.sum("kafka_delivery_up") == 1
    assert found.by("kafka_delivery_waiting_messages", "queue", "priority") == {
        ("kafka-delivery", "0"): 2,
        ("kafka-delivery", "3"): 1,
        ("kafka-delivery-dlq", "0"): 1,
    }
    assert found.by("kafka_delivery_delayed_messages", "queue") == {("kafka-delivery",): 2, ("kafka-delivery-dlq",): 1}
    assert found.by("kafka_delivery_due_messages", "queue") == {("kafka-delivery",): 1}
    next_due = found.by("kafka_delivery_next_due_seconds", "queue")
    assert next_due[("kafka-delivery",)] == pytest.approx(-60, abs=30)
    assert next_due[("kafka-delivery-dlq",)] == pytest.approx(DAY_MS / 1000, abs=30)
    assert found.sum("kafka_delivery_leased_messages") == 2
    assert found.by("kafka_delivery_put_aside_messages", "topic") == {("orders",): 2, ("bills",): 1}
    assert found.sum("kafka_delivery_backlog_messages") == 4 + 1 + 2 + 3
    assert found.sum("kafka_delivery_parked_records") == 1
    assert found.sum("kafka_delivery_dead_letters_total") == 3
    assert found.by("kafka_delivery_fleet_records_total", "outcome", "topic") == {
        ("delivered", "orders"): 7,
        ("dead-lettered", "orders"): 1,
        ("dead-lettered", "bills"): 2,
    }
    assert found.by("kafka_delivery_circuit_state", "scope", "state") == {
        ("cluster", "closed"): 1,
        ("topic:orders", "open"): 1,
    }
    assert found.by("kafka_delivery_circuit_forced", "scope") == {("topic:orders",): 1}
    assert found.sum("kafka_delivery_workers") == 2
    assert found.sum("kafka_delivery_redis_memory_used_bytes") > 0
    assert not found.has("kafka_delivery_redis_memory_max_bytes"), "this one has no limit"


def test_the_exporter_tells_the_limit_of_redis(delivery: Stack) -> None:
    delivery.redis.config_set("maxmemory", 123_000_000)
    try:
        assert collected(delivery).sum("kafka_delivery_redis_memory_max_bytes") == 123_000_000
    finally:
        delivery.redis.config_set("maxmemory", 0)


def test_topics_of_the_fleet_are_bounded_too(delivery: Stack) -> None:
    delivery.redis.hset("kafka-delivery:counts:1", mapping={f"delivered:t{n}": 1 for n in range(10)})
    told = collected(delivery, METRICS_TOPICS=2).by("kafka_delivery_fleet_records_total", "topic")
    assert told == {("t0",): 1, ("t1",): 1, ("other",): 8}


class TestTheOldest:
    """Whoever waits at the front of a queue is the next, and the oldest of these says how late the service is."""

    @pytest.fixture
    def clock(self) -> list[float]:
        return [0.0]

    @pytest.fixture
    def collector(self, delivery: Stack, clock: list[float]) -> FleetCollector:
        return FleetCollector(settings.Settings.from_env(delivery.env()), clock=lambda: clock[0])

    def age(self, collector: FleetCollector) -> float:
        registry = CollectorRegistry()
        registry.register(collector)
        value = registry.get_sample_value("kafka_delivery_oldest_waiting_seconds")
        assert value is not None
        return value

    def test_where_nothing_waits_it_is_of_no_age(self, delivery: Stack, collector: FleetCollector) -> None:
        assert self.age(collector) == 0

    def test_it_is_as_old_as_its_send(self, delivery: Stack, collector: FleetCollector) -> None:
        send.apply_async(("orders", "first"), headers={"correlation_id": "mine"})
        time.sleep(0.3)
        send.delay("orders", "second")
        dead_letter.delay("orders", "third")
        assert 0.3 <= self.age(collector) < 30

    def test_what_waits_for_its_topic_counts_too(self, delivery: Stack, collector: FleetCollector) -> None:
        send.delay("orders", "v")
        delivery.redis.sadd("kafka-delivery:waiting:1", "orders:kafka-delivery")
        delivery.redis.lmove("kafka-delivery", "kafka-delivery:waiting:1:orders:kafka-delivery")
        assert self.age(collector) > 0

    def test_an_id_that_says_nothing_is_as_old_as_it_is_known(
        self, delivery: Stack, collector: FleetCollector, clock: list[float]
    ) -> None:
        send.delay("orders", "v", message_id="mine")
        assert self.age(collector) == 0
        clock[0] = 100.0
        assert self.age(collector) == 100
        delivery.redis.delete("kafka-delivery")
        send.delay("orders", "v", message_id="another")
        assert self.age(collector) == 0

    def test_two_who_scrape_at_once_are_told_the_same(self, collector: FleetCollector, clock: list[float]) -> None:
        told: list[float] = []

        class Fronts(dict[str, str]):
            def items(self) -> Any:
                told.append(collector._oldest_s(dict(self)))  # the other one, in the middle of this one
                return super().items()

        collector._oldest_s({"kafka-delivery": "mine"})
        clock[0] = 100.0
        told.append(collector._oldest_s(Fronts({"kafka-delivery": "mine"})))
        assert told == [100, 100]


@pytest.mark.real
def test_a_redis_that_hangs_is_told_in_bounded_time(real_redis: RealRedis) -> None:
    with stack(real_redis.url, OtherKafka("127.0.0.1:1")) as system, exporter(system) as port:
        assert scrape(port).sum("kafka_delivery_up") == 1
        real_redis.pause()
        try:
            started = time.monotonic()
            found = scrape(port)
            assert time.monotonic() - started < 8, "Prometheus gives up after ten seconds"
            started = time.monotonic()
            assert collected(system).sum("kafka_delivery_up") == 0
            assert time.monotonic() - started < 8, "also where it was never reached before"
        finally:
            real_redis.resume()
        assert [(one.name, one.value) for one in found.samples] == [("kafka_delivery_up", 0)]
        wait_until(lambda: scrape(port).sum("kafka_delivery_up") == 1, 10, "it to answer again")


def test_the_exporter_starts_before_redis(mock_kafka: MockKafka) -> None:
    with exporter(Stack("redis://127.0.0.1:1/0", mock_kafka, {})) as port:
        assert scrape(port).sum("kafka_delivery_up") == 0


def test_an_exporter_without_a_port_says_so(delivery: Stack) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        done = delivery.command("exporter", "--port", str(port), check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"kafka-delivery: cannot listen on 127.0.0.1:{port}: Address already in use")
