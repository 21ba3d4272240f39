"""Which dead letters, or which parked items, a command is about: its options, and the question that they make.

`Filter` asks nothing of what it looks at but attributes, so that every command which lists failures takes the same
options and means the same by them.
"""

from __future__ import annotations

import functools
import re
import time
from base64 import b64decode
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import click

from ..classify import code_of

UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}

BASE64 = "base64:"
"""Before a key or a header's value on the command line that is no text."""


class Failed(Protocol):
    """What a filter looks at. What is not known of it is None, and fits only where nothing is asked of it."""

    @property
    def at_ms(self) -> int:
        """When it failed, in milliseconds since the epoch."""

    @property
    def topic(self) -> str | None:
        """The original topic."""

    @property
    def error_class(self) -> str | None: ...

    @property
    def error_code(self) -> int | None: ...

    @property
    def message_id(self) -> str | None: ...

    @property
    def key(self) -> bytes | None: ...

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """The record's own, without the prefix that they have in a dead letter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """All that is asked must hold; of several values for one question any will do, but each header must be there.

    Attributes:
        since_ms, until_ms: when it failed: from the one on, and before the other (ms since the epoch).
        topics, kinds, error_classes, error_codes, message_ids, keys: one of these, where there are any.
        headers: pairs of name and value that it must have; None for any value.
    """

    since_ms: int | None = None
    until_ms: int | None = None
    topics: Collection[str] = ()
    kinds: Collection[str] = ()
    error_classes: Collection[str] = ()
    error_codes: Collection[int] = ()
    message_ids: Collection[str] = ()
    keys: Collection[bytes] = ()
    headers: Collection[tuple[str, bytes | None]] = ()

    @property
    def asks(self) -> bool:
        """Whether anything is asked; if not, everything fits."""
        return self != Filter()

    def __call__(self, found: Failed) -> bool:
        """Whether `found` is meant. It has a `kind` too, where `kinds` are asked for."""
        return (
            (self.since_ms is None or found.at_ms >= self.since_ms)
            and (self.until_ms is None or found.at_ms < self.until_ms)
            and _one_of(self.topics, found.topic)
            and (not self.kinds or _one_of(self.kinds, found.kind))  # type: ignore[attr-defined]  # parked items have
            and _one_of(self.error_classes, found.error_class)
            and _one_of(self.error_codes, found.error_code)
            and _one_of(self.message_ids, found.message_id)
            and (not self.keys or found.key in self.keys)
            and (not self.headers or _has_all(found.headers, self.headers))
        )


def _one_of(wanted: Collection[Any], value: Any) -> bool:
    return not wanted or value in wanted


def _has_all(headers: Sequence[tuple[str, bytes | None]], wanted: Collection[tuple[str, bytes | None]]) -> bool:
    return all(any(name == n and value in (None, v) for n, v in headers) for name, value in wanted)


class Moment(click.ParamType[int]):
    """A moment in milliseconds since the epoch: ISO 8601, in UTC where no zone is said, or so long ago."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return moment_ms(value, time.time_ns() // 1_000_000)
        except ValueError:
            self.fail(f"{value!r} is no time: say 2026-03-01T09:30, 2026-03-01, or 2h for two hours ago", param, ctx)


def moment_ms(text: str, now_ms: int) -> int:
    """The moment of `Moment`'s text.

    Raises:
        ValueError: it is none.
    """
    ago = re.fullmatch(r"(\d+)([smhdw])", text.strip())
    if ago:
        return now_ms - int(ago[1]) * UNITS_MS[ago[2]]
    moment = datetime.fromisoformat(text.strip())
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


class ErrorCode(click.ParamType[int]):
    """Kafka's error code, by its number or its name."""

    name = "code"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if re.fullmatch(r"-?[0-9]{1,9}", value.strip()):
            return int(value)
        code = code_of(value.strip().upper())
        if code is None:
            self.fail(f"{value!r} is no error code: say 10 or MSG_SIZE_TOO_LARGE; docs/errors.md has all", param, ctx)
        return code


class Data(click.ParamType[bytes]):
    """Bytes: text as UTF-8, or base64 behind `BASE64`."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if not value.startswith(BASE64):
            return bytes(value.encode())
        try:
            return b64decode(value.removeprefix(BASE64), validate=True)
        except ValueError:
            self.fail(f"what follows {BASE64} is no base64", param, ctx)


class Header(click.ParamType[tuple[str, bytes | None]]):
    """A header: name=value, or the name alone for any value."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, bytes | None]:
        name, equals, text = value.partition("=")
        if not name:
            self.fail(f"{value!r} has no name: say name=value", param, ctx)
        return name, Data().convert(text, param, ctx) if equals else None


_OPTIONS = (
    click.option("--since", "since_ms", type=Moment(), help="From then on: ISO 8601 (UTC), or 2h for two hours ago."),
    click.option("--until", "until_ms", type=Moment(), help="Before that."),
    click.option("--error-class", "error_classes", multiple=True, help="RejectedError, RetriesExhaustedError, ..."),
    click.option("--error-code", "error_codes", multiple=True, type=ErrorCode(), help="Kafka's number or its name."),
    click.option("--key", "keys", multiple=True, type=Data(), help=f"The record's key; a binary one as {BASE64}..."),
    click.option("--header", "headers", multiple=True, type=Header(), help="name=value, or name; all that are said."),
    click.option("--message-id", "message_ids", multiple=True, help="The record's message id."),
)

topic_option = click.option("--topic", "topics", multiple=True, help="The original topic.")


def filter_options(*more: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of a `Filter`, and the filter as its argument `chosen`.

    Args:
        more: options for further fields, as `topic_option`; they come first.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**arguments: Any) -> Any:
            asked = {name: arguments.pop(name) for name in Filter.__slots__ if name in arguments}
            return function(**arguments, chosen=Filter(**asked))

        for option in reversed((*more, *_OPTIONS)):
            command = option(command)
        return command

    return decorate
