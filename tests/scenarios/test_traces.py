"""A record carries the trace of the caller that sent it and of nobody else, whatever becomes of it in workers that
OpenTelemetry's instrumentation of Celery traces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from confluent_kafka import KafkaError
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from kafka_delivery import Record, dead_letter, send, send_many
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka
from letters import redrive
from servers import wait_until
from stack import Stack, message_id, stack
from watching import emptied, other_worker

pytest.importorskip("opentelemetry.instrumentation.celery")

TOPIC = "traced"
RETRIED, DEFERRED, REFUSED = (
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.NOT_CONTROLLER,
    KafkaError.POLICY_VIOLATION,
)

WORKER = """
    import os
    from celery.signals import worker_process_init
    from opentelemetry import baggage, context, trace
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    class Told(SpanExporter):
        def export(self, spans):
            for span in spans:
                os.write(2, f"SPAN {span.name} {span.context.trace_id:032x}\\n".encode())
            return SpanExportResult.SUCCESS

    def instrument(**_):
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(Told()))
        trace.set_tracer_provider(provider)
        CeleryInstrumentor().instrument()

    if PREFORK:
        worker_process_init.connect(instrument, weak=False)
    else:
        instrument()
    from kafka_delivery_worker import app
"""

tracer = TracerProvider().get_tracer("test")


@pytest.fixture(scope="module", params=["in-flight", "prefork"])
def system(request: pytest.FixtureRequest, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    prefork = request.param == "prefork"
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, LINGER_MS=0) as system:
        for topic in (TOPIC, f"{TOPIC}-dlq"):
            kafka.create_topic(topic, 1)
        code = f"PREFORK = {prefork}\n" + "\n".join(line[4:] for line in WORKER.splitlines())
        arguments = ("-P", "prefork", "-c", "1") if prefork else ()
        other_worker(system, tmp_path_factory.mktemp("worker"), code, *arguments)
        yield system


@pytest.fixture(params=["a traced caller", "an untraced caller"])
def caller(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param == "a traced caller")


class Caller:
    """Who sends: in a span of its own or in none."""

    def __init__(self, traced: bool) -> None:
        self._traced = traced
        self.trace_id = ""

    def __call__(self) -> AbstractContextManager[Any]:
        return self._span() if self._traced else nullcontext()

    def _span(self) -> AbstractContextManager[Any]:
        span = tracer.start_span("request")
        self.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
        return trace.use_span(span, end_on_exit=True)

    def check(self, headers: list[tuple[str, bytes | None]], name: str = "traceparent") -> None:
        """Of a record's headers: the trace is the caller's, once, or there is none at all."""
        found = [value for name_, value in headers if re.search("traceparent|tracestate|baggage", name_)]
        if self._traced:
            assert [one for one, _ in headers if "traceparent" in one] == [name]
            assert len(found) == 1
            assert self.trace_id in (found[0] or b"").decode()
        else:
            assert found == []


def mock(system: Stack) -> MockKafka:
    assert isinstance(system.kafka, MockKafka)
    return system.kafka


def headers_of(system: Stack, topic: str, record_id: str) -> list[tuple[str, bytes | None]]:
    return next(
        record.headers for record in reversed(system.wait_for(topic, {record_id})) if message_id(record) == record_id
    )


def counted(system: Stack, outcome: str) -> Callable[[], int]:
    before = counts.read(system.redis).get(TOPIC, {}).get(outcome, 0)
    return lambda: counts.read(system.redis).get(TOPIC, {}).get(outcome, 0) - before


def wait_counted(since: Callable[[], int], what: str) -> None:
    wait_until(lambda: since() > 0, 60, f"a record to be {what}")


@pytest.mark.smoke
@pytest.mark.parametrize(("outcome", "code"), [("retried", RETRIED), ("deferred", DEFERRED)])
def test_what_is_sent_again(system: Stack, caller: Caller, outcome: str, code: int) -> None:
    mock(system).fail_next(code)
    since = counted(system, outcome)
    with caller():
        sent = send.delay(TOPIC, "x", headers={"mine": "1"})
    headers = headers_of(system, TOPIC, sent.id)
    wait_counted(since, outcome)
    assert ("mine", b"1") in headers
    caller.check(headers)
    wait_until(lambda: "SPAN run/kafka_delivery.send" in system.workers[0].log, 60, "a span of the worker's")


def test_a_dead_letter_and_its_redrive(system: Stack, caller: Caller) -> None:
    mock(system).fail_next(REFUSED)
    with caller():
        sent = send.delay(TOPIC, "x")
    caller.check(headers_of(system, f"{TOPIC}-dlq", sent.id), "original-traceparent")
    system.wait_empty()
    with tracer.start_as_current_span("an operator's"):
        assert redrive(system, TOPIC)["delivered"] == 1
    caller.check(headers_of(system, TOPIC, sent.id))


def test_a_dead_letter_of_the_applications_own(system: Stack, caller: Caller) -> None:
    with caller():
        sent = dead_letter.delay(TOPIC, "x")
    record_id = sent.id.removesuffix("-dlq")
    caller.check(headers_of(system, f"{TOPIC}-dlq", record_id), "original-traceparent")


@pytest.mark.parametrize(
    ("outcome", "code"), [("retried", RETRIED), ("deferred", DEFERRED), ("dead-lettered", REFUSED)]
)
def test_a_member_of_a_batch(system: Stack, caller: Caller, outcome: str, code: int) -> None:
    mock(system).fail_next(code)
    since = counted(system, outcome)
    member = Record(TOPIC, "x")
    with caller():
        send_many.delay([member])
    wait_counted(since, outcome)
    topic, name = (f"{TOPIC}-dlq", "original-traceparent") if code == REFUSED else (TOPIC, "traceparent")
    caller.check(headers_of(system, topic, member.id), name)


def test_a_parked_record_and_its_redrive(system: Stack, caller: Caller) -> None:
    with caller():
        sent = send.apply_async((TOPIC, "x"), expires=-1)
    system.wait_parked(1)
    with tracer.start_as_current_span("an operator's"):
        system.command("parked", "redrive", "--all", "--yes")
    caller.check(headers_of(system, TOPIC, sent.id))
    assert system.parked() == []
