"""What a Celery message says to our own workers: read and written here and nowhere else.

Marks are headers of the message. Tracing tools put a dictionary of their own among these, under the key ``headers``,
and Celery then shows a task that dictionary in place of the message's headers (celery/app/task.py, `Context`). Some
of them, as Sentry's SDK, copy our marks into it as well. So marks are written into the outer headers, and read there
first; a copy in the inner dictionary counts only where the outer headers say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .names import DEFERRALS, PROBE, REDRIVES, RELEASED, REVIVED

LASTING = (DEFERRALS, REDRIVES, REVIVED)
"""Marks that a message keeps when it is queued again."""

FLEETING = (PROBE, RELEASED)
"""Marks of a worker to itself, for one attempt; those that come with a message are a stranger's."""

_MARKS = frozenset((*LASTING, *FLEETING))

MAX_COUNT = 1_000_000
"""Of a mark that counts, and of Celery's retries. A second each is eleven days: what is more, nobody counted."""


def mark_of(source: Any, mark: str) -> Any:
    """Return what a message says under `mark`; None where it says nothing.

    Args:
        source: a message's headers, Celery's dictionary of a request, or the request of a running task.
        mark: its name.
    """
    # Several times for each record: a look at its exact type costs a third of one at `Mapping`.
    headers = source if type(source) is dict or isinstance(source, Mapping) else vars(source)
    found = headers.get(mark)
    if found is None:
        inner = headers.get("headers")
        if inner is not None and isinstance(inner, Mapping):
            found = inner.get(mark)
    return found


def count_of(source: Any, mark: str) -> int:
    """As `mark_of`, of a mark that counts; 0 for what is no plausible count, which no worker of ours wrote."""
    count = mark_of(source, mark)
    return count if is_count(count) else 0


def is_count(value: Any) -> bool:
    """Whether a worker may compute with `value` as with a number of times."""
    return type(value) is int and 0 <= value <= MAX_COUNT


def is_revived(source: Any) -> bool:
    """Whether an operator sends a message again, whatever revoked it before."""
    return mark_of(source, REVIVED) is True


def marked(marks: Mapping[str, Any], headers: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return headers for a publish with these marks, and without any other.

    Args:
        marks: by name; None for one that is not there.
        headers: other people's headers that are to stay; they are not changed.
    """
    kept = {name: value for name, value in (headers or {}).items() if name not in _MARKS}
    inner = kept.get("headers")
    if isinstance(inner, Mapping):
        kept["headers"] = {name: value for name, value in inner.items() if name not in _MARKS}
    return kept | {name: value for name, value in marks.items() if value is not None}


def marked_again(request: Any, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the headers under which the message of a running task is queued again: its lasting marks stay.

    Args:
        request: the task's.
        changes: marks that differ from then on.
    """
    lasting = {mark: count_of(request, mark) or None for mark in (DEFERRALS, REDRIVES)}
    lasting[REVIVED] = True if is_revived(request) else None
    return marked(lasting | dict(changes or {}), request.headers)


def drop_fleeting(headers: dict[str, Any]) -> None:
    """Remove the marks of a message that only this process may give it."""
    inner = headers.get("headers")
    for mark in FLEETING:
        headers.pop(mark, None)
        if type(inner) is dict:
            inner.pop(mark, None)
