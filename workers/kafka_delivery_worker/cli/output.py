"""How commands print: tables and sentences for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead, for programs.")


def console() -> Console:
    """Standard output; rich leaves colours out where it is not a terminal."""
    to_person = sys.stdout.isatty()
    # A log or a pipe has no width to fit in; an id may look like the name of an emoji.
    return Console(highlight=False, emoji=False, width=None if to_person else 200)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table; what comes from users is shown as it is, never read as markup."""
    drawn = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        drawn.add_column(name, overflow="fold", no_wrap=place == 0)  # the first is what people copy
    for row in rows:
        drawn.add_row(*(Text("" if cell is None else visible(str(cell))) for cell in row))
    return drawn


def visible(text: str) -> str:
    """`text` with what a terminal would act on made visible; only lines and tabs stay."""
    return "".join(one if one.isprintable() or one in "\n\t" else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    code = ord(one)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def print_json(value: Any) -> None:
    """One JSON value on one line: a listing is one such line per item."""
    click.echo(json_line(value))


def json_line(value: Any) -> str:
    """A JSON value on one line. What a terminal would act on, or is no character, is escaped as JSON does it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)


def moment(ms: int) -> str:
    """Milliseconds since the epoch as ISO 8601 in UTC, to the second; the number, where no calendar has that moment."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms"
