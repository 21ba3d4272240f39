"""The exporter tells Prometheus what lies in Redis; and what Redis does not take is counted all the same."""

from __future__ import annotations

import socket
import time
from collections import Counter
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
from kafka_delivery_worker.metrics import catalogue
from kafka_delivery_worker.metrics.fleet import FleetCollector
from kafka_delivery_worker.parking import Parked, ParkingStore
from scraping import collected, names_of
from servers import wait_until
from stack import Stack

DAY_MS = 86_400_000


def test_what_redis_does_not_take_is_told_once_and_written_later(redis_url: str, redis_client: redis.Redis) -> None:
    class Away:
        prefix = ""
        client: redis.Redis = redis.Redis(port=1, retry=Retry(NoBackoff(), 0))

    away, told = Away(), Counter[str]()
    counting = Counts(away, 0.01, told.update)  # type: ignore[arg-type]
    counting.add("delivered", "orders", 2)
    wait_until(lambda: told["delivered:orders"] == 2, 30, "it to be told")
    counting.add("delivered", "orders")
    wait_until(lambda: told["delivered:orders"] == 3, 30, "it to be told")
    assert counts.read(redis_client) == {}
    away.client = redis_client
    wait_until(lambda: counts.read(redis_client) == {"orders": {"delivered": 3}}, 30, "it to be written")
    counting.stop()
    assert told == {"delivered:orders": 3}


# -- the fleet
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
    put.zadd(circuits.base + "workers", {"w1": now_ms + DAY_MS, "w2": now_ms + DAY_MS, "gone": now_ms - 8_000})


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


def test_an_exporter_without_a_port_says_so(delivery: Stack) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        done = delivery.command("exporter", "--port", str(port), check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"kafka-delivery: cannot listen on 127.0.0.1:{port}: Address already in use")
