"""While Kafka is down the fleet stands still and waits, whoever noticed it; while one topic is, the others flow. No
attempt is used, everything arrives in the end, and an operator's word holds for all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kafka_delivery import circuit, send, send_many
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka
from servers import wait_until
from stack import Stack, Worker, message_id, stack
from watching import ALONE, emptied, opened

TOPIC = "breaker"
QUICK = {
    "STALL_S": 2,
    "RESET_TIMEOUT_S": 1,
    "RESET_TIMEOUT_MAX_S": 3,
    "RAMP_S": 1,
    "MESSAGE_TIMEOUT_MS": 60_000,
    "LINGER_MS": 0,
}


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


def outcomes(system: Stack, topic: str = TOPIC) -> dict[str, int]:
    return counts.read(system.redis).get(topic, {})


def state(topic: str | None = None) -> str:
    return circuit(topic).state


def wait_known(system: Stack) -> None:
    """Wait until all workers know of the circuits what Redis does: who looks again has learnt what it saw before."""
    for _ in range(2):
        before = looks(system)
        wait_until(lambda before=before: all(looks(system)[one] > before[one] for one in before), 20, "a look")  # type: ignore[misc]


def looks(system: Stack) -> dict[bytes, float]:
    """When each worker has looked last."""
    return dict(system.redis.zrange("kafka-delivery:cb:1:{default}:workers", 0, -1, withscores=True))


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


@pytest.mark.parametrize("pool", POOLS)
def test_an_outage_uses_no_attempt_and_ends_by_itself(system: Stack, mock: MockKafka, pool: str) -> None:
    arguments, changes = POOLS[pool]
    workers = [system.worker(*ALONE, *arguments, ready=False, **changes) for _ in range(2)]
    warm(system, *workers)
    mock.down()
    sent = {send.delay(TOPIC, f"first {n}").id for n in range(50)}
    wait_until(lambda: state() != "closed", 20, "the circuit to open")
    sent |= {send.delay(TOPIC, f"then {n}").id for n in range(200)}
    # Where all processes or threads are taken by records in flight, these are what arrives first, and no probe is sent.
    wait_until(lambda: state() == "half-open" or circuit().trips >= 2, 20, "a round to begin")
    mock.up()
    back = time.monotonic()
    wait_until(lambda: state() == "closed", 30, "the circuit to close")
    system.wait_for(TOPIC, sent, 60)
    system.wait_empty()
    assert time.monotonic() - back < 60
    assert system.read(f"{TOPIC}-dlq") == []
    assert system.parked() == []
    for worker in workers:
        worker.stop()
    counted = outcomes(system)
    assert counted["delivered"] == len(sent) + 10
    assert set(counted) <= {"delivered", "deferred"}, "no attempt is used"


def test_while_it_is_open_records_wait_in_order_and_no_worker_spins(system: Stack, mock: MockKafka) -> None:
    # The third round is still open when Kafka is back, and the fourth probe has the time that a client takes to connect
    # anew; after four that failed, every other probe is the newest record.
    system.settings |= {"RESET_TIMEOUT_MAX_S": "10", "STALL_S": "3"}
    worker = system.worker(*ALONE)
    warm(system, worker)
    mock.down()
    send.delay(TOPIC, "first")
    wait_until(lambda: state() == "open", 20, "the circuit to open")
    sent = [send.delay(TOPIC, f"{n}").id for n in range(300)]
    wait_until(lambda: circuit().trips >= 3, 20, "it to be open for longer")
    assert system.redis.llen("kafka-delivery") >= 300 - circuit().trips, "but for the probes they wait in Redis"
    before, started = cpu_seconds(worker.pid), time.monotonic()
    time.sleep(3)
    took = time.monotonic() - started
    assert (cpu_seconds(worker.pid) - before) / took < 0.03  # it takes less than 1 %; a tick of the clock is 0.3 % here
    mock.up()
    arrived = [message_id(record) for record in system.wait_for(TOPIC, set(sent), 60)]
    assert [one for one in arrived if one in set(sent)] == sent


def test_a_worker_that_starts_in_an_outage_sends_nothing_before_it_knows(system: Stack, mock: MockKafka) -> None:
    first = system.worker(*ALONE)
    warm(system, first)
    mock.down()
    send.delay(TOPIC, "first")
    wait_until(lambda: state() == "open", 20, "the circuit to open")
    system.command("breaker", "force-open", "--reason", "no probes while the new one starts")
    waiting = [send.delay(TOPIC, f"{n}").id for n in range(20)]
    second = system.worker(*ALONE)
    time.sleep(2)  # it would have taken them in that time
    assert system.redis.llen("kafka-delivery") == len(waiting)
    assert "producer.error" not in second.log, "it has not even connected"
    mock.up()
    system.command("breaker", "auto", "--reason", "done")
    system.wait_for(TOPIC, set(waiting), 30)


def test_a_batch_that_meets_an_outage_is_delivered_record_by_record(system: Stack, mock: MockKafka) -> None:
    worker = system.worker(*ALONE)
    warm(system, worker)
    mock.down()
    send.delay(TOPIC, "first")
    wait_until(lambda: state() == "open", 20, "the circuit to open")
    ids = {f"b{n}" for n in range(30)}
    send_many.delay([{"topic": TOPIC, "value": "x", "message_id": one} for one in ids])
    mock.up()
    system.wait_for(TOPIC, ids, 60)
    system.wait_empty()
    assert outcomes(system).get("retried", 0) == 0


def test_while_one_topic_cannot_be_written_others_flow(redis_url: str, mock: MockKafka) -> None:
    """The broker that leads its partition is away, and nobody takes over: its records time out."""
    sick, well, broker = led_apart(mock)
    timeouts = {"MESSAGE_TIMEOUT_MS": 2_500, "REQUEST_TIMEOUT_MS": 1_000}
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

        wait_until(found_out, 40, "the topic's circuit to open")
        assert state() == "closed"
        later = [send.delay(sick, f"{n}", message_id=f"later {n:03}").id for n in range(200)]
        waiting = f"kafka-delivery:waiting:1:{sick}:kafka-delivery"
        wait_until(lambda: system.redis.llen(waiting) >= 150, 20, "them to be put aside")
        assert json.loads(system.command("status", "--json").stdout)["put_aside"][sick] >= 150
        flowing |= {send.delay(well, f"{n}").id for n in range(50)}
        system.wait_for(well, flowing, 20)
        before = claims(system)
        time.sleep(2)
        assert claims(system) - before < 100, "what is put aside is not claimed and put back in circles"

        mock.broker_up(broker)
        arrived = system.wait_for(sick, {*early, *later}, 60)
        system.wait_empty()
        order = [one for one in dict.fromkeys(map(message_id, arrived)) if one in set(later)]
        assert sum(a > b for a, b in pairwise(order)) <= 3, "but for probes, in their order"
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

        wait_until(found_out, 40, "the topic's circuit to open")
        assert opened(system, sick) == "no report for 4 s, while others arrive"
        held_up |= {send.delay(sick, f"{n}").id for n in range(500)}
        flowing |= {send.delay(well, f"{n}").id for n in range(500)}
        system.wait_for(well, flowing, 20)
        assert state() == "closed"


def test_a_topic_that_fills_all_room_at_once_holds_up_no_other(redis_url: str, mock: MockKafka) -> None:
    """So that nothing of others is in flight that could arrive; but the other brokers answer."""
    with silent(redis_url, mock, MAX_IN_FLIGHT=20) as (system, sick, well, held_up):
        held_up |= {send.delay(sick, f"{n}").id for n in range(300)}
        flowing = {send.delay(well, f"{n}").id for n in range(300)}
        system.wait_for(well, flowing, 30)
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

        wait_until(found_out, 40, "the topic's circuit to be the only one that is open")
        system.wait_for(well, flowing, 20)


def test_batches_of_a_topic_that_is_silent_hold_up_no_others(redis_url: str, mock: MockKafka) -> None:
    """They fill what may be in flight of batches."""
    with silent(redis_url, mock) as (system, sick, well, held_up):
        held_up |= batch(sick, "sick", 4_500)

        def found_out() -> bool:
            send.delay(well, "more")
            return state(sick) != "closed"

        wait_until(found_out, 40, "the topic's circuit to open")
        system.wait_for(well, batch(well, "well", 10), 10)


def batch(topic: str, name: str, records: int) -> set[str]:
    """Send so many as one; their ids."""
    ids = {f"{name} {n}" for n in range(records)}
    send_many.delay([{"topic": topic, "value": "x", "message_id": one} for one in ids])
    return ids


def claims(system: Stack) -> int:
    return int(system.redis.info("commandstats")["cmdstat_evalsha"]["calls"])


def led_apart(mock: MockKafka) -> tuple[str, str, int]:
    """Two topics of one partition that different brokers lead, and the broker of the first."""
    sick, well, broker = "sick", "well", 1
    for name in sick, well:
        mock.create_topic(name, 1)
        mock.create_topic(f"{name}-dlq", 1)
    mock.lead(broker, sick)
    mock.lead(broker + 1, well)
    return sick, well, broker


class TestOperators:
    def test_the_whole_fleet_obeys(self, system: Stack) -> None:
        workers = [system.worker(*ALONE, ready=False) for _ in range(2)]
        warm(system, *workers)
        system.command("breaker", "force-open", "--reason", "maintenance", "--for", "30s")
        assert (state(), circuit().forced, circuit().why) == ("open", "open", "maintenance")
        waiting = [send.delay(TOPIC, f"{n}").id for n in range(50)]
        time.sleep(1.5)  # they would all have been delivered ten times over
        assert system.redis.llen("kafka-delivery") == 50
        system.command("breaker", "auto", "--reason", "done")
        system.wait_for(TOPIC, set(waiting), 10)

    def test_what_is_forced_for_a_time_ends_by_itself(self, system: Stack) -> None:
        worker = system.worker(*ALONE)
        warm(system, worker)
        system.command("breaker", "force-open", "--reason", "briefly", "--for", "2s")
        sent = send.delay(TOPIC, "x").id
        system.wait_for(TOPIC, {sent}, 10)
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
        wait_until(lambda: state() == "open", 20, "the circuit to open")
        system.command("breaker", "force-closed", "--reason", "all through")
        assert (state(), circuit().found) == ("closed", "open")
        for n in range(20):
            send.delay(TOPIC, f"{n}")
        wait_until(lambda: system.redis.llen("kafka-delivery") == 0, 10, "them to be claimed")
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
        system.wait_for(TOPIC, {passed}, 10)
        assert system.read("other") == []
        assert state("other") == "open"
        assert state() == "closed"
        system.command("breaker", "auto", "--topic", "other", "--reason", "they are well")
        arrived = system.wait_for("other", set(held), 10)
        assert [message_id(record) for record in arrived] == held

    def test_show_and_history_for_people_and_programs(self, system: Stack, mock: MockKafka) -> None:
        shown = system.command("breaker", "show").stdout
        assert "cluster" in shown
        assert "closed" in shown
        (line,) = system.command("breaker", "show", "--json").stdout.splitlines()
        assert json.loads(line)["state"] == "closed"
        assert json.loads(system.command("status", "--json").stdout)["circuits"] == {"cluster": "closed"}

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (("force-open",), "--reason"),
            (("force-open", "--reason", "x", "--for", "soon"), "90s, 10m or 2h"),
            (("force-open", "--reason", "x", "--for", "0s"), "90s, 10m or 2h"),
            (("auto", "--reason", "x", "--topic", "no topic"), "no name of a topic"),
        ],
    )
    def test_mistakes_end_in_a_sentence(self, system: Stack, arguments: tuple[str, ...], complaint: str) -> None:
        done = system.command("breaker", *arguments, check=False)
        assert done.returncode == 2
        assert complaint in done.stderr
        assert system.redis.exists("kafka-delivery:cb:1:{default}:cluster:st") == 0
