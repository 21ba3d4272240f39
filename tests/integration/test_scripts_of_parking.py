"""What the scripts of the parking store count and keep, rule by rule, where no caller would show it at once."""

from __future__ import annotations

import time
from typing import Any

import pytest
import redis

from kafka_delivery_worker.parking import _script

KEYS = ("items", "index", "room")
DIGEST = "0123456789abcdef"
OVERHEAD = 300


def size(item_id: str, item: str) -> int:
    return len(item) + 2 * len(item_id) + OVERHEAD


class Store:
    def __init__(self, client: redis.Redis) -> None:
        self.client = client

    def park(self, item_id: str, item: str = "{}", max_bytes: int = 0, digest: str = DIGEST) -> tuple[str, int]:
        found, taken = self.client.eval(_script("park"), 3, *KEYS, item_id, digest, 7, item, max_bytes)
        return found.decode(), taken

    def unpark(self, item_id: str, parked_at: str = "") -> int:
        return int(self.client.eval(_script("unpark"), 3, *KEYS, item_id, parked_at))

    def taken(self) -> list[int]:
        answer: list[int] = self.client.eval(_script("taken"), 3, *KEYS)
        return answer

    def room(self) -> dict[str, str]:
        found: Any = self.client.hgetall("room")
        return {name.decode(): value.decode() for name, value in found.items()}

    def by_an_older_worker(self, item_id: str, item: str) -> None:
        """Park without counting."""
        self.client.hset("items", item_id, item)


@pytest.fixture
def store(redis_client: redis.Redis) -> Store:
    return Store(redis_client)


class TestPark:
    def test_what_fills_the_room_exactly_fits(self, store: Store) -> None:
        assert store.park("a", "{}", size("a", "{}")) == ("a", size("a", "{}"))
        assert store.park("b", "{}", 2 * size("b", "{}") - 1) == ("", size("a", "{}"))

    def test_any_limit_is_one(self, store: Store) -> None:
        assert store.park("a", "{}", 1) == ("", 0)

    def test_another_content_under_the_same_id_lies_beside_it(self, store: Store) -> None:
        store.park("a", f'{{"digest": "{DIGEST}"}}')
        other = "fedcba9876543210"
        assert store.park("a", f'{{"digest": "{other}"}}', digest=other)[0] == "a~fedcba98"
        assert store.park("a", f'{{"digest": "{other}"}}', digest=other)[0] == "a~fedcba98"
        assert store.park("a", f'{{"digest": "{DIGEST}"}}')[0] == "a"
        assert store.taken()[0] == 2

    def test_the_same_again_takes_the_place_of_what_was_there(self, store: Store) -> None:
        store.park("a", f'{{"digest": "{DIGEST}"}}')
        longer = f'{{"digest": "{DIGEST}", "more": 1}}'
        assert store.park("a", longer, 1) == ("a", size("a", longer)), "what is parked may always be parked again"

    def test_it_is_listed_by_its_time(self, store: Store) -> None:
        store.park("a")
        assert store.client.zrange("index", 0, -1, withscores=True) == [(b"a", 7.0)]


class TestSendBack:
    def test_it_says_what_it_did(self, store: Store) -> None:
        def send_back(at: str = "5", token: str = "mine") -> int:  # noqa: S107  # no secret
            keys = (*KEYS, "lock", "queue")
            return int(store.client.eval(_script("send_back"), 5, *keys, "a", at, token, "message"))

        store.park("a", '{"parked_at_ms": 5}')
        assert send_back() == -1
        store.client.set("lock", "mine")
        assert [send_back("5", "another's"), send_back("6"), send_back(), send_back()] == [-1, 0, 1, 0]
        assert store.client.lrange("queue", 0, -1) == [b"message"]
        assert store.taken() == [0, 0]


class TestUnpark:
    def test_a_command_that_lost_its_lock_takes_nothing_away(self, store: Store) -> None:
        store.park("a")
        store.client.set("lock", "mine")

        def unpark(token: str) -> int:
            return int(store.client.eval(_script("unpark"), 4, *KEYS, "lock", "a", "", token))

        assert [unpark("another's"), unpark("mine")] == [-1, 1]

    def test_it_leaves_nothing(self, store: Store) -> None:
        store.park("a")
        store.park("b", "{  }")
        assert store.unpark("a") == 1
        assert store.taken() == [1, size("b", "{  }")]
        assert store.unpark("b") == 1
        assert store.client.exists(*KEYS) == 0

    def test_what_is_not_there_is_told(self, store: Store) -> None:
        assert store.unpark("a") == 0

    @pytest.mark.parametrize(("at", "done"), [("7", 1), ("77", 0), ("", 1)])
    def test_what_was_parked_again_stays(self, store: Store, at: str, done: int) -> None:
        store.park("a", '{"parked_at_ms": 7}')
        assert store.unpark("a", at) == done


class TestCounting:
    def test_it_is_exact(self, store: Store) -> None:
        store.park("a", "{}")
        store.park("bb", "{ }")
        both = size("a", "{}") + size("bb", "{ }")
        assert store.taken() == [2, both]
        room = store.room()
        assert (room["bytes"], room["items"], room["estimated"]) == (str(both), "2", "0")

    def test_of_items_of_older_workers_is_done_at_once_where_none_was(self, store: Store) -> None:
        store.by_an_older_worker("a", "{}")
        assert store.taken() == [1, size("a", "{}")]
        assert store.room()["items"] == "1", "so that it is not done again"
        assert abs(int(store.room()["counted_at"]) - time.time()) < 60

    def test_is_estimated_by_the_average_meanwhile(self, store: Store) -> None:
        store.park("a", "{}")
        store.by_an_older_worker("b", "{" + " " * 1_000 + "}")
        assert store.taken() == [2, 2 * size("a", "{}")]
        assert store.room()["estimated"] == "1"

    @pytest.mark.parametrize("seconds", [-3_600, 3_600], ids=["long ago", "by a clock that was wrong"])
    def test_is_done_anew_once_it_is_old(self, store: Store, seconds: int) -> None:
        store.park("a", "{}")
        store.by_an_older_worker("b", "{  }")
        store.client.hset("room", "counted_at", int(time.time()) + seconds)
        assert store.taken() == [2, size("a", "{}") + size("b", "{  }")]
        assert store.room()["estimated"] == "0"

    def test_that_was_an_estimate_is_done_anew_though_no_item_came(self, store: Store) -> None:
        store.park("a", "{}")
        store.by_an_older_worker("b", "{" + " " * 1_000 + "}")
        store.taken()
        store.client.hset("room", "counted_at", int(time.time()) - 3_600)
        assert store.taken() == [2, size("a", "{}") + size("b", "{" + " " * 1_000 + "}")]
        assert store.room()["estimated"] == "0"

    def test_is_never_below_nothing(self, store: Store) -> None:
        store.park("a", "{}")
        store.park("b", "{}")
        store.client.hset("room", "bytes", 1)
        store.unpark("a")
        assert store.room()["bytes"] == "0"
