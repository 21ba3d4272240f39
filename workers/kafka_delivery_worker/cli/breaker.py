"""``kafka-delivery breaker``: how the fleet's circuits are, what they did, and how to overrule them."""

from __future__ import annotations

import getpass
import re
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click
from rich.live import Live
from rich.table import Table

from kafka_delivery import settings
from kafka_delivery.circuits import CLOSED, OPEN, Circuit, known_topics, read
from kafka_delivery.names import CLUSTER_SCOPE, TOPIC_SCOPE, is_topic_name
from kafka_delivery.redis_client import RedisClient

from ..breaker.rules import Rules
from ..breaker.store import CircuitStore
from .output import console, json_option, moment, print_json, table

LOOK_S = 0.5
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

topic_option = click.option("--topic", help="The circuit of this topic; by default the cluster's.")
reason_option = click.option("--reason", required=True, help="Why; kept in the history, for the next one who looks.")


@click.group()
def command() -> None:
    """Show and overrule the circuit breaker that all workers share."""


@command.command()
@click.option("--watch", is_flag=True, help="Keep looking, until Ctrl-C.")
@json_option
def show(watch: bool, as_json: bool) -> None:
    """Show the circuit of the cluster, and of each topic that has had trouble of its own lately."""
    redis = RedisClient(settings.current())
    if as_json:
        while True:
            for one in circuits(redis):
                print_json(asdict(one))
            if not watch:
                return
            time.sleep(LOOK_S)
    if not watch:
        console().print(_table(circuits(redis)))
        return
    with Live(_table(circuits(redis)), console=console(), refresh_per_second=4) as live:
        try:
            while True:
                time.sleep(LOOK_S)
                live.update(_table(circuits(redis)))
        except KeyboardInterrupt:
            return


@command.command()
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1000), help="The newest so many.")
@json_option
def history(limit: int, as_json: bool) -> None:
    """Show what opened and closed circuits, the newest first; the last thousand transitions are kept."""
    found = _store().history(limit)
    if as_json:
        for one in found:
            print_json(one._asdict())
        return
    rows = [(moment(one.at_ms), one.scope, one.before, one.after, one.why, one.by) for one in found]
    console().print(table("Transitions", ("at", "scope", "from", "to", "why", "by"), rows))


def _for_option(function: Callable[..., Any]) -> Callable[..., Any]:
    text = "For so long, as in 90s, 10m or 2h; then it is automatic again. Without it: until `auto`."
    return click.option("--for", "length", type=Length(), default=0, help=text)(function)


class Length(click.ParamType[int]):
    """A length of time with its unit, in milliseconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+)([smhd])", value.strip())
        if not found or not int(found[1]):
            self.fail(f"{value!r} is no time: say 90s, 10m or 2h", param, ctx)
        return int(found[1]) * UNITS[found[2]] * 1000


@command.command("force-open")
@topic_option
@reason_option
@_for_option
def force_open(topic: str | None, reason: str, length: int) -> None:
    """Hold all records back, whatever the circuit finds: they wait in Redis, in order."""
    _force(topic, OPEN, length, reason)


@command.command("force-closed")
@topic_option
@reason_option
@_for_option
def force_closed(topic: str | None, reason: str, length: int) -> None:
    """Let records through, whatever the circuit finds; it goes on counting underneath."""
    _force(topic, CLOSED, length, reason)


@command.command()
@topic_option
@reason_option
def auto(topic: str | None, reason: str) -> None:
    """End what was forced: the circuit's own state holds again."""
    _force(topic, "", 0, reason)


def circuits(redis: RedisClient) -> list[Circuit]:
    """The cluster's circuit, then those of topics.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached.
    """
    cluster = settings.current().cluster
    return read(redis, cluster, [CLUSTER_SCOPE, *known_topics(redis, cluster)])


def _force(topic: str | None, mode: str, length: int, reason: str) -> None:
    if topic is not None and not is_topic_name(topic):
        raise click.BadParameter(f"{topic!r} is no name of a topic", param_hint="--topic")
    scope = CLUSTER_SCOPE if topic is None else TOPIC_SCOPE + topic
    store = _store()
    store.force(scope, mode, length, f"{getpass.getuser()}@{socket.gethostname()}", reason)
    console().print(_table(circuits(RedisClient(settings.current()))))


def _store() -> CircuitStore:
    s = settings.current()
    return CircuitStore(RedisClient(s), s.cluster, Rules.of(s), "operator")


def _table(found: list[Circuit]) -> Table:
    rows = [
        (
            one.scope,
            one.state + (f" (forced; found {one.found})" if one.forced else ""),
            "" if one.state == CLOSED else f"{one.retry_after:.0f} s",
            one.trips or "",
            "" if one.since_s is None else f"{_length(one.since_s)} ago",
            one.why,
            one.by,
        )
        for one in found
    ]
    return table("Circuits", ("scope", "state", "next look in", "rounds", "changed", "why", "by"), rows)


def _length(seconds: float) -> str:
    for unit, size in reversed(UNITS.items()):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
