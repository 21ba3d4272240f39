"""What is parked is kept once, whole, and can be listed, taken and removed by the id under which it lies.

One body for Valkey and Redis. This is the last place where a record can be: what is lost here is lost.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kafka_delivery import Record
from kafka_delivery.errors import ParkingFullError
from kafka_delivery.names import PARKED, PARKED_INDEX, PARKED_ROOM
from kafka_delivery_worker import parking
from kafka_delivery_worker.parking import Parked, ParkingStore
from kafka_delivery_worker.run_lock import NotAloneError


@pytest.fixture
def client(either_redis: redis.Redis) -> redis.Redis:
    return either_redis


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
    fields: dict[str, Any] = {"kind": "bug", "error_class": "TypeError", "error_message": "it broke", "content": "call"}
    fields |= changes
    if fields["content"] == "call":
        data = {"task": "t", "id": item_id, "args": [data], "kwargs": {}}
    return Parked(id=item_id, data=data, **fields)


def held(found: Parked) -> Any:
    """The `data` that `item` was given."""
    return found.data["args"][0]


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
        assert (found.id, held(found)) == (kept, [number])
    assert store.count() == 3
    assert [store.park(item(data=[number])) for number in range(3)] == [first, second, third]
    assert store.count() == 3


def test_the_same_data_as_another_kind_of_content_is_another_content(store: ParkingStore) -> None:
    store.park(item(data=[], content="record"))
    store.park(item(data=[], content="call"))
    assert store.count() == 2


def test_many_are_kept_in_order_and_again_without_harm(store: ParkingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "PAGE", 7)
    items = [item(f"id-{number:02}", {"args": [number]}) for number in range(20)]
    assert store.park_all(items) == [one.id for one in items]
    assert store.park_all(items[5:]) == [one.id for one in items[5:]]
    assert [held(one) for one in sorted(store.list(), key=lambda one: one.id)] == [held(one) for one in items]
    assert store.park_all([]) == []


def test_many_are_written_in_few_round_trips_of_bounded_size(
    store: ParkingStore, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    park_some = ParkingStore._park_some

    def counted(self: ParkingStore, first: Parked, some: Any) -> Any:
        sizes.append(sum(len(arguments[3]) for arguments in some))
        return park_some(self, first, some)

    monkeypatch.setattr(ParkingStore, "_park_some", counted)
    monkeypatch.setattr(parking, "PAGE_BYTES", 50_000)
    store.park_all([item(f"id-{number}", "x" * 10_000) for number in range(20)] + [item("large", "x" * 90_000)])
    assert len(sizes) == 6
    assert all(size <= 50_000 for size in sizes[:-1])
    sizes.clear()
    store.park_all([item(f"small-{number}") for number in range(5_000)])
    assert len(sizes) == 5_000 // parking.PAGE


def test_what_found_no_room_is_parked_again_with_all_when_there_is(client: redis.Redis) -> None:
    """A batch whose message went back: what was parked before is kept once."""
    items = [item(f"id-{number}", "x" * 1_000) for number in range(20)]
    with pytest.raises(ParkingFullError):
        ParkingStore(client, max_bytes=10_000).park_all(items)
    store = ParkingStore(client)
    assert 0 < store.count() < 20
    assert store.park_all(items) == [one.id for one in items]
    assert store.count() == 20


def test_what_was_asked_of_celery_comes_back_and_tells_two_items_apart(store: ParkingStore) -> None:
    linked = item(data=[1], asked={"callbacks": [{"task": "t", "args": ["\u00fc"]}], "root_id": "r"})
    assert [store.park(one) for one in (linked, linked)] == ["id-1", "id-1"]
    beside = store.park(item(data=[1]))
    assert beside != "id-1"
    first, second = store.get("id-1"), store.get(beside)
    assert first is not None and first.asked == linked.asked  # noqa: PT018  # mypy
    assert second is not None and second.asked is None  # noqa: PT018


def test_the_places_of_an_item_are_where_it_is_kept(store: ParkingStore) -> None:
    store.park(item(data=[0]))
    one = item(data=[1])
    assert store.park(one) == one.places[1]
    (times,) = store.parked_at([one.places])
    assert None not in times
    assert [*store.parked_at([item("id-2").places, one.places])] == [(None, None), times]
    assert [*store.parked_at([])] == []


class TestLock:
    """What acts on items checks in the same step that it may."""

    LOCK = SimpleNamespace(key="lock", token="mine", lost=lambda: NotAloneError("lost"))  # noqa: S106  # no secret

    def test_nothing_is_removed_or_sent_without_it(self, store: ParkingStore, client: redis.Redis) -> None:
        kept = store.get(store.park(item()))
        assert kept is not None
        for holder in (None, "another's"):
            if holder:
                client.set("lock", holder)
            for act in (
                lambda: store.remove(kept.id, kept.parked_at_ms, self.LOCK),
                lambda: store.send_back(kept, [("queue", "message")], self.LOCK),
                lambda: store.park(item("another"), self.LOCK),
                lambda: store.check(self.LOCK),
            ):
                with pytest.raises(NotAloneError, match="lost"):
                    act()
        assert (store.count(), client.llen("queue")) == (1, 0)

    def test_with_it_an_item_goes_back_and_is_gone(self, store: ParkingStore, client: redis.Redis) -> None:
        client.set("lock", "mine")
        kept = store.get(store.park(item()))
        assert kept is not None
        store.check(self.LOCK)
        assert store.park(item(), self.LOCK) == kept.id
        kept = store.get(kept.id)
        assert kept is not None
        assert store.send_back(kept, [("queue", "a"), ("queue", b"\xff")], self.LOCK)
        assert client.lrange("queue", 0, -1) == [b"\xff", b"a"]
        assert (store.count(), store.usage().bytes) == (0, 0)
        assert not store.send_back(kept, [("queue", "a")], self.LOCK)
        assert client.llen("queue") == 2

    def test_what_was_parked_again_meanwhile_stays(
        self, store: ParkingStore, client: redis.Redis, clock: SimpleNamespace
    ) -> None:
        client.set("lock", "mine")
        kept = store.get(store.park(item()))
        assert kept is not None
        clock.ms += 1
        store.park(item())
        assert not store.send_back(kept, [("queue", "a")], self.LOCK)
        assert not store.remove(kept.id, kept.parked_at_ms, self.LOCK)
        assert (store.count(), client.llen("queue")) == (1, 0)

    def test_what_its_queue_does_not_take_stays(self, store: ParkingStore, client: redis.Redis) -> None:
        client.set("lock", "mine")
        client.set("queue", "no list")
        kept = store.get(store.park(item()))
        assert kept is not None
        with pytest.raises(redis.ResponseError):
            store.send_back(kept, [("queue", "a")], self.LOCK)
        assert store.count() == 1


def test_an_item_is_listed_under_the_id_by_which_it_is_got_and_removed(store: ParkingStore) -> None:
    kept = {store.park(item(data=[number])) for number in range(2)}
    assert {listed.id for listed in store.list()} == kept


def test_removing_what_was_listed_removes_that_and_nothing_else(store: ParkingStore) -> None:
    store.park(item(data="keep", kind="bug"))
    store.park(item(data="take", kind="expired"))
    for listed in [*store.list()]:
        if listed.kind == "expired":  # as `kafka-delivery parked retry --all --kind expired` does
            store.remove(listed.id)
    assert [held(left) for left in store.list()] == ["keep"]


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
    assert [held(listed) for listed in store.list()] == [*range(12, 0, -1)]
    assert [listed.parked_at_ms for listed in store.list()] == [*range(clock.ms - 12, clock.ms)]


def test_a_long_list_is_whole(store: ParkingStore, clock: SimpleNamespace) -> None:
    for number in range(250):
        clock.ms += 1
        store.park(item(f"id-{number}", number))
    assert [held(listed) for listed in store.list()] == [*range(250)]


def test_what_is_taken_away_while_it_is_listed_is_left_out(store: ParkingStore, clock: SimpleNamespace) -> None:
    for number in range(150):
        clock.ms += 1
        store.park(item(f"id-{number}", number))
    listing = store.list()
    next(listing)
    store.remove("id-140")
    assert [held(listed) for listed in listing] == [*range(1, 140), *range(141, 150)]


def test_what_is_removed_leaves_nothing_behind(store: ParkingStore, client: redis.Redis) -> None:
    store.park(item("id-1"))
    store.park(item("id-2"))
    assert store.remove("id-1") is True
    assert store.remove("id-1") is False
    assert store.get("id-1") is None
    assert [listed.id for listed in store.list()] == ["id-2"]
    store.remove("id-2")
    assert not client.exists(PARKED, PARKED_INDEX, PARKED_ROOM)


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
    assert (type(held(kept)), held(kept)) == (type(data), data)
    assert [held(listed) for listed in store.list()] == [data]


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
    assert set(client.keys("other:*")) == {f"other:{name}".encode() for name in (PARKED, PARKED_INDEX, PARKED_ROOM)}
    other.remove("id-1")


def _together(count: int, park: Callable[[int], str]) -> list[str]:
    start = threading.Barrier(count)
    kept: list[str] = []

    def run(number: int) -> None:
        start.wait(60)
        kept.append(park(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return kept


def test_sixteen_threads_that_park_the_same_keep_it_once(store: ParkingStore) -> None:
    assert _together(16, lambda _: store.park(item(data="same"))) == ["id-1"] * 16
    assert store.count() == 1


def test_sixteen_threads_that_park_different_contents_of_one_id_keep_all(store: ParkingStore) -> None:
    kept = _together(16, lambda number: store.park(item(data=number)))
    assert len(set(kept)) == store.count() == 16
    found = [store.get(kept_id) for kept_id in kept]
    assert sorted(held(one) for one in found if one is not None) == [*range(16)]


class TestRoom:
    """What is parked takes no more of Redis than it may, counted in the step that parks it."""

    ROOM = 20_000

    @pytest.fixture
    def moment(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """The process's clock, which decides when a full store is asked again."""
        hands = SimpleNamespace(s=1000.0)
        monkeypatch.setattr(parking, "monotonic", lambda: hands.s)
        return hands

    @pytest.fixture
    def bounded(self, client: redis.Redis, moment: SimpleNamespace) -> ParkingStore:
        return ParkingStore(client, max_bytes=self.ROOM)

    def fill(self, bounded: ParkingStore) -> int:
        for number in range(1000):
            try:
                bounded.park(item(f"id-{number}", "x" * 500))
            except ParkingFullError:
                return number
        raise AssertionError("it was never full")

    def test_a_full_store_refuses_and_keeps_what_it_has(self, bounded: ParkingStore) -> None:
        kept = self.fill(bounded)

        items, taken, room = bounded.usage()
        assert (items, room) == (kept, self.ROOM)
        assert self.ROOM - 2000 < taken <= self.ROOM
        assert {listed.id for listed in bounded.list()} == {f"id-{number}" for number in range(kept)}

    def test_what_it_takes_is_what_redis_says(self, bounded: ParkingStore, client: redis.Redis) -> None:
        self.fill(bounded)
        really = sum(client.memory_usage(key, samples=0) or 0 for key in (PARKED, PARKED_INDEX, PARKED_ROOM))
        assert 0.75 * really < bounded.usage().bytes < 1.25 * really

    def test_there_is_room_again_when_something_left(self, bounded: ParkingStore, moment: SimpleNamespace) -> None:
        kept = self.fill(bounded)
        bounded.remove("id-0")
        moment.s += 61
        assert bounded.park(item("late", "x" * 500)) == "late"
        assert bounded.usage().items == kept

    def test_what_is_parked_already_is_taken_also_by_a_full_store(
        self, bounded: ParkingStore, moment: SimpleNamespace, clock: SimpleNamespace
    ) -> None:
        """It was sent again and came back, before its old place was taken out: refused, it would be lost then."""
        self.fill(bounded)
        (old,) = [listed for listed in bounded.list() if listed.id == "id-3"]
        clock.ms += 1
        moment.s += 61
        assert bounded.park(item("id-3", "x" * 500, error_message="again" * 1000)) == "id-3"
        assert not bounded.remove("id-3", old.parked_at_ms)

    def test_a_full_store_is_asked_ever_more_seldom(self, bounded: ParkingStore, moment: SimpleNamespace) -> None:
        self.fill(bounded)
        asked = []
        for _ in range(400):
            before = bounded._full_until
            with pytest.raises(ParkingFullError) as refused:
                bounded.park(item("late", "x" * 500))
            assert refused.value.retry_after >= bounded._full_until - moment.s
            if bounded._full_until != before:
                asked.append(moment.s)
            moment.s += 1
        pauses = [round(after - before) for before, after in itertools.pairwise(asked)]
        assert pauses[:5] == [4, 8, 16, 32, 60]
        assert set(pauses[5:]) == {60}

    def test_threads_that_are_refused_together_are_refused_once(
        self, bounded: ParkingStore, moment: SimpleNamespace, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Else the pause of the first time would be the longest: a worker has thirty-two of them."""
        self.fill(bounded)
        moment.s += 61
        caplog.clear()
        ask, all_have_asked = bounded._park, threading.Barrier(16)

        def together(keys: Any, arguments: Any) -> Any:
            answer = ask(keys, arguments)
            all_have_asked.wait(60)
            return answer

        bounded._park = together

        def park(number: int) -> str:
            with pytest.raises(ParkingFullError):
                bounded.park(item(f"late-{number}", "x" * 500))
            return "refused"

        assert len(_together(16, park)) == 16
        assert bounded._full_until == moment.s + 2 * parking.FIRST_PAUSE_S
        assert len([line for line in caplog.records if line.name == parking.log.name]) == 1

    def test_one_that_found_room_ends_the_pause(self, bounded: ParkingStore, moment: SimpleNamespace) -> None:
        self.fill(bounded)
        moment.s += 3
        with pytest.raises(ParkingFullError):
            bounded.park(item("large", "x" * self.ROOM))
        bounded.remove("id-0")
        moment.s += 5
        bounded.park(item("small", "x" * 10))
        with pytest.raises(ParkingFullError):
            bounded.park(item("large", "x" * self.ROOM))
        assert bounded._full_until == moment.s + parking.FIRST_PAUSE_S

    def test_the_count_is_exact_whatever_comes_and_goes(self, bounded: ParkingStore, client: redis.Redis) -> None:
        for number in range(12):
            bounded.park(item(f"id-{number}", "x" * 37 * number))
        bounded.park(item("id-3", "x" * 37 * 3, error_message="a longer reason"))
        bounded.park(item("id-3", "other"))
        for number in range(0, 12, 2):
            bounded.remove(f"id-{number}")
        counted = bounded.usage()
        client.delete(PARKED_ROOM)  # so that it is counted anew
        assert bounded.usage() == counted

    def test_items_of_older_workers_count(self, bounded: ParkingStore, client: redis.Redis) -> None:
        bounded.park(item("id-0", "x" * 100))
        one = bounded.usage().bytes
        for number in range(1, 10):
            old_park(client, f"id-{number}", client.hget(PARKED, "id-0") or b"")
        assert bounded.usage() == (10, 10 * one, self.ROOM)  # estimated
        bounded.park(item("id-10", "x" * 1000))
        old_park(client, "id-11", b"x" * 5000)
        assert bounded.usage().bytes < 11 * one + 3000
        client.hset(PARKED_ROOM, "counted_at", int(client.time()[0]) - 61)
        assert bounded.usage().bytes > 10 * one + 6000  # counted
        client.hdel(PARKED, "id-11")
        client.zrem(PARKED_INDEX, "id-11")
        client.hset(PARKED_ROOM, "counted_at", int(client.time()[0]) - 61)
        assert bounded.usage().bytes < 11 * one + 3000

    def test_a_store_that_an_older_version_filled_is_full(self, bounded: ParkingStore, client: redis.Redis) -> None:
        for number in range(10):
            old_park(client, f"id-{number}", b"x" * 5000)
        with pytest.raises(ParkingFullError):
            bounded.park(item("late"))
        assert bounded.count() == 10

    def test_of_sixteen_threads_no_more_find_room_than_there_is(self, client: redis.Redis) -> None:
        one = ParkingStore(client)
        one.park(item("first", "x" * 500))
        room = 8 * one.usage().bytes + 50

        def park(number: int) -> str:
            try:
                return ParkingStore(client, max_bytes=room).park(item(f"id-{number}", "x" * 500))
            except ParkingFullError:
                return ""

        kept = [item_id for item_id in _together(16, park) if item_id]
        assert len(kept) == 7
        assert one.count() == 8

    def test_what_is_refused_for_want_of_room_is_not_what_redis_refuses(self, moment: SimpleNamespace) -> None:
        with redis.Redis(port=1, retry=Retry(NoBackoff(), 0)) as nobody, pytest.raises(redis.RedisError):
            ParkingStore(nobody, max_bytes=self.ROOM).park(item())


def old_park(client: redis.Redis, item_id: str, stored: bytes | str) -> None:
    """As a worker of an older version parks: it counts nothing."""
    client.hset(PARKED, item_id, stored)
    client.zadd(PARKED_INDEX, {item_id: 1})


def test_an_item_of_a_newer_version_can_be_read(store: ParkingStore, client: redis.Redis) -> None:
    store.park(item(data=["v"]))
    stored = json.loads(client.hget(PARKED, "id-1") or b"")
    client.hset(PARKED, "id-1", json.dumps(stored | {"more": 1}))
    found = store.get("id-1")
    assert found is not None
    assert held(found) == ["v"]


def test_an_item_of_an_older_version_can_be_read(store: ParkingStore, client: redis.Redis) -> None:
    store.park(item(data=["v"]))
    stored = json.loads(client.hget(PARKED, "id-1") or b"")
    client.hset(PARKED, "id-1", json.dumps({k: v for k, v in stored.items() if k not in ("size", "sha256")}))
    (found,) = store.list()
    assert (held(found), found.size) == (["v"], None)


def test_many_of_one_millisecond_are_listed_once_each(store: ParkingStore, clock: SimpleNamespace) -> None:
    for number in range(350):
        clock.ms += number == 120
        store.park(item(f"id-{number}", number))
    listed = [held(found) for found in store.list()]
    assert sorted(listed) == [*range(350)]


def test_what_is_parked_while_it_is_listed_is_left_out(store: ParkingStore, clock: SimpleNamespace) -> None:
    """Otherwise sending all again would never end while they come back."""
    for number in range(150):
        clock.ms += 1
        store.park(item(f"id-{number}", number))
    listed = []
    for found in store.list():
        listed.append(held(found))
        clock.ms += 1
        store.park(item(found.id, held(found), error_message="again"))
        assert len(listed) <= 150
    assert len(set(listed)) == len(listed)


def test_a_stretch_of_time(store: ParkingStore, clock: SimpleNamespace) -> None:
    start = clock.ms
    for number in range(5):
        store.park(item(f"id-{number}", number))
        clock.ms += 10
    assert [held(found) for found in store.list(start + 10, start + 30)] == [1, 2]
    assert [held(found) for found in store.list(since_ms=start + 31)] == [4]
    assert [held(found) for found in store.list(until_ms=start)] == []


def test_a_record_says_what_a_filter_asks(store: ParkingStore) -> None:
    record = Record("orders", b"\xff", b"k\x00", [("a", b"1"), ("a", None)], message_id="id-1")
    store.park(item(data=record.to_wire("default"), content="record", **parking.fingerprint(record.value_bytes)))
    found = store.get("id-1")
    assert found is not None
    assert (found.message_id, found.key, found.headers) == ("id-1", b"k\x00", [("a", b"1"), ("a", None)])
    assert (found.size, found.sha256) == (1, "a8100ae6aa1940d0b663bb31cd466142ebbdbd5187131b92d93818987832eb89")
