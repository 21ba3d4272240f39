"""JSON and base64, read fast, and by the standard library what fast readers do not take."""

from __future__ import annotations

import json
from binascii import Error, a2b_base64
from typing import Any

import orjson
import pybase64

MAX_DEPTH = 64
"""Of objects and lists in an envelope. Ours has four; a tracing tool's header adds a few."""

MAX_DEPTH_OF_BODY = 500
"""Of a message's arguments. Python's JSON writes twice as many, and what is parked has the arguments inside."""


def is_deeper(value: Any, depth: int) -> bool:
    """Whether objects and lists lie in each other more than `depth` deep."""
    level = [value]
    for _ in range(depth):
        inner: list[Any] = []
        for one in level:
            if type(one) is dict:
                inner += [each for each in one.values() if type(each) in (dict, list)]
            elif type(one) is list:
                inner += [each for each in one if type(each) in (dict, list)]
        if not inner:
            return False
        level = inner
    return True


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none.
        RecursionError: it is nested too deeply for Python.
    """
    try:
        return orjson.loads(text)
    except ValueError:  # half a character, NaN: the standard library lets them pass, and they are parked by their names
        return json.loads(text)


def unbase64(text: str | bytes) -> bytes:
    """The bytes of a base64 text.

    Raises:
        ValueError: it is none.
    """
    try:
        return pybase64.b64decode(text, validate=True)
    except Error:  # line breaks and other strays, which the standard library skips
        return a2b_base64(text)
