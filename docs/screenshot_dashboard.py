"""Take the pictures of the dashboard in docs/images: a real Grafana, on five minutes in which everything happened.

    .venv/bin/python docs/screenshot_dashboard.py --grafana /usr/share/grafana

Three workers on a real Kafka: records that arrive, some that Kafka refuses for good, some that are retried, one that
can go nowhere; a topic that somebody holds back for a while, and then an outage. Needs a Grafana installation,
prometheus and Chromium on the PATH, and java. The pictures become small if pngquant is there.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from screenshots import HERE, IMAGES, chromium, take

from kafka_delivery import circuit, send
from kafka_delivery_worker.embedded import free_port
from scraping import exporter, ports
from servers import RealGrafana, RealKafka, RealPrometheus, RealRedis, valkey_binary, wait_until
from stack import Stack, stack
from watching import ALONE

TOPICS = ("orders", "payments", "emails")
SMALL, NOWHERE = "invoices", "exports"  # neither takes large records, and the second has no dead-letter topic
LIMIT_BYTES = 2_000
WORKERS = 3
PAUSE_S = 0.01
"""Between two sends."""

SETTINGS = {
    "RETRY_BACKOFF_S": 2,
    "RETRY_BACKOFF_MAX_S": 8,
    "MESSAGE_TIMEOUT_MS": 15_000,
    "REQUEST_TIMEOUT_MS": 5_000,
    "STALL_S": 5,
    "RESET_TIMEOUT_S": 5,
    "RESET_TIMEOUT_MAX_S": 10,
    "RAMP_S": 10,
    "PRODUCER": '{"statistics.interval.ms": 1000}',
}

SCRAPE_S = 5
"""What Grafana is told: rates look back on four times as much."""

HEIGHTS = {"grafana": 1492, "grafana-all": 2810}
"""Down to what waits, and the whole dashboard; in a page's own pixels."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Take the pictures of the dashboard.")
    parser.add_argument("--grafana", type=Path, required=True, help="home of a Grafana installation, with bin in it")
    home = parser.parse_args().grafana.resolve()
    browser = chromium()
    with tempfile.TemporaryDirectory() as directory, running(Path(directory)) as (system, kafka, prometheus):
        began = time.time()
        run(system, kafka)
        look(browser, home, Path(directory), prometheus, began, time.time())
    return 0


@contextmanager
def running(directory: Path) -> Iterator[tuple[Stack, RealKafka, RealPrometheus]]:
    """A fleet of which Prometheus is told."""
    changes = SETTINGS | {"METRICS_PORT": free_port()}
    with (
        RealKafka(directory / "kafka") as kafka,
        RealRedis(directory / "redis", binary=valkey_binary(), options={"maxmemory": "64mb"}) as redis,
        stack(redis.url, kafka, **changes) as system,
    ):
        for topic in TOPICS:
            kafka.create_topic(topic)
        for topic in (SMALL, NOWHERE):
            kafka.create_topic(topic, max_message_bytes=LIMIT_BYTES)
        for topic in (*TOPICS, SMALL):
            kafka.create_topic(f"{topic}-dlq")
        workers = [system.worker(*ALONE, ready=False) for _ in range(WORKERS)]
        for worker in workers:
            worker.wait_ready()
        with (
            exporter(system) as fleet,
            RealPrometheus(directory / "prometheus", [fleet, *ports(*workers)], "groups: []") as prometheus,
        ):
            yield system, kafka, prometheus


def run(system: Stack, kafka: RealKafka) -> None:
    """All of it in five minutes; an outage of an hour looks the same.

    The pauses wait for nothing: they are what lies between two events on the time axis of the pictures.
    """
    with load():
        time.sleep(60)
        send.delay(NOWHERE, os.urandom(2 * LIMIT_BYTES))
        time.sleep(20)
        system.command("breaker", "force-open", "--topic", "payments", "--reason", "its consumers are ill")
        time.sleep(30)
        system.command("breaker", "auto", "--topic", "payments", "--reason", "they are well")
        time.sleep(60)
        kafka.kill()
        wait_until(lambda: circuit().state != "closed", 60, "the circuit to open")
        time.sleep(45)
        kafka.start()
        wait_until(lambda: circuit().state == "closed", 60, "the circuit to close")
        time.sleep(75)


@contextmanager
def load() -> Iterator[None]:
    """Records for all topics, and now and then one that Kafka refuses, at once or again and again."""
    enough = threading.Event()

    def send_on() -> None:
        for number in itertools.count():
            if enough.wait(PAUSE_S):
                return
            send.delay(TOPICS[number % len(TOPICS)], {"id": number, "total": "9.90"}, key=str(number % 50))
            if number % 150 == 0:
                send.delay(SMALL, os.urandom(2 * LIMIT_BYTES))
            if number % 200 == 0:
                send.delay("emails", "no such partition", partition=99)

    sending = threading.Thread(target=send_on)
    sending.start()
    try:
        yield
    finally:
        enough.set()
        sending.join()


def look(browser: str, home: Path, directory: Path, prometheus: RealPrometheus, began: float, ended: float) -> None:
    with RealGrafana(directory / "grafana", home, prometheus.url, HERE.parent / "deploy" / "grafana", SCRAPE_S) as it:
        page = f"{it.url}/d/kafka-delivery?kiosk&theme=light&from={began * 1000:.0f}&to={ended * 1000:.0f}"
        for name, height in HEIGHTS.items():
            picture = IMAGES / f"{name}.png"
            take(browser, page, picture, height)
            if small := shutil.which("pngquant"):
                subprocess.run([small, "--force", "--output", picture, "128", picture], check=True)  # noqa: S603  # our own file


if __name__ == "__main__":
    sys.exit(main())
