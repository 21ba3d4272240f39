"""`kafka-delivery trace` in this process, and its exit codes."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner

from kafka_delivery import settings
from kafka_delivery.redis_client import RedisClient
from kafka_delivery_worker.cli import cli
from kafka_delivery_worker.whereabouts import Whereabouts

PAYLOAD = "secret-payload"


DELIVERED, ON_ITS_WAY, DEAD, NOT_FOUND = 0, 3, 4, 5


def trace(message_id: str, *options: str, code: int) -> dict[str, Any]:
    """What the command tells programs; both they and people get no payload."""
    told = [CliRunner().invoke(cli, ["trace", message_id, *form, *options]) for form in (["--json"], [])]
    for one in told:
        assert one.exit_code == code, one.output
        assert PAYLOAD not in one.output
        assert message_id in one.stdout
    found: dict[str, Any] = json.loads(told[0].stdout)
    assert found["message_id"] == message_id
    return found


def place(message_id: str) -> Any:
    """The same without a process of its own, and of Redis only."""
    return Whereabouts(RedisClient(settings.current()), message_id).look()
