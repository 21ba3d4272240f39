"""JSON, read fast: by orjson, and by the standard library what orjson does not take."""

from __future__ import annotations

import json
from typing import Any

import orjson


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none.
    """
    try:
        return orjson.loads(text)
    except ValueError:  # half a character, NaN: the standard library lets them pass, and they are parked by their names
        return json.loads(text)
