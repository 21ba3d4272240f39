"""A record carries the trace in which it was sent, once, and costs nothing where nobody traces."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.propagators.textmap import TextMapPropagator, default_setter
from opentelemetry.sdk.trace import TracerProvider

from kafka_delivery import Record, dead_letter, send, send_many, settings
from kafka_delivery.base import wire_of
from kafka_delivery.tracing import passed_on, traced

tracer = TracerProvider().get_tracer("test")


def headers(record: Record) -> dict[str, bytes | None]:
    return dict(record.header_pairs)


def wired(record: Record) -> dict[str, bytes | None]:
    """Headers on the wire."""
    return headers(Record.from_wire(wire_of(record), "default"))


@pytest.fixture
def with_baggage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KAFKA_DELIVERY_TRACE_BAGGAGE", "true")
    settings.current.cache_clear()
    yield
    monkeypatch.undo()
    settings.current.cache_clear()


@pytest.fixture
def some_baggage() -> Iterator[None]:
    token = context.attach(baggage.set_baggage("user", "secret"))
    yield
    context.detach(token)


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


@pytest.mark.parametrize("name", ["traceparent", "tracestate"])
def test_a_record_with_a_trace_of_its_own_keeps_it(name: str, some_baggage: None, with_baggage: None) -> None:
    record = Record("orders", "x", headers={name: "mine"})
    with tracer.start_as_current_span("request"):
        assert traced(record) is record


def test_the_wire_carries_it() -> None:
    with tracer.start_as_current_span("request"):
        assert "traceparent" in wired(Record("orders", "x"))


@pytest.mark.parametrize("task", [send, send_many, dead_letter], ids=lambda task: task.name)
def test_what_a_delivery_task_sends_on_gets_none(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its span is a worker's."""
    monkeypatch.setattr(type(send.app), "current_worker_task", task)
    with tracer.start_as_current_span("worker"):
        assert wired(Record("orders", "x")) == {}
        own = Record("orders", "x", headers={"traceparent": "the caller's"})
        assert wired(own) == {"traceparent": b"the caller's"}


def test_a_task_of_the_applications_own_is_a_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(send.app), "current_worker_task", object())
    with tracer.start_as_current_span("task"):
        assert "traceparent" in wired(Record("orders", "x"))


def test_what_a_command_sends_on_gets_none() -> None:
    with tracer.start_as_current_span("command"):
        with passed_on():
            assert wired(Record("orders", "x")) == {}
        assert "traceparent" in wired(Record("orders", "x"))


def test_the_headers_are_w3cs_whatever_the_application_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(TextMapPropagator):
        def inject(self, carrier: Any, context: Any = None, setter: Any = default_setter) -> None:
            setter.set(carrier, "x-b3", "1")

        def extract(self, carrier: Any, context: Any = None, getter: Any = None) -> Any:
            return context

        fields = {"x-b3"}  # noqa: RUF012  # an attribute in the base class, too

    monkeypatch.setattr(propagate, "propagator", Other())
    with tracer.start_as_current_span("request"):
        assert list(headers(traced(Record("orders", "x")))) == ["traceparent"]


def test_baggage_stays_where_it_is(some_baggage: None) -> None:
    assert headers(traced(Record("orders", "x"))) == {}
    with tracer.start_as_current_span("request"):
        assert list(headers(traced(Record("orders", "x")))) == ["traceparent"]


def test_baggage_travels_where_a_setting_says_so(some_baggage: None, with_baggage: None) -> None:
    with tracer.start_as_current_span("request"):
        assert headers(traced(Record("orders", "x")))["baggage"] == b"user=secret"
        own = headers(traced(Record("orders", "x", headers={"baggage": "mine"})))
    assert own["baggage"] == b"mine"
    assert list(own) == ["baggage", "traceparent"]


def test_without_a_span_nothing_is_added() -> None:
    record = Record("orders", "x")
    assert traced(record) is record


def test_a_record_without_room_goes_without_its_trace(some_baggage: None, with_baggage: None) -> None:
    def filled(room: int) -> Record:
        return Record("orders", "x" * (1_000_000 - room - Record("orders", "").size))

    with tracer.start_as_current_span("request"):
        assert headers(traced(filled(0))) == {}
        both = traced(Record("orders", "")).size - Record("orders", "").size
        assert list(headers(traced(filled(both)))) == ["traceparent", "baggage"]
        assert list(headers(traced(filled(both - 1)))) == ["traceparent"], "the trace goes before baggage"


def test_where_opentelemetry_is_not_loaded_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record("orders", "x")
    with tracer.start_as_current_span("request"):
        monkeypatch.delitem(sys.modules, "opentelemetry.trace")
        assert traced(record) is record
