"""The scripts behind `status`, `release`, `trace` and `dead-letters redrive`, rule by rule.

They say whose turn it is, what goes back to its list, where a message is found, and which dead letters are done.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis

from kafka_delivery_worker import task_ids
from kafka_delivery_worker.lease import script
from kafka_delivery_worker.parked_items import Reason, of_raw, printable
from kafka_delivery_worker.redrive.done import script as redrive_script
from kafka_delivery_worker.run_lock import _script as run_lock_script

EVERYTHING = 1_000_000


def envelope(name: str, **more: Any) -> str:
    return json.dumps({"body": "x", "headers": {"id": name}, "properties": {"correlation_id": name}, **more})


def fronts(client: redis.Redis, *lists: str) -> list[str | None]:
    found: Any = client.eval(script("fronts"), len(lists), *lists, task_ids.LOOKED_AT, task_ids.LOOKS)
    return [None if text is None else task_ids.read_id(text) for text in found]


NAME = '"correlation_id"'


class TestFronts:
    def test_the_oldest_of_each_list_is_next(self, redis_client: redis.Redis) -> None:
        redis_client.lpush("a", envelope("first"), envelope("second"), envelope("third"))
        redis_client.lpush("b", envelope("other"))
        assert fronts(redis_client, "a", "b", "empty") == ["first", "other", None]

    def test_a_list_that_is_empty_hides_none(self, redis_client: redis.Redis) -> None:
        redis_client.lpush("b", envelope("other"))
        assert fronts(redis_client, "empty", "b") == [None, "other"]

    def test_no_more_leaves_redis_than_an_id_may_take(self, redis_client: redis.Redis) -> None:
        redis_client.lpush("a", f'{{{NAME}: "{"x" * 10_000}"}}')
        (text,) = redis_client.eval(script("fronts"), 1, "a", 20, 1)
        assert text == b'"' + b"x" * 19

    @pytest.mark.parametrize(
        ("item", "task_id"),
        [
            ("garbage", ""),
            ("", ""),
            (json.dumps({"headers": {"correlation_id": "mine"}, "properties": {"correlation_id": "real"}}), "real"),
            ('{"correlation_id":"compact"}', "compact"),
            ('{"correlation_id" \t\r\n:\n\n"spread"}', "spread"),
            ('{"correlation_id": "first", "x": {"correlation_id": null}}', "first"),
            ('{"correlation_id": "first", "x": "correlation_id"}', "first"),
            ('{"correlation_id": "first", "x": {"correlation_id": ""}}', ""),
            ('{"correlation_id": "a\\"b\\u00e4"}', 'a"b\u00e4'),
            ('{"correlation_id": "never closed', ""),
            ('{"correlation_id": "\x00"}', ""),
            ('"correlation_id"correlation_id": "shares a quote"', "shares a quote"),
            ('{"x": "\\"correlation_id\\": \\"quoted\\""}', ""),
            (f'{{{NAME}: "{"i" * (task_ids.LOOKED_AT - 2)}"}}', "i" * (task_ids.LOOKED_AT - 2)),
            (f'{{{NAME}: "{"i" * (task_ids.LOOKED_AT - 1)}"}}', ""),
            (f'{NAME}: "deep"' + NAME * (task_ids.LOOKS - 1), "deep"),
            (f'{NAME}: "deeper"' + NAME * task_ids.LOOKS, ""),
            (f'{{{NAME}: "\u00e4\u20ac"}}', "\u00e4\u20ac"),
        ],
    )
    def test_the_script_and_who_parks_poison_find_the_same_id(
        self, redis_client: redis.Redis, item: str, task_id: str
    ) -> None:
        redis_client.lpush("a", item)
        assert fronts(redis_client, "a") == [task_id]
        assert task_ids.id_in(item.encode()) == task_id
        poison = Reason(kind="poison", error_class="WorkerLost", error_message="m")
        parked = of_raw("q", item, poison, apart=False)[0].id
        assert parked == printable(task_id) if task_id else parked.startswith("poison-")


class TestRelease:
    @pytest.fixture(autouse=True)
    def with_redis(self, redis_client: redis.Redis) -> None:
        self.client = redis_client
        self.client.set("lock", "mine")

    def delayed(self, many: int, token: str = "mine") -> int:  # noqa: S107  # no secret
        return int(self.client.eval(script("release"), 3, "lock", "source", "list", token, many, ""))

    def aside(self, many: int, token: str = "mine") -> int:  # noqa: S107  # no secret
        keys = ("lock", "source", "list", "registry")
        return int(self.client.eval(script("release"), len(keys), *keys, token, many, "topic:list"))

    def test_the_soonest_go_back_behind_what_waits(self) -> None:
        self.client.lpush("list", "waits")
        self.client.zadd("source", {"third": 30, "first": 10, "second": 20})
        assert self.delayed(2) == 2
        assert self.client.lrange("list", 0, -1) == [b"second", b"first", b"waits"]
        assert self.client.zrange("source", 0, -1) == [b"third"]

    def test_nothing_is_left_at_the_end(self) -> None:
        self.client.zadd("source", {"only": 10})
        assert [self.delayed(5), self.delayed(5)] == [1, 0]
        assert self.client.llen("list") == 1

    def test_what_was_put_aside_goes_before_what_waits_in_order(self) -> None:
        self.client.sadd("registry", "topic:list", "other")
        self.client.lpush("list", "waits")
        self.client.lpush("source", "first", "second", "third")
        assert [self.aside(2), self.aside(2), self.aside(2)] == [2, 1, 0]
        assert self.client.lrange("list", 0, -1) == [b"waits", b"third", b"second", b"first"]

    def test_its_list_is_forgotten_when_it_is_empty_and_not_before(self) -> None:
        self.client.sadd("registry", "topic:list", "other")
        self.client.lpush("source", "first", "second")
        self.aside(1)
        assert self.client.smembers("registry") == {b"topic:list", b"other"}
        self.aside(1)
        assert self.client.smembers("registry") == {b"other"}

    @pytest.mark.parametrize("kind", ["delayed", "aside"])
    def test_another_holder_of_the_lock_moves_nothing(self, kind: str) -> None:
        self.client.sadd("registry", "topic:list")
        if kind == "delayed":
            self.client.zadd("source", {"only": 10})
        assert getattr(self, kind)(5, "other") == -1
        self.client.delete("lock")
        assert getattr(self, kind)(5) == -1
        assert self.client.exists("list") == 0
        assert self.client.scard("registry") == 1

    @pytest.mark.parametrize("kind", ["delayed", "aside"])
    def test_a_full_redis_lets_it_pass(self, kind: str) -> None:
        if kind == "delayed":
            self.client.zadd("source", {"only": 10})
        else:
            self.client.lpush("source", "only")
        limit = self.client.config_get("maxmemory")["maxmemory"]
        self.client.config_set("maxmemory", 1)
        try:
            assert getattr(self, kind)(5) == 1
        finally:
            self.client.config_set("maxmemory", str(limit))
        assert self.client.lrange("list", 0, -1) == [b"only"]


class TestRunLock:
    """The lock of an operator's command."""

    @pytest.fixture(autouse=True)
    def with_redis(self, redis_client: redis.Redis) -> None:
        self.client = redis_client

    def ask(self, what: str, token: str = "mine", ms: int = 60_000) -> list[Any]:  # noqa: S107  # no secret
        return list(self.client.eval(run_lock_script(), 1, "lock", what, token, ms))

    def test_it_is_taken_for_its_time_and_given_back(self) -> None:
        assert self.ask("take") == [1]
        assert 0 < int(self.client.pttl("lock")) <= 60_000
        assert self.ask("give back") == [1]
        assert self.client.exists("lock") == 0

    def test_who_did_not_hear_that_it_got_it_gets_it_again(self) -> None:
        self.ask("take", ms=10_000)
        assert self.ask("take") == [1]
        assert int(self.client.pttl("lock")) > 10_000

    def test_another_one_is_told_who_holds_it_and_how_long(self) -> None:
        self.ask("take")
        no, holder, left = self.ask("take", "other")
        assert (no, holder) == (0, b"mine")
        assert 0 < left <= 60_000

    def test_what_never_ends_is_told_so(self) -> None:
        self.client.set("lock", "mine")
        assert self.ask("take", "other") == [0, b"mine", -1]

    @pytest.mark.parametrize("what", ["renew", "give back"])
    def test_what_is_anothers_stays_as_it_is(self, what: str) -> None:
        self.client.set("lock", "other", px=1_000_000)
        assert self.ask(what)[:2] == [0, b"other"]
        assert int(self.client.pttl("lock")) > 60_000

    @pytest.mark.parametrize("what", ["renew", "give back"])
    def test_what_was_lost_is_not_taken_again(self, what: str) -> None:
        """Another one may have had it meanwhile."""
        assert self.ask(what) == [0, b"", -2]
        assert self.client.exists("lock") == 0

    def test_it_is_renewed_for_its_time(self) -> None:
        self.ask("take", ms=10_000)
        assert self.ask("renew") == [1]
        assert int(self.client.pttl("lock")) > 10_000

    def test_a_full_redis_lets_a_command_begin_that_makes_room(self) -> None:
        limit = self.client.config_get("maxmemory")["maxmemory"]
        self.client.config_set("maxmemory", 1)
        try:
            assert self.ask("take") == [1]
        finally:
            self.client.config_set("maxmemory", str(limit))


class TestSend:
    @pytest.fixture(autouse=True)
    def with_redis(self, redis_client: redis.Redis) -> None:
        self.client = redis_client
        self.client.set("lock", "mine")
        self.client.mset({"result": "old", "another": "old"})

    def send(self, token: str, results: list[str], **messages: str) -> int:
        keys = ["lock", *results, *messages]
        script = redrive_script("send")
        return int(self.client.eval(script, len(keys), *keys, token, len(results), *messages.values()))

    def test_messages_go_to_their_lists_and_results_go(self) -> None:
        assert self.send("mine", ["result"], one="first", two="second") == 1
        assert self.client.lrange("one", 0, -1) == [b"first"]
        assert self.client.lrange("two", 0, -1) == [b"second"]
        assert self.client.exists("result") == 0
        assert self.client.get("another") == b"old"

    def test_results_go_alone(self) -> None:
        assert self.send("mine", ["result", "another"]) == 1
        assert self.client.exists("result", "another") == 0

    def test_another_holder_of_the_lock_sends_nothing(self) -> None:
        assert self.send("other", ["result"], one="first") == 0
        assert self.client.exists("one") == 0
        assert self.client.get("result") == b"old"

    def test_what_redis_refuses_is_not_half_done(self) -> None:
        self.client.set("one", "no list")
        with pytest.raises(redis.ResponseError):
            self.send("mine", ["result"], one="first")
        assert self.client.get("result") == b"old"


class TestFloors:
    @pytest.fixture(autouse=True)
    def with_redis(self, redis_client: redis.Redis) -> None:
        self.client = redis_client
        self.client.set("lock", "mine")
        self.client.mset({"old": "bits", "kept": "bits"})

    def note(self, token: str, *fields: Any, dropped: tuple[str, ...] = ()) -> int:
        keys = ["lock", "floors", *dropped]
        return int(self.client.eval(redrive_script("floors"), len(keys), *keys, token, *fields))

    def test_floors_are_noted_and_bitmaps_dropped(self) -> None:
        assert self.note("mine", "0", 5, "1", 6, dropped=("old",)) == 1
        assert self.client.hgetall("floors") == {b"0": b"5", b"1": b"6"}
        assert self.client.exists("old") == 0
        assert self.client.get("kept") == b"bits"

    def test_another_holder_of_the_lock_notes_nothing(self) -> None:
        assert self.note("other", "0", 5, dropped=("old",)) == 0
        assert self.client.exists("floors") == 0
        assert self.client.get("old") == b"bits"


class TestFind:
    BATCH = '{"task": "kafka_delivery.send_many", "body": "%s"}'

    @pytest.fixture(autouse=True)
    def with_redis(self, redis_client: redis.Redis) -> None:
        self.client = redis_client

    def find(
        self, kind: str, at: str = "0", size: int = EVERYTHING, texts: tuple[str, ...] = ("needle",), *others: str
    ) -> tuple[str, list[bytes], int, int]:
        arguments: tuple[str | int, ...] = (kind, at, size, len(texts), *texts, *others)
        goes_on, found, there, looked = self.client.eval(script("find"), 1, "key", *arguments)
        return goes_on.decode(), found, there, looked

    def test_in_a_list_the_place_counts_what_is_served_before(self) -> None:
        self.client.lpush("key", "needle oldest", "hay", "needle newest")
        found = self.find("list")
        assert found == ("", [2, b"needle newest", 0, b"needle oldest"], 3, 3)

    def test_in_a_delayed_set_the_place_is_when_it_is_due(self) -> None:
        self.client.zadd("key", {"needle": 7, "hay": 8, "needles": 9})
        assert self.find("zset") == ("", [b"9", b"needles", b"7", b"needle"], 3, 3)

    def test_in_a_hash_the_place_is_the_field(self) -> None:
        self.client.hset("key", mapping={"tag-1": "hay", "tag-2": "needle"})
        assert self.find("hash") == ("", [b"tag-2", b"needle"], 2, 2)

    @pytest.mark.parametrize("kind", ["list", "zset", "hash"])
    def test_nothing_is_found_in_nothing(self, kind: str) -> None:
        assert self.find(kind) == ("", [], 0, 0)

    def test_any_of_the_texts_will_do(self) -> None:
        self.client.lpush("key", "one", "two", "three")
        assert self.find("list", texts=("one", "three"))[1] == [2, b"three", 0, b"one"]

    def test_texts_are_no_patterns(self) -> None:
        self.client.lpush("key", "nxedle")
        assert self.find("list", texts=("n.edle",))[1] == []

    def test_other_texts_count_in_a_batch_only(self) -> None:
        self.client.lpush("key", "base64", self.BATCH % "base64")
        assert self.find("list", "0", EVERYTHING, ("needle",), "first", "base64")[1] == [
            1,
            (self.BATCH % "base64").encode(),
        ]
        assert self.find("list", "0", EVERYTHING, ("needle",), "base64", "last")[1] == [
            1,
            (self.BATCH % "base64").encode(),
        ]

    def test_a_batch_without_them_is_not_found(self) -> None:
        self.client.lpush("key", self.BATCH % "hay 1")
        assert self.find("list", "0", EVERYTHING, ("needle",), "base64")[1] == []

    @pytest.mark.parametrize("kind", ["list", "zset"])
    def test_it_stops_after_so_many_bytes_and_goes_on_where_it_was(self, kind: str) -> None:
        for number in range(5):
            item = f"needle {number} " + "x" * 91
            if kind == "list":
                self.client.rpush("key", item)
            else:
                self.client.zadd("key", {item: -number})
        seen: list[bytes] = []
        at, rounds = "0", 0
        while at:
            at, found, there, looked = self.find(kind, at, 150)
            assert (there, looked) in [(5, 2), (5, 1)]
            seen += [item[:8] for item in found[1::2]]
            rounds += 1
        assert seen == [b"needle %d" % number for number in range(5)]
        assert rounds == 3

    def test_one_that_is_larger_than_a_slice_is_looked_at_alone(self) -> None:
        self.client.rpush("key", "needle" + "x" * 500, "needle" + "x" * 500)
        assert self.find("list", size=10)[0] == "1"
        assert self.find("list", size=10)[3] == 1

    def test_an_empty_item_does_not_end_it(self) -> None:
        self.client.rpush("key", "", "needle")
        assert self.find("list") == ("", [0, b"needle"], 2, 2)

    def test_a_hundred_are_looked_at_by_one_command(self) -> None:
        self.client.rpush("key", *["x"] * 1_000)
        before = int(self.client.info("commandstats")["cmdstat_lrange"]["calls"]) if self._asked() else 0
        self.find("list")
        assert int(self.client.info("commandstats")["cmdstat_lrange"]["calls"]) - before == 11

    def _asked(self) -> bool:
        return "cmdstat_lrange" in self.client.info("commandstats")

    def test_a_large_hash_takes_several_rounds(self) -> None:
        self.client.hset("key", mapping={f"tag-{n}": f"needle {n} " + "x" * 100 for n in range(600)})
        seen: set[bytes] = set()
        at, rounds, looked = "0", 0, 0
        while True:
            at, found, there, some = self.find("hash", at, 2_000)
            seen.update(found[::2])
            rounds, looked = rounds + 1, looked + some
            assert there == 600
            if not at:
                break
        assert len(seen) == 600
        assert rounds > 10


class TestMark:
    @pytest.fixture(autouse=True)
    def with_redis(self, redis_client: redis.Redis) -> None:
        self.client = redis_client
        self.client.set("lock", "mine")

    def mark(self, token: str, entry: str, **bits: int) -> int:
        keys = ["lock", "audit", *bits]
        return int(self.client.eval(redrive_script("mark"), len(keys), *keys, token, entry, 100, *bits.values()))

    def test_each_bit_is_set_in_its_own_map(self) -> None:
        assert self.mark("mine", "", one=3, two=9) == 1
        assert [self.client.getbit(name, bit) for name in ("one", "two") for bit in (3, 9)] == [1, 0, 0, 1]
        assert self.client.exists("audit") == 0

    def test_an_entry_is_written_down(self) -> None:
        self.mark("mine", "entry", one=3)
        ((_, fields),) = self.client.xrange("audit")  # type: ignore[misc]
        assert fields == {b"entry": b"entry"}

    def test_another_holder_of_the_lock_marks_nothing(self) -> None:
        assert self.mark("other", "entry", one=3) == 0
        assert self.client.exists("one", "audit") == 0
