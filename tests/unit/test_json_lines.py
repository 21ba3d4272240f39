"""A line of the JSON log has the fields of what was logged."""

from __future__ import annotations

import json
import logging
from typing import Any

from kafka_delivery_worker.logs import JsonLines


def formatted(message: str, *values: object, name: str = "kafka_delivery.x", **more: Any) -> dict[str, Any]:
    record = logging.LogRecord(name, logging.INFO, "path", 1, message, values, None)
    record.__dict__.update(more)
    made: dict[str, Any] = json.loads(JsonLines().format(record))
    return made


class TestFields:
    def test_are_those_of_the_line(self) -> None:
        made = formatted("a.b count=%d share=%.2f name=%r none=%s free %s at=%s", 3, 0.5, "x y", None, "skipped", [1])
        assert made["event"] == "a.b"
        assert made["message"] == "a.b count=3 share=0.50 name='x y' none=None free skipped at=[1]"
        assert [made[name] for name in ("count", "share", "name", "none", "at")] == [3, 0.5, "x y", None, "[1]"]

    def test_of_others_are_not_guessed(self) -> None:
        assert "event" not in formatted("a.b count=%d", 3, name="someone.else")

    def test_what_celery_adds_is_left_out(self) -> None:
        assert "secret" not in json.dumps(formatted("received", name="celery", data={"args": "secret"}))
