"""Tracers replace Kafka's client in the worker's process. Each record arrives all the same, byte by byte: repeated
header names, headers without a value, no headers, no value.

With the real packages, without their agents: nothing leaves this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_delivery import Record, send, send_many
from kafka_delivery_worker.embedded import MockKafka
from stack import Stack, stack
from watching import emptied, other_worker

TOPIC = "traced"

DDTRACE = "import ddtrace.auto"
OPENTELEMETRY = """
from opentelemetry import trace
from opentelemetry.instrumentation.confluent_kafka import ConfluentKafkaInstrumentor
from opentelemetry.sdk.trace import TracerProvider

trace.set_tracer_provider(TracerProvider())
ConfluentKafkaInstrumentor().instrument()
"""
NEW_RELIC = """
import newrelic.agent

newrelic.agent.initialize()
"""
SENTRY = """
import sentry_sdk

sentry_sdk.init("http://key@127.0.0.1:9/1", traces_sample_rate=1.0)
"""

QUIET = {
    "DD_TRACE_AGENT_URL": "http://127.0.0.1:9",
    "DD_KAFKA_PROPAGATION_ENABLED": "true",
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "DD_CRASHTRACKING_ENABLED": "false",
    "DD_TRACE_STARTUP_LOGS": "false",
    "NEW_RELIC_DEVELOPER_MODE": "true",  # it connects nowhere
    "NEW_RELIC_LICENSE_KEY": "0" * 40,
    "NEW_RELIC_HOST": "127.0.0.1",
    "NEW_RELIC_APP_NAME": "tests",
}

OURS = "from kafka_delivery_worker import app, client, producer"
STANDING = """
import confluent_kafka
from confluent_kafka import cimpl

print("standing:", confluent_kafka.Producer.__module__, cimpl.Producer.__flags__ >> 9 & 1, flush=True)
"""

WRAPPED = {
    DDTRACE: "standing: ddtrace.contrib.internal.kafka.patch 0",
    OPENTELEMETRY: "standing: opentelemetry.instrumentation.confluent_kafka 0",
    NEW_RELIC: "standing: newrelic.hooks.messagebroker_confluentkafka 1",
}
"""What stands in the place of Kafka's client, also where that is loaded from (1). Sentry leaves it alone, and so does
New Relic what was loaded before it."""

RECORDS = [
    Record(TOPIC, b"\x00repeated", "k", [("a", "1"), ("a", b"\xff2"), ("b", None), ("a", "3")], message_id="repeated"),
    Record(TOPIC, "none", None, [("traceparent", None), ("x-datadog-trace-id", "own")], message_id="no-values"),
    Record(TOPIC, "plain", message_id="no-headers"),
    Record(TOPIC, None, "tombstone", message_id="no-value", timestamp=1_700_000_000_000),
]


@pytest.fixture
def system(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        kafka.create_topic(TOPIC, 1)
        yield system


@pytest.mark.parametrize("before", [True, False], ids=["loaded before ours", "loaded after ours"])
@pytest.mark.parametrize(
    "tracer",
    [
        pytest.param(DDTRACE, id="ddtrace", marks=pytest.mark.smoke),
        pytest.param(OPENTELEMETRY, id="opentelemetry"),
        pytest.param(NEW_RELIC, id="newrelic"),
        pytest.param(SENTRY, id="sentry"),
    ],
)
def test_records_arrive_unchanged(system: Stack, tmp_path: Path, tracer: str, before: bool) -> None:
    code = "\n".join([tracer, OURS, STANDING] if before else [OURS, tracer, STANDING])
    worker = other_worker(system, tmp_path, code)
    for record in RECORDS:
        send.apply_async((record,))
    waited = Record(TOPIC, "w", headers=[("x", None), ("x", "2")], message_id="waited")
    result = send.apply_async((waited,), ignore_result=False)  # by a thread of the worker
    send_many.delay([Record(TOPIC, "batched", headers=[("y", "1"), ("y", None)], message_id="batched")])
    assert result.get(60)["topic"] == TOPIC

    ids = {record.id for record in RECORDS} | {"waited", "batched"}
    found = {dict(one.headers[:1])["message-id"]: one for one in system.wait_for(TOPIC, ids)}

    assert len(found) == len(ids)
    for record in RECORDS:
        one = found[record.id.encode()]
        assert one.headers == record.kafka_headers
        assert (one.value, one.key) == (record.value_bytes, record.key_bytes)
        assert one.timestamp == record.timestamp_ms
    assert found[b"waited"].headers[1:] == [("x", None), ("x", b"2")]
    assert found[b"batched"].headers[1:] == [("y", b"1"), ("y", None)]
    assert system.parked() == []
    if before or tracer is not NEW_RELIC:
        assert WRAPPED.get(tracer, "standing: cimpl 0") in worker.log, "nothing is wrapped, so this shows nothing"
