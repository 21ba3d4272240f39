"""Parked items as the tests of the commands make them, and the commands in this process."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from kafka_delivery import Record
from kafka_delivery.names import QUEUE
from kafka_delivery_worker.cli.parked import command
from kafka_delivery_worker.parking import Parked, ParkingStore, fingerprint
from stack import Stack

PAYLOAD = "secret-payload"


BINARY = b"\x00\xff"


def park(store: ParkingStore, item_id: str, topic: str = "orders", value: Any = PAYLOAD, **changes: Any) -> Parked:
    """A record whose dead-letter topic refused it."""
    record = Record(topic, value, changes.pop("key", "k"), changes.pop("headers", None), message_id=item_id)
    fields = {
        "kind": "dead-letter",
        "error_class": "RejectedError",
        "error_code": 10,
        "error_message": "too large",
        "topic": topic,
        **fingerprint(record.value_bytes),
        **changes,
    }
    item = Parked(id=item_id, content="record", data=record.to_wire("default"), **fields)
    store.park(item)
    return item


def run(*arguments: str, ok: bool = True, stdin: str | None = None) -> Result:
    done = CliRunner().invoke(command, [*arguments], input=stdin)
    assert not ok or done.exit_code == 0, done.output
    return done


def queued(system: Stack) -> list[str]:
    """Ids of what was sent again, in order."""
    return [json.loads(raw)["headers"]["id"] for raw in reversed(system.redis.lrange(QUEUE, 0, -1))]
