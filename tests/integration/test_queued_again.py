"""What a worker queues again says what the message before it said, and no more: other tools nest headers of their own
in it, and trace the worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from celery import states
from opentelemetry.sdk.trace import TracerProvider

from kafka_delivery import Record, RetriableError, UnavailableError, send
from kafka_delivery.names import DEFERRALS, PROBE, REDRIVES, RELEASED, REVIVED
from kafka_delivery_worker.embedded import Valkey
from one_task import TOPIC, Engine, queued, run, take, working

MARKS = {DEFERRALS: 2, REDRIVES: 3, REVIVED: True, PROBE: "cluster|t", RELEASED: True}
NESTED = {"sentry-trace": "1-2-1", "baggage": "a=b"}
RETRIED = RetriableError("FENCED_LEADER_EPOCH", TOPIC, "a", 74, "FENCED_LEADER_EPOCH", "topic")
DEFERRED = UnavailableError("no broker", TOPIC, "a", -195, "_TRANSPORT", "cluster")


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as valkey:
        yield valkey


@pytest.fixture
def engine(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    with working(valkey.url, monkeypatch) as engine:
        yield engine


@pytest.fixture
def client(valkey: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as client:
        yield client


@pytest.mark.parametrize(
    ("error", "deferrals"), [(RETRIED, 2), (DEFERRED, 3)], ids=["an attempt is used", "none is used"]
)
@pytest.mark.parametrize(
    "nested",
    [{}, {"headers": NESTED}, {"headers": {**NESTED, **MARKS, DEFERRALS: 1, PROBE: "forged"}}],
    ids=["plain", "nested", "nested and copied"],
)
def test_its_marks(
    engine: Engine, client: redis.Redis, error: Exception, deferrals: int, nested: dict[str, Any]
) -> None:
    send.apply_async((TOPIC, "x"), task_id="a", ignore_result=True, priority=0)
    message = take(client)
    message["headers"] |= {**MARKS, **nested}
    engine.fail = error
    assert run(message)[0] == states.RETRY
    assert engine.asked == [("cluster|t", 3)]
    (again,) = queued(client)
    marks = {name: again["headers"].get(name) for name in MARKS}
    assert marks == {DEFERRALS: deferrals, REDRIVES: 3, REVIVED: True, PROBE: None, RELEASED: None}
    assert not set(again["headers"].get("headers") or {}) & {PROBE, RELEASED}


@pytest.mark.parametrize("error", [RETRIED, DEFERRED], ids=["an attempt is used", "none is used"])
@pytest.mark.parametrize("own", [{}, {"traceparent": "the caller's"}], ids=["of an untraced caller", "of a traced one"])
def test_its_trace(engine: Engine, client: redis.Redis, error: Exception, own: dict[str, str]) -> None:
    send.apply_async((Record(TOPIC, "x", headers=own, message_id="a"),), priority=0)
    engine.fail = error
    with TracerProvider().get_tracer("test").start_as_current_span("of a worker"):
        assert run(take(client))[0] == states.RETRY
    engine.fail = None
    sent: list[Record] = []
    deliver = engine.deliver
    engine.deliver = lambda record, *more: sent.append(record) or deliver(record, *more)  # type: ignore[method-assign,func-returns-value]
    assert run(take(client))[0] == states.SUCCESS
    assert dict(sent[0].header_pairs) == {name: value.encode() for name, value in own.items()}
