"""A worker receives what anybody who can write to Redis may put into its queue, among good records. Each of those is
delivered; each stranger's message is parked, once, where the commands list, show and discard it. The worker goes on,
its memory stays bounded, and its log has neither a forged line nor a payload.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import strangers
from kafka_delivery import send
from kafka_delivery.names import PARKED
from kafka_delivery_worker.embedded import MockKafka
from servers import wait_until
from stack import Stack, Worker, stack
from watching import ALONE, emptied

TOPIC = "good"
GOOD = 200
PEAK_BYTES = 600 * 1024 * 1024
"""A worker that does nothing has 100 MB; one that decompresses a bomb of the zoo took 2 GB."""


def test_the_zoo(redis_url: str) -> None:
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        kafka.create_topic(TOPIC)
        worker = system.worker(*ALONE)
        zoo, forged = strangers.zoo(big=True), strangers.forged(TOPIC)
        good = _put(system, [*zoo.values(), *forged.values()])

        system.wait_for(TOPIC, {*good, *forged})
        system.wait_empty()

        assert Counter(system.ids(TOPIC)) == Counter([*good, *forged]), "each good record is delivered, once"
        stored = system.redis.hvals(PARKED)
        assert len(stored) == len(zoo), "each stranger's message is parked, once"
        assert worker.process.poll() is None
        _is_bounded(worker)
        _is_plain(worker)
        _is_at_hand(system, len(zoo))


def test_kombu_decompresses_by_our_bound_in_a_worker(redis_url: str) -> None:
    """Another transport than ours leaves that to kombu."""
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        told = system.application(
            """
            import zlib
            from kombu.compression import decompress
            from kafka_delivery_worker import app
            try:
                decompress(zlib.compress(b"0" * 50_000_000), "gzip")
            except Exception as error:
                print(type(error).__name__)
            """
        )
    assert told.strip() == "BodyTooLargeError"


def _put(system: Stack, raws: list[bytes]) -> list[str]:
    """Put them into the queue, with good records all over."""
    good = []
    for place, raw in enumerate(raws):
        system.redis.lpush(strangers.QUEUE, raw)
        if place % (len(raws) // GOOD + 1) == 0:
            good.append(send.delay(TOPIC, f"record {place}").id)
    return good


def _is_bounded(worker: Worker) -> None:
    status = Path(f"/proc/{worker.process.pid}/status")
    if not status.exists():  # not Linux
        return
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) * 1024 < PEAK_BYTES, peak


def _is_plain(worker: Worker) -> None:
    wait_until(lambda: "record.parked" in worker.log, 60, "the log to be written")
    lines = worker.log.split("\n")
    assert [line for line in lines if line.startswith(strangers.FORGED_LINE) or strangers.SECRET in line] == []
    assert [line for line in lines if not line.replace("\t", "").isprintable()] == []
    assert max(map(len, lines)) < 20_000


def _is_at_hand(system: Stack, parked: int) -> None:
    assert json.loads(system.command("status", "--json").stdout)["parked"]["total"] == parked
    assert system.command("parked", "summary").stdout
    listed = system.command("parked", "list", "--json").stdout
    assert listed.replace("\n", "").isprintable()
    items = [json.loads(line) for line in listed.splitlines()]
    assert len(items) == parked
    assert {item["kind"] for item in items} == {"invalid", "undecodable", "unknown-task"}
    for item in items[::10]:
        shown = system.command("parked", "show", item["id"]).stdout
        assert shown.replace("\n", "").replace("\t", "").isprintable()
    system.command("parked", "discard", items[0]["id"], "--reason", "a stranger's", "--yes")
    system.command("parked", "discard", "--all", "--reason", "strangers'", "--yes")
    assert system.redis.hlen(PARKED) == 0
