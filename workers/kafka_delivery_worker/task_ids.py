"""The task id in a message as it lies in Redis, found as text.

The message may be anybody's: another client's JSON, garbage, or what killed whoever decoded it. Headers may hold the
name too, where a caller writes what he likes; Celery writes its own behind them. So the last one counts that a text
follows.
fronts.lua looks for it by the same rule, so that nothing large leaves Redis.
"""

from __future__ import annotations

import json
import re

from kafka_delivery.record import MAX_MESSAGE_ID

NAME = b'"correlation_id"'

LOOKS = 100
"""Places of one message that are looked at, from its end."""

LOOKED_AT = 8 * MAX_MESSAGE_ID
"""Bytes that an id may take: JSON writes a character as six at most."""

_TEXT_FOLLOWS = re.compile(rb'[ \t\r\n]*:[ \t\r\n]*(?=")')


def id_in(message: bytes) -> str:
    """Return the task id that a message says it has; "" for none."""
    end = len(message)
    for _ in range(LOOKS):
        end = message.rfind(NAME, 0, end)
        if end < 0:
            return ""
        follows = _TEXT_FOLLOWS.match(message, end + len(NAME))
        if follows:
            return read_id(message[follows.end() : follows.end() + LOOKED_AT])
    return ""


def read_id(text: bytes) -> str:
    """Return the text that JSON begins with; "" if it is none."""
    try:
        found, _ = json.JSONDecoder().raw_decode(text.decode(errors="replace"))
    except ValueError:
        return ""
    return found if isinstance(found, str) else ""
