"""What died is seen, understood and sent again as it was; what is not asked for goes on waiting; nothing goes twice by
running it twice, and what will not do is given to a person.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import islice
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from celery.exceptions import TimeoutError as ResultTimeoutError
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

from kafka_delivery import Record, app, send
from kafka_delivery.dead_letters import reason
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker.cli import main
from kafka_delivery_worker.dead_letter_headers import PRESETS
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import Parked, ParkingStore
from kafka_delivery_worker.redrive import Backlog, RunLock
from kafka_delivery_worker.redrive import run as redrive_run
from servers import wait_until
from stack import BIN, Stack, message_id, stack
from watching import ALONE, emptied

MISTYPED = "typed"
TOPICS = [f"orders-{n}" for n in range(40)] + [MISTYPED]

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
    with RunLock(redis_client(system), f"{topic}-dlq") as lock:
        second = command(system, "redrive", topic, "--yes", check=False)
        assert second.returncode == 1
        assert f"{lock.runner.user}@{lock.runner.host}, process {os.getpid()}, since 20" in second.stderr
        assert command(system, "discard", topic, "--all", "--reason", "x", "--yes", check=False).returncode == 1
        assert len(listed(system, topic)) == 1
    assert redrive(system, topic)["delivered"] == 1


def test_who_lost_the_lock_sends_nothing_more(system: Stack, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped finds another run in its place. No outcome tells it so while a circuit is open."""
    bury(system, topic, 50)
    system.command("breaker", "force-open", "--topic", topic, "--reason", "it is repaired", "--for", "5s")
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


def test_a_terminal_acts_on_nothing_that_a_stranger_wrote(system: Stack, topic: str) -> None:
    headers = [
        ("original-topic", topic.encode()),
        ("error-message", b"bad\x1b[2J"),
        ("error-class", b"Bad\x1b[2J"),
        ("original-h\x1b[2J", b"1"),
    ]
    produce(system, f"{topic}-dlq", [(b"v", b"k\x1b[2J", headers)])
    (place,) = (one["place"] for one in listed(system, topic))
    for arguments in (["list", topic], ["show", topic, place], ["summary", topic]):
        said = command(system, *arguments).stdout
        assert "\x1b[2J" not in said
        assert "\\x1b[2J" in said
    assert "key: k\\x1b[2J" in command(system, "show", topic, place).stdout


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
    other = next(names)
    bury(system, topic, 1)
    system.command("breaker", "force-open", "--topic", other, "--reason", "it is repaired", "--for", "8s")
    wait_until(lambda: is_held(other), 5, "the worker to know")
    monkeypatch.setattr(redrive_run, "SILENCE_S", 6.0)
    monkeypatch.setattr(redrive_run, "LOST_S", 0.5)
    assert redrive(system, topic, "--to", other)["delivered"] == 1


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
    app.control.revoke(f"{topic}-0", reply=True, timeout=1)
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
    app.backend.store_result(f"{topic}-0", {"topic": topic}, "SUCCESS")
    refuse_next(system)
    assert redrive(system, topic, fails=True)["refused"] == 1


def test_discarded_ones_leave_a_line(system: Stack, topic: str) -> None:
    bury(system, topic, 5)
    assert "say which" in command(system, "discard", topic, "--reason", "x", "--yes", check=False).stderr
    said = command(
        system, "discard", topic, "--message-id", f"{topic}-1", "--reason", "a test order", "--yes", "--json",
        PYTHONUNBUFFERED="1",
    )  # fmt: skip
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


def test_what_is_discarded_is_told_also_where_kafka_does_not_move_its_offsets(
    system: Stack, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bury(system, topic, 3)
    commit, asked = Backlog.commit, []

    def refuses(*arguments: Any) -> None:
        asked.append(1)
        if len(asked) > 1:  # it began
            raise KafkaException(KafkaError(KafkaError.COORDINATOR_NOT_AVAILABLE))
        commit(*arguments)

    monkeypatch.setattr(Backlog, "commit", refuses)
    done = command(system, "discard", topic, "--all", "--reason", "x", "--yes", "--json")
    assert json.loads(done.stdout) == {"topic": topic, "discarded": 3}
    assert waiting(system, topic) == 0


def test_fewer_discarded_than_were_counted_is_a_failure(
    system: Stack, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention took one away between the question and the answer."""
    bury(system, topic, 3)
    read, runs = Backlog.letters, []

    def letters(*arguments: Any, **options: Any) -> Iterator[Any]:
        runs.append(1)
        return (one for one in read(*arguments, **options) if len(runs) == 1 or not one or one.message_id[-1] != "0")

    monkeypatch.setattr(Backlog, "letters", letters)
    done = command(system, "discard", topic, "--all", "--reason", "x", "--yes", check=False)
    assert (done.returncode, done.stdout) == (1, "2 discarded\n")


def test_looking_on(system: Stack, topic: str, tmp_path: Path) -> None:
    bury(system, topic, 3, value=b"secret-\xff", key="secret-key", headers=[("h", "secret-header")])
    table = command(system, "list", topic).stdout
    assert "MSG_SIZE_TOO_LARGE" in table
    assert f"{topic}-0" in table
    assert "secret" not in table + json.dumps(listed(system, topic))
    (place,) = (one["place"] for one in listed(system, topic, "--message-id", f"{topic}-0"))
    shown = command(system, "show", topic, place).stdout
    assert "raise max.message.bytes" in shown
    assert "header h: secret-header" in shown
    assert "value (8 bytes): base64:" in shown
    summary = json.loads(command(system, "summary", topic, "--json").stdout)
    assert summary["errors"] == [{"error_class": "Mine", "error_code": 10, "error": "MSG_SIZE_TOO_LARGE", "count": 3}]
    assert sum(hour["count"] for hour in summary["hours"]) == summary["dead_letters"] == 3
    file = tmp_path / "letters.jsonl"
    assert "3 dead letters written" in command(system, "export", topic, str(file)).stdout
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["key"] for line in lines} == {"secret-key"}
    assert {line["value"] for line in lines} == {"base64:c2VjcmV0Lf8="}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "File exists" in command(system, "export", topic, str(file), check=False).stderr
    assert len(command(system, "export", topic, "-").stdout.splitlines()) == 3


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("list typo", "did you mean typed"),
        ("list typed-dlq", "typed-dlq is a dead-letter topic itself; name the original: typed"),
        ("list 'a b'", "'a b' is no name of a topic"),
        ("show typed 0", "'0' is no place"),
        ("show typed 9:0", "has no partition 9, only 4"),
        ("show typed 0:5", "partition 0 of typed-dlq is empty"),
        ("redrive typed --rate fast", "'fast' is no rate"),
        ("redrive typed --to 'a b'", "'a b' is no name of a topic"),
        ("redrive typed --to ordres --yes", "there is no topic ordres: create it"),
        ("redrive typed --to ordres --dry-run", "there is no topic ordres: create it"),
        ("redrive typed 0:1 --yes", "no dead letter waits at 0:1"),
        ("list typed --error-code MSG_SIZE_TO_LARGE", "is no error code"),
        ("list typed --error-code " + "9" * 5_000, "is no error code"),
        ("list typed --since yesterday", "is no time"),
        ("list typed --key \udcff", "an argument is not UTF-8"),
        ("discard typed --all", "--reason"),
    ],
)
def test_a_typing_mistake_ends_in_a_sentence(system: Stack, arguments: str, said: str) -> None:
    done = command(system, *shlex.split(arguments), check=False)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


# -- helpers
def is_held(topic: str) -> bool:
    """Whether a record does not get through."""
    try:
        send.apply_async((topic, "v"), ignore_result=False).get(timeout=1)
    except ResultTimeoutError:
        return True
    return False


def bury(
    system: Stack,
    topic: str,
    count: int,
    *,
    first: int = 0,
    original: str = "",
    error_class: Callable[[int], str] = lambda _: "Mine",
    retry_count: int = 0,
    **fields: Any,
) -> None:
    """Dead letters of `original` in the dead-letter topic of `topic`, as a worker writes them; ids ``<topic>-<n>``."""
    letters = []
    for n in range(first, first + count):
        values = {"value": f"value {n}", "key": f"key {n % 7}"} | fields
        record = Record(original or topic, **values, message_id=f"{topic}-{n}")
        why = reason(error_class(n), KafkaError.MSG_SIZE_TOO_LARGE, "why", retry_count)
        letters.append((record.value_bytes, record.key_bytes, PRESETS["ours"](record, why)))
    produce(system, f"{topic}-dlq", letters)


def produce(system: Stack, topic: str, records: list[tuple[Any, ...]]) -> None:
    """Records as value, key, headers, and time in ms."""
    producer = Producer({"bootstrap.servers": system.kafka.bootstrap_servers, "linger.ms": 5})
    for value, key, headers, *timestamp in records:
        producer.produce(topic, value, key, headers=headers, timestamp=timestamp[0] if timestamp else 0)
    assert producer.flush(20) == 0


def command(system: Stack, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``kafka-delivery dead-letters``: here, which spares the start of a process, unless it needs `env`."""
    argv = ["dead-letters", *arguments]
    if env:
        done = subprocess.run(
            [BIN / "kafka-delivery", *argv], env=system.env() | env, capture_output=True, text=True, timeout=60
        )
    else:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            try:
                main(argv)
                code: Any = 0
            except SystemExit as end:
                code = end.code
        said = f"{code}\n" if isinstance(code, str) else ""
        done = subprocess.CompletedProcess(argv, 1 if said else code or 0, out.getvalue(), err.getvalue() + said)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def redrive(system: Stack, topic: str, *arguments: str, fails: bool = False, **env: str) -> dict[str, Any]:
    done = command(system, "redrive", topic, *arguments, "--yes", "--json", check=False, **env)
    assert done.returncode == (1 if fails else 0), done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def listed(system: Stack, topic: str, *arguments: str, **env: Any) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in command(system, "list", topic, "--json", *arguments, **env).stdout.splitlines()
    ]


def wait_listed(system: Stack, topic: str, count: int) -> list[dict[str, Any]]:
    """Wait until so many wait: a record that was refused again is a dead letter a moment later."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = listed(system, topic)
        return len(found) == count

    wait_until(there, 30, f"{count} dead letters of {topic}")
    return found


def waiting(system: Stack, topic: str) -> int:
    """As the command says."""
    found = [json.loads(line) for line in command(system, "topics", "--json").stdout.splitlines()]
    return int(next(one["waiting"] for one in found if one["topic"] == [topic]))


def lag(system: Stack, topic: str) -> int:
    """As Kafka's own tools say."""
    letters = f"{topic}-dlq"
    servers: dict[str, Any] = {"bootstrap.servers": system.kafka.bootstrap_servers}
    group, partitions = f"kafka-delivery-redrive.{letters}", [TopicPartition(letters, n) for n in range(4)]
    admin = AdminClient(servers)
    asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group, partitions)])
    committed = {one.partition: one.offset for one in asked[group].result(10).topic_partitions}
    consumer = Consumer(servers | {"group.id": "watermarks"})
    try:
        return sum(consumer.get_watermark_offsets(one, timeout=10)[1] - committed[one.partition] for one in partitions)
    finally:
        consumer.close()


def redis_client(system: Stack) -> RedisClient:
    return RedisClient(Settings.from_env(system.env()))


def refuse_next(system: Stack) -> None:
    assert isinstance(system.kafka, MockKafka)
    system.kafka.fail_next(KafkaError.POLICY_VIOLATION)
