"""What died is seen, understood and sent again as it was; what is not asked for goes on waiting; nothing goes twice by
running it twice, and what will not do is given to a person.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from celery.exceptions import TimeoutError as ResultTimeoutError
from confluent_kafka import KafkaError, KafkaException

from kafka_delivery import Record, app, send
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import Parked, ParkingStore
from kafka_delivery_worker.redrive import Backlog
from kafka_delivery_worker.redrive import run as redrive_run
from kafka_delivery_worker.run_lock import RunLock
from letters import bury, command, lag, listed, produce, redrive, wait_listed, waiting
from servers import wait_until
from stack import Stack, message_id, stack
from watching import ALONE, emptied, revoke

TOPICS = [f"orders-{n}" for n in range(24)]

SPRING = [("kafka_dlt-original-topic", b"TOPIC"), ("kafka_dlt-original-offset", b"\0" * 8), ("own", b"1")]
CONNECT = [("__connect.errors.topic", b"TOPIC"), ("__connect.errors.offset", b"0"), ("own", b"1")]


@pytest.fixture(scope="module")
def system(redis_url: str) -> Iterator[Stack]:
    """One worker on a cluster that fails on demand."""
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        for name in TOPICS:  # all at once: the mock takes its time for each that comes later
            kafka.create_topic(name)
            kafka.create_topic(f"{name}-dlq")
        system.worker(*ALONE)
        yield system


@pytest.fixture
def topic(names: Iterator[str]) -> str:
    """A topic that no test has used, with its dead-letter topic."""
    return next(names)


@pytest.fixture(scope="module")
def names() -> Iterator[str]:
    return iter(TOPICS)


@pytest.mark.smoke
def test_what_comes_back_is_what_died(system: Stack, topic: str) -> None:
    headers: list[tuple[str, str | bytes | None]] = [
        ("redrive-count", "mine"),
        ("original-topic", "mine"),
        ("a", b"\xff"),
        ("a", None),
        ("message-id", "mine"),
    ]
    bury(system, topic, 1, value=b"\x00\xff", key=b"\x00k", headers=headers, timestamp=1767323045678)

    done = redrive(system, topic)

    assert done["delivered"] == 1
    (record,) = system.read(topic)
    assert (record.key, record.value, record.timestamp) == (b"\x00k", b"\x00\xff", 1767323045678)
    assert record.headers == [
        ("message-id", f"{topic}-0".encode()),
        ("redrive-count", b"1"),
        ("redrive-count", b"mine"),
        ("original-topic", b"mine"),
        ("a", b"\xff"),
        ("a", None),
        ("message-id", b"mine"),
    ]


@pytest.mark.smoke
def test_nothing_goes_twice_by_running_it_twice(system: Stack, topic: str) -> None:
    bury(system, topic, 30)
    assert redrive(system, topic)["delivered"] == 30
    assert redrive(system, topic)["sent"] == 0
    assert sorted(system.ids(topic)) == sorted(f"{topic}-{n}" for n in range(30))
    assert lag(system, topic) == 0
    assert listed(system, topic) == []
    assert len(listed(system, topic, "--all")) == 30
    bury(system, topic, 2, first=30)
    assert redrive(system, topic)["delivered"] == 2


def test_what_was_not_asked_for_goes_on_waiting(system: Stack, topic: str) -> None:
    """One offset per partition cannot say that every third is done; the lag says what the first of the rest is."""
    bury(system, topic, 60, error_class=lambda n: "Mine" if n % 3 == 0 else "Other")
    assert redrive(system, topic, "--error-class", "Mine")["delivered"] == 20
    assert redrive(system, topic, "--error-class", "Mine")["sent"] == 0

    assert sorted(one["message_id"] for one in listed(system, topic)) == sorted(
        f"{topic}-{n}" for n in range(60) if n % 3
    )
    assert waiting(system, topic) == 40
    assert 40 <= lag(system, topic) <= 60
    assert redrive(system, topic, "--limit", "15")["delivered"] == 15
    (place,) = listed(system, topic, "--limit", "1")
    assert redrive(system, topic, place["place"])["delivered"] == 1
    assert waiting(system, topic) == 24
    assert redrive(system, topic)["delivered"] == 24
    assert sorted(system.ids(topic)) == sorted(f"{topic}-{n}" for n in range(60))
    assert lag(system, topic) == waiting(system, topic) == 0


def test_one_that_fails_again_says_how_often_and_is_parked_in_the_end(system: Stack, topic: str) -> None:
    bury(system, topic, 1, headers=[("redrive-count", "mine")], retry_count=5)
    for count in (1, 2, 3):
        refuse_next(system)
        assert redrive(system, topic, fails=True)["refused"] == 1
        (letter,) = wait_listed(system, topic, 1)
        assert (letter["redrive_count"], letter["retry_count"]) == (count, 0)
        assert letter["error"] == "POLICY_VIOLATION"
    newest = system.read(f"{topic}-dlq")[-1]
    assert [name for name, _ in newest.headers].count("redrive-count") == 1
    assert newest.headers[-1] == ("original-redrive-count", b"mine")

    assert redrive(system, topic)["parked"] == 1

    (parked,) = (item for item in system.parked() if item.topic == topic)
    assert (parked.id, parked.kind, parked.error_code) == (f"{topic}-0", "redriven", KafkaError.POLICY_VIOLATION)
    assert system.read(topic) == []
    assert waiting(system, topic) == 0


def test_one_that_its_dead_letter_topic_does_not_take_is_not_redriven_for_ever(system: Stack, topic: str) -> None:
    record = Record(topic, "v", message_id=f"{topic}-0")
    parked = Parked(
        id=record.id, kind="dead-letter", error_class="E", error_message="too large", topic=topic, content="record",
        data=record.to_wire("default"),
    )  # fmt: skip
    ParkingStore(system.redis).park(parked)

    def found() -> list[tuple[str, int]]:
        return [(item.kind, item.redrive_count) for item in system.parked() if item.topic == topic]

    for count in (1, 2, 3):
        refuse_next(system)
        refuse_next(system)  # its dead letter too
        assert redrive(system, topic, fails=True)["refused"] == 1
        again = [("dead-letter", count)]
        wait_until(lambda again=again: found() == again, 30, "it to be parked again")  # type: ignore[misc]
    done = redrive(system, topic)
    assert (done["sent"], done["parked"]) == (0, 1)
    assert found() == [("redriven", 3)]
    assert system.read(topic) == []


def test_the_plan_comes_first(system: Stack, topic: str) -> None:
    bury(system, topic, 3, error_class=lambda n: "Mine" if n else "Other")
    plan = json.loads(command(system, "redrive", topic, "--dry-run", "--json", "--error-class", "Mine").stdout)
    assert (plan["send"], plan["not_chosen"], plan["park"]) == ({topic: 2}, 1, 0)
    assert plan["errors"] == [{"error_class": "Mine", "error_code": 10, "error": "MSG_SIZE_TOO_LARGE", "count": 2}]
    refused = system.command("dead-letters", "redrive", topic, stdin="n\n", check=False)
    assert refused.returncode == 1
    assert "Redrive 3 dead letters?" in refused.stdout
    assert system.read(topic) == []
    asked = system.command("dead-letters", "redrive", topic, stdin="y\n")
    assert "3 delivered, 0 dead letters again" in asked.stdout


def test_two_at_once(system: Stack, topic: str) -> None:
    bury(system, topic, 1)
    with RunLock(redis_client(system), f"{topic}-dlq", lock_s=600) as lock:
        second = command(system, "redrive", topic, "--yes", check=False)
        assert second.returncode == 1
        assert f"{lock.runner.user}@{lock.runner.host}, process {os.getpid()}, since 20" in second.stderr
        assert command(system, "discard", topic, "--all", "--reason", "x", "--yes", check=False).returncode == 1
        assert len(listed(system, topic)) == 1
    assert redrive(system, topic)["delivered"] == 1


def test_who_lost_the_lock_sends_nothing_more(system: Stack, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped finds another run in its place. No outcome tells it so while a circuit is open."""
    bury(system, topic, 50)
    system.command("breaker", "force-open", "--topic", topic, "--reason", "it is repaired", "--for", "1h")
    sends, sent = [], redrive_run.Redrive._send

    def _send(self: Any, letter: Any, record: Any) -> None:
        sent(self, letter, record)
        sends.append(letter)
        if len(sends) == 3:
            system.redis.delete(f"kafka-delivery:redrive:1:{topic}-dlq:lock")
            time.sleep(2 * redrive_run.COLLECT_S)

    monkeypatch.setattr(redrive_run.Redrive, "_send", _send)
    done = command(system, "redrive", topic, "--yes", check=False)
    assert done.returncode == 1
    assert f"the lock on {topic}-dlq was lost" in done.stderr
    system.command("breaker", "auto", "--topic", topic, "--reason", "it is tried")
    system.wait_empty()
    assert len(system.ids(topic)) == 3


@pytest.mark.parametrize("headers", [SPRING, CONNECT], ids=["spring", "connect"])
def test_dead_letters_of_other_tools(system: Stack, topic: str, headers: list[tuple[str, bytes]]) -> None:
    theirs = [(name, topic.encode() if value == b"TOPIC" else value) for name, value in headers]
    produce(system, f"{topic}-dlq", [(b"v", b"k", theirs)])
    assert redrive(system, topic)["delivered"] == 1
    (record,) = system.read(topic)
    assert (record.key, record.value) == (b"k", b"v")
    assert [name for name, _ in record.headers] == ["message-id", "redrive-count", "own"]


def test_one_without_headers_needs_to_be_told_where_to(system: Stack, topic: str) -> None:
    produce(system, f"{topic}-dlq", [(b"v", None, [])])
    plan = json.loads(command(system, "redrive", topic, "--dry-run", "--json").stdout)
    assert plan["left"] == {"nothing says which topic it was for: give --to": 1}
    done = redrive(system, topic, fails=True)
    assert (done["sent"], done["left"]) == (0, 1)
    (letter,) = listed(system, topic)
    assert "ask its writer" in command(system, "show", topic, letter["place"]).stdout

    assert redrive(system, topic, "--to", topic)["delivered"] == 1
    (record,) = system.read(topic)
    assert message_id(record) == letter["message_id"]


def test_one_that_is_no_valid_record_stays_and_the_plan_says_why(system: Stack, topic: str) -> None:
    """Another tool's may be larger than ours may be."""
    theirs = [("kafka_dlt-original-topic", topic.encode()), ("kafka_dlt-original-offset", b"\0" * 8)]
    produce(system, f"{topic}-dlq", [(b"v", None, theirs), (b"x" * 2_000, None, theirs)])
    small: dict[str, Any] = {"KAFKA_DELIVERY_MAX_RECORD_BYTES": "2000"}
    plan = json.loads(command(system, "redrive", topic, "--dry-run", "--json", **small).stdout)
    (why,) = plan["left"]
    assert (plan["send"], plan["left"][why]) == ({topic: 1}, 1)
    assert "more than KAFKA_DELIVERY_MAX_RECORD_BYTES=2000" in why
    done = redrive(system, topic, fails=True, **small)
    assert (done["delivered"], done["left"]) == (1, 1)
    assert redrive(system, topic)["delivered"] == 1


def test_the_circuit_of_the_topic_that_takes_them_is_waited_for(
    system: Stack, topic: str, names: Iterator[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it is open: here any silence is too long while nothing explains it."""
    other = next(names)
    bury(system, topic, 1)
    system.command("breaker", "force-open", "--topic", other, "--reason", "it is repaired", "--for", "1h")
    wait_until(lambda: is_held(other), 60, "the worker to know")
    known, silent_s, looks = redrive_run.Redrive._is_known_to_wait, redrive_run.Redrive._silent_s, []

    def _is_known_to_wait(self: Any) -> bool:
        looks.append(known(self))
        if len(looks) == 5:  # outcomes take a moment once it is closed
            monkeypatch.setattr(redrive_run.Redrive, "_silent_s", silent_s)
            system.command("breaker", "auto", "--topic", other, "--reason", "it is tried")
        return looks[-1]

    monkeypatch.setattr(redrive_run.Redrive, "_is_known_to_wait", _is_known_to_wait)
    monkeypatch.setattr(redrive_run.Redrive, "_silent_s", lambda _: math.inf)
    assert redrive(system, topic, "--to", other)["delivered"] == 1
    assert looks[:5] == [True] * 5


def test_topics_that_share_a_dead_letter_topic_keep_apart(system: Stack, topic: str, names: Iterator[str]) -> None:
    other = next(names)
    shared: dict[str, Any] = {"KAFKA_DELIVERY_DEAD_LETTER_TOPICS": json.dumps({other: f"{topic}-dlq"})}
    bury(system, topic, 2)
    bury(system, topic, 2, first=2, original=other)
    assert [one["topic"] for one in listed(system, topic, **shared)] == [topic] * 2
    assert redrive(system, other, **shared)["delivered"] == 2
    assert len(system.read(other)) == 2
    assert system.read(topic) == []
    assert redrive(system, topic, **shared)["delivered"] == 2


def test_one_that_was_revoked_before_is_meant_now(system: Stack, topic: str) -> None:
    bury(system, topic, 1)
    revoke(f"{topic}-0")
    assert redrive(system, topic)["delivered"] == 1


def test_one_that_died_twice_goes_twice_one_after_the_other(system: Stack, topic: str) -> None:
    """Both have one id, under which there is one outcome at a time."""
    bury(system, topic, 1, value="first")
    bury(system, topic, 1, value="second")
    assert redrive(system, topic)["delivered"] == 2
    assert sorted(record.value or b"" for record in system.read(topic)) == [b"first", b"second"]
    assert waiting(system, topic) == 0


def test_what_is_under_way_is_waited_for_when_nothing_more_can_be_read(
    system: Stack, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bury(system, topic, 10)
    read, runs = Backlog.letters, []

    def letters(*arguments: Any, **options: Any) -> Iterator[Any]:
        runs.append(1)
        yield from islice((one for one in read(*arguments, **options) if one), 3 if len(runs) == 2 else None)
        if len(runs) == 2:  # the plan was made
            raise KafkaException(KafkaError(KafkaError._FAIL, "it broke"))

    monkeypatch.setattr(Backlog, "letters", letters)
    done = redrive(system, topic, fails=True)
    assert (done["delivered"], done["in_flight"], done["stopped"]) == (3, 0, "Kafka: it broke")
    assert json.loads(command(system, "history", "--limit", "1", "--json").stdout)["count"] == 3

    assert redrive(system, topic)["delivered"] == 7
    assert sorted(system.ids(topic)) == sorted(f"{topic}-{n}" for n in range(10))


def test_an_earlier_result_under_the_id_is_not_taken_for_this_one(system: Stack, topic: str) -> None:
    bury(system, topic, 1)
    earlier: dict[str, Any] = {"status": "SUCCESS", "result": {"topic": topic}, "traceback": None, "children": []}
    app.backend.client.set(app.backend.get_key_for_task(f"{topic}-0"), app.backend.encode(earlier))
    refuse_next(system)
    assert redrive(system, topic, fails=True)["refused"] == 1


def test_discarded_ones_leave_a_line(system: Stack, topic: str) -> None:
    bury(system, topic, 5)
    assert "say which" in command(system, "discard", topic, "--reason", "x", "--yes", check=False).stderr
    chosen = ("--message-id", f"{topic}-1", "--reason", "a test order")
    said = system.program("dead-letters", "discard", topic, *chosen, "--yes", "--json")
    assert json.loads(said.stdout) == {"topic": topic, "discarded": 1}
    assert f"dead_letters.discarded topic={topic} count=1" in said.stderr
    assert "reason='a test order'" in said.stderr

    entry = json.loads(command(system, "history", "--limit", "1", "--json").stdout)
    assert (entry["verb"], entry["topic"], entry["count"], entry["reason"]) == ("discarded", topic, 1, "a test order")
    assert entry["asked"] == f"message_ids={topic}-1"
    gone = {one["place"] for one in listed(system, topic, "--all")} - {one["place"] for one in listed(system, topic)}
    assert gone == {entry["places"]}
    assert redrive(system, topic)["delivered"] == 4
    assert f"{topic}-1" not in system.ids(topic)
    missing = command(system, "redrive", topic, entry["places"], "--yes", check=False)
    assert f"no dead letter waits at {entry['places']}" in missing.stderr


def test_a_full_disk_ends_in_a_sentence(system: Stack, topic: str, tmp_path: Path) -> None:
    bury(system, topic, 3)
    code = """
        import resource

        from kafka_delivery_worker.cli import main

        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(code), "dead-letters", "export", topic, str(tmp_path / "letters.jsonl")],
        env=system.env(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (1, "kafka-delivery: File too large\n")


# -- helpers
def is_held(topic: str) -> bool:
    """Whether a record does not get through."""
    try:
        send.apply_async((topic, "v"), ignore_result=False).get(timeout=1)
    except ResultTimeoutError:
        return True
    return False


def redis_client(system: Stack) -> RedisClient:
    return RedisClient(Settings.from_env(system.env()))


def refuse_next(system: Stack) -> None:
    assert isinstance(system.kafka, MockKafka)
    system.kafka.fail_next(KafkaError.POLICY_VIOLATION)
