"""Workers whose Kafka client is wrapped by somebody else's tracer, and a Sentry that sends nothing to anybody."""

from __future__ import annotations

from typing import Any

import sentry_sdk

PLAIN, DDTRACE, OPENTELEMETRY, SENTRY = "plain", "ddtrace", "OpenTelemetry", "Sentry"

_STANDING = """
import logging
import sys

import confluent_kafka
from kafka_delivery_worker import app

logging.getLogger("kafka_delivery.producer").setLevel(logging.INFO)  # it says when a client is renewed
print("in the place of the client:", confluent_kafka.Producer.__module__, file=sys.__stderr__, flush=True)
"""

MODULES = {
    PLAIN: _STANDING,
    DDTRACE: "import ddtrace.auto" + _STANDING,
    OPENTELEMETRY: """
from opentelemetry import trace
from opentelemetry.instrumentation.confluent_kafka import ConfluentKafkaInstrumentor
from opentelemetry.sdk.trace import TracerProvider

trace.set_tracer_provider(TracerProvider())
ConfluentKafkaInstrumentor().instrument()
"""
    + _STANDING,
    SENTRY: """
import sentry_sdk

from soak.chaos.tracers import Nowhere

sentry_sdk.init("http://key@127.0.0.1:9/1", transport=Nowhere, traces_sample_rate=1.0)
"""
    + _STANDING,
}
"""What `celery -A` loads, so that each worker process is of one of these kinds."""

ORDER = (DDTRACE, OPENTELEMETRY, PLAIN, SENTRY)
"""One worker process after the other; the first two are wrapped."""

WRAPS = {DDTRACE: "ddtrace.", OPENTELEMETRY: "opentelemetry."}
"""How the module begins whose class then stands in the place of Kafka's client."""

QUIET = {
    "DD_TRACE_AGENT_URL": "http://127.0.0.1:9",
    "DD_KAFKA_PROPAGATION_ENABLED": "true",
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "DD_CRASHTRACKING_ENABLED": "false",
    "DD_TRACE_STARTUP_LOGS": "false",
}
"""Environment in which ddtrace looks for nobody to tell."""


def is_wrapped(kind: str, log: str) -> bool:
    """Whether a worker of this kind says in its log that the client is not Kafka's own."""
    return kind in WRAPS and f"in the place of the client: {WRAPS[kind]}" in log


class Nowhere(sentry_sdk.transport.Transport):
    """Where Sentry's SDK sends, which is nowhere."""

    def capture_envelope(self, envelope: Any) -> None:
        pass
