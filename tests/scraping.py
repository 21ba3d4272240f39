"""Asking for metrics as Prometheus does, and reading the answer with its own parser."""

from __future__ import annotations

import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kafka_delivery.settings import Settings
from kafka_delivery_worker.embedded import free_port
from kafka_delivery_worker.metrics import catalogue
from kafka_delivery_worker.metrics.fleet import registry
from servers import wait_until
from stack import BIN, Stack, Worker


class Scraped:
    """The answer of one port, at one moment."""

    def __init__(self, text: str) -> None:
        self.text = text
        families = list(text_string_to_metric_families(text))
        self.types = {f"{one.name}_total" if one.type == "counter" else one.name: one.type for one in families}
        """By name; also of those that have no sample now."""
        self.samples = [sample for family in families for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Of all samples of this name that have these labels."""
        return sum(one.value for one in self.samples if one.name == name and labels.items() <= one.labels.items())

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The samples of this name that are not 0, by these labels."""
        return {
            tuple(one.labels[label] for label in labels): one.value
            for one in self.samples
            if one.name == name and one.value
        }

    def has(self, name: str) -> bool:
        return any(one.name == name for one in self.samples)


def scrape(port: int, timeout: float = 20) -> Scraped:
    """Ask a port of this host.

    Raises:
        OSError: it does not answer.
    """
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=timeout) as answer:
        return Scraped(answer.read().decode())


def answers(port: int) -> bool:
    try:
        scrape(port)
    except OSError:
        return False
    return True


def ports(*workers: Worker) -> list[int]:
    """Where the processes of these workers answer, as they log it."""
    return [
        int(port) for worker in workers for port in re.findall(r"metrics\.served address=\S+ port=(\d+)", worker.log)
    ]


def names_of(metrics: tuple[catalogue.Metric, ...]) -> dict[str, str]:
    """The kinds of metrics by their names."""
    return {one.name: one.kind for one in metrics}


def collected(system: Stack, **changes: int) -> Scraped:
    """What the exporter of a stack would tell, in this process."""
    return Scraped(generate_latest(registry(Settings.from_env(system.env(**changes)))).decode())


@contextmanager
def exporter(system: Stack) -> Iterator[int]:
    """`kafka-delivery exporter` of this stack; its port."""
    port = free_port()
    with subprocess.Popen([BIN / "kafka-delivery", "exporter", "--port", str(port)], env=system.env()) as process:
        try:
            wait_until(lambda: answers(port) or process.poll() is not None, 60, "the exporter to answer")
            assert process.poll() is None
            yield port
        finally:
            process.terminate()
            process.wait(60)
