"""Marks of a message: the outer headers count first, and nothing that is nested in them hides or forges one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.app.task import Context

from kafka_delivery.marks import FLEETING, LASTING, count_of, drop_fleeting, mark_of, marked, marked_again
from kafka_delivery.names import DEFERRALS, PROBE, REDRIVES, RELEASED, REVIVED

NESTED = {"sentry-trace": "1-2-1", "baggage": "a=b"}
"""What Sentry's integration puts under the key ``headers``."""


def context(headers: dict[str, Any]) -> Any:
    """The request of a running task, as Celery makes it of a message's headers."""
    return Context({"id": "one", "task": "t", "delivery_info": {}} | headers, args=(), kwargs={}, called_directly=False)


@pytest.mark.parametrize("form", [dict, context], ids=["headers of a message", "request of a task"])
class TestReading:
    @pytest.mark.parametrize("mark", [*LASTING, *FLEETING])
    @pytest.mark.parametrize(
        "headers",
        [
            {"MARK": 2},
            {"MARK": 2, "headers": NESTED},
            {"MARK": 2, "headers": {**NESTED, "MARK": 1}},
            {"headers": {**NESTED, "MARK": 2}},
            {"MARK": 2, "headers": None},
            {"MARK": 2, "headers": "not a dictionary"},
        ],
        ids=["plain", "nested", "copied", "only inside", "none", "junk"],
    )
    def test_the_outer_one_counts_first(self, form: Any, mark: str, headers: dict[str, Any]) -> None:
        assert mark_of(form(named(headers, mark)), mark) == 2

    @pytest.mark.parametrize("headers", [{}, {"headers": NESTED}, {"headers": "junk"}])
    def test_a_mark_that_is_not_there(self, form: Any, headers: dict[str, Any]) -> None:
        assert mark_of(form(dict(headers)), PROBE) is None
        assert count_of(form(dict(headers)), DEFERRALS) == 0

    @pytest.mark.parametrize(("value", "count"), [(3, 3), ("3", 0), (True, 0), ([3], 0)])
    def test_a_count_is_a_number(self, form: Any, value: Any, count: int) -> None:
        assert count_of(form({REDRIVES: value, "headers": NESTED}), REDRIVES) == count


def named(headers: dict[str, Any], mark: str) -> dict[str, Any]:
    return {
        mark if name == "MARK" else name: named(value, mark) if isinstance(value, dict) else value
        for name, value in headers.items()
    }


def test_a_call_that_never_ran_has_none() -> None:
    assert mark_of(SimpleNamespace(id="one"), PROBE) is None


class TestWriting:
    def test_the_outer_headers_carry_them(self) -> None:
        given = {"mine": 1, DEFERRALS: 4, "headers": {**NESTED, DEFERRALS: 3, PROBE: "p"}}
        before = {**given, "headers": dict(given["headers"])}  # type: ignore[call-overload]
        assert marked({DEFERRALS: 5, REVIVED: None}, given) == {"mine": 1, "headers": NESTED, DEFERRALS: 5}
        assert given == before, "what was given may be used again"

    def test_without_other_headers(self) -> None:
        assert marked({REVIVED: True}) == {REVIVED: True}
        assert marked({}) == {}

    @pytest.mark.parametrize("nested", [{}, {"headers": NESTED}, {"headers": {**NESTED, DEFERRALS: 1, PROBE: "x"}}])
    def test_what_is_queued_again_keeps_what_lasts(self, nested: dict[str, Any]) -> None:
        request = context({DEFERRALS: 2, REDRIVES: 3, REVIVED: True, PROBE: "p", RELEASED: True} | nested)
        again = marked_again(request, {DEFERRALS: 3})
        marks = {DEFERRALS: 3, REDRIVES: 3, REVIVED: True}
        assert again == marks | (NESTED if nested else {})
        # And once more, as it comes out of a worker where another tool has nested it.
        more = marked_again(context({**again, "headers": {**NESTED, **again}}))
        assert {name: value for name, value in more.items() if name not in NESTED} == marks


def test_a_strangers_claim_to_be_a_probe_is_dropped_wherever_it_lies() -> None:
    headers = {PROBE: "p", RELEASED: True, DEFERRALS: 1, "headers": {PROBE: "q", RELEASED: True, **NESTED}}
    drop_fleeting(headers)
    assert headers == {DEFERRALS: 1, "headers": NESTED}
    junk: dict[str, Any] = {PROBE: "p", "headers": "junk"}
    drop_fleeting(junk)
    assert junk == {"headers": "junk"}
