"""Values as JSON, as Django's encoder writes them, so that a model's fields need no conversion by hand.

The rules are `django.core.serializers.json.DjangoJSONEncoder`'s: datetimes as ISO 8601 with milliseconds and ``Z``
for UTC, timedeltas as ISO 8601 durations, `decimal.Decimal` and `uuid.UUID` as text, Django's lazy strings as the
text they stand for. Dataclasses become objects. NaN and infinities, which JSON does not have, are refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import json
import sys
import uuid
from typing import Any

from .errors import InvalidRecordError

JSON_REASONS = (
    "keys must be str, int, float, bool or None",
    "Out of range float values are not JSON compliant",
    "Circular reference detected",
)
"""What the json module says, as far as it quotes nothing."""


def to_json(value: Any) -> bytes:
    """`value` (dict, list, tuple or dataclass) as compact UTF-8 JSON.

    Raises:
        InvalidRecordError: with field ``value``, naming the type that JSON cannot carry; never quoting the value.
    """
    if not isinstance(value, dict | list | tuple) and not _is_dataclass(value):
        raise InvalidRecordError(
            "value", f"must be bytes, str, dict, list, dataclass or None, not {type(value).__name__}"
        )
    try:
        return json.dumps(value, default=_encode, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except InvalidRecordError:
        raise
    except UnicodeEncodeError:
        raise InvalidRecordError("value", "has text that is not valid Unicode: a lone surrogate has no UTF-8") from None
    except RecursionError:
        raise InvalidRecordError("value", "is nested too deeply for JSON") from None
    except Exception as error:  # a user's own class may raise anything, and quote what it holds
        text = str(error)
        known = next((reason for reason in JSON_REASONS if text.startswith(reason)), type(error).__name__)
        raise InvalidRecordError("value", f"cannot be written as JSON: {known}") from None


def _encode(value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        text = value.isoformat()
        if value.microsecond:
            text = text[:23] + text[26:]
        return text.removesuffix("+00:00") + "Z" if text.endswith("+00:00") else text
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, datetime.time):
        if value.utcoffset() is not None:
            raise InvalidRecordError("value", "has a time with a time zone, which JSON readers cannot place: no date")
        text = value.isoformat()
        return text[:12] if value.microsecond else text
    if isinstance(value, datetime.timedelta):
        return _duration(value)
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    if _is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if _is_lazy_text(value):
        return str(value)
    raise InvalidRecordError("value", f"cannot be written as JSON: it contains a {type(value).__name__}")


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_lazy_text(value: Any) -> bool:
    # Only a process that has loaded Django can hold such a string; this one must not load it.
    django = sys.modules.get("django.utils.functional")
    return django is not None and isinstance(value, django.Promise)


def _duration(value: datetime.timedelta) -> str:
    """ISO 8601, in the form of `django.utils.duration.duration_iso_string`."""
    sign = ""
    if value < datetime.timedelta(0):
        sign, value = "-", -value
    minutes, seconds = divmod(value.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{value.microseconds:06d}" if value.microseconds else ""
    return f"{sign}P{value.days}DT{hours:02d}H{minutes:02d}M{seconds:02d}{fraction}S"
