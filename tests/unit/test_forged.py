"""What no worker may compute with is refused before anybody does, and what only paces a record counts as nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.utils.json import loads

import strangers
from kafka_delivery import Record, base, send_many
from kafka_delivery.base import BATCH_BYTES
from kafka_delivery.marks import MAX_COUNT, count_of, marked_again
from kafka_delivery.names import DEFERRALS, REDRIVES, REVIVED, SEND_MANY
from kafka_delivery_worker import logs, parked_items
from kafka_delivery_worker.cli.output import json_line, visible
from kafka_delivery_worker.decoding import is_deeper
from kafka_delivery_worker.parked_items import Call, Reason, of_bytes, of_call, of_message, printable
from kafka_delivery_worker.shape import fault_of, forged

WHY = Reason(kind="invalid", error_class="E", error_message="m")

TOO_MANY: list[Any] = [0] * (base.MAX_MEMBERS + 1)


def message(headers: dict[str, Any] | None = None, body: Any = None, **properties: Any) -> Any:
    made = strangers.envelope("id-1")
    text = json.dumps(body if body is not None else [[strangers.wire("id-1")], {}, None]).encode()
    return SimpleNamespace(
        headers=made["headers"] | (headers or {}),
        properties=made["properties"] | properties,
        errors=[],
        content_type="application/json",
        body=text,
        decode=lambda: loads(text.decode()),
    )


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


class TestForged:
    def test_a_good_message_is_not(self) -> None:
        assert forged(message()) is None
        assert forged(message({"retries": MAX_COUNT, "timelimit": [1, 0.5], "stamped_headers": ["a"]})) is None
        assert forged(message({"retries": None, "group": "g", "group_index": 3, "stamps": {}})) is None

    @pytest.mark.parametrize("value", ["x", -1, 1.5, 2**70, MAX_COUNT + 1, True, [], {}, float("nan")])
    @pytest.mark.parametrize("name", ["retries", "replaced_task_nesting", "group_index"])
    def test_a_number_of_times(self, name: str, value: Any) -> None:
        for find in (forged, fault_of):
            fault = find(message({name: value}))
            assert fault is not None
            assert (fault.kind, name in fault.why) == ("invalid", True)

    @pytest.mark.parametrize(
        "value", [[float("inf"), None], [float("nan"), 1], [-1, None], [1e300, None], [True, 1], "x"]
    )
    def test_a_time_limit(self, value: Any) -> None:
        fault = forged(message({"timelimit": value}))
        assert fault is not None
        assert "timelimit" in fault.why

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("shadow", {"a": 1}),
            ("root_id", [1]),
            ("argsrepr", 7),
            ("stamped_headers", [7]),
            ("stamped_headers", "x"),
            ("stamps", [1]),
            ("is_eager", True),
            ("_children", 1),
            ("eta", float("inf")),
            ("expires", {}),
        ],
    )
    def test_what_celery_takes_without_a_look(self, name: str, value: Any) -> None:
        fault = forged(message({name: value}))
        assert fault is not None
        assert fault.kind == "invalid"

    @pytest.mark.parametrize(("value", "left"), [(0, 0), (9, 9), (None, None), (-1, None), (2**70, None), ("x", None)])
    def test_a_priority_decides_nothing(self, value: Any, left: Any) -> None:
        sent = message(priority=value)
        assert forged(sent) is None
        assert sent.properties["priority"] == left

    @pytest.mark.parametrize("where", ["headers", "properties"])
    def test_the_depth_of_an_envelope(self, where: str) -> None:
        for depth, refused in ((60, False), (70, True)):
            sent = message({"deep": nested(depth)}) if where == "headers" else message(deep=nested(depth))
            assert (forged(sent) is not None) is refused

    def test_the_depth_of_arguments(self) -> None:
        assert forged(message(body=[[nested(450)], {}, None])) is None
        assert forged(message(body=[[nested(550)], {}, None])) is not None
        assert forged(message(body=[[], {"a": nested(550)}, None])) is not None
        assert forged(message(body=[[], {}, {"chain": nested(550)}])) is not None

    @pytest.mark.parametrize("by_name", [False, True])
    def test_the_members_of_a_batch(self, by_name: bool) -> None:
        body: list[Any] = [[], {"records": TOO_MANY}, None] if by_name else [[TOO_MANY], {}, None]
        fault = forged(message({"task": SEND_MANY}, body))
        assert fault is not None
        assert str(base.MAX_MEMBERS) in fault.why

    def test_the_bytes_of_a_batch(self) -> None:
        body: list[Any] = [[["x" * 900_000] * 10], {}, None]
        assert forged(message({"task": SEND_MANY}, body)) is not None
        assert forged(message(None, body)) is None


def test_the_depth_is_counted_from_the_outermost() -> None:
    assert not is_deeper(nested(64), 64)
    assert is_deeper(nested(65), 64)
    assert not is_deeper("x", 1)


class TestBatches:
    def test_no_part_of_our_own_has_so_many_members(self) -> None:
        shortest = Record("t", None, message_id="i", timestamp=1)
        assert BATCH_BYTES / len(json.dumps(shortest.to_wire("")) + ", ") < base.MAX_MEMBERS

    def test_a_larger_one_is_parked_whole(self) -> None:
        (item,) = of_call(Call(task=SEND_MANY, id="b", args=[TOO_MANY]), WHY)
        assert (item.id, item.content) == ("b", "call")
        assert parked_items.message_ids(item) == []
        made = strangers.envelope("b", json.dumps([[TOO_MANY], {}, None]), task=SEND_MANY)
        body = json.dumps([[TOO_MANY], {}, None]).encode()
        (item,) = of_message("q", made, made["headers"], body, WHY)
        assert (item.id, item.content) == ("b", "message")

    def test_as_many_as_may_be_are_members(self) -> None:
        assert len(of_call(Call(task=SEND_MANY, id="b", args=[[0] * base.MAX_MEMBERS]), WHY)) == base.MAX_MEMBERS

    def test_a_caller_may_give_more(self) -> None:
        assert send_many.name == SEND_MANY
        assert len(base.batch_from(([{"topic": "t", "value": None}] * (base.MAX_MEMBERS + 1),), {}, "b")) > 20_000


class TestCounts:
    @pytest.mark.parametrize("value", [2**70, MAX_COUNT + 1, -1, 1.5, "9", True, None, float("nan"), [1]])
    def test_what_is_not_plausible_counts_as_none(self, value: Any) -> None:
        headers = {"id": "i", DEFERRALS: value, REDRIVES: value}
        assert (count_of(headers, DEFERRALS), count_of(headers, REDRIVES)) == (0, 0)
        request = SimpleNamespace(headers={}, **headers)
        assert marked_again(request) == {}

    @pytest.mark.parametrize("value", [1, "true", [1], {"a": 1}])
    def test_only_true_revives(self, value: Any) -> None:
        assert REVIVED not in marked_again(SimpleNamespace(headers={}, **{REVIVED: value}))

    def test_the_largest_costs_nothing(self) -> None:
        assert count_of({DEFERRALS: MAX_COUNT}, DEFERRALS) == MAX_COUNT


class TestIds:
    @pytest.mark.parametrize("text", [*strangers.BREAKS.values(), "\u202e" * 300, "i" * 1_000_000, "é", "\U000e0001"])
    def test_an_item_is_parked_under_a_printable_one(self, text: str) -> None:
        made = strangers.envelope(text)
        (item,) = of_message("q", made, made["headers"], None, WHY)
        (call,) = of_call(Call(task="t", id=text), WHY)
        for item_id in (item.id, call.id):
            assert item_id.isascii()
            assert item_id.isprintable()
            assert 0 < len(item_id) <= 200

    @pytest.mark.parametrize("text", ["id-1", "a b", "x\\u0000", "~"])
    def test_one_that_is_printable_stays(self, text: str) -> None:
        assert printable(text) == text

    @pytest.mark.parametrize("value", [None, "", [], ["x"], {}, {"a": 1}])
    def test_what_has_none_is_the_same_item_each_time(self, value: Any) -> None:
        made = strangers.envelope(value)
        ids = {of_message("q", made, made["headers"], None, WHY)[0].id for _ in range(2)}
        assert len(ids) == 1
        other = made | {"body": "other"}
        assert {of_message("q", other, made["headers"], None, WHY)[0].id} != ids

    def test_bytes_are_the_same_item_each_time(self) -> None:
        assert of_bytes("q", b"\xff", WHY).id == of_bytes("q", b"\xff", WHY).id != of_bytes("q", b"\xfe", WHY).id

    def test_the_reason_is_not_longer_than_a_page(self) -> None:
        assert len(Reason(kind="invalid", error_class="E", error_message="x" * 10**6).error_message) == 2_000


@pytest.mark.parametrize("text", strangers.BREAKS.values())
class TestShown:
    def test_in_a_log(self, text: str) -> None:
        shown = logs.plain(f"a{text}b")
        assert shown.isprintable()
        assert shown.startswith("a")

    def test_in_json(self, text: str) -> None:
        line = json_line({text: [f"a{text}b"]})
        assert line.isprintable()
        assert json.loads(line) == {text: [f"a{text}b"]}

    def test_on_a_terminal(self, text: str) -> None:
        assert visible(f"a{text}b".replace("\n", "")).isprintable()
