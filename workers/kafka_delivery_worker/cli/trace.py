"""``kafka-delivery trace``: where one record is now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import click
from celery.states import SUCCESS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kafka_delivery import app, settings
from kafka_delivery.dead_letters import TASK_ID_SUFFIX
from kafka_delivery.names import DeadLetterHeaders
from kafka_delivery.record import is_message_id
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings

from .. import counts
from ..installation import Installation
from ..readback import SKEW_MS, Readback, Sighting, told_ms
from ..whereabouts import Place, Where, Whereabouts
from .output import console, json_option, moment, print_json, table

ON_ITS_WAY, DEAD, NOT_FOUND = 3, 4, 5
"""Exit codes, beside 0 for what is delivered; 1 and 2 are those of a failure and of a wrong call."""

ROUNDS = 2
"""How often all places are looked at: what moved back while it was looked for is met the second time."""

LIMIT = 1_000_000

Watched = Callable[[str], Callable[[int, int], None]]


@click.command()
@click.argument("message_id")
@click.option("--topic", "topics", multiple=True, help="Where it was sent to; by default all topics ever counted.")
@click.option(
    "--since",
    type=click.DateTime(["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M", "%Y-%m-%d"]),
    help="Read topics from this time on, in UTC; by default from a minute before the time that the id tells.",
)
@click.option("--limit", default=LIMIT, show_default=True, type=click.IntRange(0), help="Of records to read back.")
@json_option
def command(message_id: str, topics: tuple[str, ...], since: datetime | None, limit: int, as_json: bool) -> None:
    """Show where a record is: queued, delayed, held by a worker, delivered, a dead letter, parked.

    What is in Redis no more is looked for in its topic and its dead-letter topic, which are read back.

    Exit code 0: it is delivered. 3: it is on its way. 4: it is a dead letter or parked. 5: it was not found.
    """
    message_id = message_id.removesuffix(TASK_ID_SUFFIX)  # as Flower shows a dead letter
    if not is_message_id(message_id):
        raise click.BadParameter("it has 1 to 200 printable ASCII characters", param_hint="MESSAGE_ID")
    since_ms = int(since.replace(tzinfo=UTC).timestamp() * 1000) if since else _since(message_id)
    s = settings.current()
    admit = Installation(RedisClient(s), s).compare
    with Readback(s, message_id, since_ms, limit, admit) as readback, _progress() as watched:
        place = _find(s, message_id, topics, readback, watched)
    if as_json:
        print_json({"message_id": message_id, "where": place.where, "batch": place.batch, **place.facts})
    else:
        _show(message_id, place)
    raise SystemExit(_exit_code(place))


def _since(message_id: str) -> int | None:
    told = told_ms(message_id)
    return None if told is None else told - SKEW_MS


def _find(s: Settings, message_id: str, given: tuple[str, ...], readback: Readback, watched: Watched) -> Place:
    redis = RedisClient(s)
    whereabouts = Whereabouts(redis, message_id, s.queue_on_redis)
    topics: list[str] = []
    letters: list[str] = []
    for _ in range(ROUNDS):
        place = whereabouts.look(watched("messages in Redis")) or _by_result(message_id)
        if place is not None:
            return place
        # Only now: a record that was delivered since the round began has been counted, and is before the topic's end.
        topics = list(given) or sorted(filter(None, counts.read(redis.client, redis.prefix)))
        letters = sorted({s.dead_letter_topic(topic) for topic in topics})
        if (seen := readback.look(topics, watched("records in topics"))) is not None:
            return Place(Where.DELIVERED, facts=_of_record(seen) | {"known_from": "topic"})
        if (seen := readback.look(letters, watched("dead letters"))) is not None:
            return Place(Where.DEAD_LETTERED, True, facts=_of_record(seen) | _of_dead_letter(seen))
    return Place(
        Where.NOWHERE,
        facts={
            "queues_searched": s.queue_on_redis,
            "topics": [topic for topic in (*topics, *letters) if topic not in readback.missing],
            "missing_topics": sorted(readback.missing),
            "since": None if readback.since_ms is None else moment(readback.since_ms),
            "records_read": readback.looked,
            "records_not_read": readback.left,
        },
    )


def _by_result(message_id: str) -> Place | None:
    """Where it is, if its sender asked for the result and that is still kept."""
    kept = app.backend.get_task_meta(message_id)
    found = kept.get("result")
    if kept.get("status") != SUCCESS or not isinstance(found, dict) or "offset" not in found:
        return None
    return Place(Where.DELIVERED, facts={**found, "known_from": "result"})


def _of_record(seen: Sighting) -> dict[str, Any]:
    return {
        "topic": seen.topic,
        "partition": seen.partition,
        "offset": seen.offset,
        "timestamp": seen.timestamp_ms,
    }


def _of_dead_letter(seen: Sighting) -> dict[str, Any]:
    names = DeadLetterHeaders
    shown = (
        names.ORIGINAL_TOPIC, names.ERROR_CLASS, names.ERROR_CODE, names.ERROR_MESSAGE, names.RETRY_COUNT,
        names.TIMESTAMP,
    )  # fmt: skip
    told = {name.replace("-", "_"): seen.headers.get(name) for name in shown}
    return {"dead_lettered_at" if name == names.TIMESTAMP else name: text for name, text in told.items()}


def _exit_code(place: Place) -> int:
    if place.where == Where.NOWHERE:
        return NOT_FOUND
    if place.where == Where.DELIVERED:
        return 0
    return DEAD if place.dead_letter or place.where in (Where.PARKED, Where.POISON) else ON_ITS_WAY


# -- for people
def _show(message_id: str, place: Place) -> None:
    out = console()
    what = f"{message_id}'s dead letter" if place.dead_letter and place.where != Where.DEAD_LETTERED else message_id
    out.print(f"{what} {_sentence(message_id, place)}", soft_wrap=True, markup=False)
    facts = {name: value for name, value in place.facts.items() if value not in (None, "", [])}
    if place.batch:
        facts = {"batch": place.batch, **facts}
    rows = [(name.replace("_", " "), _readable(name, value)) for name, value in facts.items()]
    out.print(table("What is known", ("what", "value"), rows))


def _sentence(message_id: str, place: Place) -> str:
    facts = place.facts
    match place.where:
        case Where.QUEUED:
            return f"waits in {facts['queue']}, with {facts['before']:,} before it."
        case Where.DELAYED:
            return f"waits for its time, which comes in {facts['in_s']:,.0f} s."
        case Where.PUT_ASIDE:
            return f"waits until the circuit of {facts['topic']} is closed, with {facts['before']:,} before it."
        case Where.HELD:
            return f"is held by {facts['worker'] or 'a worker that did not answer'}."
        case Where.POISON:
            return "took too many workers down, and is about to be parked."
        case Where.PARKED:
            return f"is parked: {facts['kind']}. `kafka-delivery parked show {facts['parked_id']}` shows it whole."
        case Where.DELIVERED:
            return f"is delivered: {facts['topic']}, partition {facts['partition']}, offset {facts['offset']}."
        case Where.DEAD_LETTERED:
            return f"is a dead letter: {facts['topic']}, partition {facts['partition']}, offset {facts['offset']}."
    where = "Redis" if facts["queues_searched"] else "the parking store (the queues' broker cannot be searched)"
    since = f" since {facts['since']}" if facts["since"] else ""
    read = f"{where} and in {facts['records_read']:,} records{since} of {', '.join(facts['topics']) or 'no topic'}"
    hints = []
    if facts["records_not_read"]:
        hints.append(f"{facts['records_not_read']:,} more were not read: --limit")
    if not facts["topics"]:
        hints.append("say where it was sent to: --topic")
    if facts["since"]:
        hints.append("a record may be older than its id: --since")
    return f"was not found in {read}" + (f" ({'; '.join(hints)})." if hints else ".")


def _readable(name: str, value: Any) -> Any:
    if name in ("due_ms", "parked_at_ms", "timestamp") and isinstance(value, int):
        return moment(value)
    if isinstance(value, float):
        return f"{value:,.1f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else value


@contextmanager
def _progress() -> Iterator[Watched]:
    """A bar for each kind of place, on standard error, where that is a terminal; it is gone at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    err = Console(stderr=True)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:

        def watched(what: str) -> Callable[[int, int], None]:
            bar = progress.add_task(what, total=None)
            return lambda looked, there: progress.update(bar, completed=looked, total=max(looked, there))

        yield watched
