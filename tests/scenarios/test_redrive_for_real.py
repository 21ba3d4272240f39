"""What only real brokers do to dead letters and to who sends them again: limits, transactions, new topics of an old
name, brokers that die in the middle; and operators and machines that stop a run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import KafkaError, Producer

from five_kinds import configure
from kafka_delivery import Record, send
from kafka_delivery.dead_letters import reason
from kafka_delivery_worker.dead_letter_headers import PRESETS
from kafka_delivery_worker.redrive import IN_FLIGHT
from letters import command, listed, redrive, waiting
from servers import RealKafka, wait_until
from stack import BIN, Stack, stack
from watching import ALONE, emptied

pytestmark = [pytest.mark.long, pytest.mark.real]


@pytest.fixture(scope="module")
def system(redis_url: str, real_kafka: RealKafka) -> Iterator[Stack]:
    """One worker; a topic of its own keeps each test apart."""
    with stack(emptied(redis_url), real_kafka) as system:
        system.worker(*ALONE)
        yield system


@pytest.fixture
def topic(real_kafka: RealKafka) -> str:
    """A topic that no test has used, with its dead-letter topic."""
    name = f"orders-{uuid.uuid4().hex[:8]}"
    real_kafka.create_topic(name, partitions=2)
    real_kafka.create_topic(f"{name}-dlq", partitions=2)
    return name


def test_one_that_is_too_large_for_its_dead_letter_topic_is_found_whole(
    system: Stack, real_kafka: RealKafka, topic: str
) -> None:
    for name in (topic, f"{topic}-dlq"):
        configure(real_kafka, name, "max.message.bytes", "1000")
    value = os.urandom(5_000)
    send.delay(topic, value, key="k", headers=[("a", "1"), ("a", None)], message_id="large")
    send.delay(f"{topic}-other", value, message_id="other")  # is parked too, and is none of this topic
    system.wait_parked(2, timeout=60)

    plan = run(system, "redrive", topic, "--dry-run", "--json")
    assert (plan["send"], plan["whole"]) == ({topic: 1}, 1)
    assert redrive(system, topic, fails=True)["refused"] == 1
    wait_until(lambda: {item.id for item in system.parked()} == {"large", "other"}, 60, "it to be parked again")

    configure(real_kafka, topic, "max.message.bytes", "20000")
    assert redrive(system, topic)["delivered"] == 1
    (record,) = system.read(topic)
    assert record.value == value
    assert [one for one in record.headers if one[0] == "a"] == [("a", b"1"), ("a", None)]
    assert [item.id for item in system.parked()] == ["other"]


def test_a_topic_made_anew_has_its_own_dead_letters(system: Stack, real_kafka: RealKafka, topic: str) -> None:
    """Offsets start again; what was done of the old topic says nothing of the new one."""
    bury(system, topic, range(20), error_class=lambda n: "Mine" if n % 2 else "Other")
    assert redrive(system, topic, "--error-class", "Mine")["delivered"] == 10
    letters = f"{topic}-dlq"
    real_kafka.admin.delete_topics([letters])[letters].result(60)
    wait_until(lambda: letters not in real_kafka.admin.list_topics(timeout=5).topics, 60, "it to be gone")
    real_kafka.create_topic(letters, partitions=2)
    bury(system, topic, range(100, 120))
    assert waiting(system, topic) == 20
    assert redrive(system, topic)["delivered"] == 20
    assert waiting(system, topic) == 0


def test_gaps_and_aborted_transactions_are_no_dead_letters(system: Stack, real_kafka: RealKafka, topic: str) -> None:
    producer = Producer(
        {
            "bootstrap.servers": real_kafka.bootstrap_servers,
            "transactional.id": f"t-{uuid.uuid4()}",
            "transaction.timeout.ms": 600_000,
            "linger.ms": 0,
        }
    )
    producer.init_transactions(60)
    for n in range(4):
        producer.begin_transaction()
        for m in range(5):
            produce(producer, topic, 10 * n + m, partition=0)
        (producer.abort_transaction if n % 2 else producer.commit_transaction)(60)

    assert len(listed(system, topic)) == 10
    (place,) = (one["place"] for one in listed(system, topic) if one["message_id"] == f"{topic}-20")
    assert redrive(system, topic, place)["delivered"] == 1
    assert redrive(system, topic)["delivered"] == 9
    assert sorted(system.ids(topic)) == sorted(f"{topic}-{10 * n + m}" for n in (0, 2) for m in range(5))
    assert waiting(system, topic) == 0

    # What is in an open transaction is no dead letter yet, and must not be passed over.
    producer.begin_transaction()
    produce(producer, topic, 100, partition=0)
    assert producer.flush(60) == 0
    bury(system, topic, [101], partition=0)
    assert redrive(system, topic)["sent"] == 0
    producer.commit_transaction(60)
    assert redrive(system, topic)["delivered"] == 2


def test_it_stops_by_itself_while_the_cause_is_still_there(system: Stack, real_kafka: RealKafka, topic: str) -> None:
    """Each round uses up one of the few redrives that a record is worth."""
    bury(system, topic, range(300))
    real_kafka.deny_write(topic)
    stopped = redrive(system, topic, fails=True)
    assert "in a row were refused again: the cause is still there" in stopped["stopped"]
    assert 50 <= stopped["refused"] <= 50 + IN_FLIGHT < 300
    system.wait_empty()
    letters = listed(system, topic)
    assert Counter(one["redrive_count"] for one in letters) == {0: 300 - stopped["refused"], 1: stopped["refused"]}
    assert {one["error"] for one in letters if one["redrive_count"]} == {"TOPIC_AUTHORIZATION_FAILED"}

    real_kafka.allow_write(topic)
    assert redrive(system, topic)["delivered"] == 300
    assert sorted(system.ids(topic)) == sorted(f"{topic}-{n}" for n in range(300))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_clean(system: Stack, topic: str, number: signal.Signals) -> None:
    def stopped(running: subprocess.Popen[str]) -> bool:
        running.send_signal(number)
        return running.wait(60) != 0

    running, count = caught_in_the_middle(system, topic, 200, 5, stopped, "--rate", "20/s")
    result = json.loads(running.communicate()[0])
    assert running.returncode == 128 + number
    assert result["stopped"] == "it was told to"
    assert result["in_flight"] == 0
    left = waiting(system, topic)
    assert result["delivered"] == 200 - left < 200
    assert redrive(system, topic)["delivered"] == left
    assert sorted(system.ids(topic)) == sorted(f"{topic}-{n}" for n in range(count))


def test_a_run_that_is_killed_repeats_what_was_in_flight_at_most(system: Stack, topic: str) -> None:
    def killed(running: subprocess.Popen[str]) -> bool:
        running.kill()
        return running.wait() == -signal.SIGKILL

    first = 0
    for _ in range(3):
        system.wait_empty()
        _, first = caught_in_the_middle(system, topic, 1_000, 100, killed, first=first)
        system.redis.delete(f"kafka-delivery:redrive:1:{topic}-dlq:lock")  # instead of waiting for its end
    redrive(system, topic)

    system.wait_empty()
    delivered = Counter(system.ids(topic))
    assert set(delivered) == {f"{topic}-{n}" for n in range(first)}
    assert delivered.total() - first <= 3 * IN_FLIGHT
    assert waiting(system, topic) == 0


@pytest.mark.timeout(300)
def test_a_broker_dies_in_the_middle(system: Stack, real_kafka: RealKafka, topic: str) -> None:
    def without_broker(running: subprocess.Popen[str]) -> bool:
        real_kafka.kill()
        try:
            return running.poll() is None
        finally:
            real_kafka.start()

    running, count = caught_in_the_middle(system, topic, 600, 20, without_broker, "--rate", "60/s")
    out, err = running.communicate(timeout=180)
    assert json.loads(out)["delivered"] == 600, err
    delivered = Counter(system.ids(topic))
    assert set(delivered) == {f"{topic}-{n}" for n in range(count)}
    assert waiting(system, topic) == 0
    assert len(system.ids(f"{topic}-dlq")) == count


# -- helpers
def bury(system: Stack, topic: str, numbers: Any, partition: int = -1, **fields: Any) -> None:
    """Dead letters of `topic`, as a worker writes them; ids ``<topic>-<n>``."""
    producer = Producer(
        {"bootstrap.servers": system.kafka.bootstrap_servers, "linger.ms": 5, "message.max.bytes": 20_000_000}
    )
    for n in numbers:
        produce(producer, topic, n, partition, **fields)
        producer.poll(0)
        if len(fields.get("value", "")) > 1_000_000:
            producer.flush(20)
    assert producer.flush(60) == 0


def produce(
    producer: Producer, topic: str, n: int, partition: int, error_class: Any = lambda _: "Mine", value: Any = None
) -> None:
    record = Record.__new__(Record)  # not bound by this process's limit of size
    for name, given in {
        "topic": topic, "value": value or f"value {n}".encode(), "key": b"k", "headers": (), "partition": None,
        "timestamp": 1_767_323_045_678, "message_id": f"{topic}-{n}",
    }.items():  # fmt: skip
        object.__setattr__(record, name, given)
    headers = PRESETS["ours"](record, reason(error_class(n), KafkaError.MSG_SIZE_TOO_LARGE, "why"))
    producer.produce(
        f"{topic}-dlq", record.value_bytes, str(n), partition=partition, headers=headers, timestamp=record.timestamp_ms
    )


def caught_in_the_middle(
    system: Stack,
    topic: str,
    count: int,
    delivered: int,
    act: Callable[[subprocess.Popen[str]], bool],
    *arguments: str,
    first: int = 0,
) -> tuple[subprocess.Popen[str], int]:
    """Run a redrive over `count` dead letters and act on it when more than `delivered` of them are delivered.

    `act` returns whether the run was in the middle. It may be over before this process comes to act: then as many more
    are buried for another run. Returns the run that was met, and how many were buried for this topic.
    """
    while True:
        before = len(set(system.ids(topic)))
        bury(system, topic, range(first, first + count))
        first += count
        running = start(system, "redrive", topic, *arguments, "--yes", "--json")

        def moved(running: subprocess.Popen[str] = running, enough: int = before + delivered) -> bool:
            return running.poll() is not None or len(set(system.ids(topic))) > enough

        wait_until(moved, 60, "some to be delivered")
        if act(running):
            return running, first


def start(system: Stack, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / "kafka-delivery", "dead-letters", *arguments],
        env=system.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(system: Stack, *arguments: str) -> dict[str, Any]:
    (result,) = map(json.loads, command(system, *arguments).stdout.splitlines())
    return dict(result)
