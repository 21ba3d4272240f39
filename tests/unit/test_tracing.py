"""A record carries the trace in which it was sent, once, and costs nothing where nobody traces."""

from __future__ import annotations

import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from kafka_delivery import Record
from kafka_delivery.base import wire_of
from kafka_delivery.tracing import traced

tracer = TracerProvider().get_tracer("test")


def headers(record: Record) -> dict[str, bytes | None]:
    return dict(record.header_pairs)


def test_the_current_span_travels_in_the_headers() -> None:
    with tracer.start_as_current_span("request") as span:
        record = traced(Record("orders", "x", headers={"mine": "1"}))
    trace_id = trace.format_trace_id(span.get_span_context().trace_id).encode()
    assert trace_id in (headers(record)["traceparent"] or b"")
    assert headers(record)["mine"] == b"1"


def test_a_retry_in_another_span_keeps_the_first() -> None:
    with tracer.start_as_current_span("request"):
        first = traced(Record("orders", "x"))
    with tracer.start_as_current_span("worker"):
        assert traced(first) == first


def test_the_wire_carries_it() -> None:
    with tracer.start_as_current_span("request"):
        wire = wire_of(Record("orders", "x"))
    assert "traceparent" in [name for name, _ in Record.from_wire(wire, "default").header_pairs]


def test_without_a_span_nothing_is_added() -> None:
    record = Record("orders", "x")
    assert traced(record) is record


def test_a_record_without_room_goes_without_its_trace() -> None:
    record = Record("orders", "x" * (1_000_000 - Record("orders", "").size))
    with tracer.start_as_current_span("request"):
        assert traced(record) is record


def test_where_opentelemetry_is_not_loaded_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record("orders", "x")
    with tracer.start_as_current_span("request"):
        monkeypatch.delitem(sys.modules, "opentelemetry.trace")
        assert traced(record) is record
