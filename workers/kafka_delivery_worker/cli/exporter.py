"""``kafka-delivery exporter``: the metrics of the fleet, for Prometheus."""

from __future__ import annotations

import signal
import threading

import click
from prometheus_client import start_http_server

from kafka_delivery import settings
from kafka_delivery.errors import KafkaDeliveryError

from ..metrics.fleet import registry
from .output import console

PORT = 9420
"""Below the ports of workers, which the page on monitoring begins at 9421."""


@click.command()
@click.option("--port", default=PORT, show_default=True, type=click.IntRange(1, settings.MAX_PORT), help="Listen here.")
@click.option(
    "--address", default="127.0.0.1", show_default=True, help="Of this host; there is no password, so keep it private."
)
def command(port: int, address: str) -> None:
    """Answer Prometheus with what lies in Redis: backlog, circuits, workers, parked, dead letters. Until SIGTERM.

    One for a fleet is enough. It may start before Redis; while Redis does not answer, kafka_delivery_up is 0.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        server, thread = start_http_server(port, address, registry(settings.current()))
    except OSError as error:
        raise KafkaDeliveryError(f"cannot listen on {address}:{port}: {error.strerror}; see --port") from error
    console().print(f"metrics of the fleet: http://{address}:{port}/metrics")
    stop.wait()
    server.shutdown()
    thread.join()
