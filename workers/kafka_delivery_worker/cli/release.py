"""``kafka-delivery release``: the way back to Celery's own transport."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import click
from kombu.transport.redis import Channel
from rich.console import Console
from rich.progress import Progress

from kafka_delivery import settings
from kafka_delivery.names import CLUSTERS, DELAYED, HELD, RELEASE_LOCK, WAITING, is_another_clusters
from kafka_delivery.redis_client import RedisClient

from ..breaker.store import alive
from ..lease import Lease, script
from ..run_lock import RunLock
from .output import json_option, print_json

AT_ONCE = 500


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Give everything that only the leased transport sees back to the queues.

    Before a downgrade, with all workers stopped: delayed messages go back to their lists, where Celery's own transport
    finds them and keeps them in the worker's memory until they are due; so does what was put aside while its topic's
    circuit was open; and what killed workers held goes back when their leases are over, or is parked if it killed too
    many. Messages and workers of another KAFKA_DELIVERY_CLUSTER in the same Redis are left alone.
    """
    s = settings.current()
    redis = RedisClient(s)
    client, prefix = redis.client, redis.prefix
    with RunLock(redis, "the release", key=RELEASE_LOCK, command="release") as lock:
        held, running = _release_held(redis, s)
        # A worker that runs would take them back at once.
        delayed = 0 if running else _release_delayed(client, prefix, s.cluster, lock)
        aside = 0 if running else _release_put_aside(client, prefix, s.cluster, lock)
    if as_json:
        print_json({"delayed": delayed, "put_aside": aside, "still_held": held, "still_running": running})
    else:
        click.echo(
            f"{delayed} delayed messages are back in their queues, and {aside} whose topic's circuit was open; "
            f"{running} workers still run, {held} hold messages"
        )
    if running:
        raise SystemExit(1)


def _is_ours(name: str, cluster: str) -> bool:
    """Whether a list is one of this cluster's, or of a queue that an operator has named himself."""
    return not is_another_clusters(name.partition(Channel.sep)[0], cluster)


def _release_held(redis: RedisClient, s: settings.Settings) -> tuple[int, int]:
    """Wait until all leases are over; how many workers still hold messages, and how many run."""
    client, prefix, lease_s = redis.client, redis.prefix, s.lease_s
    lease = Lease(lambda: client, lease_s, prefix)
    deadline = time.monotonic() + 2.5 * lease_s
    console = Console(stderr=True)  # what a program reads on standard output is the result alone
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("waiting for leases to end", total=2.5 * lease_s)
            while True:
                lease.renew()
                lease.park_poison()
                holders = set(_holders(client, prefix, s.cluster))
                owners = {owner.decode() for owner in client.zrange(lease.leases, 0, -1)} - {lease.owner}
                # A lease does not say for which cluster it is.
                running = holders | (owners if alive(redis, s.cluster) or not _others_run(redis, s) else set())
                if not running or time.monotonic() > deadline:
                    return len(holders), len(running)
                time.sleep(min(1.0, lease_s / 4))  # a lease ends when it ends
                progress.update(task, completed=2.5 * lease_s - (deadline - time.monotonic()))
    finally:
        lease.stop()


def _holders(client: Any, prefix: str, cluster: str) -> Iterator[str]:
    """Return the workers that hold a message of this cluster's lists."""
    for key in client.scan_iter(f"{prefix}{HELD}*"):
        if any(_is_ours(tag.decode(errors="replace").partition(":")[2], cluster) for tag in client.hkeys(key)):
            yield key.decode()[len(prefix + HELD) :]


def _others_run(redis: RedisClient, s: settings.Settings) -> bool:
    known = {name.decode() for name in redis.client.hkeys(redis.prefix + CLUSTERS)} - {s.cluster}
    return any(alive(redis, name) for name in known)


def _release_put_aside(client: Any, prefix: str, cluster: str, lock: RunLock) -> int:
    """To the front of the queues, in order: it is older than what is there."""
    registry = prefix + WAITING
    moved = 0
    for member in client.smembers(registry):
        name = member.decode(errors="surrogateescape")
        if not _is_ours(name.partition(":")[2], cluster):
            continue
        moved += _move(client, lock, f"{registry}:{name}", prefix + name.partition(":")[2], registry, member)
    return moved


def _release_delayed(client: Any, prefix: str, cluster: str, lock: RunLock) -> int:
    """To the ends of the queues, the soonest first."""
    start = f"{prefix}{DELAYED}"
    names = [key.decode()[len(start) :] for key in client.scan_iter(f"{start}*")]
    return sum(_move(client, lock, start + name, prefix + name) for name in names if _is_ours(name, cluster))


def _move(client: Any, lock: RunLock, source: str, target: str, registry: str = "", member: bytes = b"") -> int:
    """How many were moved, in steps that each compare the lock.

    Raises:
        NotAloneError: the lock is lost; nothing more is moved.
    """
    keys = [lock.key, source, target, *filter(None, [registry])]
    moved = 0
    while some := client.eval(script("release"), len(keys), *keys, lock.token, AT_ONCE, member):
        if some < 0:
            raise lock.lost()
        moved += some
    return moved
