"""The commands on what is parked, without workers: which items they mean, what they print, and that an interrupted run
loses nothing and repeats nothing.
"""

from __future__ import annotations

import base64
import json
import stat
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kafka_delivery import Record
from kafka_delivery.names import PARKED_LOCK, QUEUE, SEND
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import KINDS, Parked, ParkingStore, fingerprint
from kafka_delivery_worker.run_lock import RunLock
from parked_items import BINARY, PAYLOAD, park, queued, run
from stack import Stack, stack
from watching import emptied


@pytest.fixture
def system(redis_url: str) -> Iterator[Stack]:
    """No worker, and a Kafka that nobody asks."""
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        yield system


@pytest.fixture
def store(system: Stack) -> ParkingStore:
    return ParkingStore(system.redis)


def lines(*arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(*arguments).stdout.splitlines()]


def listed(*options: str) -> list[str]:
    return [item["id"] for item in lines("list", "--json", *options)]


def test_a_message_that_is_not_utf8_is_json_all_the_same(store: ParkingStore, tmp_path: Path) -> None:
    raw = b"\xff\xe4".decode(errors="surrogateescape")
    store.park(
        Parked(
            id="raw",
            kind="undecodable",
            error_class="ValueError",
            error_message="no",
            content="message",
            data={"queue": QUEUE, "raw": raw},
        )
    )
    file = tmp_path / "parked.jsonl"
    run("export", str(file))
    for text in (file.read_bytes(), run("export", "-").stdout_bytes, run("show", "raw", "--json").stdout_bytes):
        assert json.loads(text.decode())["data"]["raw"] == raw


@pytest.mark.parametrize("verb", [["redrive"], ["discard", "--reason", "x"]])
def test_two_at_once(system: Stack, store: ParkingStore, verb: list[str]) -> None:
    """Each would send what the other sends, or discard it."""
    park(store, "a")
    with RunLock(RedisClient(Settings.from_env(system.env())), "x", key=PARKED_LOCK) as lock:
        second = system.command("parked", *verb, "--all", "--yes", check=False)
        assert second.returncode == 1
        assert f"the parking store is being worked on by {lock.runner}" in second.stderr
        assert run(*verb, "--all", "--dry-run").exit_code == 0
    assert queued(system) == []
    run(*verb, "--all", "--yes")
    assert store.count() == 0


class TestWhich:
    @pytest.fixture(autouse=True)
    def five(self, store: ParkingStore) -> None:
        park(store, "a", headers=[("tenant", "t1")])
        park(store, "b", key=BINARY, headers=[("tenant", "t2")])
        park(store, "c", topic="payments", error_class="RetriesExhaustedError", error_code=3)
        park(store, "d", kind="expired", error_class="TaskRevokedError", error_code=None)
        store.park(
            Parked(
                id="e",
                kind="undecodable",
                error_class="ValueError",
                error_message="no",
                content="message",
                data={"queue": QUEUE, "raw": PAYLOAD},
            )
        )

    @pytest.mark.parametrize(
        ("options", "ids"),
        [
            ("", "abcde"),
            ("--topic payments", "c"),
            ("--topic payments --topic orders", "abcd"),
            ("--kind dead-letter", "abc"),
            ("--kind expired --kind undecodable", "de"),
            ("--error-class RejectedError", "ab"),
            ("--error-code 10", "ab"),
            ("--error-code UNKNOWN_TOPIC_OR_PART", "c"),
            ("--key k", "acd"),
            ("--key base64:AP8=", "b"),
            ("--header tenant=t1", "a"),
            ("--header tenant", "ab"),
            ("--message-id b --message-id e", "be"),
            ("--since 1h", "abcde"),
            ("--until 1h", ""),
            ("--limit 2", "ab"),
            ("--topic orders --kind dead-letter --key k", "a"),
        ],
    )
    def test_options_narrow_every_command(self, options: str, ids: str, tmp_path: Path) -> None:
        assert sorted(listed(*options.split())) == [*ids]
        if "--limit" not in options:
            (counted,) = lines("summary", "--json", *options.split())
            assert counted["parked"] == len(ids)
        run("export", str(tmp_path / "all"), *options.split())
        exported = [json.loads(line)["id"] for line in (tmp_path / "all").read_text().splitlines()]
        assert sorted(exported) == [*ids]
        for verb in ("redrive", "discard --reason r"):
            which = options if options and "--limit" not in options else f"--all {options}"
            (planned,) = lines(*verb.split(), *which.split(), "--dry-run", "--json")
            assert planned["planned"] == len(ids)
        assert sorted(listed()) == [*"abcde"]  # nothing was done

    @pytest.mark.parametrize("verb", ["redrive", "discard --reason r"])
    def test_a_command_that_acts_is_told_on_what(self, verb: str) -> None:
        for options in ("", "a --all", "a --all --kind expired"):
            refused = run(*verb.split(), *options.split(), "--yes", ok=False)
            assert refused.exit_code == 2, options
            assert "say which" in refused.stderr
        assert len(listed()) == 5

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ("--kind poisson", "poison"),
            ("--since tomorrow", "no time"),
            ("--rate fast", "no rate"),
            ("--to a/b", "no name"),
        ],
    )
    def test_a_typing_mistake_ends_in_a_sentence(self, options: str, said: str) -> None:
        refused = run("redrive", *options.split(), "--yes", ok=False)
        assert refused.exit_code == 2
        assert said in refused.stderr

    def test_the_table_and_the_json_have_no_payload_key_or_header(self) -> None:
        shown = run("list").stdout + run("list", "--json").stdout + run("summary").stdout
        for hidden in (PAYLOAD, "tenant", "t1", "AP8="):
            assert hidden not in shown
        assert "MSG_SIZE_TOO_LARGE" in shown

    def test_a_table_is_short_unless_told(self, store: ParkingStore) -> None:
        for number in range(60):
            park(store, f"more-{number}")
        short, long = run("list").stdout, run("list", "--limit", "65").stdout
        assert (short.count("RejectedError"), "there are more" in short) == (50 - 3, True)
        assert (long.count("RejectedError"), "there are more" in long) == (62, False)


class TestShown:
    def test_a_record_is_shown_with_its_parts_and_what_to_do(self, store: ParkingStore) -> None:
        park(store, "a", value=BINARY, headers=[("h", b"1"), ("h", None)])
        (shown,) = lines("show", "a", "--json")
        assert (shown["key"], shown["headers"], shown["value"]) == ("k", [["h", "1"], ["h", None]], "base64:AP8=")
        assert (shown["size"], shown["message_id"], shown["error"]) == (2, "a", "MSG_SIZE_TOO_LARGE")
        assert shown["sha256"] == fingerprint(BINARY)["sha256"]
        assert shown["advice"] == KINDS["dead-letter"]
        text = run("show", "a").stdout
        assert "value: base64:AP8=" in text
        assert KINDS["dead-letter"] in text

    def test_the_summary_counts_by_kind_error_and_topic_and_by_hour(self, store: ParkingStore) -> None:
        for number in range(3):
            park(store, f"a-{number}")
        park(store, "b", topic="payments", error_code=None, kind="expired")
        (counted,) = lines("summary", "--json")
        assert [(k["kind"], k["topic"], k["error"], k["count"]) for k in counted["kinds"]] == [
            ("dead-letter", "orders", "MSG_SIZE_TOO_LARGE", 3),
            ("expired", "payments", "", 1),
        ]
        assert sum(hour["count"] for hour in counted["hours"]) == counted["parked"] == 4
        assert (counted["bytes"], counted["max_bytes"]) == (store.usage().bytes, 512 * 1024 * 1024)
        assert f"{store.usage().bytes:,} of 536,870,912 bytes" in run("summary").stdout

    def test_an_export_is_whole_and_the_owners_alone(self, store: ParkingStore, tmp_path: Path) -> None:
        park(store, "a", value=PAYLOAD)
        target = tmp_path / "parked.jsonl"
        run("export", str(target))
        (exported,) = [json.loads(line) for line in target.read_text().splitlines()]
        assert (exported["id"], exported["value"]) == ("a", PAYLOAD)
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        again = run("export", str(target), ok=False)
        assert again.exit_code == 1
        assert "File exists" in again.stderr
        assert json.loads(run("export", "-").stdout)["value"] == PAYLOAD


class TestRedrive:
    def test_a_dry_run_shows_the_plan_and_does_nothing(self, system: Stack, store: ParkingStore) -> None:
        park(store, "a")
        park(store, "b", topic="payments")
        done = run("redrive", "--all", "--dry-run")
        assert "payments" in done.stdout
        assert "2 planned, nothing done" in done.stdout
        assert (store.count(), queued(system)) == (2, [])

    def test_it_asks_first(self, system: Stack, store: ParkingStore) -> None:
        park(store, "a")
        refused = run("redrive", "--all", ok=False, stdin="n\n")
        assert refused.exit_code == 1
        assert (store.count(), queued(system)) == (1, [])
        run("redrive", "--all", stdin="y\n")
        assert (store.count(), queued(system)) == (0, ["a"])

    @pytest.mark.parametrize("verb", ["redrive", "retry"])
    def test_the_former_name_does_the_same(self, system: Stack, store: ParkingStore, verb: str) -> None:
        park(store, "a")
        (told,) = lines(verb, "a", "--yes", "--json")
        assert told == {"redriven": 1, "left": 0, "reasons": {}, "stopped": ""}
        assert queued(system) == ["a"]

    def test_to_another_topic(self, system: Stack, store: ParkingStore) -> None:
        record = Record("orders", b"v", "k", [("h", "1")], 3, 1767323045678, "a")
        store.park(
            Parked(
                id="a",
                kind="dead-letter",
                error_class="E",
                error_message="m",
                content="record",
                data=record.to_wire("default"),
                topic="orders",
            )
        )
        run("redrive", "a", "--to", "orders-2", "--yes")
        (raw,) = system.redis.lrange(QUEUE, 0, -1)
        (wire,), _, _ = json.loads(base64.b64decode(json.loads(raw)["body"]))
        assert Record.from_wire(wire, "default") == Record(
            "orders-2", b"v", "k", [("h", "1")], None, 1767323045678, "a"
        )

    def test_what_is_not_what_was_parked_stays(self, system: Stack, store: ParkingStore) -> None:
        """A value that was changed in Redis is never sent as if it were whole."""
        park(store, "whole")
        park(store, "cut", sha256=fingerprint(b"longer")["sha256"])
        done = run("redrive", "--all", "--yes", ok=False)
        assert done.exit_code == 1
        assert "cut: its value is not the one that was parked" in done.stderr
        assert "1 redriven, 1 still parked" in done.stdout
        assert (queued(system), [item.id for item in store.list()]) == (["whole"], ["cut"])

    def test_what_is_no_record_does_not_go_to_another_topic(self, system: Stack, store: ParkingStore) -> None:
        store.park(
            Parked(
                id="m",
                kind="poison",
                error_class="E",
                error_message="m",
                content="message",
                data={"queue": QUEUE, "raw": "{}"},
            )
        )
        done = run("redrive", "m", "--to", "orders-2", "--yes", ok=False)
        assert done.exit_code == 1
        assert "it is no record" in done.stderr
        assert (store.count(), queued(system)) == (1, [])

    def test_a_rate_is_kept(self, store: ParkingStore) -> None:
        for number in range(11):
            park(store, f"a-{number}")
        started = time.monotonic()
        run("redrive", "--all", "--yes", "--rate", "20/s")
        assert time.monotonic() - started >= 10 / 20

    def test_where_redis_ends_it_says_so(
        self, system: Stack, store: ParkingStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(5):
            park(store, f"a-{number}")
        from kafka_delivery.delivery import Send
        from kafka_delivery.errors import EnqueueError

        apply_async, sent = Send.apply_async, []

        def fails_at_the_third(self: Send, args: Any, **options: Any) -> Any:
            sent.append(args)
            if len(sent) == 3:
                raise EnqueueError("a-2", "TimeoutError: Timeout reading from socket")
            return apply_async(self, args, **options)

        monkeypatch.setattr(Send, "apply_async", fails_at_the_third)
        done = run("redrive", "--all", "--yes", ok=False)
        assert done.exit_code == 1
        assert "2 redriven, 3 still parked" in done.stdout
        assert "Stopped before the end" in done.stderr
        monkeypatch.undo()
        run("redrive", "--all", "--yes")
        assert Counter(queued(system)) == Counter(f"a-{number}" for number in range(5))

    def test_what_was_asked_of_celery_is_asked_again(self, system: Stack, store: ParkingStore) -> None:
        after = [{"task": "app.tell", "args": [PAYLOAD], "kwargs": {}, "options": {}}]
        asked = {"callbacks": after, "errbacks": after, "chain": after, "chord": after[0]}
        park(store, "a", asked=asked | {"root_id": "r", "parent_id": "p", "group": "g", "group_index": 2})
        run("redrive", "a", "--yes")
        (raw,) = system.redis.lrange(QUEUE, 0, -1)
        message = json.loads(raw)
        assert json.loads(base64.b64decode(message["body"]))[2] == asked
        headers = {name: message["headers"][name] for name in ("root_id", "parent_id", "group", "group_index", "id")}
        assert headers == {"root_id": "r", "parent_id": "p", "group": "g", "group_index": 2, "id": "a"}

    def test_only_show_and_export_show_what_was_asked(self, store: ParkingStore) -> None:
        park(store, "a", value="v", asked={"chain": [{"task": "t", "args": [PAYLOAD]}]})
        assert lines("list", "--json")[0]["asked"] == ["chain"]
        for hidden in (run("list"), run("list", "--json"), run("summary"), run("redrive", "--all", "--dry-run")):
            assert PAYLOAD not in hidden.stdout
        for shown in (run("show", "a"), run("show", "a", "--json"), run("export", "-")):
            assert PAYLOAD in shown.stdout

    def test_a_call_without_a_record_is_made_again(self, system: Stack, store: ParkingStore) -> None:
        """Once the workers know its form, which is under its own id."""
        wire = Record("orders", "v", message_id="its-own").to_wire("default")
        kwargs = {"topic": "orders", "value": "v", "message_id": "named"}
        for item_id, args, named in (("made-up", [wire], {}), ("named", [], kwargs)):
            data = {"task": SEND, "id": item_id, "args": args, "kwargs": named}
            store.park(
                Parked(id=item_id, kind="invalid", error_class="E", error_message="m", content="call", data=data)
            )
        run("redrive", "--all", "--yes")
        assert sorted(queued(system)) == ["its-own", "named"]

    def test_a_lock_that_is_lost_ends_it_before_the_next(
        self, system: Stack, store: ParkingStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was frozen, and another one has begun: that one has the rest."""
        for number in range(5):
            park(store, f"a-{number}")
        send_back, sent = ParkingStore.send_back, []

        def frozen_before_the_third(self: ParkingStore, *arguments: Any) -> bool:
            sent.append(arguments)
            if len(sent) == 3:
                system.redis.set(PARKED_LOCK, "another's")
            return send_back(self, *arguments)

        monkeypatch.setattr(ParkingStore, "send_back", frozen_before_the_third)
        done = run("redrive", "--all", "--yes", ok=False)
        assert done.exit_code == 1
        assert "the lock on the parking store was lost" in done.stderr
        assert "2 redriven, 3 still parked" in done.stdout
        assert (len(queued(system)), store.count()) == (2, 3)
        assert system.redis.get(PARKED_LOCK) == b"another's"

    def test_what_was_parked_again_meanwhile_is_left(
        self, system: Stack, store: ParkingStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        park(store, "a")
        send_back = ParkingStore.send_back

        def parked_again_before(self: ParkingStore, item: Parked, *arguments: Any) -> bool:
            while store.get("a") == item:  # until the clock has moved
                store.park(item)
            return send_back(self, item, *arguments)

        monkeypatch.setattr(ParkingStore, "send_back", parked_again_before)
        done = run("redrive", "a", "--yes", ok=False)
        assert "it was parked again or taken away meanwhile" in done.stderr
        assert (queued(system), store.count()) == ([], 1)


class TestDiscard:
    def test_a_lock_that_is_lost_ends_it_before_a_line_says_otherwise(
        self, system: Stack, store: ParkingStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        park(store, "a")
        check = ParkingStore.check

        def frozen_before(self: ParkingStore, lock: Any) -> None:
            system.redis.delete(PARKED_LOCK)
            check(self, lock)

        monkeypatch.setattr(ParkingStore, "check", frozen_before)
        done = run("discard", "--all", "--reason", "r", "--yes", ok=False)
        assert "was lost" in done.stderr
        assert store.count() == 1
        assert [record for record in caplog.records if record.name == "kafka_delivery.audit"] == []

    def test_each_leaves_a_line_with_the_reason(self, store: ParkingStore, caplog: pytest.LogCaptureFixture) -> None:
        park(store, "a")
        park(store, "b", topic="payments")
        run("discard", "--topic", "payments", "--reason", "a test's", "--yes")
        assert [item.id for item in store.list()] == ["a"]
        (line,) = [record.getMessage() for record in caplog.records if record.name == "kafka_delivery.audit"]
        assert line == 'parked.discarded parked_id=b topic=payments kind=dead-letter reason="a test\'s"'

    def test_it_asks_and_needs_a_reason(self, store: ParkingStore) -> None:
        park(store, "a")
        assert run("discard", "--all", "--yes", ok=False).exit_code == 2
        assert run("discard", "--all", "--reason", "r", ok=False, stdin="n\n").exit_code == 1
        assert run("discard", "--all", "--reason", "r", "--dry-run").exit_code == 0
        assert store.count() == 1
