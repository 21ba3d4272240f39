"""Where a backlog starts, below what all is done, and what is to become of a dead letter."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import click
import pytest
from confluent_kafka import KafkaError, KafkaException

from kafka_delivery.settings import Settings
from kafka_delivery_worker.cli.letters import advice, data, for_people
from kafka_delivery_worker.cli.output import console, table
from kafka_delivery_worker.dead_letter import DeadLetter, Origin
from kafka_delivery_worker.redrive import ledger
from kafka_delivery_worker.redrive.backlog import Committed, Span, _span
from kafka_delivery_worker.redrive.ledger import Floors
from kafka_delivery_worker.redrive.selection import LEFT, PARK, SEND, Fate, Selection

LETTER = DeadLetter(
    partition=0, offset=5, origin=Origin.OURS, topic="orders", key=None, value=b"v", headers=[], timestamp_ms=1,
    message_id="id-1", error_class="RejectedError", error_code=10,
)  # fmt: skip


def test_a_coordinator_that_is_away_does_not_hold_the_records_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again after a while; Redis knows meanwhile."""
    now, asked, marked = [0.0], [], []

    def commit(floors: dict[int, int], *_: object) -> None:
        asked.append(now[0])
        if len(asked) == 2:
            raise KafkaException(KafkaError(KafkaError.COORDINATOR_LOAD_IN_PROGRESS))

    monkeypatch.setattr(ledger, "monotonic", lambda: now[0])
    done = SimpleNamespace(
        begin=lambda *_: None, check=lambda *_: None, settle=lambda *_: None,
        mark=lambda lock, places, audit: marked.extend(places),
    )  # fmt: skip
    backlog = SimpleNamespace(commit=commit, done=done, topic_id="", group="g", reached={})
    book = ledger.Ledger(backlog, None, [Span(0, 0, 0, 100)], None)  # type: ignore[arg-type]
    for offset in range(60):
        now[0] += 1
        letter = replace(LETTER, offset=offset)
        book.take(letter)
        book.done([letter])
    assert marked == [(0, offset) for offset in range(60)]
    assert asked[:3] == [0, 1, 2 + ledger.REFUSED_S]
    assert asked[3:] == [asked[2] + n for n in range(1, len(asked) - 2)]


def test_a_parked_one_is_taken_away_under_the_lock_of_the_store() -> None:
    """No mark in Kafka's partitions checks it, and commands on the store lock that alone."""
    removed: list[object] = []
    done = SimpleNamespace(begin=lambda *_: None, mark=lambda *_: None, check=lambda _: None)
    backlog = SimpleNamespace(commit=lambda *_: None, done=done, topic_id="", group="g", reached={})
    store = SimpleNamespace(remove=lambda *arguments: removed.append(arguments))
    book = ledger.Ledger(backlog, "the topic's", [Span(0, 0, 0, 100)], store, "the store's")  # type: ignore[arg-type]
    book.done([replace(LETTER, parked_id="p", parked_at_ms=5)])
    assert removed == [("p", 5, "the store's")]


@pytest.mark.parametrize(
    ("low", "end", "committed", "remembered", "start", "forgotten"),
    [
        (0, 10, None, None, 0, True),  # the first run
        (0, 10, 4, 4, 4, False),
        (0, 10, 6, 4, 6, False),  # killed between the two
        (0, 10, None, 4, 4, False),  # Kafka forgot the group for its age
        (0, 10, 2, 4, 2, True),  # somebody reset the group to have it again
        (0, 10, -2, 4, 4, False),  # a run moved it after a newer one had gone further
        (0, 10, -6, 4, 6, False),
        (0, 10, -4, None, 4, True),
        (0, 3, -2, 9, 0, True),  # another topic of that name
        (7, 10, -2, 4, 7, False),
        (7, 10, 4, 4, 7, False),  # retention took some away
        (7, 10, None, None, 7, True),
        (0, 3, 9, None, 0, True),  # another topic of that name
        (0, 3, None, 9, 0, True),
        (0, 3, 9, 9, 0, True),
        (5, 5, 5, 5, 5, False),
        (0, 10, 4, None, 4, True),  # Redis lost its memory: what is done beyond 4 is not known
    ],
)
def test_where_a_backlog_starts(
    low: int, end: int, committed: int | None, remembered: int | None, start: int, forgotten: bool
) -> None:
    """An offset below 0 stands for one that a run of ours moved."""
    offset = None if committed is None else Committed(abs(committed), ours=committed < 0)
    assert _span(3, low, end, offset, remembered) == Span(3, low, start, end, forgotten)


def test_below_a_floor_all_is_done() -> None:
    """Letters taken in order end in any order; gaps between offsets are nobody's."""
    for seed in range(200):
        dice = random.Random(seed)
        offsets = sorted(dice.sample(range(30), 15))
        floors = Floors([Span(0, 0, 0, 30)])
        waits, flying = set(), []
        for offset in offsets:
            letter = replace(LETTER, offset=offset)
            if dice.random() < 0.1:
                floors.leave(letter)
                waits.add(offset)
            else:
                floors.take(letter)
                flying.append(letter)
            while flying and dice.random() < 0.5:
                floors.done(flying.pop(dice.randrange(len(flying))))
            undone = waits | {one.offset for one in flying}
            assert floors.now()[0] == min(undone, default=offset + 1)
        for letter in flying:
            floors.done(letter)
        floors.end(0, 30)
        assert floors.now()[0] == min(waits, default=30)


@pytest.mark.parametrize(
    ("letter", "to", "fate"),
    [
        (LETTER, None, Fate(SEND, "orders")),
        (LETTER, "other", Fate(SEND, "other")),
        (replace(LETTER, redrive_count=2), None, Fate(SEND, "orders")),
        (replace(LETTER, redrive_count=3), None, Fate(PARK, "orders")),
        (replace(LETTER, redrive_count=3), "other", Fate(PARK, "other")),
        (replace(LETTER, message_id="id-2"), None, Fate(LEFT)),
        (replace(LETTER, topic=None), None, Fate(LEFT, why="nothing says which topic it was for: give --to")),
        (replace(LETTER, topic=None), "other", Fate(SEND, "other")),
        (LETTER, "orders-dlq", Fate(LEFT, why="orders-dlq is where it lies: give another --to")),
        (replace(LETTER, problem="unreadable"), "other", Fate(LEFT, why="unreadable")),
        (
            replace(LETTER, headers=[("", b"1")]),
            None,
            Fate(
                LEFT,
                why="it is no valid record, headers: the name of number 0 is empty or has a NUL: librdkafka cuts it",
            ),
        ),
        (replace(LETTER, topic="shares"), None, Fate(LEFT)),
        (replace(LETTER, topic="stray"), None, Fate(SEND, "stray")),
    ],
)
def test_what_is_to_become_of_it(letter: DeadLetter, to: str | None, fate: Fate) -> None:
    """One of a topic that shares the dead-letter topic is that one's; one that nobody else would ask for is ours."""
    settings = Settings(dead_letter_topics={"shares": "orders-dlq"})
    selection = Selection(settings, "orders", lambda one: one.message_id == "id-1", to)
    assert selection.fate(letter) == fate
    assert selection(letter) is (fate != Fate(LEFT))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        (b"", ""),
        ("größe\n".encode(), "größe\n"),
        (b"\xff", "base64:/w=="),
        (b"a\0", "base64:YQA="),
        (b"base64:x", "base64:YmFzZTY0Ong="),
    ],
)
def test_data_is_text_or_base64_and_the_filters_read_both(value: bytes | None, text: str | None) -> None:
    from kafka_delivery_worker.cli.filters import Data

    assert data(value) == text
    if text is not None:
        assert Data().convert(text, None, None) == value


def test_a_terminal_does_not_act_on_a_value() -> None:
    assert for_people("a\x1b[2J\r\n") == "a\\x1b[2J\\x0d\n"
    assert "5,000 characters" in for_people("x" * 5000)
    assert for_people(None) == "(none)"
    assert click.unstyle(for_people("x")) == "x"


def test_a_table_shows_what_strangers_wrote_as_it_is() -> None:
    """It is neither markup nor an emoji's name, and no command to the terminal."""
    out = console()
    with out.capture() as shown:
        out.print(table("t", ("id", "error"), [("order:key:1", "a\\[red]b\x1b[2J\x07")]))
        out.print("order:key:1 waits", markup=False)
    assert "order:key:1 │ a\\[red]b\\x1b[2J\\x07" in shown.get()
    assert "order:key:1 waits" in shown.get()


@pytest.mark.parametrize(
    ("letter", "said"),
    [
        (LETTER, "MSG_SIZE_TOO_LARGE: Larger than the topic or broker allows"),
        (replace(LETTER, error_code=999), "CODE_999"),
        (replace(LETTER, error_code=None), "ask its owner"),
        (replace(LETTER, error_code=None, origin=Origin.SPRING), "mend that first"),
        (replace(LETTER, error_code=None, origin=Origin.UNKNOWN), "--to"),
    ],
)
def test_there_is_something_to_do_about_each(letter: DeadLetter, said: str) -> None:
    assert said in advice(letter)
