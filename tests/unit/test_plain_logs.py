"""What strangers call their messages ends no line of a log and moves no cursor, whichever logger tells of it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

import strangers
from kafka_delivery_worker.logs import LONGEST, JsonLines, be_plain

EVIL = "".join(text for text in strangers.BREAKS.values()) + strangers.FORGED_LINE


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """All that is logged by any logger while a test runs, as text."""
    before = logging.getLogRecordFactory()
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    root = logging.getLogger()
    root.addHandler(handler)
    be_plain()
    yield out
    logging.setLogRecordFactory(before)
    root.removeHandler(handler)


@pytest.mark.parametrize(
    "name", ["kafka_delivery.engine", "celery.app.trace", "celery.worker.strategy", "kombu", "celery"]
)
@pytest.mark.parametrize("value", [EVIL, ValueError(EVIL), [EVIL], {"a": EVIL}, EVIL.encode(errors="replace")])
def test_each_thing_stays_in_its_line(written: io.StringIO, name: str, value: object) -> None:
    logging.getLogger(name).error("record.parked id=%s error=%r", value, value)
    (line,) = written.getvalue().split("\n")[:-1]
    assert line.isprintable()
    assert line.startswith("record.parked id=")
    assert strangers.FORGED_LINE in line


def test_fields_by_name_too(written: io.StringIO) -> None:
    """As Celery logs its tasks."""
    logging.getLogger("celery.app.trace").error("Task %(name)s[%(id)s] %(n)d", {"name": EVIL, "id": EVIL, "n": 7})
    (line,) = written.getvalue().split("\n")[:-1]
    assert line.isprintable()
    assert line.endswith(" 7")


def test_a_text_may_have_lines_of_its_own(written: io.StringIO) -> None:
    logging.getLogger("celery.worker").error("one\n\ttwo\x1b\x9b é")
    assert written.getvalue() == "one\n\ttwo\\u001b\\u009b é\n"


def test_what_is_long_is_cut(written: io.StringIO) -> None:
    logging.getLogger("kafka_delivery").error("id=%s", "i" * 1_000_000)
    assert len(written.getvalue()) < LONGEST + 100
    assert "1000000 characters" in written.getvalue()


def test_numbers_stay_numbers(written: io.StringIO) -> None:
    logging.getLogger("kafka_delivery").error("%d %.1f %s %5.2f", 1, 2.5, None, True)
    assert written.getvalue() == "1 2.5 None  1.00\n"


def test_other_peoples_loggers_are_left_alone(written: io.StringIO) -> None:
    logging.getLogger("shop").error("a %s", "b\nc")
    assert written.getvalue() == "a b\nc\n"


def test_it_is_done_once(written: io.StringIO) -> None:
    made = logging.getLogRecordFactory()
    be_plain()
    assert logging.getLogRecordFactory() is made


def test_json_has_the_same_fields(written: io.StringIO) -> None:
    record = logging.getLogRecordFactory()("kafka_delivery.x", 40, "p", 1, "a.b id=%s n=%d", (EVIL, 3), None)
    assert '"n": 3' in JsonLines().format(record)
    assert JsonLines().format(record).isprintable()
