"""Whether a message has the shape of a Celery task message: the one kind of failure that is the message's own.

Celery's own code trips over a wrong shape with whatever exception comes up. A bug of ours, or a broken host, looks the
same from outside. So a message that was not taken is looked at here, part by part, and only a part that is wrong is
charged to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from celery.utils.time import maybe_iso8601, maybe_make_aware


class Fault(NamedTuple):
    """What is wrong with a message.

    Attributes:
        kind: see `parking.KINDS`: ``undecodable`` where its bytes cannot be decoded, else ``invalid``.
        why: in words; nothing of the message is quoted.
    """

    kind: str
    why: str


def fault_of(message: Any) -> Fault | None:
    """Return what is wrong with the shape of `message`; None if nothing is (celery/worker/request.py, strategy.py)."""
    headers = message.headers
    if not isinstance(headers, dict):
        return Fault("invalid", "its headers are no object")
    for name in ("id", "task"):
        if not isinstance(headers.get(name), str):
            return Fault("invalid", f"its header {name} is missing or no text")
    if message.errors:
        return Fault("undecodable", f"its body cannot be decompressed: {message.errors[0][0].__name__}")
    if not isinstance(message.content_type, str):
        return Fault("undecodable", "it does not say how its body is encoded")
    try:
        body = message.decode()
    except MemoryError:  # the process's
        return None
    except Exception as error:  # of whatever serializer; what it says may quote the body
        return Fault("undecodable", f"its body cannot be decoded: {type(error).__name__}")
    if not isinstance(body, list | tuple) or len(body) != 3:
        return Fault("invalid", "its body is not a list of arguments, keyword arguments and the rest")
    args, kwargs, embed = body
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        return Fault("invalid", "its arguments are not a list and an object")
    if embed is not None and not isinstance(embed, dict):
        return Fault("invalid", "what it asks of Celery is no object")
    for name in ("eta", "expires"):
        if not _is_time(headers.get(name)):
            return Fault("invalid", f"its header {name} is no time that a clock can show")
    limits = headers.get("timelimit")
    if limits and not (isinstance(limits, list | tuple) and len(limits) == 2 and all(map(_is_limit, limits))):
        return Fault("invalid", "its header timelimit is not a pair of numbers")
    retries = headers.get("retries")
    if retries is not None and type(retries) is not int:
        return Fault("invalid", "its header retries is no number")
    return None


def _is_time(value: Any) -> bool:
    if value is None:
        return True
    try:
        at = maybe_make_aware(maybe_iso8601(value))
        return at.timestamp() is not None and at.utctimetuple() is not None
    except (AttributeError, ValueError, TypeError, OverflowError):
        return False


def _is_limit(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
