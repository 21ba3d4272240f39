"""What the tests of circuits share: settings of seconds, and what was counted."""

from __future__ import annotations

from kafka_delivery import circuit
from kafka_delivery_worker import counts
from stack import Stack

QUICK = {
    "STALL_S": 4,  # a machine that stands still for two seconds is no outage
    "RESET_TIMEOUT_S": 1,
    "RESET_TIMEOUT_MAX_S": 3,
    "RAMP_S": 1,
    "MESSAGE_TIMEOUT_MS": 60_000,
    "LINGER_MS": 0,
}


def outcomes(system: Stack, topic: str) -> dict[str, int]:
    return counts.read(system.redis).get(topic, {})


def state(topic: str | None = None) -> str:
    return circuit(topic).state
