"""Take the pictures in docs/images: Flower, looked at in headless Chromium, after a run with everything in it.

    .venv/bin/python docs/screenshots.py

The run stands on embedded servers: records that arrive, one that waits for its next attempt, one that Kafka refuses for
good, and then an outage, in which some are deferred. Needs Chromium on the PATH. Half a minute.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from confluent_kafka import KafkaError  # noqa: E402

from kafka_delivery import circuit, send  # noqa: E402
from kafka_delivery_worker.embedded import MockKafka, OrphanGuard, Valkey, free_port  # noqa: E402
from servers import wait_until  # noqa: E402
from stack import BIN, Stack, stack  # noqa: E402
from watching import Events, watched_events  # noqa: E402

IMAGES = HERE / "images"
WORKER = "worker1@example"  # no name of the machine on which the pictures are taken
WIDTH = 1800

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=0.75",
    "--virtual-time-budget=4000",  # ms of the page's own time, in which it fetches what it shows
)
"""Options of Chromium: nothing of it that would call home, and a picture of which a page has room for."""

SETTINGS = {
    "RETRY_BACKOFF_S": 120,  # what is retried waits while its picture is taken
    "RETRY_BACKOFF_MAX_S": 120,
    "MESSAGE_TIMEOUT_MS": 4_000,
    "REQUEST_TIMEOUT_MS": 1_000,
    "STALL_S": 1,
    "FAILURE_THRESHOLD": 2,
    "RESET_TIMEOUT_S": 60,
    "RESET_TIMEOUT_MAX_S": 60,
}


def main() -> int:
    browser = chromium()
    with Valkey() as valkey, MockKafka() as kafka, stack(valkey.url, kafka, **SETTINGS) as system:
        system.worker("-E", "-n", WORKER)
        with flower(system) as url, watched_events() as events:
            ids = run(system, kafka, events)
            wait_until(lambda: "DEFERRED" in read(f"{url}/task/{ids['deferred']}"), 10, "Flower to know of all")
            read(f"{url}/worker/{WORKER}")  # Flower asks a worker when it is first looked at
            for name, path, height in (
                ("flower-tasks", "/tasks", 840),
                ("flower-failed", f"/task/{ids['refused']}", 910),  # above the traceback, which has paths in it
                ("flower-retried", f"/task/{ids['retried']}", 955),
                ("flower-worker", f"/worker/{WORKER}", 740),
                ("flower-broker", "/broker", 480),
            ):
                take(browser, url + path, IMAGES / f"{name}.png", height)
    return 0


def run(system: Stack, kafka: MockKafka, events: Events) -> dict[str, str]:
    """One of everything; return the message ids of those to look at."""
    for topic in ("orders", "payments"):
        kafka.create_topic(topic)
        kafka.create_topic(f"{topic}-dlq")
    arrived = [send.delay("orders", {"id": n, "total": "9.90"}, key=str(n)).id for n in range(6)]
    for one in arrived:
        events.wait_for(one, "task-succeeded")
    kafka.fail_next(KafkaError.FENCED_LEADER_EPOCH)
    retried = send.delay("payments", {"order": 3, "amount": "9.90"}, key="3").id
    events.wait_for(retried, "task-retried")
    kafka.fail_next(KafkaError.POLICY_VIOLATION)
    refused = send.delay("orders", {"id": 7, "note": "x" * 2_000}, key="7").id
    events.wait_for(f"{refused}-dlq", "task-succeeded")
    events.wait_for(send.delay("orders", {"id": 8, "total": "12.00"}, key="8").id, "task-succeeded")
    kafka.down()
    deferred = [send.delay("payments", {"order": n, "amount": "1.00"}, key=str(n)).id for n in range(2)]
    for one in deferred:
        events.wait_for(one, "task-deferred")
    wait_until(lambda: circuit().state == "open", 20, "the circuit to open")
    return {"retried": retried, "refused": refused, "deferred": deferred[-1]}


@contextmanager
def flower(system: Stack) -> Iterator[str]:
    """Flower, as its users start it, as it is."""
    port = free_port()
    arguments = [f"--port={port}", "--loglevel=ERROR"]
    process = subprocess.Popen(  # noqa: S603  # our own command
        [BIN / "celery", "-A", "kafka_delivery_worker", "flower", *arguments], env=system.env()
    )
    guard = OrphanGuard(process.pid)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: read(f"{url}/healthcheck") == "OK", 30, "Flower to answer")
        yield url
    finally:
        guard.release()
        process.terminate()
        process.wait(20)


def read(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  # our own Flower
            return str(answer.read().decode())
    except OSError:
        return ""


def chromium() -> str:
    """Where it is; ends the program where it is not."""
    return (
        shutil.which("chromium")
        or shutil.which("google-chrome")
        or sys.exit("this needs Chromium: apt install chromium")
    )


def take(browser: str, url: str, picture: Path, height: int) -> None:
    with tempfile.TemporaryDirectory() as profile:
        page = [f"--user-data-dir={profile}", f"--window-size={WIDTH},{height}", f"--screenshot={picture}", url]
        subprocess.run([browser, *QUIET, *page], check=True, timeout=60, capture_output=True)  # noqa: S603  # our page


if __name__ == "__main__":
    sys.exit(main())
