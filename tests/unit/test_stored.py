"""What lies in the parking store may be anybody's. It is read as the item that a worker parked, or as damaged; nothing
that the commands do with what was read fails.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kafka_delivery import Record
from kafka_delivery_worker.cli.filters import Filter
from kafka_delivery_worker.cli.output import json_line, moment, visible
from kafka_delivery_worker.cli.parked import described, whole
from kafka_delivery_worker.parked_items import message_ids
from kafka_delivery_worker.parking import DAMAGED, Parked, _item
from kafka_delivery_worker.stored import DamagedError, fields_of

RECORD = Record("orders", "value", "key", [("h", b"\xff")], message_id="id-1").to_wire("default")
CONTENTS: dict[str, Any] = {
    "record": RECORD,
    "call": {"task": "kafka_delivery.send_many", "id": "id-1", "args": [[RECORD]], "kwargs": {}},
    "message": {"queue": "kafka-delivery", "envelope": {"body": "", "headers": {}, "properties": {}}},
}


def stored(content: str = "record", **changes: Any) -> dict[str, Any]:
    """An item as a worker writes it."""
    fields = {
        "id": "id-1",
        "kind": "dead-letter",
        "error_class": "RejectedError",
        "error_message": "too large",
        "content": content,
        "data": json.dumps(CONTENTS[content]),
        "error_code": 10,
        "retry_count": 3,
        "redrive_count": 0,
        "topic": "orders",
        "parked_at_ms": 1_767_323_045_678,
        "size": 5,
        "sha256": "0" * 64,
        "asked": None,
        "digest": "0" * 64,
    }
    return fields | changes


def use(item: Parked) -> str:
    """Do with an item what the commands do with it."""
    chosen = Filter(since_ms=1, keys=[b"k"], headers=[("h", None)], topics=["t"], kinds=["bug"])
    chosen(item)
    hash((item.kind, item.topic, item.error_class, item.error_code))
    shown = json_line(whole(item)) + visible("".join(map(str, described(item).values()))) + moment(item.at_ms)
    assert shown.isprintable() or "\n" in shown or "\t" in shown
    assert all(isinstance(one, str) for one in message_ids(item))
    assert item.digest
    assert isinstance(item.message_id, str)
    return item.content


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([2**70, -(2**70), 1e400, ""]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.mark.parametrize("content", CONTENTS)
def test_what_a_worker_parked_is_read_as_that(content: str) -> None:
    fields = fields_of(json.dumps(stored(content)).encode())
    assert (fields["content"], fields["data"]) == (content, CONTENTS[content])
    assert use(_item(json.dumps(stored(content)).encode(), b"id-1")) == content


@given(st.binary() | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_anything_is_read_as_an_item_or_as_damaged(raw: bytes) -> None:
    item = _item(raw, b"\xff\x1b\n", 1e300)
    assert use(item) == DAMAGED
    assert item.data["stored"].encode(errors="surrogateescape") == raw


@given(st.sampled_from(sorted(CONTENTS)), st.sampled_from(sorted(stored())), ANYTHING)
def test_a_field_that_is_anything(content: str, name: str, value: Any) -> None:
    assert use(_item(json.dumps(stored(content) | {name: value}).encode(), b"id-1"))


@given(st.sampled_from(sorted(CONTENTS)), ANYTHING | st.lists(ANYTHING, min_size=9, max_size=9))
def test_a_content_that_is_anything(content: str, value: Any) -> None:
    assert use(_item(json.dumps(stored(content, data=json.dumps(value))).encode(), b"id-1"))


@given(st.integers(0, 8), ANYTHING)
def test_a_record_of_which_a_part_is_anything(place: int, value: Any) -> None:
    wire = [*RECORD]
    wire[place] = value
    assert use(_item(json.dumps(stored(data=json.dumps(wire))).encode(), b"id-1"))


@pytest.mark.parametrize(
    "changes",
    [
        {"parked_at_ms": -1},
        {"parked_at_ms": 2**63},
        {"parked_at_ms": float("nan")},
        {"parked_at_ms": float("inf")},
        {"parked_at_ms": 1.5},
        {"parked_at_ms": True},
        {"parked_at_ms": "1"},
        {"error_code": 2**31},
        {"error_code": True},
        {"retry_count": -1},
        {"retry_count": 2**60},
        {"topic": ["t"]},
        {"kind": {"a": 1}},
        {"content": "parcel"},
        {"content": ["record"]},
        {"data": {"not": "text"}},
        {"data": "no JSON"},
        {"data": "[" * 100_000},
        {"data": "[" * 600 + "]" * 600},
        {"data": "9" * 5_000},
        {"data": '{"__type__": "datetime", "__value__": "never"}'},
        {"asked": "[1]"},
        {"asked": '{"chain": ' + "[" * 700 + "]" * 700 + "}"},
        {"size": -1},
        {"sha256": 1},
    ],
    ids=lambda changes: f"{changes!r:.60}",
)
def test_what_no_worker_writes_is_damaged(changes: dict[str, Any]) -> None:
    with pytest.raises(DamagedError):
        fields_of(json.dumps(stored("call") | changes).encode())


@pytest.mark.parametrize("name", ["kind", "error_class", "error_message", "content", "data", "parked_at_ms"])
def test_a_field_that_is_missing(name: str) -> None:
    fields = stored()
    del fields[name]
    with pytest.raises(DamagedError, match=name):
        fields_of(json.dumps(fields).encode())


def test_what_the_scripts_would_not_find_is_damaged() -> None:
    """They look for its time as text; in compact JSON it could be discarded by nobody."""
    with pytest.raises(DamagedError, match="no worker"):
        fields_of(json.dumps(stored(), separators=(",", ":")).encode())


def test_what_is_nested_as_deep_as_an_argument_may_be_is_read() -> None:
    deep = "[" * 500 + "]" * 500
    data = f'{{"task": "t", "id": "i", "args": [{deep}], "kwargs": {{}}}}'
    assert use(_item(json.dumps(stored("call", data=data)).encode(), b"id-1")) == "call"


def test_the_reason_quotes_nothing() -> None:
    for raw in (
        b"secret",
        json.dumps(stored(data="secret")).encode(),
        json.dumps(stored() | {"content": "secret"}).encode(),
    ):
        assert "secret" not in _item(raw, b"x").error_message


def test_a_moment_that_no_calendar_has() -> None:
    assert moment(2**63) == f"{2**63} ms"
    assert moment(-sys.maxsize) == f"{-sys.maxsize} ms"
