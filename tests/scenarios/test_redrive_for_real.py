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
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError, Producer

from five_kinds import configure
from kafka_delivery import Record, send
from kafka_delivery.dead_letters import reason
from kafka_delivery_worker.dead_letter_headers import PRESETS
from kafka_delivery_worker.redrive import IN_FLIGHT
from servers import RealKafka, wait_until
from stack import BIN, Stack, message_id, stack
from watching import ALONE, emptied

pytestmark = pytest.mark.real


@pytest.fixture
def topic() -> str:
    return f"orders-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def system(redis_url: str, real_kafka: RealKafka, topic: str) -> Any:
    """A topic with its dead-letter topic, and a worker."""
    real_kafka.create_topic(topic, partitions=2)
    real_kafka.create_topic(f"{topic}-dlq", partitions=2)
    with stack(emptied(redis_url), real_kafka) as system:
        system.worker(*ALONE)
        yield system


def test_one_that_is_too_large_for_its_dead_letter_topic_is_found_whole(
    redis_url: str, real_kafka: RealKafka, topic: str
) -> None:
    real_kafka.create_topic(topic, max_message_bytes=1_000)
    real_kafka.create_topic(f"{topic}-dlq", max_message_bytes=1_000)
    with stack(emptied(redis_url), real_kafka) as system:
        system.worker(*ALONE)
        value = os.urandom(5_000)
        send.delay(topic, value, key="k", headers=[("a", "1"), ("a", None)], message_id="large")
        send.delay(f"{topic}-other", value, message_id="other")  # is parked too, and is none of this topic
        system.wait_parked(2)

        plan = run(system, "redrive", topic, "--dry-run", "--json")
        assert (plan["send"], plan["whole"]) == ({topic: 1}, 1)
        refused = run(system, "redrive", topic, "--yes", "--json", code=1)
        assert refused["refused"] == 1
        wait_until(lambda: {item.id for item in system.parked()} == {"large", "other"}, 30, "it to be parked again")

        configure(real_kafka, topic, "max.message.bytes", "20000")
        assert run(system, "redrive", topic, "--yes", "--json")["delivered"] == 1
        (record,) = system.read(topic)
        assert record.value == value
        assert [one for one in record.headers if one[0] == "a"] == [("a", b"1"), ("a", None)]
        assert [item.id for item in system.parked()] == ["other"]


def test_a_topic_made_anew_has_its_own_dead_letters(system: Stack, real_kafka: RealKafka, topic: str) -> None:
    """Offsets start again; what was done of the old topic says nothing of the new one."""
    bury(system, topic, range(20), error_class=lambda n: "Mine" if n % 2 else "Other")
    assert run(system, "redrive", topic, "--error-class", "Mine", "--yes", "--json")["delivered"] == 10
    letters = f"{topic}-dlq"
    real_kafka.admin.delete_topics([letters])[letters].result(10)
    wait_until(lambda: letters not in real_kafka.admin.list_topics(timeout=5).topics, 10, "it to be gone")
    real_kafka.create_topic(letters, partitions=2)
    bury(system, topic, range(100, 120))
    assert waiting(system, topic) == 20
    assert run(system, "redrive", topic, "--yes", "--json")["delivered"] == 20
    assert waiting(system, topic) == 0


def test_gaps_and_aborted_transactions_are_no_dead_letters(system: Stack, real_kafka: RealKafka, topic: str) -> None:
    producer = Producer(
        {"bootstrap.servers": real_kafka.bootstrap_servers, "transactional.id": f"t-{uuid.uuid4()}", "linger.ms": 0}
    )
    producer.init_transactions(20)
    for n in range(4):
        producer.begin_transaction()
        for m in range(5):
            produce(producer, topic, 10 * n + m, partition=0)
        (producer.abort_transaction if n % 2 else producer.commit_transaction)(20)

    assert len(lines(system, "list", topic)) == 10
    (place,) = (one["place"] for one in lines(system, "list", topic) if one["message_id"] == f"{topic}-20")
    assert run(system, "redrive", topic, place, "--yes", "--json")["delivered"] == 1
    assert run(system, "redrive", topic, "--yes", "--json")["delivered"] == 9
    assert sorted(system.ids(topic)) == sorted(f"{topic}-{10 * n + m}" for n in (0, 2) for m in range(5))
    assert waiting(system, topic) == 0

    # What is in an open transaction is no dead letter yet, and must not be passed over.
    producer.begin_transaction()
    produce(producer, topic, 100, partition=0)
    producer.flush(10)
    bury(system, topic, [101], partition=0)
    assert run(system, "redrive", topic, "--yes", "--json")["sent"] == 0
    producer.commit_transaction(20)
    assert run(system, "redrive", topic, "--yes", "--json")["delivered"] == 2


def test_it_stops_by_itself_while_the_cause_is_still_there(system: Stack, real_kafka: RealKafka, topic: str) -> None:
    """Each round uses up one of the few redrives that a record is worth."""
    bury(system, topic, range(300))
    real_kafka.deny_write(topic)
    stopped = run(system, "redrive", topic, "--yes", "--json", code=1)
    assert "in a row were refused again: the cause is still there" in stopped["stopped"]
    assert 50 <= stopped["refused"] <= 50 + IN_FLIGHT < 300
    system.wait_empty()
    letters = lines(system, "list", topic)
    assert Counter(one["redrive_count"] for one in letters) == {0: 300 - stopped["refused"], 1: stopped["refused"]}
    assert {one["error"] for one in letters if one["redrive_count"]} == {"TOPIC_AUTHORIZATION_FAILED"}

    real_kafka.allow_write(topic)
    assert run(system, "redrive", topic, "--yes", "--json")["delivered"] == 300
    assert sorted(system.ids(topic)) == sorted(f"{topic}-{n}" for n in range(300))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_clean(system: Stack, topic: str, number: signal.Signals) -> None:
    bury(system, topic, range(200))
    running = start(system, "redrive", topic, "--rate", "20/s", "--yes", "--json")
    wait_until(lambda: len(system.ids(topic)) > 5, 30, "some to be delivered")
    running.send_signal(number)
    out, _ = running.communicate(timeout=30)

    result = json.loads(out)
    assert running.returncode == 128 + number
    assert result["stopped"] == "it was told to"
    assert result["in_flight"] == 0
    assert result["delivered"] == 200 - waiting(system, topic) < 200
    rest = run(system, "redrive", topic, "--yes", "--json")
    assert rest["delivered"] == 200 - result["delivered"]
    assert sorted(system.ids(topic)) == sorted(f"{topic}-{n}" for n in range(200))


def test_a_run_that_is_killed_repeats_what_was_in_flight_at_most(system: Stack, topic: str) -> None:
    bury(system, topic, range(5_000))
    for _ in range(3):
        system.wait_empty()
        before = len(system.ids(topic))
        running = start(system, "redrive", topic, "--yes", "--json")
        wait_until(lambda before=before: len(system.ids(topic)) > before + 100, 30, "some to be delivered")  # type: ignore[misc]
        running.kill()
        assert running.wait() == -signal.SIGKILL  # it was in the middle
        system.redis.delete(f"kafka-delivery:redrive:1:{topic}-dlq:lock")  # instead of waiting for its end
    run(system, "redrive", topic, "--yes", "--json")

    system.wait_empty()
    delivered = Counter(system.ids(topic))
    assert set(delivered) == {f"{topic}-{n}" for n in range(5_000)}
    assert delivered.total() - 5_000 <= 3 * IN_FLIGHT
    assert waiting(system, topic) == 0


def test_a_broker_dies_in_the_middle(redis_url: str, tmp_path: Path, topic: str) -> None:
    with RealKafka(tmp_path / "kafka") as kafka, stack(emptied(redis_url), kafka) as system:
        kafka.create_topic(topic)
        kafka.create_topic(f"{topic}-dlq", partitions=2)
        system.worker(*ALONE)
        bury(system, topic, range(600))
        running = start(system, "redrive", topic, "--rate", "60/s", "--yes", "--json")
        wait_until(lambda: len(system.ids(topic)) > 20, 30, "some to be delivered")
        kafka.kill()
        assert running.poll() is None
        kafka.start()
        out, err = running.communicate(timeout=120)
        assert json.loads(out)["delivered"] == 600, err
        delivered = Counter(system.ids(topic))
        assert set(delivered) == {f"{topic}-{n}" for n in range(600)}
        assert waiting(system, topic) == 0
        assert system.ids(f"{topic}-dlq") == [message_id(one) for one in system.read(f"{topic}-dlq")]
        assert len(system.ids(f"{topic}-dlq")) == 600


def test_large_values_take_bounded_memory(redis_url: str, real_kafka: RealKafka, topic: str) -> None:
    """Sixty of 10 MB: six hundred would take no more."""
    size = 10_000_000
    for name in (topic, f"{topic}-dlq"):
        real_kafka.create_topic(name, partitions=1, max_message_bytes=2 * size)
    with stack(emptied(redis_url), real_kafka, MAX_RECORD_BYTES=size + 1_000) as system:
        system.worker(*ALONE)
        bury(system, topic, range(60), value=os.urandom(size))
        # One or two of them are in hand in any case: now this many, now that.
        before = max(peak_kib(system, "summary", topic, "--error-class", "None") for _ in range(3))
        assert peak_kib(system, "summary", topic) < before + 20_000
        assert peak_kib(system, "redrive", topic, "--yes") < 500_000
        assert len(system.ids(topic)) == 60


def test_servers_that_are_away_end_in_a_sentence(system: Stack, topic: str) -> None:
    for change, said in (
        ({"KAFKA_DELIVERY_BOOTSTRAP_SERVERS": "127.0.0.1:1"}, "kafka-delivery: Kafka: "),
        ({"KAFKA_DELIVERY_REDIS_URL": "redis://127.0.0.1:1/0"}, "kafka-delivery: Redis: "),
    ):
        for verb in (["topics"], ["list", topic], ["redrive", topic, "--yes"]):
            done = subprocess.run(
                [BIN / "kafka-delivery", "dead-letters", *verb],
                env=system.env() | change,
                capture_output=True,
                text=True,
                timeout=30,
            )
            assert done.returncode == 1
            assert done.stderr.startswith(said), done.stderr
            assert "Traceback" not in done.stderr


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
    assert producer.flush(30) == 0


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


def start(system: Stack, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / "kafka-delivery", "dead-letters", *arguments],
        env=system.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(system: Stack, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    running = start(system, *arguments, *([] if "--json" in arguments else ["--json"]))
    out, err = running.communicate(timeout=120)
    assert running.returncode == code, out + err
    return [json.loads(line) for line in out.splitlines()]


def run(system: Stack, *arguments: str, code: int = 0) -> dict[str, Any]:
    (result,) = lines(system, *arguments, code=code)
    return result


def waiting(system: Stack, topic: str) -> int:
    return int(next(one["waiting"] for one in lines(system, "topics") if one["topic"] == [topic]))


def peak_kib(system: Stack, *arguments: str) -> int:
    """The most memory that a command had, as the kernel counts it."""
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    argv = [str(BIN / "python"), "-c", code, str(BIN / "kafka-delivery"), "dead-letters", *arguments]
    done = subprocess.run(argv, env=system.env(), capture_output=True, text=True, timeout=170)
    returned, peak = done.stdout.split()
    assert returned == "0", done.stderr
    return int(peak)
