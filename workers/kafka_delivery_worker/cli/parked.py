"""``kafka-delivery parked``: what could go nowhere else, until a person decides."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import click
from kombu.utils.json import dumps

from kafka_delivery import app, send, settings
from kafka_delivery.base import record_from
from kafka_delivery.errors import InvalidRecordError
from kafka_delivery.names import DEAD_LETTER, QUEUE, REVIVED
from kafka_delivery.redis_client import RedisClient

from .. import broker
from ..parking import Parked, ParkingStore
from .output import console, json_option, moment, print_json, table

audit = logging.getLogger("kafka_delivery.audit")

ids_argument = click.argument("ids", nargs=-1, metavar="[ID]...")
all_option = click.option("--all", "everything", is_flag=True, help="All parked items (of --kind and --topic).")
kind_option = click.option("--kind", help="Only items of this kind: dead-letter, invalid, expired, revoked, ...")
topic_option = click.option("--topic", help="Only records of this topic.")


@click.group()
def command() -> None:
    """List, show, retry or discard what could go nowhere: refused dead letters, expired sends, unreadable messages."""


@command.command("list")
@kind_option
@topic_option
@json_option
def list_(kind: str | None, topic: str | None, as_json: bool) -> None:
    """List parked items, oldest first, without their contents."""
    items = list(_chosen(_store(), (), True, kind, topic))
    if as_json:
        for item in items:
            print_json({name: value for name, value in asdict(item).items() if name != "data"})
        return
    rows = [(item.id, moment(item.parked_at_ms), item.kind, item.topic, item.error_class) for item in items]
    console().print(table(f"{len(rows)} parked", ("id", "parked at", "kind", "topic", "error"), rows))
    if rows:
        click.echo("`kafka-delivery parked show ID` says why, and shows the content.")


@command.command()
@click.argument("item_id", metavar="ID")
@json_option
def show(item_id: str, as_json: bool) -> None:
    """Show one item whole. This is where its payload is shown, and nowhere else."""
    item = _store().get(item_id)
    if item is None:
        raise click.ClickException(f"nothing is parked under {item_id!r}; `kafka-delivery parked list` shows the ids")
    shown = asdict(item)
    if as_json:
        print_json(shown)
        return
    for name, value in shown.items():
        click.echo(f"{name}: {moment(value) if name == 'parked_at_ms' else dumps(value) if name == 'data' else value}")


@command.command()
@ids_argument
@all_option
@kind_option
@topic_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def retry(ids: tuple[str, ...], everything: bool, kind: str | None, topic: str | None, yes: bool) -> None:
    """Put items back on their way: records are sent anew, messages return to their queue. They keep their ids.

    An item is taken out of the store only when the queue has it; run it again if it was interrupted.
    """
    store = _store()
    items = list(_chosen(store, ids, everything, kind, topic))
    _confirm(f"Send {len(items)} parked item(s) again?", items, yes)
    failed = 0
    for item in items:
        try:
            _send_again(item)
        except InvalidRecordError as error:
            failed += 1
            click.echo(f"{item.id}: still invalid: {error}", err=True)
            continue
        store.remove(item.id, item.parked_at_ms)
        audit.warning("parked.retried parked_id=%s topic=%s", item.id, item.topic)
    click.echo(f"{len(items) - failed} sent again, {failed} still parked")
    if failed:
        raise SystemExit(1)


@command.command()
@ids_argument
@all_option
@kind_option
@topic_option
@click.option("--reason", required=True, help="Why these may be lost; kept in the audit log.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def discard(
    ids: tuple[str, ...], everything: bool, kind: str | None, topic: str | None, reason: str, yes: bool
) -> None:
    """Delete items for good, leaving an audit line for each."""
    store = _store()
    items = list(_chosen(store, ids, everything, kind, topic))
    _confirm(f"Delete {len(items)} parked item(s) for good?", items, yes)
    for item in items:
        store.remove(item.id, item.parked_at_ms)
        audit.warning(
            "parked.discarded parked_id=%s topic=%s kind=%s reason=%r", item.id, item.topic, item.kind, reason
        )
    click.echo(f"{len(items)} discarded")


def _store() -> ParkingStore:
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    redis = RedisClient(settings.current())
    return ParkingStore(redis.client, redis.prefix)


def _chosen(
    store: ParkingStore, ids: tuple[str, ...], everything: bool, kind: str | None, topic: str | None
) -> Iterable[Parked]:
    if bool(ids) == everything:
        raise click.UsageError("name items by their ids, or say --all")
    if everything:
        return (i for i in store.list() if kind in (None, i.kind) and topic in (None, i.topic))
    found = [store.get(item_id) for item_id in ids]
    for item_id, item in zip(ids, found, strict=True):
        if item is None:
            raise click.ClickException(
                f"nothing is parked under {item_id!r}; `kafka-delivery parked list` shows the ids"
            )
    return [item for item in found if item is not None]


def _confirm(question: str, items: list[Parked], yes: bool) -> None:
    if items and not yes:
        click.confirm(question, abort=True)


def _send_again(item: Parked) -> None:
    if item.content == "record":
        # An old copy of the same id in the store, under a suffix, is still the record of that id.
        send.apply_async((record_from((item.data,), {}, None),), headers={REVIVED: True})
    elif item.content == "call":
        _call_again(item.data)
    else:
        _return_to_queue(item.data)


def _call_again(call: dict[str, Any]) -> None:
    task = app.tasks[call["task"]]
    task_id = None if call["task"] == DEAD_LETTER else call.get("id")
    task.apply_async(call["args"], call["kwargs"], task_id=task_id, headers={REVIVED: True})


def _return_to_queue(message: dict[str, Any]) -> None:
    queue = message["queue"] or QUEUE
    if not settings.current().queue_on_redis:
        broker.put_back(queue, message)
        return
    envelope = message["raw"].encode(errors="surrogateescape") if "raw" in message else dumps(message["envelope"])
    with app.connection_for_write() as connection:
        connection.default_channel.client.lpush(queue, envelope)
