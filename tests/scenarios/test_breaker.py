"""While Kafka is down the fleet stands still and waits, whoever noticed it. No attempt is used, everything arrives in
the end, and an operator's word holds for all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kafka_delivery import circuit, send, send_many
from kafka_delivery_worker.embedded import MockKafka
from scenarios.circuits import QUICK, outcomes, state
from servers import wait_until
from stack import Stack, Worker, message_id, stack
from watching import ALONE, emptied, looks

pytestmark = pytest.mark.long

TOPIC = "breaker"
CIRCUIT = "kafka-delivery:cb:1:{default}:"


@pytest.fixture
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC, 1)
        kafka.create_topic(f"{TOPIC}-dlq", 1)
        yield kafka


@pytest.fixture
def system(redis_url: str, mock: MockKafka) -> Iterator[Stack]:
    with stack(emptied(redis_url), mock, **QUICK) as system:
        yield system


def warm(system: Stack, *workers: Worker) -> None:
    """One send through each: its client is connected."""
    for worker in workers:
        worker.wait_ready()
    for _ in range(10):
        send.delay(TOPIC, "warm", message_id=f"warm {time.monotonic_ns()}")
    system.wait_empty()


def wait_known(system: Stack) -> None:
    """Wait until all workers know of the circuits what Redis does: who looks again has learnt what it saw before."""
    with looks(system.redis) as looked:
        looked.reports(2, workers=len(system.workers))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


POOLS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "in-flight": ((), {}),
    "threads": (("-P", "threads"), {}),
    "prefork": (("-P", "prefork", "-c", "2"), {}),
    "prefork with children that end": (("-P", "prefork", "-c", "2", "--max-tasks-per-child", "20"), {}),
    "Celery's transport": ((), {"TRANSPORT": "celery", "POOL": "threads"}),
}


@pytest.mark.parametrize("pool", [pytest.param("in-flight", marks=pytest.mark.smoke), *list(POOLS)[1:]])
def test_an_outage_uses_no_attempt_and_ends_by_itself(system: Stack, mock: MockKafka, pool: str) -> None:
    arguments, changes = POOLS[pool]
    workers = [system.worker(*ALONE, *arguments, ready=False, **changes) for _ in range(2)]
    warm(system, *workers)
    mock.down()
    sent = {send.delay(TOPIC, f"first {n}").id for n in range(50)}
    wait_until(lambda: state() != "closed", 60, "the circuit to open")
    sent |= {send.delay(TOPIC, f"then {n}").id for n in range(200)}
    # Where all processes or threads are taken by records in flight, these are what arrives first, and no probe is sent.
    wait_until(lambda: state() == "half-open" or circuit().trips >= 2, 60, "a round to begin")
    mock.up()
    wait_until(lambda: state() == "closed", 60, "the circuit to close")
    system.wait_for(TOPIC, sent, 60)
    system.wait_empty()
    assert system.read(f"{TOPIC}-dlq") == []
    assert system.parked() == []
    for worker in workers:
        worker.stop()
    counted = outcomes(system, TOPIC)
    assert counted["delivered"] == len(sent) + 10
    assert set(counted) <= {"delivered", "deferred"}, "no attempt is used"


def test_while_it_is_open_records_wait_in_order_and_no_worker_spins(system: Stack, mock: MockKafka) -> None:
    # A round ends when the test says so: after four that failed, every other probe is the newest record.
    system.settings |= {"RESET_TIMEOUT_S": "600", "RESET_TIMEOUT_MAX_S": "600"}
    worker = system.worker(*ALONE)
    warm(system, worker)
    mock.down()
    first = send.delay(TOPIC, "first").id
    wait_until(lambda: state() == "open", 60, "the circuit to open")
    sent = [send.delay(TOPIC, f"{n}").id for n in range(300)]
    for trips in (2, 3):
        system.redis.hset(CIRCUIT + "cluster:st", "till", 0)
        wait_until(lambda trips=trips: circuit().trips == trips, 60, "another probe to fail")  # type: ignore[misc]
    assert system.redis.llen("kafka-delivery") == 300 - 2, "but for the probes they wait in Redis"
    wait_known(system)
    before, started = cpu_seconds(worker.pid), time.monotonic()
    with looks(system.redis) as looked:
        looked.reports(3)
    took = time.monotonic() - started
    assert looked.seen["claims"] == 0
    assert (cpu_seconds(worker.pid) - before) / took < 0.1  # it takes less than 1 %; one that spins, what it can get
    mock.up()
    # What was in flight arrives first, and brings the next probe forward: the client is connected by then.
    system.wait_for(TOPIC, {first}, 60)
    arrived = [message_id(record) for record in system.wait_for(TOPIC, set(sent), 60)]
    assert [one for one in arrived if one in set(sent)] == sent


def test_a_worker_that_starts_in_an_outage_sends_nothing_before_it_knows(system: Stack, mock: MockKafka) -> None:
    first = system.worker(*ALONE)
    warm(system, first)
    mock.down()
    send.delay(TOPIC, "first")
    wait_until(lambda: state() == "open", 60, "the circuit to open")
    system.command("breaker", "force-open", "--reason", "no probes while the new one starts")
    waiting = [send.delay(TOPIC, f"{n}").id for n in range(20)]
    second = system.worker(*ALONE)
    wait_known(system)
    assert system.redis.llen("kafka-delivery") == len(waiting)
    assert "record." not in second.log, "it has tried to send one"
    mock.up()
    system.command("breaker", "auto", "--reason", "done")
    system.wait_for(TOPIC, set(waiting), 60)


def test_a_batch_that_meets_an_outage_is_delivered_record_by_record(system: Stack, mock: MockKafka) -> None:
    worker = system.worker(*ALONE)
    warm(system, worker)
    mock.down()
    send.delay(TOPIC, "first")
    wait_until(lambda: state() == "open", 60, "the circuit to open")
    ids = {f"b{n}" for n in range(30)}
    send_many.delay([{"topic": TOPIC, "value": "x", "message_id": one} for one in ids])
    mock.up()
    system.wait_for(TOPIC, ids, 60)
    system.wait_empty()
    assert outcomes(system, TOPIC).get("retried", 0) == 0


class TestOperators:
    def test_the_whole_fleet_obeys(self, system: Stack) -> None:
        workers = [system.worker(*ALONE, ready=False) for _ in range(2)]
        warm(system, *workers)
        system.command("breaker", "force-open", "--reason", "maintenance", "--for", "1h")
        assert (state(), circuit().forced, circuit().why) == ("open", "open", "maintenance")
        waiting = [send.delay(TOPIC, f"{n}").id for n in range(50)]
        wait_known(system)
        assert system.redis.llen("kafka-delivery") == 50
        system.command("breaker", "auto", "--reason", "done")
        system.wait_for(TOPIC, set(waiting), 60)

    def test_what_is_forced_for_a_time_ends_by_itself(self, system: Stack) -> None:
        worker = system.worker(*ALONE)
        warm(system, worker)
        system.command("breaker", "force-open", "--reason", "briefly", "--for", "2s")
        sent = send.delay(TOPIC, "x").id
        system.wait_for(TOPIC, {sent}, 60)
        history = [json.loads(line) for line in system.command("breaker", "history", "--json").stdout.splitlines()]
        assert [(one["before"], one["after"]) for one in history] == [
            ("forced open", "auto"),
            ("closed", "forced open"),
        ]

    def test_forced_closed_lets_all_through_in_an_outage(self, system: Stack, mock: MockKafka) -> None:
        # For longer than the command takes to start: it is half-open when its time is over.
        system.settings |= {"RESET_TIMEOUT_S": "60", "RESET_TIMEOUT_MAX_S": "60"}
        worker = system.worker(*ALONE)
        warm(system, worker)
        mock.down()
        send.delay(TOPIC, "first")
        wait_until(lambda: state() == "open", 60, "the circuit to open")
        system.command("breaker", "force-closed", "--reason", "all through")
        assert (state(), circuit().found) == ("closed", "open")
        for n in range(20):
            send.delay(TOPIC, f"{n}")
        wait_until(lambda: system.redis.llen("kafka-delivery") == 0, 60, "them to be claimed")
        mock.up()
        system.wait_empty(60)

    def test_one_topic_can_be_held_back(self, system: Stack, mock: MockKafka) -> None:
        mock.create_topic("other", 1)
        worker = system.worker(*ALONE)
        warm(system, worker)
        system.command("breaker", "force-open", "--topic", "other", "--reason", "its consumers are ill")
        wait_known(system)
        held = [send.delay("other", f"{n}").id for n in range(10)]
        passed = send.delay(TOPIC, "x").id
        system.wait_for(TOPIC, {passed}, 60)
        with looks(system.redis) as looked:
            looked.claims(2)
        assert system.read("other") == []
        assert state("other") == "open"
        assert state() == "closed"
        system.command("breaker", "auto", "--topic", "other", "--reason", "they are well")
        arrived = system.wait_for("other", set(held), 60)
        assert [message_id(record) for record in arrived] == held
