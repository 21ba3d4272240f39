"""A command's options say which failures it is about; what is not asked decides nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import click
import pytest
from click.testing import CliRunner

from kafka_delivery_worker.cli.filters import Filter, filter_options, moment_ms, topic_option

NOW = 1_767_323_045_678  # 2026-01-02T03:04:05.678Z


@dataclass
class Letter:
    at_ms: int = NOW
    topic: str | None = "orders"
    kind: str = "dead-letter"
    error_class: str | None = "RejectedError"
    error_code: int | None = 10
    message_id: str | None = "id-1"
    key: bytes | None = b"k"
    headers: list[tuple[str, bytes | None]] = field(default_factory=lambda: [("a", b"1"), ("a", b"2"), ("n", None)])


UNKNOWN = Letter(topic=None, error_class=None, error_code=None, message_id=None, key=None, headers=[])


@pytest.mark.parametrize(
    ("chosen", "fits"),
    [
        (Filter(), True),
        (Filter(since_ms=NOW), True),
        (Filter(since_ms=NOW + 1), False),
        (Filter(until_ms=NOW + 1), True),
        (Filter(until_ms=NOW), False),
        (Filter(topics=["other", "orders"]), True),
        (Filter(topics=["order"]), False),
        (Filter(kinds=["dead-letter"]), True),
        (Filter(kinds=["poison"]), False),
        (Filter(error_classes=["RejectedError"]), True),
        (Filter(error_classes=["Rejected"]), False),
        (Filter(error_codes=[3, 10]), True),
        (Filter(error_codes=[3]), False),
        (Filter(message_ids=["id-1"]), True),
        (Filter(message_ids=["id-2"]), False),
        (Filter(keys=[b"k"]), True),
        (Filter(keys=[b""]), False),
        (Filter(headers=[("a", b"2")]), True),
        (Filter(headers=[("a", b"3")]), False),
        (Filter(headers=[("a", b"1"), ("a", b"2")]), True),
        (Filter(headers=[("a", b"1"), ("b", b"2")]), False),
        (Filter(headers=[("n", None)]), True),
        (Filter(headers=[("a", None)]), True),
        (Filter(headers=[("b", None)]), False),
        (Filter(topics=["orders"], keys=[b"other"]), False),
    ],
    ids=repr,
)
def test_all_that_is_asked_must_hold(chosen: Filter, fits: bool) -> None:
    assert chosen(Letter()) is fits
    assert chosen.asks is (chosen != Filter())


@pytest.mark.parametrize(
    "asked",
    [
        {"topics": ["orders"]},
        {"error_classes": ["RejectedError"]},
        {"error_codes": [10]},
        {"message_ids": ["id-1"]},
        {"keys": [b""]},
        {"headers": [("a", None)]},
    ],
    ids=str,
)
def test_what_is_not_known_fits_only_where_nothing_is_asked_of_it(asked: dict[str, list[object]]) -> None:
    assert Filter()(UNKNOWN)
    assert not Filter(**asked)(UNKNOWN)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2026-01-02T03:04:05.678Z", NOW),
        ("2026-01-02T04:04:05.678+01:00", NOW),
        ("2026-01-02T03:04:05.678", NOW),
        ("2026-01-02", int(datetime(2026, 1, 2, tzinfo=UTC).timestamp() * 1000)),
        ("90s", NOW - 90_000),
        ("10m", NOW - 600_000),
        (" 2h ", NOW - 7_200_000),
        ("7d", NOW - 604_800_000),
        ("1w", NOW - 604_800_000),
    ],
)
def test_a_moment(text: str, ms: int) -> None:
    assert moment_ms(text, NOW) == ms


@pytest.mark.parametrize("text", ["", "yesterday", "2x", "-2h", "2026-13-01", "1767323045678"])
def test_no_moment(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # whatever the standard library says
        moment_ms(text, NOW)


@click.command()
@filter_options(topic_option)
def ask(chosen: Filter) -> None:
    fitting = [
        letter for letter in (Letter(), replace(Letter(), key=b"\xff", headers=[("x", b"a=b")])) if chosen(letter)
    ]
    click.echo(json.dumps([repr(letter.key) for letter in fitting]))


BOTH, FIRST, SECOND = ["b'k'", "b'\\xff'"], ["b'k'"], ["b'\\xff'"]
NONE: list[str] = []


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ("", BOTH),
        ("--topic orders --topic other", BOTH),
        ("--topic other", NONE),
        ("--key k", FIRST),
        ("--key base64:/w==", SECOND),
        ("--key k --key base64:/w==", BOTH),
        ("--header a=1 --header a=2", FIRST),
        ("--header a=1 --header x", NONE),
        ("--header x=a=b", SECOND),
        ("--header n", FIRST),
        ("--error-code 10", BOTH),
        ("--error-code MSG_SIZE_TOO_LARGE", BOTH),
        ("--error-code msg_size_too_large", BOTH),
        ("--error-code -188", NONE),
        ("--error-class RejectedError --message-id id-1", BOTH),
        ("--since 2026-01-02T03:04:05.678Z", BOTH),
        ("--until 2026-01-02T03:04:05.678Z", NONE),
        ("--since 1s", NONE),
    ],
)
def test_options_become_the_filter(options: str, keys: list[str]) -> None:
    done = CliRunner().invoke(ask, options.split())
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == keys


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--since yesterday", "'yesterday' is no time"),
        ("--error-code NO_SUCH", "'NO_SUCH' is no error code"),
        ("--key base64:***", "no base64"),
        ("--header =1", "'=1' has no name"),
    ],
)
def test_a_typing_mistake_ends_in_a_sentence(options: str, said: str) -> None:
    done = CliRunner().invoke(ask, options.split())
    assert done.exit_code == 2
    assert said in done.output
