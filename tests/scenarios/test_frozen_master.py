"""A Redis master behind Sentinel that freezes costs the time until another is master, not one timeout after another.

The host of the master is frozen, and with it the Sentinel that is asked first. Workers deliver again within 15 s, with
timeouts of 10 s; callers get their answer in their own. When the host wakes up, its Redis takes itself for the master
until the Sentinels tell it otherwise: nobody goes on with it, and nothing that was accepted meanwhile is lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import pytest

from kafka_delivery import EnqueueError, send
from kafka_delivery_worker.embedded import MockKafka
from sentinels import Guarded, guarded
from servers import RealRedis, wait_until
from stack import IMPATIENT, stack
from watching import ALONE

TOPIC = "frozen-master"

WITHIN_S = 25
"""The promise is 15 s; the rest is for a machine with much else to do. One timeout more would take it beyond."""


@contextmanager
def sending() -> Iterator[dict[str, float]]:
    """Send five records a second while the block runs; those that were accepted, and when each was given up to that."""
    accepted: dict[str, float] = {}
    stop = Event()

    def stream() -> None:
        while not stop.wait(0.2):
            began = time.monotonic()
            with suppress(EnqueueError):
                accepted[send.delay(TOPIC, "x").id] = began

    thread = Thread(target=stream)
    thread.start()
    try:
        yield accepted
    finally:
        stop.set()
        thread.join()


def clients(servers: Guarded, server: RealRedis) -> list[str]:
    """Who is connected to a server that takes itself for the master; nobody counts to one that does not."""
    with servers.client(server) as client, client.pipeline() as pipe:
        pipe.role()
        pipe.client_list(_type="normal")
        role, there = pipe.execute()
        ours = client.client_id()
    if role[0] != b"master":
        return []
    return [one["addr"] for one in there if not one["name"].startswith("sentinel-") and int(one["id"]) != ours]


@pytest.mark.real
def test_another_master_is_taken_at_once_and_the_old_one_never_again(tmp_path: Path) -> None:
    with MockKafka() as kafka, guarded(tmp_path) as servers:
        kafka.create_topic(TOPIC)
        with stack(servers.first.url, kafka, **servers.settings, **IMPATIENT) as system:
            worker = system.worker(*ALONE)
            system.wait_for(TOPIC, {send.delay(TOPIC, "before").id})
            system.wait_empty()
            system.redis.close()  # it goes to the first by itself
            servers.sentinels[0].pause()
            servers.first.pause()
            frozen = time.monotonic()
            with sending() as accepted:
                wait_until(lambda: servers.role(servers.second) == "master", 60, "another master")
                promoted = time.monotonic()

                def delivered() -> bool:
                    later = {one for one, at in tuple(accepted.items()) if at > promoted}
                    return not later.isdisjoint(system.ids(TOPIC))

                wait_until(delivered, 60, "deliveries after the freeze")
                took = time.monotonic() - frozen
                print(f"\nanother master after {promoted - frozen:.1f} s, deliveries after {took:.1f} s")  # noqa: T201
                assert took < WITHIN_S
                servers.first.resume()
                servers.sentinels[0].resume()
                assert clients(servers, servers.first) == []
                more = len(accepted) + 10
                wait_until(lambda: len(accepted) > more, 60, "records that are sent beside the old master")
                assert clients(servers, servers.first) == []
            system.wait_for(TOPIC, set(accepted))
            assert "redis.master address" in worker.log
            assert "breaker.attached" in worker.log
            worker.stop()
