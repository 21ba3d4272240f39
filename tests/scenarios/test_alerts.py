"""Whoever has the alerts and the dashboard sees an outage of Kafka when it is there, and that it is over when it is.

With a real Prometheus and the files as they are, but for time: what an alert waits for before it fires, and what its
rates look back on, are seconds here instead of minutes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from kafka_delivery import send
from kafka_delivery_worker.embedded import free_port
from scraping import exporter, ports
from servers import RealKafka, RealPrometheus, have_prometheus, missing, wait_until
from stack import stack
from watching import ALONE, emptied, load

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
TOPIC, SMALL, TINY = "alerts-orders", "alerts-small", "alerts-tiny"

DELIVERED = 'sum(kafka_delivery_records_total{outcome="delivered"})'

NOTHING_TO_SHOW = (
    "kafka_delivery_redis_memory_max_bytes",
    "kafka_delivery_next_due_seconds",
    "kafka_delivery_put_aside",
)
"""This Redis has no limit, nothing is delayed in the end, and no topic was in trouble of its own."""


def quickened(rules: str) -> str:
    """The same rules in seconds."""
    found = yaml.safe_load(rules)
    for rule in found["groups"][0]["rules"]:
        rule["expr"] = re.sub(r"\[\d+m\]", "[10s]", rule["expr"])
        if "for" in rule:
            rule["for"] = "1s"
    return str(yaml.safe_dump(found))


@pytest.mark.real
@pytest.mark.timeout(300)
def test_an_outage_is_seen_to_begin_and_to_end(redis_url: str, real_kafka: RealKafka, tmp_path: Path) -> None:
    if not have_prometheus():
        missing("prometheus")
    changes = {"STALL_S": 3, "METRICS_PORT": free_port(), "PRODUCER": '{"statistics.interval.ms": 500}'}
    kafka = real_kafka
    with stack(emptied(redis_url), kafka, **changes) as system:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        kafka.create_topic(SMALL, max_message_bytes=300)
        kafka.create_topic(TINY, max_message_bytes=300)
        kafka.create_topic(f"{TINY}-dlq")
        workers = [system.worker(*ALONE, ready=False) for _ in range(2)]
        for worker in workers:
            worker.wait_ready()
        rules = quickened((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
        with (
            exporter(system) as fleet,
            RealPrometheus(tmp_path / "prometheus", [fleet, *ports(*workers)], rules) as prom,
        ):

            def until(what: str, condition: Callable[[], bool], timeout: float = 60) -> None:
                wait_until(condition, timeout, what)

            with load(TOPIC) as accepted:
                until("all targets", lambda: prom.query("sum(up)") == [({}, 3.0)])
                until("quiet", lambda: prom.firing() == set())  # before the first scrape there is no exporter
                until("some load", lambda: len(accepted) > 100)
                until("quiet under load", lambda: prom.firing() == set())

                kafka.kill()
                try:
                    until("the alert", lambda: prom.firing() == {"KafkaDeliveryCircuitOpen"})
                    until("a backlog", lambda: backlog(prom) > 0)
                    before = backlog(prom)
                    until("a larger one", lambda: backlog(prom) > before + 50)
                finally:
                    kafka.start()
                until("its end", lambda: prom.firing() == set())
            system.wait_for(TOPIC, set(accepted))
            system.wait_empty()
            arrived = len(system.ids(TOPIC))
            until("the account", lambda: prom.query(DELIVERED) == [({}, float(arrived))])
            # Of another process, which was asked at another moment.
            until("an empty queue", lambda: prom.query("sum(kafka_delivery_oldest_waiting_seconds)") == [({}, 0.0)])

            # Too large for its topic: without a dead-letter topic it is parked, with one it is a dead letter.
            send.delay(SMALL, os.urandom(1000))
            until("what is parked", lambda: "KafkaDeliveryParked" in prom.firing())
            send.delay(TINY, os.urandom(1000))
            until("the dead letter", lambda: "KafkaDeliveryDeadLetters" in prom.firing())

            for title, expression in dashboard():
                shown = prom.query(expression)
                empty = any(name in expression for name in NOTHING_TO_SHOW)
                assert bool(shown) != empty, f"{title}: {expression}"

            for worker in workers:
                worker.stop()
            until("nobody", lambda: "KafkaDeliveryNoWorker" in prom.firing())


def backlog(prom: RealPrometheus) -> float:
    """What waits; none where the last scrape took too long."""
    return sum(messages for _, messages in prom.query("kafka_delivery_backlog_messages"))


def dashboard() -> list[tuple[str, str]]:
    """Title and expression of all that the dashboard asks, as Grafana would ask it."""
    panels = json.loads((ROOT / "deploy" / "grafana" / "kafka-delivery.json").read_text())["panels"]
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "1m").replace("$topic", ".*"))
        for panel in panels
        for target in panel.get("targets", [])
    ]
