"""``kafka-delivery dead-letters``: from the alert to the empty dead-letter topic."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click

from kafka_delivery import settings
from kafka_delivery.redis_client import RedisClient

from ..dead_letter import DeadLetter
from ..parking import ParkingStore
from ..redrive import (
    Backlog,
    Cluster,
    Redrive,
    RedriveError,
    Result,
    Selection,
    Span,
    discard,
    history,
    plan,
    whole_letters,
)
from ..run_lock import RunLock, Runner
from .acting import AuditHandler, Rate, Signals, Topic, counted, parking_lock, progress
from .filters import Filter, filter_options
from .letters import (
    advice,
    bar,
    code_name,
    data,
    described,
    for_people,
    hour,
    plan_as_json,
    plan_tables,
    result_text,
    whole,
)
from .output import console, json_option, moment, print_json, table, visible

audit = logging.getLogger("kafka_delivery.audit")

TABLE_LIMIT = 50
"""Dead letters in a table, where nobody says otherwise; for programs there is no limit."""


class Place(click.ParamType[tuple[int, int]]):
    """A place in a dead-letter topic, as lists show it."""

    name = "partition:offset"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if not (found := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,18})", value)):
            self.fail(f"{value!r} is no place: say 0:42 for offset 42 of partition 0", param, ctx)
        return int(found[1]), int(found[2])


topic_argument = click.argument("topic", type=Topic())
everything_option = click.option("--all", "everything", is_flag=True, help="Also what was redriven or discarded.")
limit_option = click.option("--limit", type=click.IntRange(min=1), help="The first so many.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")
places_argument = click.argument("places", type=Place(), nargs=-1, metavar="[PARTITION:OFFSET]...")


@click.group()
def command() -> None:
    """See what Kafka refused, understand it, send it again.

    TOPIC is the original topic; its dead-letter topic is found from it. A dead letter waits until it was redriven or
    discarded; the lag of the consumer group kafka-delivery-redrive.<dead-letter topic> says the same to other tools.
    """


@command.command()
@json_option
def topics(as_json: bool) -> None:
    """Show each dead-letter topic with how much waits in it, and since when."""
    redis = RedisClient(settings.current())
    cluster = Cluster(settings.current(), redis)
    found: list[dict[str, Any]] = []
    for letters, originals in cluster.dead_letter_topics().items():
        with Backlog(cluster, redis, letters) as backlog:
            spans = backlog.spans()
            waiting = backlog.waiting(spans)
            oldest = min((letter.at_ms for letter in backlog.oldest(spans)), default=None) if waiting else None
        found.append(
            {
                "topic": originals,
                "dead_letter_topic": letters,
                "waiting": waiting,
                "oldest": None if oldest is None else moment(oldest),
                "group": backlog.group,
            }
        )
    if as_json:
        for one in found:
            print_json(one)
        return
    rows = [(", ".join(one["topic"]), one["dead_letter_topic"], one["waiting"], one["oldest"]) for one in found]
    console().print(table("Dead letters", ("topic", "dead letters in", "waiting", "oldest"), rows))


@command.command("list")
@topic_argument
@filter_options()
@limit_option
@everything_option
@json_option
def list_(topic: str, chosen: Filter, limit: int | None, everything: bool, as_json: bool) -> None:
    """List dead letters with their reasons, without keys, headers and values."""
    with _opened(topic) as (backlog, selection):
        found = _letters(backlog, backlog.spans(), selection(chosen), everything)
        if as_json:
            for letter in islice(found, limit):
                print_json(described(letter))
            return
        some = list(islice(found, limit or TABLE_LIMIT))
        more = limit is None and next(found, None) is not None
    rows = [
        (
            one.place,
            moment(one.at_ms),
            one.error_class,
            code_name(one.error_code),
            one.redrive_count or "",
            one.message_id,
        )
        for one in some
    ]
    columns = ("place", "failed at", "error", "code", "redriven", "message id")
    console().print(table(f"Dead letters of {topic}", columns, rows))
    if more:
        click.echo(f"The first {TABLE_LIMIT}; there are more: --limit shows more, `summary {topic}` counts them.")
    if some:
        click.echo(f"`kafka-delivery dead-letters show {topic} {some[0].place}` shows one whole.")


@command.command()
@topic_argument
@click.argument("place", type=Place(), metavar="PARTITION:OFFSET")
@json_option
def show(topic: str, place: tuple[int, int], as_json: bool) -> None:
    """Show one dead letter whole, and what to do about its error. This is where its payload is shown."""
    with _opened(topic) as (backlog, _):
        spans = {span.partition: span for span in backlog.spans()}
        letter = backlog.one(*place)
        waits = not backlog.is_done(spans[letter.partition], letter.offset)
    shown = described(letter) | {
        "state": "waits" if waits else "redriven, parked or discarded",
        "error_message": letter.error_message,
        "key": data(letter.key),
        "headers": [[name, data(value)] for name, value in letter.headers],
        "value": data(letter.value),
        "advice": advice(letter),
    }
    if as_json:
        print_json(shown)
        return
    for name, value in shown.items():
        if name == "headers":
            for header, text in value:
                click.echo(f"header {visible(header)}: {for_people(text)}")
        elif name == "key":
            click.echo(f"key: {for_people(value)}")
        elif name != "value":
            click.echo(f"{name}: {'' if value is None else visible(str(value))}")
    click.echo(f"value ({len(letter.value or b''):,} bytes): {for_people(shown['value'])}")


@command.command()
@topic_argument
@filter_options()
@everything_option
@json_option
def summary(topic: str, chosen: Filter, everything: bool, as_json: bool) -> None:
    """Count dead letters by error and by hour."""
    errors: Counter[tuple[str, int | None]] = Counter()
    hours: Counter[str] = Counter()
    with _opened(topic) as (backlog, selection):
        spans = backlog.spans()
        expected = backlog.waiting(spans)
        with progress("reading", expected) as advance:
            for letter in counted(_letters(backlog, spans, selection(chosen), everything), advance):
                errors[letter.error_class, letter.error_code] += 1
                hours[hour(letter.at_ms)] += 1
    total = errors.total()
    if as_json:
        print_json(
            {
                "topic": topic,
                "dead_letters": total,
                "errors": [
                    {"error_class": name, "error_code": code, "error": code_name(code), "count": count}
                    for (name, code), count in errors.most_common()
                ],
                "hours": [{"hour": hour, "count": hours[hour]} for hour in sorted(hours)],
            }
        )
        return
    out = console()
    rows = [
        (name or "(not said)", code_name(code), count, f"{100 * count / total:.0f} %", bar(count, errors))
        for (name, code), count in errors.most_common()
    ]
    out.print(table(f"{total:,} dead letters of {topic}, by error", ("error", "code", "count", "share", ""), rows))
    by_hour = [(hour, hours[hour], bar(hours[hour], hours)) for hour in sorted(hours)]
    out.print(table("By hour of their failure (UTC)", ("hour", "count", ""), by_hour))


@command.command()
@topic_argument
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@filter_options()
@limit_option
@everything_option
def export(topic: str, file: Path, chosen: Filter, limit: int | None, everything: bool) -> None:
    """Write dead letters whole to FILE, one JSON object on each line; - is standard output.

    Keys, header values and values are text, or base64 behind "base64:". FILE must not exist; only you may read it.
    """
    with _opened(topic) as (backlog, selection):
        found = islice(_letters(backlog, backlog.spans(), selection(chosen), everything), limit)
        lines = (json.dumps(whole(letter), ensure_ascii=False) for letter in found)
        if str(file) == "-":
            for line in lines:
                click.echo(line)
            return
        try:
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise click.ClickException(f"{file}: {error.strerror}") from error
        count = 0
        with os.fdopen(opened, "w", encoding="utf-8") as out:
            for count, line in enumerate(lines, 1):  # noqa: B007  # it is what is told at the end
                out.write(line + "\n")
    click.echo(f"{count} dead letters written to {file}")


@command.command()
@topic_argument
@places_argument
@filter_options()
@click.option("--to", type=Topic(), help="Send to this topic instead of the original one.")
@click.option("--rate", type=Rate(), help="At most so many: 200/s, 30/m, 500/h.")
@limit_option
@click.option("--dry-run", is_flag=True, help="Show the plan, and do nothing.")
@click.option("--keep-going", is_flag=True, help="Also where one after the other is refused again.")
@yes_option
@json_option
def redrive(
    topic: str,
    places: tuple[tuple[int, int], ...],
    chosen: Filter,
    to: str | None,
    rate: float | None,
    limit: int | None,
    dry_run: bool,
    keep_going: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Send dead letters again: those at the places named, those that fit the options, or all that wait.

    Those that their dead-letter topic did not take, for their size say, are found in the parking store. Shows the plan
    first and asks. Records go as ordinary sends, with their key, value, headers, time and message id;
    one counts as done when its outcome is known. Interrupted or killed, it goes on where it was when it is run again.
    Records that were redriven too often before (KAFKA_DELIVERY_MAX_REDRIVES) are parked.
    """
    s = settings.current()
    redis = RedisClient(s)
    store = ParkingStore.of(redis, s)
    now_ms = time.time_ns() // 1_000_000
    with ExitStack() as stack:
        backlog, selection = stack.enter_context(_opened(topic))
        lock = None if dry_run else stack.enter_context(_alone(redis, backlog, "redrive"))
        at = _At(places, chosen)
        meant = selection(at, to)
        spans = backlog.spans()
        with progress("reading", backlog.waiting(spans)) as advance:
            letters = chain(backlog.letters(spans), whole_letters(store, topic, now_ms, s.cluster))
            planned = plan(counted((one for one in letters if one is not None), advance), meant, limit)
        at.check()
        if as_json and dry_run:
            print_json(plan_as_json(topic, planned))
        elif not as_json:
            console().print(*plan_tables(topic, planned))
        if missing := backlog.missing([to] if to else planned.send):
            raise RedriveError(
                f"there is no topic {' or '.join(missing)}: create it, or send to another one, --to; nothing is done"
            )
        if lock is None or not planned.total:
            left = planned.left.total()
            if as_json and not dry_run:
                print_json({"topic": topic} | asdict(Result(left=left)))
            raise SystemExit(1 if left and not dry_run else 0)
        # Those that lie in the parking store, a command on that store would send or discard at the same time.
        store_lock = stack.enter_context(parking_lock(redis, "dead-letters redrive")) if planned.stored else None
        if not yes:
            click.confirm(f"Redrive {planned.total:,} dead letters?", abort=True, err=as_json)
        with Signals() as signals, progress("redriving", planned.total) as advance:
            run = Redrive(
                s,
                redis,
                store,
                backlog,
                lock,
                meant,
                whole_letters(store, topic, now_ms, s.cluster),
                store_lock,
                rate=rate,
                limit=limit,
                stop=signals.told,
                keep_going=keep_going,
                tell=lambda result, why: advance(result.done, why),
            )
            result = run.run(spans)
        entry = _entry("redriven", topic, _asked(chosen, places)) | {"count": result.done} | asdict(result)
        backlog.done.note(entry)
        audit.warning("dead_letters.redriven topic=%s count=%d by=%s", topic, result.done, entry["by"])
    if as_json:
        print_json({"topic": topic} | asdict(result))
    else:
        click.echo(result_text(to or topic, result))
    if signals.number:
        raise SystemExit(128 + signals.number)
    if result.stopped or result.refused or result.left:
        raise SystemExit(1)


@command.command("discard")
@topic_argument
@places_argument
@filter_options()
@click.option("--all", "everything", is_flag=True, help="All that wait, where no place and no other option says which.")
@limit_option
@click.option("--reason", required=True, help="Why these need not arrive; kept in the audit.")
@yes_option
@json_option
def discard_(
    topic: str,
    places: tuple[tuple[int, int], ...],
    chosen: Filter,
    everything: bool,
    limit: int | None,
    reason: str,
    yes: bool,
    as_json: bool,
) -> None:
    """Let dead letters wait no more, without sending them. Kafka keeps them until its retention takes them.

    Who, when, why and which are kept in Redis (`kafka-delivery dead-letters history`), and logged.
    """
    if not (places or chosen.asks or everything):
        raise click.UsageError("say which: by places, by options such as --error-code, or --all")
    redis = RedisClient(settings.current())
    store = ParkingStore.of(redis, settings.current())
    with _opened(topic) as (backlog, selection), _alone(redis, backlog, "discard") as lock:
        at = _At(places, chosen)
        meant = selection(at)
        spans = backlog.spans()
        found = sum(letter is not None and meant(letter) for letter in backlog.letters(spans))
        at.check()
        count = found if limit is None else min(found, limit)
        total = 0
        if count and not yes:
            click.confirm(f"Discard {count:,} dead letters of {topic} for good?", abort=True, err=as_json)
        if count:
            entry = _entry("discarded", topic, _asked(chosen, places)) | {"reason": reason}
            with Signals() as signals, progress("discarding", count) as advance:
                total = discard(
                    backlog, lock, spans, meant, store, limit=limit, audit=entry, stop=signals.told, tell=advance
                )
            audit.warning("dead_letters.discarded topic=%s count=%d by=%s reason=%r", topic, total, entry["by"], reason)
    if as_json:
        print_json({"topic": topic, "discarded": total})
    else:
        click.echo(f"{total:,} discarded")
    if total < count:
        raise SystemExit(128 + signals.number if signals.number else 1)


@command.command("history")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000), help="The newest so many.")
@json_option
def history_(limit: int, as_json: bool) -> None:
    """Show who redrove and discarded what, the newest first. A large discard has an entry for every few hundred."""
    found = history(RedisClient(settings.current()), limit)
    if as_json:
        for one in found:
            print_json(one)
        return
    rows = [
        (one["at"], one["verb"], one["topic"], one["count"], one["by"], one.get("reason", ""), one["asked"])
        for one in found
    ]
    console().print(table("History", ("at", "what", "topic", "count", "by", "reason", "asked for"), rows))


# -- what commands share
def _alone(redis: RedisClient, backlog: Backlog, verb: str) -> RunLock:
    """One command at a time acts on a dead-letter topic.

    Raises:
        NotAloneError: on entry: another one runs; the text says who.
    """
    cluster = settings.current().cluster
    return RunLock(redis, backlog.topic, command=f"dead-letters {verb}", cluster=cluster)


@contextmanager
def _opened(topic: str) -> Iterator[tuple[Backlog, Callable[..., Selection]]]:
    """The dead letters of `topic`, and what makes a selection of them from a filter."""
    logging.basicConfig(handlers=[AuditHandler()])
    s = settings.current()
    redis = RedisClient(s)
    cluster = Cluster(s, redis)
    with Backlog(cluster, redis, cluster.dead_letter_topic(topic)) as backlog:
        yield backlog, lambda chosen, to=None: Selection(s, topic, chosen, to)


def _letters(
    backlog: Backlog, spans: list[Span], meant: Callable[[DeadLetter], bool], everything: bool
) -> Iterator[DeadLetter]:
    return (one for one in backlog.letters(spans, everything) if one is not None and meant(one))


class _At:
    """A filter that also asks for places, where any are named."""

    def __init__(self, places: tuple[tuple[int, int], ...], chosen: Filter) -> None:
        self._places, self._chosen = frozenset(places), chosen
        self._seen: set[tuple[int, int]] = set()

    def __call__(self, letter: DeadLetter) -> bool:
        place = letter.partition, letter.offset
        if self._places and place not in self._places:
            return False
        if self._places:
            self._seen.add(place)
        return self._chosen(letter)

    def check(self) -> None:
        """After all was looked at: whether every place had a dead letter that waits.

        Raises:
            RedriveError: one had not.
        """
        if missing := sorted(self._places - self._seen):
            names = ", ".join(f"{partition}:{offset}" for partition, offset in missing[:5])
            raise RedriveError(f"no dead letter waits at {names}: nothing is there, or it was redriven or discarded")


def _entry(verb: str, topic: str, asked: str) -> dict[str, Any]:
    """A line of the audit."""
    here = Runner.here()
    return {
        "at": moment(time.time_ns() // 1_000_000),
        "verb": verb,
        "topic": topic,
        "by": f"{here.user}@{here.host}",
        "asked": asked,
    }


def _asked(chosen: Filter, places: tuple[tuple[int, int], ...]) -> str:
    """A filter in short. Keys and header values may be secret: of these only that they were asked for."""
    said = [f"{partition}:{offset}" for partition, offset in places[:20]]
    said += ["..."] if len(places) > 20 else []
    for name in Filter.__slots__:
        value = getattr(chosen, name)
        if value and name in ("keys", "headers"):
            said.append(f"{name}={len(value)}")
        elif value:
            said.append(f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(said) or "all"
