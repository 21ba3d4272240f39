"""Ten thousand different records, the same in every process: what is sent can be known where it is read."""

from __future__ import annotations

import json
import random
from typing import Any

Sent = dict[str, Any]


def sends(count: int, topic: str) -> list[Sent]:
    """`count` calls of `send.delay`, as keyword arguments."""
    return [_send(number, topic) for number in range(count)]


def expected(sent: Sent) -> tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]], int]:
    """Key, value, headers and timestamp with which it must arrive."""
    value = sent["value"]
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    headers = [("message-id", sent["message_id"]), *sent["headers"]]
    return _bytes(sent["key"]), _bytes(value), [(name, _bytes(data)) for name, data in headers], sent["timestamp"]


def _send(number: int, topic: str) -> Sent:
    dice = random.Random(number)
    size = dice.choice((0, 1, 10, 200, 200, 200, 2_000, 20_000)) if number % 1000 else 900_000
    return {
        "topic": topic,
        "value": dice.choice((_binary, _text, _object, _array, _nothing))(dice, size),
        "key": dice.choice((None, b"", f"k{number % 97}", _binary(dice, 12))),
        "headers": [
            (dice.choice(("a", "b", "x-trace", "gr\u00f6\u00dfe")), dice.choice((None, "", "v", _binary(dice, 9))))
            for _ in range(dice.randrange(4))
        ],
        "partition": dice.choice((None, None, 0, 3)),
        "timestamp": 1_700_000_000_000 + number,
        "message_id": f"m{number}",
    }


def _binary(dice: random.Random, size: int) -> bytes:
    return dice.randbytes(size)


def _text(dice: random.Random, size: int) -> str:
    return "".join(dice.choices('abc \u00e4\u20ac\U0001f600\n"\\', k=size // 4))


def _object(dice: random.Random, size: int) -> dict[str, Any]:
    return {"__type__": "x", "__value__": dice.random(), "text": "\u00fc" * (size // 2), "none": None}


def _array(dice: random.Random, size: int) -> list[Any]:
    return [dice.randrange(1000) for _ in range(size // 4)]


def _nothing(dice: random.Random, size: int) -> None:
    return None


def _bytes(data: str | bytes | None) -> bytes | None:
    return data.encode() if isinstance(data, str) else data
