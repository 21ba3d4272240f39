"""What an absent queue says is told on, but for the messages that it quotes."""

from __future__ import annotations

import pytest
import redis
from redis.client import Pipeline

from kafka_delivery.base import words_of
from kafka_delivery.errors import EnqueueError
from kafka_delivery.faults import said_by, text_of

PAYLOAD = "secret-payload (in brackets) of pipeline"


@pytest.fixture
def quoting() -> redis.ResponseError:
    """An error of a pipeline as redis-py makes it: it quotes the beginning of the command."""
    error = redis.ResponseError("OOM command not allowed")
    Pipeline.annotate_exception(None, error, 1, ("LPUSH", "kafka-delivery", PAYLOAD))  # type: ignore[arg-type, no-untyped-call]
    assert "secret-payload" in str(error)
    return error


def test_no_command_is_quoted(quoting: redis.ResponseError) -> None:
    assert text_of(quoting) == "Command # 1 of pipeline caused error: OOM command not allowed"
    assert said_by(quoting) == f"ResponseError: {text_of(quoting)}"
    assert words_of(quoting) == said_by(quoting)
    assert "secret-payload" not in words_of(EnqueueError("m", said_by(quoting)))


def test_anything_else_is_told_whole() -> None:
    assert said_by(OSError("no route (to host)")) == "OSError: no route (to host)"
