"""What each kind of thing is parked as, and that the same thing always gives the same items."""

from __future__ import annotations

import json
import sys
from base64 import b64decode, b64encode
from types import SimpleNamespace
from typing import Any

import pytest

from kafka_delivery import Record, app, dead_letter, send, send_many
from kafka_delivery.dead_letters import reason
from kafka_delivery.names import DEAD_LETTER, REDRIVES, SEND, SEND_MANY
from kafka_delivery.publisher import envelope
from kafka_delivery_worker import parked_items
from kafka_delivery_worker.parked_items import Call, Reason, asked_of, of_bytes, of_call, of_message, of_raw, options_of
from kafka_delivery_worker.parking import Parked, fingerprint

WHY = Reason(kind="expired", error_class="E", error_message="m", error_code=7)
POISON = Reason(kind="poison", error_class="WorkerLost", error_message="5 workers died")
LINK = [{"task": "app.tell", "args": []}]


def record(message_id: str = "id-1", value: bytes = b"v", topic: str = "orders") -> Record:
    return Record(topic, value, "k", message_id=message_id, timestamp=1_767_323_045_678)


def wire(message_id: str = "id-1", **changes: Any) -> list[Any]:
    return record(message_id, **changes).to_wire("default")


def call(task: str, *args: Any, task_id: str = "id-1", **fields: Any) -> Call:
    return Call(task=task, id=task_id, args=list(args), **fields)


def raw(of: Any, args: list[Any], task_id: str = "id-1", **changes: Any) -> str:
    """A message as our own callers write it, with other headers, or another embed."""
    made = json.loads(envelope(app, of, "kafka-delivery", task_id, args, "", ""))
    embed = changes.pop("embed", None)
    if embed is not None:
        made["body"] = b64encode(json.dumps([args, {}, embed]).encode()).decode()
    made["headers"] |= changes
    return json.dumps(made)


def as_message(text: str, why: Reason) -> list[Parked]:
    made = json.loads(text)
    body = b64decode(made["body"])
    return of_message("kafka-delivery", made, made["headers"], body, why)


class TestCall:
    def test_a_send_is_parked_as_its_record(self) -> None:
        (item,) = of_call(call(SEND, wire(), retries=2, redrives=1), WHY)
        assert item == Parked(
            id="id-1",
            kind="expired",
            error_class="E",
            error_message="m",
            error_code=7,
            retry_count=2,
            redrive_count=1,
            topic="orders",
            content="record",
            data=wire(),
            **fingerprint(b"v"),
        )
        assert (item.message_id, item.key) == ("id-1", b"k")

    def test_a_tombstone_has_no_size(self) -> None:
        (item,) = of_call(call(SEND, Record("orders", None, timestamp=1, message_id="id-1").to_wire("default")), WHY)
        assert (item.size, item.sha256, item.topic) == (None, None, "orders")

    def test_a_dead_letter_is_parked_as_its_record_with_its_own_reason_and_counts(self) -> None:
        letter = call(DEAD_LETTER, wire(), reason("RejectedError", 10, "too large", 3, redrive_count=2), retries=1)
        (item,) = of_call(letter, WHY)
        assert (item.content, item.id, item.retry_count, item.redrive_count) == ("record", "id-1", 3, 2)
        assert item.error_message == "RejectedError: too large; then its dead letter was parked: m"

    @pytest.mark.parametrize(
        "made",
        [
            call(SEND),
            call(SEND, [1, "default"]),
            call(SEND, [*wire()[:2], "no topic!", *wire()[3:]]),
            call(SEND, None),
            call(DEAD_LETTER, "orders"),
            call("another.task", wire()),
            call(SEND_MANY, "text"),
            call(SEND_MANY),
            call(SEND_MANY, []),
        ],
    )
    def test_what_holds_no_valid_record_is_kept_as_the_call(self, made: Call) -> None:
        (item,) = of_call(made, WHY)
        data = {"task": made.task, "id": "id-1", "args": list(made.args), "kwargs": {}}
        assert (item.id, item.content, item.data, item.kind) == ("id-1", "call", data, "expired")

    def test_a_record_that_does_not_say_its_time_stays_a_call(self) -> None:
        """It would get the time of the look: parked twice, it would be two records."""
        plain = call(SEND, "orders", "v", retries=1)
        first, second = (of_call(plain, WHY)[0] for _ in range(2))
        assert (first.content, first.topic, first.size, first.retry_count) == ("call", "orders", 1, 1)
        assert first.sha256 == fingerprint(b"v")["sha256"]
        assert first.digest == second.digest

    def test_what_celery_hands_over_is_read_whole(self) -> None:
        request = SimpleNamespace(
            id="id-1",
            task=SEND,
            args=(wire(),),
            kwargs=None,
            retries=None,
            headers={REDRIVES: 2},
            callbacks=LINK,
            errbacks=[],
            chain=None,
            root_id="another",
            group="g",
            group_index=0,
        )
        (item,) = of_call(Call.of(request), WHY)
        assert item.asked == {"callbacks": LINK, "root_id": "another", "group": "g", "group_index": 0}
        assert (item.content, item.retry_count, item.redrive_count) == ("record", 0, 2)

    def test_a_call_by_name_is_read_whole_too(self) -> None:
        made = SimpleNamespace(id="id-1", task=SEND, args=None, kwargs={"topic": "orders", "value": "v"}, retries=1)
        (item,) = of_call(Call.of(made), WHY)
        assert item.data == {"task": SEND, "id": "id-1", "args": [], "kwargs": made.kwargs}
        assert (item.topic, item.retry_count, item.redrive_count, item.asked) == ("orders", 1, 0, None)

    def test_a_failure_that_nobody_planned_keeps_the_call(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fails(*_: object) -> None:
            raise MemoryError("secret")

        monkeypatch.setattr(Record, "from_wire", fails)
        (item,) = of_call(call(SEND, wire()), WHY)
        assert item.content == "call"
        assert "parked.kept_whole error=MemoryError" in caplog.text
        assert "secret" not in caplog.text


class TestBatch:
    def test_each_record_is_an_item_under_its_own_id(self) -> None:
        made = call(SEND_MANY, [wire("a"), wire("b", topic="payments")], task_id="batch", asked={"parent_id": "p"})
        items = of_call(made, WHY)
        assert [(i.id, i.kind, i.content, i.topic, i.data) for i in items] == [
            ("a", "expired", "record", "orders", wire("a")),
            ("b", "expired", "record", "payments", wire("b", topic="payments")),
        ]
        assert [item.asked for item in items] == [{"parent_id": "p"}] * 2

    def test_members_that_are_no_record_are_items_too_and_keep_their_place(self) -> None:
        newer = [2, *wire("newer")[1:]]
        plain = {"topic": "orders", "value": "v"}
        wrong = {"topic": "no topic!", "value": "v"}
        told = {**plain, "timestamp": 5}
        members = [wire("a"), newer, plain, wrong, 17, told]
        items = of_call(call(SEND_MANY, members, task_id="batch"), WHY)
        assert [(item.id, item.content) for item in items] == [
            ("a", "record"),
            ("newer", "call"),
            ("batch.2", "call"),
            ("batch.3", "call"),
            ("batch.4", "call"),
            ("batch.5", "record"),
        ]
        assert {item.kind for item in items} == {"expired"}
        assert items[1].data == {"task": SEND, "id": "newer", "args": [newer], "kwargs": {}}
        assert items[2].data == {
            "task": SEND,
            "id": "batch.2",
            "args": [],
            "kwargs": {**plain, "message_id": "batch.2"},
        }
        assert (items[2].topic, items[2].size) == ("orders", 1)
        assert items[4].data["args"] == [17]

    def test_the_same_batch_gives_the_same_items(self) -> None:
        made = call(SEND_MANY, [wire("a"), {"topic": "orders", "value": "v"}, 17], task_id="batch")
        assert [item.digest for item in of_call(made, WHY)] == [item.digest for item in of_call(made, WHY)]

    def test_members_given_by_name(self) -> None:
        items = of_call(Call(task=SEND_MANY, id="batch", kwargs={"records": [wire("a"), wire("b")]}), WHY)
        assert [item.id for item in items] == ["a", "b"]

    @pytest.mark.parametrize("name", ["callbacks", "errbacks", "chain", "chord"])
    def test_what_waits_for_the_batch_keeps_it_whole(self, name: str) -> None:
        (item,) = of_call(call(SEND_MANY, [wire("a"), wire("b")], task_id="batch", asked={name: LINK}), WHY)
        assert (item.id, item.content, item.asked) == ("batch", "call", {name: LINK})
        assert item.data["args"] == [[wire("a"), wire("b")]]


class TestMessage:
    @pytest.mark.parametrize("kind", ["expired", "revoked", "bug", "poison"])
    @pytest.mark.parametrize("build", [as_message, lambda text, why: of_raw("kafka-delivery", text, why)])
    def test_a_send_is_parked_as_its_record_with_what_it_asked(self, kind: str, build: Any) -> None:
        why = Reason(kind=kind, error_class="E", error_message="m")
        embed = {"callbacks": LINK, "errbacks": None, "chain": [], "chord": None}
        text = raw(
            send, [wire()], retries=3, group="g", root_id="r", parent_id="p", embed=embed, kafka_delivery_redrives=1
        )
        (item,) = build(text, why)
        assert (item.id, item.kind, item.content, item.data, item.topic) == ("id-1", kind, "record", wire(), "orders")
        assert (item.retry_count, item.redrive_count, item.size) == (3, 1, 1)
        assert item.asked == {"callbacks": LINK, "group": "g", "root_id": "r", "parent_id": "p"}

    @pytest.mark.parametrize("kind", ["undecodable", "unknown-task"])
    def test_of_what_a_newer_worker_may_read_the_message_is_kept_and_shows_what_is_known(self, kind: str) -> None:
        text = raw(send, [wire()], retries=3)
        (item,) = as_message(text, Reason(kind=kind, error_class="E", error_message="m"))
        assert (item.id, item.content) == ("id-1", "message")
        assert item.data == {"queue": "kafka-delivery", "envelope": json.loads(text)}
        assert (item.topic, item.size, item.sha256, item.retry_count) == ("orders", 1, fingerprint(b"v")["sha256"], 3)

    @pytest.mark.parametrize("kind", ["undecodable", "expired", "poison"])
    @pytest.mark.parametrize("build", [as_message, lambda text, why: of_raw("kafka-delivery", text, why)])
    def test_a_batch_is_parked_record_by_record(self, kind: str, build: Any) -> None:
        why = Reason(kind=kind, error_class="E", error_message="m")
        items = build(raw(send_many, [[wire("a"), wire("b")]], "batch"), why)
        assert [(item.id, item.kind, item.content) for item in items] == [("a", kind, "record"), ("b", kind, "record")]

    def test_a_dead_letter_on_its_way(self) -> None:
        (item,) = of_raw("q", raw(dead_letter, [wire(), reason("R", 1, "no", 4)], "id-1-dlq"), POISON)
        assert (item.id, item.content, item.retry_count) == ("id-1", "record", 4)

    def test_a_dead_letter_that_something_waits_for_stays_one(self) -> None:
        (item,) = of_call(call(DEAD_LETTER, wire(), reason("R", 1, "no", 4), asked={"callbacks": LINK}), WHY)
        assert (item.content, item.asked, item.topic) == ("call", {"callbacks": LINK}, "orders")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            '{"correlation_id": "id-1"',
            '"text"',
            "[]",
            raw(send, [[1]]),
            raw(send, [wire()], task="another.task"),
            raw(send, [wire()], compression="application/x-gzip"),
            json.dumps(json.loads(raw(send, [wire()])) | {"content-type": "application/x-msgpack"}),
            json.dumps(json.loads(raw(send, [wire()])) | {"body": "no base64!"}),
            "[" * 100_000,
        ],
    )
    def test_poison_that_holds_no_record_is_kept_as_it_lay(self, text: str) -> None:
        (item,) = of_raw("kafka-delivery", text, POISON)
        assert (item.kind, item.content, item.data) == ("poison", "message", {"queue": "kafka-delivery", "raw": text})
        assert item.id == ("id-1" if "id-1" in text else item.id)
        assert item.id

    def test_poison_that_is_too_long_is_not_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = raw(send, [wire()])
        monkeypatch.setattr(parked_items, "SPLIT_BYTES", len(text))
        assert of_raw("q", text, POISON)[0].content == "record"
        monkeypatch.setattr(parked_items, "SPLIT_BYTES", len(text) - 1)
        monkeypatch.setattr(parked_items, "loads", lambda _: pytest.fail("it was decoded"))
        (item,) = of_raw("q", text, POISON)
        assert (item.id, item.content) == ("id-1", "message")

    def test_a_failure_in_taking_poison_apart_keeps_it_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(parked_items, "loads", fails)
        (item,) = of_raw("q", raw(send_many, [[wire("a")]], "batch"), POISON)
        assert (item.id, item.content) == ("batch", "message")

    def test_an_id_is_read_as_json_writes_it(self) -> None:
        assert of_raw("q", '{"correlation_id": "a\\"b"}', POISON)[0].id == 'a"b'

    def test_a_message_is_kept_under_the_id_that_it_says(self) -> None:
        def kept(headers: dict[str, Any], envelope: dict[str, Any]) -> str:
            return of_message("q", envelope, headers, None, WHY)[0].id

        properties = {"properties": {"correlation_id": "other"}}
        assert kept({"id": "id-1"}, properties) == "id-1"
        assert kept({}, properties) == "other"
        assert kept({}, {"properties": 5}) != kept({}, {}), "one is made up"

    @pytest.mark.parametrize("args", [{"a": 1}, 5, None, "text", []])
    @pytest.mark.parametrize("task", [send, send_many, dead_letter])
    def test_arguments_that_are_none_are_no_reason_to_fail(self, task: Any, args: Any) -> None:
        made = json.loads(raw(task, []))
        for body in ([args, {}, {}], [[], args, {}], [[], {}, args], args):
            (item,) = of_message("q", made, made["headers"], json.dumps(body).encode(), POISON)
            assert (item.id, item.content) == ("id-1", "message")

    def test_a_body_that_is_text_in_its_envelope(self) -> None:
        made = json.loads(raw(send, [wire()]))
        made["body"] = b64decode(made["body"]).decode()
        del made["properties"]["body_encoding"]
        assert of_raw("q", json.dumps(made), POISON)[0].content == "record"

    def test_four_mebibytes_are_taken_apart(self) -> None:
        """A batch of our own has 700 kB, in base64 less than one mebibyte."""
        assert parked_items.SPLIT_BYTES == 4_194_304

    def test_an_id_that_is_none_becomes_printable(self) -> None:
        made = json.loads(raw(send, [17], "x\ud800"))
        (item,) = of_message("q", made, made["headers"], None, WHY)
        assert item.id == "x\\ud800"

    def test_bytes_that_are_no_message_are_kept_to_the_byte(self) -> None:
        item = of_bytes("q", b"\xff{", WHY)
        assert (item.id, item.content) == ("garbage-b26f99543485cab0666a50160ed4281d", "message")
        assert item.data["raw"].encode(errors="surrogateescape") == b"\xff{"

    def test_a_deep_body_is_no_reason_to_fail(self) -> None:
        made = json.loads(raw(send, [wire()]))
        (item,) = of_message("q", made, made["headers"], b"[" * 10 * sys.getrecursionlimit(), WHY)
        assert item.content == "message"


class TestAsked:
    def test_only_what_was_asked(self) -> None:
        known = {
            "callbacks": None,
            "errbacks": [],
            "chain": LINK,
            "root_id": "me",
            "parent_id": "me",
            "group": None,
            "group_index": 0,
        }
        assert asked_of(known, "me") == {"chain": LINK, "group_index": 0}

    def test_it_is_asked_again_by_the_names_of_apply_async(self) -> None:
        asked = {"callbacks": 1, "errbacks": 2, "chain": 3, "chord": 4, "root_id": 5, "parent_id": 6, "group": 7}
        assert options_of(asked) == {
            "link": 1, "link_error": 2, "chain": 3, "chord": 4, "root_id": 5, "parent_id": 6, "group_id": 7,
        }  # fmt: skip
        assert options_of(None) == {}

    def test_it_tells_two_items_of_one_id_apart_but_not_by_the_calls_that_it_belongs_to(self) -> None:
        def digest(**asked: Any) -> str:
            return of_call(call(SEND, wire(), asked=asked), WHY)[0].digest

        assert digest() == digest(root_id="r", parent_id="p")
        assert len({digest(), digest(callbacks=LINK), digest(chain=LINK)}) == 3

    def test_no_payload_is_in_a_repr(self) -> None:
        secret = [{"args": ["secret"]}]
        made = call(SEND, wire(value=b"secret"), asked={"callbacks": secret}, kwargs={"value": "secret"})
        assert "secret" not in f"{made!r} {of_call(made, WHY)!r}"
