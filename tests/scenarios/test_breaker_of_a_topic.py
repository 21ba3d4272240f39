"""While one topic cannot be written, or is silent, the others flow, whatever room its records take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest

from kafka_delivery import circuit, send, send_many
from kafka_delivery_worker.embedded import MockKafka
from scenarios.circuits import QUICK, outcomes, state
from servers import wait_until
from stack import Stack, message_id, stack
from watching import ALONE, emptied, looks, opened


@pytest.fixture
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        yield kafka


def test_while_one_topic_cannot_be_written_others_flow(redis_url: str, mock: MockKafka) -> None:
    """The broker that leads its partition is away, and nobody takes over: its records time out."""
    sick, well, broker = led_apart(mock)
    timeouts = {"MESSAGE_TIMEOUT_MS": 6_000, "REQUEST_TIMEOUT_MS": 3_000}
    with stack(emptied(redis_url), mock, **QUICK | timeouts) as system:
        worker = system.worker(*ALONE)
        flowing = {send.delay(well, f"{n}").id for n in range(20)}
        first = {send.delay(sick, "before").id}
        system.wait_for(sick, first)
        mock.broker_down(broker)
        early = [send.delay(sick, f"{n}", message_id=f"early {n:03}").id for n in range(100)]

        def found_out() -> bool:
            flowing.add(send.delay(well, "more").id)
            return state(sick) != "closed"

        wait_until(found_out, 60, "the topic's circuit to open")
        assert state() == "closed"
        later = [send.delay(sick, f"{n}", message_id=f"later {n:03}").id for n in range(200)]
        waiting = f"kafka-delivery:waiting:1:{sick}:kafka-delivery"
        wait_until(lambda: system.redis.llen(waiting) >= 150, 60, "them to be put aside")
        assert json.loads(system.command("status", "--json").stdout)["put_aside"][sick] >= 150
        flowing |= {send.delay(well, f"{n}").id for n in range(50)}
        system.wait_for(well, flowing, 60)
        with looks(system.redis) as looked:
            # An idle worker claims five times a second, one that claims and puts back in circles a thousand times.
            assert looked.claims(25) > 0.5, "what is put aside is not claimed and put back in circles"

        mock.broker_up(broker)
        arrived = system.wait_for(sick, {*early, *later}, 60)
        system.wait_empty()
        order = [one for one in dict.fromkeys(map(message_id, arrived)) if one in set(later)]
        probes = circuit(sick).trips + 3  # those that failed, one a round, and those that closed it
        assert sum(a > b for a, b in pairwise(order)) <= probes, "but for probes, in their order"
        assert system.read(f"{sick}-dlq") == []
        assert system.parked() == []
        worker.stop()
        assert outcomes(system, sick).get("retried", 0) == 0


@contextmanager
def silent(redis_url: str, mock: MockKafka, **changes: int) -> Iterator[tuple[Stack, str, str, set[str]]]:
    """A topic without its broker and one that is well: the first, the second, and what the first is yet to get.

    In the end all of it arrives; nothing fails meanwhile, since its records have a minute until they time out.
    """
    sick, well, broker = led_apart(mock)
    with stack(emptied(redis_url), mock, **QUICK | changes) as system:
        worker = system.worker(*ALONE)
        held_up = {send.delay(sick, "before").id}
        system.wait_for(sick, held_up)
        mock.broker_down(broker)
        yield system, sick, well, held_up
        mock.broker_up(broker)
        system.wait_for(sick, held_up, 60)
        system.wait_empty()
        worker.stop()
        assert system.read(f"{sick}-dlq", f"{well}-dlq") == []
        assert system.parked() == []
        assert outcomes(system, sick).get("retried", 0) == outcomes(system, well).get("retried", 0) == 0


def test_a_topic_that_is_silent_holds_up_no_other(redis_url: str, mock: MockKafka) -> None:
    """Its records would fill what may be in flight."""
    with silent(redis_url, mock, MAX_IN_FLIGHT=200) as (system, sick, well, held_up):
        flowing = set()

        def found_out() -> bool:
            held_up.add(send.delay(sick, "more").id)
            flowing.add(send.delay(well, "more").id)
            return state(sick) != "closed"

        wait_until(found_out, 60, "the topic's circuit to open")
        assert opened(system, sick) == "no report for 6 s, while others arrive"
        held_up |= {send.delay(sick, f"{n}").id for n in range(500)}
        flowing |= {send.delay(well, f"{n}").id for n in range(500)}
        system.wait_for(well, flowing, 60)
        assert state() == "closed"


@pytest.mark.smoke
def test_a_topic_that_fills_all_room_at_once_holds_up_no_other(redis_url: str, mock: MockKafka) -> None:
    """So that nothing of others is in flight that could arrive; but the other brokers answer."""
    with silent(redis_url, mock, MAX_IN_FLIGHT=20) as (system, sick, well, held_up):
        held_up |= {send.delay(sick, f"{n}").id for n in range(300)}
        flowing = {send.delay(well, f"{n}").id for n in range(300)}
        system.wait_for(well, flowing, 60)
        assert opened(system, sick)
        assert opened(system) is None


def test_large_records_of_a_topic_that_is_silent_hold_up_no_others(redis_url: str, mock: MockKafka) -> None:
    """They fill the bytes that may be in flight before anything else does."""
    with silent(redis_url, mock, MAX_IN_FLIGHT_BYTES=4_000_000) as (system, sick, well, held_up):
        held_up |= {send.delay(sick, "x" * 100_000).id for _ in range(60)}
        flowing = {send.delay(well, f"{n}").id for n in range(20)}

        def found_out() -> bool:
            flowing.add(send.delay(well, "more").id)
            return state(sick) != "closed" and state() == "closed"

        wait_until(found_out, 60, "the topic's circuit to be the only one that is open")
        system.wait_for(well, flowing, 60)


def test_batches_of_a_topic_that_is_silent_hold_up_no_others(redis_url: str, mock: MockKafka) -> None:
    """They fill what may be in flight of batches."""
    with silent(redis_url, mock) as (system, sick, well, held_up):
        held_up |= batch(sick, "sick", 4_500)

        def found_out() -> bool:
            send.delay(well, "more")
            return state(sick) != "closed"

        wait_until(found_out, 60, "the topic's circuit to open")
        system.wait_for(well, batch(well, "well", 10), 60)


def batch(topic: str, name: str, records: int) -> set[str]:
    """Send so many as one; their ids."""
    ids = {f"{name} {n}" for n in range(records)}
    send_many.delay([{"topic": topic, "value": "x", "message_id": one} for one in ids])
    return ids


def led_apart(mock: MockKafka) -> tuple[str, str, int]:
    """Two topics of one partition that different brokers lead, and the broker of the first."""
    sick, well, broker = "sick", "well", 1
    for name in sick, well:
        mock.create_topic(name, 1)
        mock.create_topic(f"{name}-dlq", 1)
    mock.lead(broker, sick)
    mock.lead(broker + 1, well)
    return sick, well, broker
