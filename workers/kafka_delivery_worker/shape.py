"""Whether a message has the shape of a Celery task message: the one kind of failure that is the message's own.

Celery's own code trips over a wrong shape with whatever exception comes up. A bug of ours, or a broken host, looks the
same from outside. So a message that was not taken is looked at here, part by part, and only a part that is wrong is
charged to it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from celery.utils.time import maybe_iso8601, maybe_make_aware

from kafka_delivery.base import MAX_MEMBERS, is_too_many
from kafka_delivery.marks import is_count
from kafka_delivery.names import SEND_MANY

from .decoding import MAX_DEPTH, MAX_DEPTH_OF_BODY, is_deeper
from .decompression import BodyTooLargeError, most_bytes

LONGEST_LIMIT_S = 1_000_000_000
"""Of a time limit; a timer takes no more than ten times that."""

COUNTS = ("retries", "replaced_task_nesting", "group_index")
TEXTS = ("shadow", "root_id", "parent_id", "group", "argsrepr", "kwargsrepr", "origin", "lang")
"""Headers of Celery's that it takes for such, without a look."""

CONTEXTS = ("called_directly", "is_eager", "_children", "_protected")
"""What Celery keeps of a running task beside its headers, under the same names."""

HIGHEST_PRIORITY = 255
"""That a broker knows."""


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
        return _of_body(message.errors[0][0])
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
    return _of_headers(headers)


def forged(message: Any) -> Fault | None:
    """Return what in `message` no worker may compute with, or cannot be written again; None if nothing is.

    Celery would take it for what it says, or trip over it only where its record is retried or parked. A priority that
    no broker knows is taken out: it decides nothing.
    """
    headers = message.headers
    fault = _of_headers(headers) if isinstance(headers, dict) else None
    if fault is not None:
        return fault
    priority = message.properties.get("priority")
    if priority is not None and not (type(priority) is int and 0 <= priority <= HIGHEST_PRIORITY):
        message.properties["priority"] = None
    if is_deeper(headers, MAX_DEPTH) or is_deeper(message.properties, MAX_DEPTH):
        return Fault("invalid", f"its headers are nested more than {MAX_DEPTH} deep")
    if is_too_large(message):
        return Fault("invalid", f"its batch has more than {most_bytes()} bytes")
    try:
        body = message.decode()
    except MemoryError:
        return None
    except Exception:  # of whatever serializer: Celery's handlers find out, too
        return None
    # Celery's older form of a message is an object.
    if is_deeper(list(body) if isinstance(body, tuple) else body, MAX_DEPTH_OF_BODY):
        return Fault("invalid", f"its arguments are nested more than {MAX_DEPTH_OF_BODY} deep")
    return _of_batch(body) if headers.get("task") == SEND_MANY else None


def _of_body(error: type[BaseException]) -> Fault:
    if issubclass(error, BodyTooLargeError):
        return Fault("invalid", f"its body has more than {most_bytes()} bytes, decompressed")
    return Fault("undecodable", f"its body cannot be decompressed: {error.__name__}")


def is_too_large(message: Any) -> bool:
    """Whether it is a batch of more bytes than any caller's, which is not even decoded."""
    return message.headers.get("task") == SEND_MANY and len(message.body) > most_bytes()


def _of_batch(body: Any) -> Fault | None:
    args, kwargs = (body[0], body[1]) if isinstance(body, list | tuple) and len(body) == 3 else ((), {})
    given = [*(args if isinstance(args, list | tuple) else ()), *(kwargs.values() if isinstance(kwargs, dict) else ())]
    if any(map(is_too_many, given)):
        return Fault("invalid", f"its batch has more than {MAX_MEMBERS} records")
    return None


def _of_headers(headers: dict[str, Any]) -> Fault | None:
    for name in ("eta", "expires"):
        if not _is_time(headers.get(name)):
            return Fault("invalid", f"its header {name} is no time that a clock can show")
    limits = headers.get("timelimit")
    if limits and not (isinstance(limits, list | tuple) and len(limits) == 2 and all(map(_is_limit, limits))):
        return Fault("invalid", "its header timelimit is not a pair of numbers of seconds")
    for name in COUNTS:
        if headers.get(name) is not None and not is_count(headers[name]):
            return Fault("invalid", f"its header {name} is no number of times")
    for name in TEXTS:
        if not isinstance(headers.get(name), str | None):
            return Fault("invalid", f"its header {name} is no text")
    if any(name in headers for name in CONTEXTS):
        return Fault("invalid", "its headers say what only a worker knows of a task that runs")
    stamped, stamps = headers.get("stamped_headers"), headers.get("stamps")
    if not (isinstance(stamped, list | tuple | None) and all(isinstance(name, str) for name in stamped or ())):
        return Fault("invalid", "its header stamped_headers is no list of names")
    if not isinstance(stamps, dict | None):
        return Fault("invalid", "its header stamps is no object")
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
    if value is None:
        return True
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= LONGEST_LIMIT_S
