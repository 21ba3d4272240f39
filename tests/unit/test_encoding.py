"""Values are written as Django's own encoder writes them, byte for byte, so that neither side has to convert.

What JSON cannot carry is refused by the name of its type: the value itself is somebody's data.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import json
import uuid
from collections import OrderedDict, namedtuple
from enum import Enum, IntEnum, StrEnum
from typing import Any

import pytest
from django.core.serializers.json import DjangoJSONEncoder
from django.utils.functional import lazystr
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st

from examples import examples
from kafka_delivery.encoding import to_json
from kafka_delivery.errors import InvalidRecordError

quick = profile(max_examples=examples(200), suppress_health_check=[HealthCheck.too_slow])

CARD = "4111-1111-1111-1111"
MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5)


def zone(**offset: int) -> datetime.timezone:
    return datetime.timezone(datetime.timedelta(**offset))


def django(value: Any) -> bytes:
    return json.dumps(value, cls=DjangoJSONEncoder, ensure_ascii=False, separators=(",", ":")).encode()


def refusal(value: Any) -> InvalidRecordError:
    with pytest.raises(InvalidRecordError) as caught:
        to_json(value)
    assert caught.value.field == "value"
    return caught.value


class Currency(StrEnum):
    EURO = "EUR"


class Level(IntEnum):
    HIGH = 3


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.date(1, 1, 1), "0001-01-01"),
        (MOMENT, "2026-01-02T03:04:05"),
        (MOMENT.replace(microsecond=678901), "2026-01-02T03:04:05.678"),
        (MOMENT.replace(microsecond=5), "2026-01-02T03:04:05.000"),
        (MOMENT.replace(tzinfo=datetime.UTC), "2026-01-02T03:04:05Z"),
        (MOMENT.replace(tzinfo=datetime.UTC, microsecond=678901), "2026-01-02T03:04:05.678Z"),
        (MOMENT.replace(tzinfo=zone(hours=5, minutes=45)), "2026-01-02T03:04:05+05:45"),
        (MOMENT.replace(tzinfo=zone(hours=-3), microsecond=1000), "2026-01-02T03:04:05.001-03:00"),
        (MOMENT.replace(tzinfo=zone(seconds=1172), microsecond=1), "2026-01-02T03:04:05.000+00:19:32"),
        (MOMENT.replace(tzinfo=zone(microseconds=7)), "2026-01-02T03:04:05+00:00:00.000007"),
        (datetime.time(3, 4, 5), "03:04:05"),
        (datetime.time(3, 4), "03:04:00"),
        (datetime.time(3, 4, 5, 678901), "03:04:05.678"),
        (datetime.timedelta(0), "P0DT00H00M00S"),
        (datetime.timedelta(days=3, hours=4, minutes=5, seconds=6), "P3DT04H05M06S"),
        (datetime.timedelta(microseconds=7), "P0DT00H00M00.000007S"),
        (datetime.timedelta(days=-1, microseconds=1), "-P0DT23H59M59.999999S"),
        (datetime.timedelta(days=-400), "-P400DT00H00M00S"),
        (datetime.timedelta.max, "P999999999DT23H59M59.999999S"),
        (datetime.timedelta.min, "-P999999999DT00H00M00S"),
        (decimal.Decimal("9.90"), "9.90"),
        (decimal.Decimal("1E+30"), "1E+30"),
        (decimal.Decimal("NaN"), "NaN"),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (lazystr("später"), "später"),
        (lazystr(12), "12"),
    ],
)
def test_these_become_the_text_that_django_writes(value: Any, text: str) -> None:
    written = to_json({"a": value, "b": [value]})
    assert json.loads(written) == {"a": text, "b": [text]}
    assert written == django({"a": value, "b": [value]})


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        (),
        {"a": [1, -2, 1.5, 1e300, True, False, None, "", "\x00\x7f\u2028\u00fc\U0001f600"]},
        {1: "int", 1.5: "float", False: "bool", None: "none"},
        {"__type__": "datetime", "__value__": "x"},
        OrderedDict(z=1, a=2),
        [Pair(1, MOMENT), (1, 2), Level.HIGH, Currency.EURO],
        [10**100, -(2**63)],
    ],
)
def test_these_become_the_json_that_django_writes(value: Any) -> None:
    assert to_json(value) == django(value)


class TestDataclasses:
    @dataclasses.dataclass
    class Line:
        price: decimal.Decimal
        ordered: datetime.date

    @dataclasses.dataclass(frozen=True, slots=True)
    class Order:
        id: uuid.UUID
        lines: list[Any]
        by_name: dict[str, Any]
        note: str | None = None

    def test_become_objects_at_any_depth(self) -> None:
        line = self.Line(decimal.Decimal("9.90"), datetime.date(2026, 1, 2))
        order = self.Order(uuid.UUID(int=1), [line, [line]], {"first": line})
        written = {"price": "9.90", "ordered": "2026-01-02"}
        assert json.loads(to_json(order)) == {
            "id": str(uuid.UUID(int=1)),
            "lines": [written, [written]],
            "by_name": {"first": written},
            "note": None,
        }

    def test_keep_the_order_of_their_fields(self) -> None:
        assert to_json(self.Line(decimal.Decimal(1), datetime.date(2026, 1, 2))).startswith(b'{"price":')

    def test_as_classes_are_no_values(self) -> None:
        assert "type" in refusal([self.Line]).problem
        assert "type" in refusal(self.Line).problem

    def test_that_contain_themselves_are_refused(self) -> None:
        order = self.Order(uuid.UUID(int=1), [], {})
        order.lines.append(order)
        assert "Circular" in refusal(order).problem

    def test_with_a_field_that_has_no_value_are_refused(self) -> None:
        @dataclasses.dataclass
        class Unfinished:
            later: int = dataclasses.field(init=False)

        assert refusal(Unfinished())


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_json_has_no_number_for_is_refused(number: float) -> None:
    for value in ([number], {"a": number}, {number: 1}, {"a": [{"b": number}]}):
        error = refusal(value)
        assert "Out of range float values" in error.problem
        assert str(number) not in error.problem


def test_what_contains_itself_is_refused() -> None:
    items: list[Any] = [CARD]
    items.append(items)
    by_name: dict[str, Any] = {"card": CARD}
    by_name["self"] = [by_name]
    for value in (items, by_name):
        error = refusal(value)
        assert "Circular" in error.problem
        assert CARD not in str(error)


def test_what_is_nested_too_deeply_is_refused() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert "nested too deeply" in refusal(value).problem


@pytest.mark.parametrize("value", [["\ud800"], {"\udfff": 1}, {"a": [lazystr("x\ud800")]}])
def test_text_without_utf_8_is_refused(value: Any) -> None:
    assert "lone surrogate" in refusal(value).problem


class Card:
    def __repr__(self) -> str:
        return CARD

    __str__ = __repr__


class Plain(Enum):
    CARD = CARD


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({CARD}, "set"),
        (frozenset([CARD]), "frozenset"),
        (CARD.encode(), "bytes"),
        (bytearray(CARD.encode()), "bytearray"),
        (memoryview(CARD.encode()), "memoryview"),
        (Card(), "Card"),
        (Plain.CARD, "Plain"),
        (iter([CARD]), "list_iterator"),
        (complex(4111, 1111), "complex"),
        (range(4111), "range"),
        (ValueError(CARD), "ValueError"),
        (datetime.time(3, 4, tzinfo=datetime.UTC), "time"),
    ],
)
@pytest.mark.parametrize("place", [lambda v: [v], lambda v: {"a": v}, lambda v: {"a": [{"b": (v,)}]}])
def test_other_types_are_refused_by_name_and_never_by_value(value: Any, name: str, place: Any) -> None:
    error = refusal(place(value))
    assert name in error.problem
    assert "4111" not in f"{error} {error!r}"
    assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize("key", [(CARD,), CARD.encode(), Card(), MOMENT, uuid.UUID(int=4111), lazystr(CARD)])
def test_keys_that_json_does_not_have_are_refused_and_never_quoted(key: Any) -> None:
    error = refusal({key: 1})
    assert "4111" not in f"{error} {error!r}"
    with pytest.raises(TypeError):
        django({key: 1})


@pytest.mark.parametrize("value", [1, 1.5, True, "text", b"bytes", None, {1}, MOMENT, lazystr("x"), iter([])])
def test_only_objects_and_arrays_are_values_of_a_record(value: Any) -> None:
    assert "must be bytes, str, dict, list, dataclass or None" in refusal(value).problem


text = st.text(max_size=20)
offsets = st.timedeltas(datetime.timedelta(hours=-23), datetime.timedelta(hours=23))
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=10)
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(datetime.UTC) | offsets.map(datetime.timezone))
    | st.times(timezones=st.none() | st.just(datetime.UTC))
    | st.timedeltas()
    | st.decimals()
    | st.uuids()
    | text.map(lazystr)
    | st.binary(max_size=3)
    | st.complex_numbers()
    | st.sets(st.integers(), max_size=2)
)
keys = text | st.integers() | st.floats() | st.booleans() | st.none() | st.binary(max_size=2) | st.uuids()
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(text | keys, inner, max_size=4)
    ),
    max_leaves=8,
)


@quick
@given(st.lists(values, max_size=3) | st.dictionaries(text, values, max_size=3))
def test_any_value_is_written_as_django_writes_it_or_refused(value: Any) -> None:
    try:
        written = to_json(value)
    except InvalidRecordError:
        written = None
    try:
        expected = django(value)
    except (TypeError, ValueError):
        expected = None
    if written is None:
        # Django writes NaN and infinities; no other language reads them.
        assert expected is None or any(word in expected for word in (b"NaN", b"Infinity"))
    else:
        assert written == expected


@quick
@given(st.lists(st.dates() | st.datetimes() | st.times() | st.timedeltas() | st.uuids() | text.map(lazystr)))
def test_what_django_models_hold_is_always_written(value: list[Any]) -> None:
    assert to_json(value) == django(value)
