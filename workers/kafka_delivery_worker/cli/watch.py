"""The live view of ``kafka-delivery status --watch``: the same facts, again and again, and what a second brings."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any

from amqp.exceptions import AMQPError
from kombu.exceptions import KombuError
from redis.exceptions import RedisError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kafka_delivery import settings

from .. import counts
from ..broker import BrokerError
from ..redis_faults import explained, sentence
from .output import table

EVERY_S = 1.0
"""How often is looked, at most. To wait for the workers' answers takes that long anyway."""

OVER_S = 10.0
"""Rates are of this time: workers write their counters once a second, and not all at once."""

MOST_TOPICS = 20
"""Of so many topics, the busiest, the rates are shown: a terminal has an end."""

REFRESHES = 2
"""A second, of the time since the last answer."""

FAULTS = (RedisError, KombuError, AMQPError, BrokerError, OSError)

Topics = dict[str, dict[str, int]]


@dataclass
class Rates:
    """What became of records, by topic and outcome, a second."""

    _seen: deque[tuple[float, Topics]] = field(default_factory=deque)

    def add(self, now: float, topics: Topics) -> None:
        """Counts since the beginning, as they are `now`."""
        self._seen.append((now, topics))
        while len(self._seen) > 2 and self._seen[1][0] <= now - OVER_S:
            self._seen.popleft()

    def by_topic(self) -> dict[str, dict[str, float]]:
        """The busiest topic first; counters that went back, say by FLUSHALL, count as none."""
        if len(self._seen) < 2:
            return {}
        (since, before), (now, after) = self._seen[0], self._seen[-1]
        rates = {
            topic: {
                outcome: max(0, count - before.get(topic, {}).get(outcome, 0)) / (now - since)
                for outcome, count in outcomes.items()
            }
            for topic, outcomes in after.items()
        }
        return dict(sorted(rates.items(), key=lambda one: -sum(one[1].values())))


class View:
    """What is on the screen: the last answer, and how old it is if the next one does not come.

    Args:
        now: draws what `status` found.
    """

    def __init__(self, now: Callable[[dict[str, Any]], Table]) -> None:
        self._now = now
        self._found: dict[str, Any] | None = None
        self._heard = monotonic()
        self._fault = ""
        self._rates = Rates()

    def found(self, found: dict[str, Any]) -> None:
        self._found, self._fault, self._heard = found, "", monotonic()
        self._rates.add(self._heard, found["topics"])

    def failed(self, error: Exception) -> None:
        if isinstance(error, RedisError | KombuError) and settings.current().queue_on_redis:
            self._fault = f"Redis: {explained(error, settings.current()).what}"  # a line is short
        else:
            self._fault = said(error)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        silent = monotonic() - self._heard
        if self._fault or silent > 3 * EVERY_S:
            why = self._fault or "no answer yet"
            parts.append(Text(f"No answer for {silent:,.0f} s ({why}); looking again.", style="bold red"))
        if self._found is not None:
            if parts:
                parts.append(Text("What was known last:"))
            parts += [self._now(self._found), self._rate_table()]
        elif not parts:
            parts.append(Text("Looking ..."))
        parts.append(Text("Ctrl-C ends this.", style="dim"))
        return Group(*parts)

    def _rate_table(self) -> Table:
        rates = self._rates.by_topic()
        rows = [
            (topic or "(none)", *(f"{outcomes[outcome]:,.1f}" for outcome in counts.OUTCOMES))
            for topic, outcomes in list(rates.items())[:MOST_TOPICS]
        ]
        if len(rates) > MOST_TOPICS:
            rows.append((f"and {len(rates) - MOST_TOPICS} more", *[""] * len(counts.OUTCOMES)))
        return table(f"A second, over the last {OVER_S:.0f}", ("topic", *counts.OUTCOMES), rows)


def said(error: Exception) -> str:
    """One of FAULTS in one line."""
    if isinstance(error, RedisError | KombuError):
        return sentence(error, settings.current())
    return f"{type(error).__name__}: {error}"


def answers(look: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any] | Exception]:
    """What each look finds, or why it finds nothing; without an end."""
    while True:
        began = monotonic()
        try:
            yield look()
        except FAULTS as error:
            yield error
        sleep(max(0.0, EVERY_S - (monotonic() - began)))


def show(out: Console, look: Callable[[], dict[str, Any]], now: Callable[[dict[str, Any]], Table]) -> None:
    """Keep looking until Ctrl-C."""
    view = View(now)
    try:
        with Live(view, console=out, refresh_per_second=REFRESHES):
            for answer in answers(look):
                if isinstance(answer, Exception):
                    view.failed(answer)
                else:
                    view.found(answer)
    except KeyboardInterrupt:
        return
