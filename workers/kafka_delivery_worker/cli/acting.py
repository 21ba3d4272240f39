"""What commands that act on many things have in common: a rate, a bar that shows how far it is, a clean end."""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Self, TextIO, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kafka_delivery.names import PARKED_LOCK, is_topic_name
from kafka_delivery.redis_client import RedisClient

from ..broadcast import Broadcast
from ..run_lock import RunLock

Item = TypeVar("Item")


class Rate(click.ParamType[float]):
    """So many in a second, minute or hour; as a number of a second."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(?:/([smh]))?", value.strip())
        if not found or not float(found[1]):
            self.fail(f"{value!r} is no rate: say 200/s, 30/m or 500/h", param, ctx)
        return float(found[1]) / {None: 1, "s": 1, "m": 60, "h": 3600}[found[2]]


class Topic(click.ParamType[str]):
    """A name that a topic can have."""

    name = "topic"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_topic_name(value):
            self.fail(f"{value!r} is no name of a topic", param, ctx)
        return str(value)


class Pace:
    """Lets things begin no faster than so many a second, evenly.

    Args:
        rate: that number; None for as fast as they go.
    """

    def __init__(self, rate: float | None) -> None:
        self._every_s = 1 / rate if rate else 0.0
        self._due = monotonic()

    def wait(self, stop: Broadcast) -> None:
        """Wait until the next may begin, or `stop` is sent."""
        self._due = max(self._due, monotonic() - self._every_s)  # what was slow for itself is not made up for at once
        pause = self._due - monotonic()
        if pause > 0:
            stop.wait(pause)
        self._due += self._every_s


class Signals:
    """SIGINT and SIGTERM end a run where it is clean; a second one ends it at once. A context manager."""

    def __init__(self) -> None:
        self.told = Broadcast()
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.number = number
        self.told.send()
        self.__exit__()


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar for people, on standard error; yields what moves it to a count, with a word on what it waits for."""
    err = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[why]}"),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total, why="")

        def advance(count: int, why: str = "") -> None:
            bar.update(task, completed=count, why=why)

        yield advance


def counted(items: Iterable[Item], tell: Callable[[int], None]) -> Iterator[Item]:
    """`items`; `tell` is called with how many there were so far, now and then, and when all are through."""
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        if not count % 1000:
            tell(count)
    tell(count)


def parking_lock(redis: RedisClient, command: str) -> RunLock:
    """One command at a time acts on parked items: two would send each twice, or discard what is being sent.

    Raises:
        NotAloneError: on entry: another one runs; the text says who.
    """
    return RunLock(redis, "the parking store", key=PARKED_LOCK, command=command)


class AuditHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is at the moment: above a progress bar while there is one."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)
