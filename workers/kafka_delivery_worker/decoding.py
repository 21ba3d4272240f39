"""JSON and base64, read fast, and by the standard library what fast readers do not take."""

from __future__ import annotations

import json
from binascii import Error, a2b_base64
from typing import Any

import orjson
import pybase64


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none.
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
