"""A dead letter says the same in each tool's words; nobody's own header passes for theirs, and none is lost."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from kafka_delivery import Record
from kafka_delivery.dead_letters import reason
from kafka_delivery_worker.dead_letter_headers import PRESETS, Pairs

WHY = reason("RejectedError", 10, "gr\u00f6\u00dfer [MSG_SIZE_TOO_LARGE]", 2, "2026-01-02T03:04:05.678+00:00")

EXPECTED: dict[str, dict[str, bytes]] = {
    "spring": {
        "kafka_dlt-original-topic": b"orders",
        "kafka_dlt-original-partition": b"\x00\x00\x01\x03",
        "kafka_dlt-original-timestamp": b"\x00\x00\x01\x9b\x7c\xa9\x8f\x2e",
        "kafka_dlt-original-timestamp-type": b"CreateTime",
        "kafka_dlt-exception-fqcn": b"RejectedError",
        "kafka_dlt-exception-message": WHY["error_message"].encode(),
    },
    "connect": {
        "__connect.errors.topic": b"orders",
        "__connect.errors.partition": b"259",
        "__connect.errors.record.timestamp": b"1767323045678",
        "__connect.errors.stage": b"KAFKA_PRODUCE",
        "__connect.errors.exception.class.name": b"RejectedError",
        "__connect.errors.exception.message": WHY["error_message"].encode(),
    },
}


def record(headers: Any = (), partition: int | None = 259) -> Record:
    return Record("orders", b"v", "k", headers, partition, 1_767_323_045_678, "id-1")


def last_of(headers: Pairs) -> dict[str, Any]:
    """As Java's `Headers.lastHeader` reads."""
    return dict(headers)


@pytest.mark.parametrize("preset", ["spring", "connect"])
def test_in_the_words_of_another_tool(preset: str) -> None:
    headers = PRESETS[preset](record(), WHY)
    assert headers[0] == ("message-id", b"id-1")
    assert dict(headers[1:]) == EXPECTED[preset]


@pytest.mark.parametrize("preset", ["spring", "connect"])
def test_what_is_not_known_is_left_out(preset: str) -> None:
    headers = last_of(PRESETS[preset](record(partition=None), WHY))
    assert not [name for name in headers if name.endswith(("partition", "offset", "stacktrace", "connector.name"))]


@pytest.mark.parametrize("preset", ["spring", "connect"])
def test_own_headers_keep_their_names_and_cannot_pass_for_the_tools(preset: str) -> None:
    own = [("a", b"1"), ("a", None), ("message-id", b"forged"), *((name, b"forged") for name in EXPECTED[preset])]
    headers = PRESETS[preset](record(own), WHY)
    assert {name: last_of(headers)[name] for name in EXPECTED[preset]} == EXPECTED[preset]
    assert next(value for name, value in headers if name == "message-id") == b"id-1"
    assert headers[1 : len(own) + 1] == own  # in order, repeats and all


def test_big_endian_as_java_reads_it() -> None:
    said = last_of(PRESETS["spring"](record(), WHY))
    assert struct.unpack(">i", said["kafka_dlt-original-partition"]) == (259,)
    assert struct.unpack(">q", said["kafka_dlt-original-timestamp"]) == (1_767_323_045_678,)


def test_ours_come_first_and_own_headers_have_a_prefix() -> None:
    headers = PRESETS["ours"](record([("a", b"1"), ("original-topic", b"forged")]), WHY)
    assert [name for name, _ in headers[:8]] == [
        "original-topic", "error-message", "error-class", "error-code", "timestamp", "retry-count", "message-id",
        "record-timestamp",
    ]  # fmt: skip
    assert headers[8:] == [("original-a", b"1"), ("original-original-topic", b"forged")]


@pytest.mark.parametrize("preset", PRESETS)
def test_they_stay_within_the_room_that_a_record_leaves(preset: str) -> None:
    """A record at its limit must fit its dead-letter topic with the longest reason."""
    from kafka_delivery.settings import DEAD_LETTER_HEADROOM_BYTES

    longest = reason("E" * 500, -(2**31), "\u20ac" * 2000, 10**6, "x" * 500)
    one = record([("a" * 50, b"1")])
    written = sum(len(name.encode()) + len(value or b"") + 10 for name, value in PRESETS[preset](one, longest))
    own = sum(len(name) + len(value or b"") for name, value in one.header_pairs)
    assert written - own < DEAD_LETTER_HEADROOM_BYTES
