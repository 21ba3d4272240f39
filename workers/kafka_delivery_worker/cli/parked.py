"""``kafka-delivery parked``: what could go nowhere else, until a person decides."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import click
from kombu.exceptions import KombuError
from kombu.utils.json import dumps
from redis.exceptions import RedisError

from kafka_delivery import Record, app, send, settings
from kafka_delivery.base import record_from
from kafka_delivery.errors import EnqueueError, InvalidRecordError
from kafka_delivery.marks import marked
from kafka_delivery.names import DEAD_LETTER, DEFAULT_CLUSTER, REVIVED, SEND, SEND_MANY
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.tracing import passed_on

from .. import broker
from ..envelopes import written_by
from ..logs import be_plain
from ..parked_items import as_it_lay, options_of
from ..parking import DAMAGED, KINDS, Parked, ParkingStore, fingerprint
from ..run_lock import NotAloneError, RunLock
from .acting import AuditHandler, Pace, Rate, Signals, Topic, counted, parking_lock, progress
from .filters import Filter, filter_options, topic_option
from .letters import bar, code_name, data, for_people, hour
from .output import console, json_line, json_option, moment, print_json, table, visible

audit = logging.getLogger("kafka_delivery.audit")

TABLE_LIMIT = 50
"""Items in a table, where nobody says otherwise; for programs there is no limit."""

kind_option = click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Why it is parked.")
limit_option = click.option("--limit", type=click.IntRange(min=1), help="The oldest so many.")
ids_argument = click.argument("ids", nargs=-1, metavar="[ID]...")
all_option = click.option("--all", "everything", is_flag=True, help="All of them, or all that fit the other options.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


class Aliases(click.Group):
    """Finds a command by its former name too."""

    FORMER = {"retry": "redrive"}  # noqa: RUF012  # of a class that is made once

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, self.FORMER.get(cmd_name, cmd_name))


@click.group(cls=Aliases)
def command() -> None:
    """See what could go nowhere, send it again or discard it: refused dead letters, expired sends, unreadable messages.

    Options narrow what a command is about; of several values for one any will do, and each option must hold.
    """


@command.command("list")
@filter_options(topic_option, kind_option)
@limit_option
@json_option
def list_(chosen: Filter, limit: int | None, as_json: bool) -> None:
    """List parked items, oldest first, without keys, headers and values."""
    found = _chosen(_store(), (), chosen)
    if as_json:
        for item in islice(found, limit):
            print_json(described(item))
        return
    rows = [
        (
            item.id,
            moment(item.parked_at_ms),
            item.kind,
            item.topic,
            item.error_class,
            code_name(item.error_code),
            item.size,
        )
        for item in islice(found, limit or TABLE_LIMIT)
    ]
    more = limit is None and next(found, None) is not None
    console().print(table("Parked", ("id", "parked at", "kind", "topic", "error", "code", "bytes"), rows))
    if more:
        click.echo(
            f"The first {TABLE_LIMIT}; there are more: --limit shows more, `kafka-delivery parked summary` counts."
        )
    if rows:
        click.echo("`kafka-delivery parked show ID` says why and what to do, and shows the content.")


@command.command()
@click.argument("item_id", metavar="ID")
@json_option
def show(item_id: str, as_json: bool) -> None:
    """Show one item whole, and what to do about it. This is where its payload is shown."""
    (item,) = _named(_store(), (item_id,))
    if as_json:
        print_json(whole(item) | {"advice": KINDS.get(item.kind)})
        return
    for name, value in described(item).items():
        click.echo(f"{name}: {'' if value is None else visible(str(value))}")
    click.echo(f"what to do: {KINDS.get(item.kind, '')}")
    if item.content == "record":
        click.echo(f"key: {for_people(data(item.key))}")
        for name, header in item.headers:
            click.echo(f"header {visible(name)}: {for_people(data(header))}")
        click.echo(f"value: {for_people(data(item.value))}")
    elif item.content == DAMAGED:
        click.echo(f"stored: {for_people(item.data['stored'])}")
    else:
        click.echo(f"data: {for_people(dumps(item.data))}")
    if item.asked:
        click.echo(f"asked of Celery: {for_people(dumps(item.asked))}")


@command.command()
@filter_options(topic_option, kind_option)
@json_option
def summary(chosen: Filter, as_json: bool) -> None:
    """Count parked items by kind, error and topic, and by hour."""
    store = _store()
    kinds: Counter[tuple[str, str | None, str, int | None]] = Counter()
    hours: Counter[str] = Counter()
    with progress("reading", store.count()) as advance:
        for item in counted(_chosen(store, (), chosen), advance):
            kinds[item.kind, item.topic, item.error_class, item.error_code] += 1
            hours[hour(item.at_ms)] += 1
    usage, total = store.usage(), kinds.total()
    if as_json:
        print_json(
            {
                "parked": total,
                "kinds": [
                    {
                        "kind": kind,
                        "topic": topic,
                        "error_class": error,
                        "error_code": code,
                        "error": code_name(code),
                        "count": count,
                    }
                    for (kind, topic, error, code), count in kinds.most_common()
                ],
                "hours": [{"hour": one, "count": hours[one]} for one in sorted(hours)],
                "bytes": usage.bytes,
                "max_bytes": usage.max_bytes,
            }
        )
        return
    out = console()
    rows = [
        (kind, topic, error, code_name(code), count, f"{100 * count / total:.0f} %", bar(count, kinds))
        for (kind, topic, error, code), count in kinds.most_common()
    ]
    out.print(table(f"{total:,} parked", ("kind", "topic", "error", "code", "count", "share", ""), rows))
    by_hour = [(one, hours[one], bar(hours[one], hours)) for one in sorted(hours)]
    out.print(table("By hour (UTC)", ("hour", "count", ""), by_hour))
    click.echo(f"All that is parked takes {usage.bytes:,} of {usage.max_bytes:,} bytes.")


@command.command()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@filter_options(topic_option, kind_option)
@limit_option
def export(file: Path, chosen: Filter, limit: int | None) -> None:
    """Write parked items whole to FILE, one JSON object on each line; - is standard output.

    Keys, header values and values are text, or base64 behind "base64:". FILE must not exist; only you may read it.
    """
    found = islice(_chosen(_store(), (), chosen), limit)
    if str(file) == "-":
        for item in found:
            print_json(whole(item))
        return
    try:
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from error
    count = 0
    with os.fdopen(opened, "w", encoding="utf-8") as out:
        for item in found:
            out.write(json_line(whole(item)) + "\n")
            count += 1
    click.echo(f"{count} parked items written to {file}")


@command.command()
@ids_argument
@filter_options(topic_option, kind_option)
@all_option
@click.option("--to", type=Topic(), help="Send records to this topic instead of their own.")
@click.option("--rate", type=Rate(), help="At most so many: 200/s, 30/m, 500/h.")
@limit_option
@click.option("--dry-run", is_flag=True, help="Show the plan, and do nothing.")
@yes_option
@json_option
def redrive(
    ids: tuple[str, ...],
    chosen: Filter,
    everything: bool,
    to: str | None,
    rate: float | None,
    limit: int | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Put items back on their way: records are sent anew, messages return to their queue. They keep their ids.

    Shows the plan first and asks. Redis puts an item into its queue and takes it out of the store in one step: run it
    again where it was interrupted. With another broker the item is taken out when the broker has confirmed the message;
    killed in between, it sends that one twice, under the same id. One redrive or discard runs at a time; what was
    killed is out of the way after ten seconds.
    """

    def do(store: ParkingStore, item: Parked) -> None:
        with passed_on():
            _send_again(store, item, to, lock)
        audit.warning("parked.redriven parked_id=%s topic=%s", item.id, to or item.topic)

    with _alone(dry_run, "redrive") as lock:
        _for_each(ids, chosen, everything, limit, do, Words("redrive", "redriven"), rate, dry_run, yes, as_json)


@command.command()
@ids_argument
@filter_options(topic_option, kind_option)
@all_option
@limit_option
@click.option("--reason", required=True, help="Why these may be lost; kept in the audit log.")
@click.option("--dry-run", is_flag=True, help="Show the plan, and do nothing.")
@yes_option
@json_option
def discard(
    ids: tuple[str, ...],
    chosen: Filter,
    everything: bool,
    limit: int | None,
    reason: str,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete items for good, leaving an audit line for each."""

    def do(store: ParkingStore, item: Parked) -> None:
        store.check(lock)  # before the line that says so
        audit.warning(
            "parked.discarded parked_id=%s topic=%s kind=%s reason=%r", item.id, item.topic, item.kind, reason
        )
        if not store.discard(item, lock):
            raise LeftError(CHANGED)

    words = Words("delete for good", "discarded")
    with _alone(dry_run, "discard") as lock:
        _for_each(ids, chosen, everything, limit, do, words, None, dry_run, yes, as_json)


def _alone(dry_run: bool, verb: str) -> AbstractContextManager[Any]:
    return nullcontext() if dry_run else parking_lock(RedisClient(settings.current()), f"parked {verb}")


# -- which
def _store() -> ParkingStore:
    be_plain()
    logging.basicConfig(handlers=[AuditHandler()])
    s = settings.current()
    return ParkingStore.of(RedisClient(s), s)


def _chosen(store: ParkingStore, ids: tuple[str, ...], chosen: Filter) -> Iterator[Parked]:
    """The items meant, oldest first; of those named by their ids, those that fit."""
    found = iter(_named(store, ids)) if ids else store.list(chosen.since_ms, chosen.until_ms)
    return (item for item in found if chosen(item))


def _named(store: ParkingStore, ids: tuple[str, ...]) -> list[Parked]:
    found = [(item_id, store.get(item_id) or _as_shown(store, item_id)) for item_id in ids]
    for item_id, item in found:
        if item is None:
            raise click.ClickException(
                f"nothing is parked under {item_id!r}; `kafka-delivery parked list` shows the ids, and "
                f"`kafka-delivery trace` finds the batch that a record is in"
            )
    return [item for _, item in found if item is not None]


def _as_shown(store: ParkingStore, item_id: str) -> Parked | None:
    """The item whose id is shown so, since nobody can type it: it has control characters, or is no UTF-8."""
    return next((item for item in store.list() if item.id != item_id and visible(item.id) == item_id), None)


# -- what is done with each
@dataclass(frozen=True, slots=True)
class Words:
    """What is done, in an order and in a report."""

    order: str
    done: str


@dataclass(slots=True)
class Result:
    """What became of a run: items done, left because of a reason each, and why it ended early, or ""."""

    done: int = 0
    left: Counter[str] = field(default_factory=Counter)
    stopped: str = ""


CHANGED = "it was parked again or taken away meanwhile"


class LeftError(Exception):
    """Raised for an item that stays parked, with the reason."""


def _for_each(
    ids: tuple[str, ...],
    chosen: Filter,
    everything: bool,
    limit: int | None,
    do: Callable[[ParkingStore, Parked], None],
    words: Words,
    rate: float | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Show the plan, ask, and do it with one item after the other, which takes it out of the store."""
    if bool(ids) == everything and (everything or not chosen.asks):
        raise click.UsageError("say which: by ids, by options such as --kind, or --all")
    store = _store()
    planned: Counter[tuple[str, str | None]] = Counter()
    with progress("reading", len(ids) or store.count()) as advance:
        for item in counted(islice(_chosen(store, ids, chosen), limit), advance):
            planned[item.kind, item.topic] += 1
    total = planned.total()
    if not as_json:
        rows = [(kind, topic, count) for (kind, topic), count in planned.most_common()]
        console().print(table(f"To {words.order}", ("kind", "topic", "items"), rows))
    if dry_run or not total:
        if as_json:
            plan = [{"kind": kind, "topic": topic, "count": count} for (kind, topic), count in planned.most_common()]
            print_json({"planned": total, "kinds": plan})
        else:
            click.echo(f"{total} planned, nothing done" if total else "Nothing that is parked fits.")
        return
    if not yes:
        click.confirm(f"{words.order.capitalize()} {total:,} parked item(s)?", abort=True, err=as_json)
    result = Result()
    pace = Pace(rate)
    with Signals() as signals, progress(words.order, total) as advance:
        for item in islice(_chosen(store, ids, chosen), total):
            pace.wait(signals.told)
            if signals.told.sent:
                result.stopped = "it was told to stop"
                break
            try:
                do(store, item)
            except (InvalidRecordError, LeftError) as error:
                what = "still invalid: " if isinstance(error, InvalidRecordError) else ""
                result.left[f"{what}{error}"] += 1
                click.echo(visible(f"{item.id}: {what}{error}"), err=True)
            except (EnqueueError, broker.BrokerError, RedisError, KombuError, NotAloneError) as error:
                result.stopped = str(error)
                break
            else:
                result.done += 1
            advance(result.done + result.left.total())
    left = result.left.total()
    if as_json:
        print_json({words.done: result.done, "left": left, "reasons": dict(result.left), "stopped": result.stopped})
    else:
        click.echo(f"{result.done} {words.done}, {total - result.done} still parked")
        if result.stopped:
            advice = "" if "run it again" in result.stopped else " Run it again to go on."
            click.echo(f"Stopped before the end: {result.stopped}.{advice}", err=True)
    if signals.number:
        raise SystemExit(128 + signals.number)
    if left or result.stopped:
        raise SystemExit(1)


Publish = Callable[[Any], object]
"""Publishes what an item holds, by a given producer or, for None, by Celery's own."""


def _send_again(store: ParkingStore, item: Parked, to: str | None, lock: RunLock) -> None:
    if item.content == DAMAGED:
        raise LeftError("it is damaged, and nothing in it can be sent: look at it, then discard it")
    if item.content == "record":
        publish = _as_send(item, to)
    elif to is not None:
        raise LeftError("it is no record, which --to could send elsewhere")
    elif item.content == "call":
        publish = _as_call(item)
    else:
        _return_to_queue(store, item, lock)
        return
    if settings.current().queue_on_redis:
        if not store.send_back(item, written_by(publish), lock):
            raise LeftError(CHANGED)
    else:
        store.check(lock)
        publish(None)
        store.remove(item.id, item.parked_at_ms, lock)


def _as_send(item: Parked, to: str | None) -> Publish:
    if item.sha256 is not None and fingerprint(item.value)["sha256"] != item.sha256:
        raise LeftError("its value is not the one that was parked: the digests differ")
    # An old copy of the same id in the store, under a suffix, is still the record of that id.
    record = record_from((item.data,), {}, None)
    if to is not None:  # its partition need not be there
        record = Record(to, record.value, record.key, record.headers, timestamp=record.timestamp, message_id=record.id)
    return lambda producer: _publish(send, (record,), {}, None, item, producer)


def _as_call(item: Parked) -> Publish:
    call = item.data
    on_the_wire = bool(call["args"]) and isinstance(call["args"][0], list)
    here, meant = settings.current().cluster, call.get("cluster", DEFAULT_CLUSTER)
    says_so = on_the_wire and call["task"] != SEND_MANY  # for which cluster it is, and is refused by that
    if meant != here and not says_so:
        raise LeftError(f"it is for the Kafka cluster {meant!r}, and KAFKA_DELIVERY_CLUSTER is {here!r} here")
    has_its_own_id = call["task"] == DEAD_LETTER or (call["task"] == SEND and on_the_wire)
    task_id = None if has_its_own_id else call.get("id")
    return lambda producer: _publish(app.tasks[call["task"]], call["args"], call["kwargs"], task_id, item, producer)


def _publish(task: Any, args: Any, kwargs: Any, task_id: str | None, item: Parked, producer: Any) -> None:
    options = options_of(item.asked) | ({} if producer is None else {"producer": producer})
    task.apply_async(args, kwargs=kwargs, task_id=task_id, headers=marked({REVIVED: True}), **options)


def _return_to_queue(store: ParkingStore, item: Parked, lock: RunLock) -> None:
    message = item.data
    queue = message["queue"] or settings.current().queue
    if not settings.current().queue_on_redis:
        store.check(lock)
        broker.put_back(queue, message)
        store.remove(item.id, item.parked_at_ms, lock)
        return
    if not store.send_back(item, [(queue, as_it_lay(message))], lock):
        raise LeftError(CHANGED)


# -- how they are shown
def described(item: Parked) -> dict[str, Any]:
    """An item without its content."""
    fields = {name: getattr(item, name) for name in Parked.__slots__ if name not in ("data", "asked")}
    return fields | {
        "asked": sorted(item.asked or ()),  # what there is, without its content
        "message_id": item.message_id,
        "parked_at": moment(item.parked_at_ms),
        "error": code_name(item.error_code),
    }


def whole(item: Parked) -> dict[str, Any]:
    """An item with its content: of a record its parts, of anything else as it is kept."""
    known = described(item) | {"asked": item.asked}
    if item.content != "record":
        return known | {"data": item.data}
    return known | {
        "key": data(item.key),
        "headers": [[name, data(value)] for name, value in item.headers],
        "value": data(item.value),
        "data": item.data,
    }
