"""What is parked is kept once, whole, and can be listed, taken and removed by the id under which it lies.

One body for Valkey and Redis. This is the last place where a record can be: what is lost here is lost.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from kafka_delivery.names import PARKED, PARKED_INDEX
from kafka_delivery_worker import parking
from kafka_delivery_worker.embedded import Valkey
from kafka_delivery_worker.parking import Parked, ParkingStore


@pytest.fixture(scope="module", params=["valkey", pytest.param("redis", marks=pytest.mark.real)])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "redis":
        yield request.getfixturevalue("real_redis").url
    else:
        with Valkey() as valkey:
            yield valkey.url


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server, socket_timeout=5) as connected:
        connected.delete(PARKED, PARKED_INDEX)
        yield connected


@pytest.fixture
def store(client: redis.Redis) -> ParkingStore:
    return ParkingStore(client)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The store's clock: stands still until a test moves it."""
    hands = SimpleNamespace(ms=1_767_323_045_678)
    monkeypatch.setattr(parking, "time", SimpleNamespace(time_ns=lambda: hands.ms * 1_000_000))
    return hands


def item(item_id: str = "id-1", data: Any = None, **changes: Any) -> Parked:
    fields = {"kind": "bug", "error_class": "TypeError", "error_message": "it broke", "content": "call"}
    return Parked(id=item_id, data=data, **{**fields, **changes})


def test_an_item_comes_back_as_it_was_parked(store: ParkingStore) -> None:
    before = time.time_ns() // 1_000_000
    given = item(
        "id-1",
        [1, "default", "orders", "v", None, [], None, 1, "id-1"],
        kind="dead-letter",
        error_class="RejectedError",
        error_message="gr\u00fc\u00dfe \U0001f600\n",
        error_code=-188,
        retry_count=3,
        topic="orders",
        content="record",
    )

    assert store.park(given) == "id-1"

    kept = store.get("id-1")
    assert kept is not None
    assert before <= kept.parked_at_ms <= time.time_ns() // 1_000_000
    assert {**_fields(kept), "parked_at_ms": 0} == _fields(given)
    assert [*store.list()] == [kept]
    assert store.count() == 1


def _fields(parked: Parked) -> dict[str, Any]:
    return {name: getattr(parked, name) for name in Parked.__slots__}


def test_what_is_not_there_is_none(store: ParkingStore) -> None:
    assert store.get("id-1") is None
    assert store.remove("id-1") is False
    assert [*store.list()] == []
    assert store.count() == 0


def test_the_same_content_is_kept_once(store: ParkingStore) -> None:
    """A worker that died before its acknowledgement parks the same message again."""
    assert {store.park(item(data={"args": [1]})) for _ in range(3)} == {"id-1"}
    assert {store.park(item(data={"args": [1]}, error_message="it broke again")) for _ in range(2)} == {"id-1"}
    assert store.count() == len([*store.list()]) == 1


def test_another_content_of_the_same_id_is_kept_beside_it(store: ParkingStore) -> None:
    first, second, third = (store.park(item(data=[number])) for number in range(3))
    assert first == "id-1"
    assert len({first, second, third}) == 3
    assert all(kept.startswith("id-1~") for kept in (second, third))
    for number, kept in enumerate((first, second, third)):
        found = store.get(kept)
        assert found is not None
        assert (found.id, found.data) == (kept, [number])
    assert store.count() == 3
    assert [store.park(item(data=[number])) for number in range(3)] == [first, second, third]
    assert store.count() == 3


def test_the_same_data_as_another_kind_of_content_is_another_content(store: ParkingStore) -> None:
    store.park(item(data=[], content="record"))
    store.park(item(data=[], content="call"))
    assert store.count() == 2


def test_an_item_is_listed_under_the_id_by_which_it_is_got_and_removed(store: ParkingStore) -> None:
    kept = {store.park(item(data=[number])) for number in range(2)}
    assert {listed.id for listed in store.list()} == kept


def test_removing_what_was_listed_removes_that_and_nothing_else(store: ParkingStore) -> None:
    store.park(item(data="keep", kind="bug"))
    store.park(item(data="take", kind="expired"))
    for listed in [*store.list()]:
        if listed.kind == "expired":  # as `kafka-delivery parked retry --all --kind expired` does
            store.remove(listed.id)
    assert [left.data for left in store.list()] == ["keep"]


def test_the_same_content_is_kept_once_also_when_its_namesake_is_gone(store: ParkingStore) -> None:
    store.park(item(data="first"))
    store.park(item(data="second"))
    store.remove("id-1")
    store.park(item(data="second"))
    assert store.count() == 1


def test_the_oldest_comes_first(store: ParkingStore, clock: SimpleNamespace) -> None:
    for number in range(12, 0, -1):
        store.park(item(f"id-{number}", number))
        clock.ms += 1
    assert [listed.data for listed in store.list()] == [*range(12, 0, -1)]
    assert [listed.parked_at_ms for listed in store.list()] == [*range(clock.ms - 12, clock.ms)]


def test_a_long_list_is_whole(store: ParkingStore, clock: SimpleNamespace) -> None:
    for number in range(250):
        clock.ms += 1
        store.park(item(f"id-{number}", number))
    assert [listed.data for listed in store.list()] == [*range(250)]


def test_what_is_taken_away_while_it_is_listed_is_left_out(store: ParkingStore, clock: SimpleNamespace) -> None:
    for number in range(150):
        clock.ms += 1
        store.park(item(f"id-{number}", number))
    listing = store.list()
    next(listing)
    store.remove("id-140")
    assert [listed.data for listed in listing] == [*range(1, 140), *range(141, 150)]


def test_what_is_removed_leaves_nothing_behind(store: ParkingStore, client: redis.Redis) -> None:
    store.park(item("id-1"))
    store.park(item("id-2"))
    assert store.remove("id-1") is True
    assert store.remove("id-1") is False
    assert store.get("id-1") is None
    assert [listed.id for listed in store.list()] == ["id-2"]
    store.remove("id-2")
    assert not client.exists(PARKED, PARKED_INDEX)


def test_what_was_parked_again_since_it_was_listed_stays(store: ParkingStore, clock: SimpleNamespace) -> None:
    """It was sent again, failed again, and only then is its first time taken away."""
    store.park(item())
    (listed,) = store.list()
    clock.ms += 1
    store.park(item())
    assert store.remove(listed.id, listed.parked_at_ms) is False
    (again,) = store.list()
    assert again.parked_at_ms == clock.ms
    assert store.remove(again.id, again.parked_at_ms) is True
    assert store.count() == 0


ZERO = {"__type__": "uuid", "__value__": {"hex": "0" * 32}}
INTERPRETED = "parking.py:_item decodes by kombu's hook, which takes a user's object of these two keys for its own"


@pytest.mark.parametrize(
    "data",
    [
        None,
        "",
        "gr\u00fc\u00dfe \U0001f600 \x00",
        "\ud800",
        [1, 1.5, True, None, [], {}],
        {"a": {"b": ["c"]}},
        b"",
        b"text",
        b"\x00\xff",
        {"args": [b"\xff", {"deep": b"text"}]},
        datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        date(2026, 1, 2),
        Decimal("9.90"),
        uuid.UUID(int=7),
        {"__type__": "x"},
        {"__type__": "x", "__value__": 1, "more": 2},
        '{"__type__": "x", "__value__": 1}',
        {"__type__": "x", "__value__": 1},
        pytest.param([ZERO], marks=pytest.mark.xfail(reason=INTERPRETED)),
        pytest.param({"__type__": "bytes", "__value__": "text"}, marks=pytest.mark.xfail(reason=INTERPRETED)),
    ],
    ids=repr,
)
def test_content_of_any_kind_comes_back_the_same(store: ParkingStore, data: Any) -> None:
    store.park(item(data=data))
    kept = store.get("id-1")
    assert kept is not None
    assert (type(kept.data), kept.data) == (type(data), data)
    assert [listed.data for listed in store.list()] == [data]


def test_one_strange_item_does_not_hide_the_others(store: ParkingStore) -> None:
    store.park(item("strange", {"__type__": "x", "__value__": 1}))
    store.park(item("plain"))
    assert {listed.id for listed in store.list()} == {"strange", "plain"}


def test_an_item_of_any_id_can_be_parked(store: ParkingStore) -> None:
    """The id of a stranger's message is whatever its JSON says."""
    store.park(item("\ud800"))
    assert store.count() == 1


def test_a_reason_of_any_text_can_be_parked_twice(store: ParkingStore) -> None:
    for _ in range(2):
        store.park(item(error_message="\ud800"))
    assert store.count() == 1


def test_the_script_is_sent_again_to_a_server_that_forgot_it(store: ParkingStore, client: redis.Redis) -> None:
    store.park(item("id-1"))
    client.script_flush()
    store.park(item("id-2"))
    assert store.count() == 2


def test_two_prefixes_are_two_stores(store: ParkingStore, client: redis.Redis) -> None:
    other = ParkingStore(client, "other:")
    other.park(item())
    assert (store.count(), other.count()) == (0, 1)
    assert set(client.keys("other:*")) == {f"other:{name}".encode() for name in (PARKED, PARKED_INDEX)}
    other.remove("id-1")


def _together(count: int, park: Callable[[int], str]) -> list[str]:
    start = threading.Barrier(count)
    kept: list[str] = []

    def run(number: int) -> None:
        start.wait()
        kept.append(park(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return kept


def test_sixteen_threads_that_park_the_same_keep_it_once(store: ParkingStore) -> None:
    assert _together(16, lambda _: store.park(item(data="same"))) == ["id-1"] * 16
    assert store.count() == 1


def test_sixteen_threads_that_park_different_contents_of_one_id_keep_all(store: ParkingStore) -> None:
    kept = _together(16, lambda number: store.park(item(data=number)))
    assert len(set(kept)) == store.count() == 16
    found = [store.get(kept_id) for kept_id in kept]
    assert sorted(one.data for one in found if one is not None) == [*range(16)]
