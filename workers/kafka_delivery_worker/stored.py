"""The form of a parked item in Redis, read with every doubt: anybody who can write there may have written it.

What passes has the types and ranges that the commands compute with. What does not is a damaged item: it is shown as it
lies, and can be discarded.
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable
from typing import Any

from kombu.utils.json import loads

from kafka_delivery.record import MAX_TIMESTAMP_MS, unpack

from .decoding import MAX_DEPTH, MAX_DEPTH_OF_BODY, is_deeper

LARGEST = 2**53
"""Of numbers: beyond it other readers of JSON round them."""


class DamagedError(ValueError):
    """Raised for what is no parked item; the text says why, and quotes nothing of it."""


def fields_of(stored: bytes) -> dict[str, Any]:
    """The fields of `Parked` in what lies in Redis, without its id. What is not known to this version is left out.

    Raises:
        DamagedError: a field is missing, or is not what it must be.
    """
    fields = _json(stored, "it")
    if type(fields) is not dict:
        raise DamagedError("it is no object")
    known = {name: fields[name] for name in _FIELDS if name in fields}
    for name, (is_right, needed) in _FIELDS.items():
        if needed and name not in known:
            raise DamagedError(f"it has no {name}")
        if name in known and not is_right(known[name]):
            raise DamagedError(f"its {name} is not what it must be")
    at = f'"parked_at_ms": {known["parked_at_ms"]}'.encode()
    if at + b"," not in stored and at + b"}" not in stored:  # the scripts look for it as text
        raise DamagedError("no worker wrote it so")
    known["data"] = _interpreted(known["data"], "data")
    if known.get("asked") is not None:
        known["asked"] = _interpreted(known["asked"], "asked")
        if type(known["asked"]) is not dict:
            raise DamagedError("what it asks of Celery is no object")
    if not _CONTENTS[known["content"]](known["data"]):
        raise DamagedError(f"it holds no {known['content']}, or one of a newer version")
    return known


def _json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DamagedError(f"{what} is no JSON that Python reads") from None


def _interpreted(text: str, what: str) -> Any:
    """As kombu reads it, or, of what it would interpret and cannot, as it is."""
    try:
        value = loads(text)
    except (ValueError, RecursionError):
        value = _json(text, what)
    except Exception:  # of whatever type it makes of it
        value = _json(text, what)
    if is_deeper(value, MAX_DEPTH + MAX_DEPTH_OF_BODY):
        raise DamagedError(f"its {what} is nested too deeply")
    return value


# -- what a field must be
def _text(value: Any) -> bool:
    return type(value) is str


def _text_or_none(value: Any) -> bool:
    return value is None or type(value) is str


def _number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _number_or_none(value: Any) -> bool:
    return value is None or _number(value)


def _code(value: Any) -> bool:
    return value is None or (type(value) is int and -(2**31) <= value < 2**31)


def _time(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TIMESTAMP_MS


def _is_record(data: Any) -> bool:
    try:
        _, _, topic, value, key, headers, partition, timestamp, message_id = data
        parts = [value, key, *(packed for _, packed in headers)]
        texts = [topic, message_id, *(name for name, _ in headers)]
        return (
            all(isinstance(unpack(part), bytes | None) for part in parts)
            and all(map(_text, texts))
            and _number_or_none(partition)
            and _time(timestamp)
        )
    except (ValueError, TypeError):
        return False


def _is_call(data: Any) -> bool:
    return (
        type(data) is dict
        and _text(data.get("task"))
        and _text(data.get("id"))
        and type(data.get("args")) is list
        and type(data.get("kwargs")) is dict
    )


def _is_message(data: Any) -> bool:
    return (
        type(data) is dict
        and _text_or_none(data.get("queue"))
        and (_text(data.get("raw")) or _is_base64(data.get("base64")) or type(data.get("envelope")) is dict)
    )


def _is_base64(text: Any) -> bool:
    try:
        return type(text) is str and b64decode(text, validate=True) is not None
    except ValueError:
        return False


_CONTENTS: dict[str, Callable[[Any], bool]] = {"record": _is_record, "call": _is_call, "message": _is_message}

_FIELDS: dict[str, tuple[Callable[[Any], bool], bool]] = {
    # What it must be, and whether it must be there: older versions wrote fewer.
    "kind": (_text, True),
    "error_class": (_text, True),
    "error_message": (_text, True),
    "content": (lambda value: type(value) is str and value in _CONTENTS, True),
    "data": (_text, True),
    "error_code": (_code, False),
    "retry_count": (_number, False),
    "redrive_count": (_number, False),
    "topic": (_text_or_none, False),
    "parked_at_ms": (_time, True),
    "size": (_number_or_none, False),
    "sha256": (_text_or_none, False),
    "asked": (_text_or_none, False),
}
