"""What is parked waits for a person, whole: listed without its payload, shown with it, sent again under its own id once
the cause is gone, or discarded with a reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from click.testing import CliRunner

from kafka_delivery import send
from kafka_delivery_worker.cli.parked import command
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import Parked, ParkingStore
from servers import wait_until
from stack import Stack, stack
from watching import ALONE, emptied, other_worker

TOPIC = "parked-topic"
LATE = "late-topic"
PAYLOAD = "secret-payload"
CONTENTS = ("record", "call", "message")
KINDS = {"record": "dead-letter", "call": "invalid", "message": "unknown-task"}

NEWER_WORKER = """
    from kafka_delivery.delivery import Send
    from kafka_delivery_worker import app

    class Later(Send):
        name = "kafka_delivery.later"

    app.register_task(Later())
"""


@pytest.fixture(scope="module")
def system(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Of each content three items, parked by a worker that has since been replaced by one that can do more."""
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, TOPIC_PROPAGATION_MS=300, FEW_BACKOFF_S=1) as system:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        old = system.worker(*ALONE, MAX_RECORD_BYTES=300)
        by_name = partial(send.app.send_task, queue="kafka-delivery", argsrepr="()", kwargsrepr="{}")
        for n in range(3):
            send.delay(LATE, PAYLOAD, key="k", message_id=f"record-{n}")
            by_name(send.name, (TOPIC, PAYLOAD + "x" * 300), {"key": "k"}, task_id=f"call-{n}")
            by_name("kafka_delivery.later", (TOPIC, PAYLOAD), {"key": "k"}, task_id=f"message-{n}")
        system.wait_parked(9)
        old.stop()
        assert PAYLOAD not in old.log

        kafka.create_topic(LATE)
        other_worker(system, tmp_path_factory.mktemp("newer"), NEWER_WORKER)
        yield system


def test_the_list_has_everything_but_the_payload(system: Stack) -> None:
    listed = {item["id"]: item for item in json_lines(system, "list", "--json")}
    table = system.command("parked", "list").stdout

    for content in CONTENTS:
        for n in range(3):
            item = listed[f"{content}-{n}"]
            assert (item["content"], item["kind"]) == (content, KINDS[content])
            assert item["error_class"]
            assert item["error_message"]
            assert "data" not in item
            assert f"{content}-{n}" in table
    assert PAYLOAD not in json.dumps(listed)
    assert PAYLOAD not in table


def test_the_list_can_be_narrowed(system: Stack) -> None:
    assert {item["id"] for item in json_lines(system, "list", "--json", "--kind", "invalid")} == ids("call")
    assert {item["id"] for item in json_lines(system, "list", "--json", "--topic", LATE)} == ids("record")
    assert json_lines(system, "list", "--json", "--kind", "invalid", "--topic", LATE) == []


@pytest.mark.parametrize("content", CONTENTS)
def test_show_has_the_payload(system: Stack, content: str) -> None:
    (shown,) = json_lines(system, "show", f"{content}-0", "--json")
    text = system.command("parked", "show", f"{content}-0").stdout

    assert (shown["id"], shown["content"]) == (f"{content}-0", content)
    if content != "message":  # whose body is base64, as it lay in the queue
        assert PAYLOAD in json.dumps(shown["data"])
        assert PAYLOAD in text


@pytest.mark.parametrize("content", CONTENTS)
def test_redrive_delivers_the_record_under_its_own_id(
    system: Stack, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    item_id, topic = f"{content}-1", LATE if content == "record" else TOPIC
    done = system.command("parked", "redrive", item_id, "--yes")

    (record,) = [one for one in system.wait_for(topic, {item_id}) if ("message-id", item_id.encode()) in one.headers]

    assert record.key == b"k"
    assert (record.value or b"").startswith(PAYLOAD.encode())
    assert record.headers == [("message-id", item_id.encode())]
    assert stored(system, item_id) is None
    assert PAYLOAD not in done.stdout + done.stderr + caplog.text
    assert f"parked.redriven parked_id={item_id}" in caplog.text
    system.wait_empty()
    assert stored(system, item_id) is None


def test_redrive_asks_first(system: Stack) -> None:
    refused = system.command("parked", "redrive", "record-2", check=False, stdin="n\n")
    assert refused.returncode != 0
    assert stored(system, "record-2") is not None


def test_what_is_still_invalid_stays_parked(system: Stack) -> None:
    system.settings["MAX_RECORD_BYTES"] = "300"  # for the command; the worker has the usual limit
    try:
        done = system.command("parked", "redrive", "call-2", "record-2", "--yes", check=False)
    finally:
        del system.settings["MAX_RECORD_BYTES"]

    assert done.returncode == 1
    assert "call-2: still invalid" in done.stderr
    assert PAYLOAD not in done.stdout + done.stderr
    assert stored(system, "call-2") is not None
    system.wait_for(LATE, {"record-2"})  # one that fails does not hold up the others
    assert stored(system, "record-2") is None


@pytest.mark.parametrize("content", CONTENTS)
def test_discard_needs_a_reason_and_leaves_it_in_the_log(
    system: Stack, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    item_id = f"{content}-0"
    without = system.command("parked", "discard", item_id, "--yes", check=False)
    assert without.returncode != 0
    assert "--reason" in without.stderr
    assert stored(system, item_id) is not None

    done = system.command("parked", "discard", item_id, "--reason", "a test's", "--yes")

    assert stored(system, item_id) is None
    assert "a test's" in caplog.text
    assert PAYLOAD not in done.stdout + done.stderr + caplog.text


@pytest.mark.parametrize(
    "arguments", [("show",), ("redrive", "--yes"), ("discard", "--yes", "--reason", "r")], ids=lambda a: a[0]
)
def test_an_unknown_id_is_an_error_and_nothing_happens(system: Stack, arguments: tuple[str, ...]) -> None:
    before = len(system.parked())
    done = system.command("parked", *arguments, "nobody", check=False)
    assert done.returncode != 0
    assert "nobody" in done.stderr
    mixed = system.command("parked", *arguments[:1], "message-2", "nobody", *arguments[1:], check=False)
    assert mixed.returncode != 0
    assert len(system.parked()) == before


def test_neither_ids_nor_all_is_an_error(system: Stack) -> None:
    before = len(system.parked())
    assert system.command("parked", "redrive", "--yes", check=False).returncode != 0
    assert system.command("parked", "discard", "--yes", "--reason", "r", check=False).returncode != 0
    assert len(system.parked()) == before


def test_what_is_parked_again_at_once_is_not_taken_away(system: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may park an item again before the command has taken the old one out of the store."""
    send.delay("missing-topic", PAYLOAD, message_id="again")
    wait_until(lambda: stored(system, "again") is not None, 60, "the first parking")
    first = stored(system, "again")
    remove = ParkingStore.remove

    def late(store: ParkingStore, item_id: str, *rest: Any, **more: Any) -> bool:
        wait_until(lambda: stored(system, item_id) != first, 60, "the second parking")
        return remove(store, item_id, *rest, **more)

    monkeypatch.setattr(ParkingStore, "remove", late)
    result = CliRunner().invoke(command, ["redrive", "again", "--yes"])

    assert result.exit_code == 0, result.output
    system.wait_empty()
    assert stored(system, "again") is not None


def test_a_message_keeps_its_id_however_often_it_is_parked(system: Stack) -> None:
    send.app.send_task(
        "kafka_delivery.never", (PAYLOAD,), task_id="never", queue="kafka-delivery", argsrepr="()", kwargsrepr="{}"
    )
    for _ in range(3):
        wait_until(lambda: stored(system, "never") is not None, 60, "it parked under its id")
        assert [item.id for item in system.parked() if item.kind == "unknown-task" and "never" in item.id] == ["never"]
        system.command("parked", "redrive", "never", "--yes")
        system.wait_empty()


def test_afterwards_the_store_can_be_emptied(system: Stack) -> None:
    """Last in this file: what is left is sent again, all of it; what still goes nowhere is discarded."""
    system.command("parked", "discard", "--all", "--kind", "unknown-task", "--reason", "never to be known", "--yes")
    system.command("parked", "discard", "--all", "--topic", "missing-topic", "--reason", "no such topic", "--yes")
    left = {item.id for item in system.parked()}
    system.command("parked", "redrive", "--all", "--yes")
    system.wait_empty()
    assert left <= set(system.ids(TOPIC, LATE))
    assert json_lines(system, "list", "--json") == []


def ids(content: str) -> set[str]:
    return {f"{content}-{n}" for n in range(3)}


def stored(system: Stack, item_id: str) -> Parked | None:
    return ParkingStore(system.redis).get(item_id)


def json_lines(system: Stack, *arguments: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in system.command("parked", *arguments).stdout.splitlines()]
