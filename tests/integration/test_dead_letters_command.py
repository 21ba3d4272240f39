"""`kafka-delivery dead-letters` shows what waits without harm, gives up what it is told to, and says what is wrong."""

from __future__ import annotations

import json
import shlex
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from kafka_delivery.names import QUEUE
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parked_items import Reason, of_raw
from kafka_delivery_worker.parking import Parked, ParkingStore
from kafka_delivery_worker.redrive import Backlog, backlog, run
from letters import bury, command, listed, produce, waiting
from servers import wait_until
from stack import Stack, stack
from watching import emptied

MISTYPED = "typed"
TOPICS = [f"orders-{n}" for n in range(7)]


@pytest.fixture(scope="module")
def system(redis_url: str) -> Iterator[Stack]:
    """Without a worker: what is asked for here sends nothing."""
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        for name in (MISTYPED, *TOPICS):  # all at once: the mock takes its time for each that comes later
            kafka.create_topic(name)
            kafka.create_topic(f"{name}-dlq")
        yield system


@pytest.fixture(scope="module")
def names() -> Iterator[str]:
    return iter(TOPICS)


@pytest.fixture
def topic(names: Iterator[str]) -> str:
    """A topic that no test has used, with its dead-letter topic."""
    return next(names)


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


@pytest.mark.parametrize("before", ["its own id is free", "another content has its id", "another one had it"])
def test_one_that_is_parked_on_its_way_is_not_waited_for(
    system: Stack, topic: str, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Of poison no result tells. It lies under its own id, or beside it where another content has or had that id."""
    monkeypatch.setattr(run, "LOST_S", 0.2)
    monkeypatch.setattr(run, "SILENCE_S", 20.0)
    bury(system, topic, 1)
    store = ParkingStore(system.redis)
    other = Parked(id=f"{topic}-0", kind="bug", error_class="E", error_message="m", content="call", data={"task": "t"})
    if before != "its own id is free":
        store.park(other)

    def works() -> None:
        """As a worker that finds the message to be poison."""
        wait_until(lambda: system.redis.llen(QUEUE) == 1, 60, "the send")
        envelope = system.redis.rpop(QUEUE)
        assert isinstance(envelope, bytes)
        why = Reason(kind="poison", error_class="WorkerLost", error_message="m")
        items = of_raw(QUEUE, envelope.decode(), why)
        if before == "another one had it":  # and so has an older parking of the same record
            store.park_all(items)
            store.remove(other.id)
        store.park_all(items)

    with ThreadPoolExecutor(1) as pool:
        worked = pool.submit(works)
        done = json.loads(command(system, "redrive", topic, "--yes", "--json").stdout)
        worked.result()
    assert (done["sent"], done["parked"], done["in_flight"], done["stopped"]) == (1, 1, 0, "")
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


@pytest.mark.parametrize(
    "verb", [["topics"], ["list", MISTYPED], ["redrive", MISTYPED, "--yes"]], ids=lambda verb: verb[0]
)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"KAFKA_DELIVERY_BOOTSTRAP_SERVERS": "127.0.0.1:1"}, "kafka-delivery: Kafka: "),
        (
            {"KAFKA_DELIVERY_REDIS_URL": "redis://127.0.0.1:1/0"},
            "kafka-delivery: Redis at redis://127.0.0.1:1/0: nothing listens there",
        ),
    ],
    ids=["Kafka", "Redis"],
)
def test_servers_that_are_away_end_in_a_sentence(
    system: Stack, verb: list[str], change: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said == "kafka-delivery: Kafka: ":  # which is known after this time only
        monkeypatch.setattr(backlog, "KAFKA_S", 0.2)
    done = command(system, *verb, check=False, **change)
    assert done.returncode == 1
    assert done.stderr.startswith(said), done.stderr
    assert "Traceback" not in done.stderr
