"""Only a wrong shape is charged to a message; whatever else a process trips over is its own."""

from __future__ import annotations

import json
from typing import Any

import kombu
import pytest

from kafka_delivery_worker.shape import fault_of

BODY: list[Any] = [["t", "secret-payload"], {}, {"callbacks": None}]


def message(body: Any = BODY, content_type: Any = "application/json", **headers: Any) -> Any:
    raw = body if isinstance(body, str | bytes) else json.dumps(body)
    known = {"id": "one", "task": "kafka_delivery.send", **headers}
    return kombu.Message(
        body=raw,
        content_type=content_type,
        content_encoding="utf-8",
        headers=known,
        accept={"application/json"},
    )


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"body": [[], {}, None]},
        {"eta": "2026-01-01T00:00:00+00:00", "expires": "2026-01-01T00:00:00"},
        {"eta": None, "expires": None, "timelimit": [None, 5], "retries": 0},
        {"timelimit": None, "retries": None, "mine": object()},
    ],
)
def test_a_task_message_has_no_fault(good: dict[str, Any]) -> None:
    assert fault_of(message(**good)) is None


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("invalid", {"id": None}),
        ("invalid", {"id": 1}),
        ("invalid", {"task": ["kafka_delivery.send"]}),
        ("undecodable", {"content_type": None}),
        ("undecodable", {"content_type": "application/x-unheard-of"}),
        ("undecodable", {"content_type": "application/x-python-serialize"}),
        ("undecodable", {"body": "{secret-payload"}),
        ("undecodable", {"body": b"\xff\xfe"}),
        ("invalid", {"body": "null"}),
        ("invalid", {"body": {"args": []}}),
        ("invalid", {"body": [[], {}]}),
        ("invalid", {"body": [[], {}, None, None]}),
        ("invalid", {"body": ["text", {}, None]}),
        ("invalid", {"body": [[], [], None]}),
        ("invalid", {"body": [[], {}, []]}),
        ("invalid", {"eta": "never"}),
        ("invalid", {"eta": "9999-12-31T23:59:59-14:00"}),
        ("invalid", {"eta": 5}),
        ("invalid", {"expires": "never"}),
        ("invalid", {"expires": ["2026-01-01"]}),
        ("invalid", {"timelimit": 5}),
        ("invalid", {"timelimit": [5]}),
        ("invalid", {"timelimit": ["5", None]}),
        ("invalid", {"timelimit": [True, None]}),
        ("invalid", {"retries": "3"}),
        ("invalid", {"retries": True}),
    ],
    ids=str,
)
def test_a_wrong_part_is_named_and_nothing_is_quoted(kind: str, bad: dict[str, Any]) -> None:
    fault = fault_of(message(**bad))
    assert fault is not None
    assert fault.kind == kind
    assert "secret-payload" not in fault.why


def test_headers_that_are_none() -> None:
    broken = message()
    broken.headers = ["id"]
    assert fault_of(broken) is not None


def test_what_could_not_be_decompressed() -> None:
    broken = message()
    broken.errors.append((KeyError, KeyError("unheard-of"), None))
    fault = fault_of(broken)
    assert fault is not None
    assert (fault.kind, "KeyError" in fault.why) == ("undecodable", True)


def test_want_of_memory_is_the_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    starved = message()

    def decode() -> None:
        raise MemoryError

    monkeypatch.setattr(starved, "decode", decode)
    assert fault_of(starved) is None
