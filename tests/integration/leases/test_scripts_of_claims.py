"""What a claim takes, keeps and answers, rule by rule, where no worker would show it at once."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import pytest
import redis

from integration.leases.workers import digest, points
from kafka_delivery_worker.lease import script

GATE, LEASES, HELD, DEATHS, CIRCUIT, PROBES, WAITING, POISON = (
    "gate",
    "leases",
    "held",
    "deaths",
    "circuit",
    "probes",
    "waiting",
    "poison",
)
LEASE_MS = 60_000
"""No machine takes so long from one statement to the next."""

LAPSES_MS = 30_000
NOTHING, CLAIMED, SUSPECT, RAMP, SHUT = 0, 1, 2, 3, -1


class Answer(NamedTuple):
    status: int
    items: list[bytes]
    tags: list[bytes]
    suspected: list[int]
    next_due: int
    holding: int


def now_ms() -> int:
    return int(time.time() * 1000)


def message(name: str, *, eta: str | None = None, size: int = 0) -> str:
    shown = "null" if eta is None else f'"{eta}"'
    headers = f'{{"id": "{name}", "eta": {shown}}}'
    body = "x" * size
    return f'{{"body": "{body}", "headers": {headers}, "properties": {{"delivery_tag": "{name}"}}}}'


class Worker:
    """A worker's claims, with all their arguments."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.number = 0
        self.looks(-LAPSES_MS // 2)

    def looks(self, ago_ms: int) -> None:
        """Some worker has looked at the circuits, or goes on with it for longer than a test takes."""
        self.client.zadd("cb:workers", {"one": now_ms() - ago_ms})

    def claim(
        self,
        room: int = 10,
        size: int = 1_000_000,
        lists: tuple[str, ...] = ("q",),
        *,
        probe: str = "",
        token: str = "",
        limit: int = 100,
        ramp_ms: int = 0,
        beyond: int = 0,
        acks: tuple[str, ...] = (),
        returns: tuple[str, ...] = (),
        asides: tuple[tuple[str, str], ...] = (),
        offs: tuple[tuple[str, int], ...] = (),
        died: tuple[str, ...] = (),
        alone_from: int = 3,
        max_deaths: int = 5,
    ) -> Answer:
        self.number += 1
        keys = [GATE, LEASES, HELD, DEATHS, CIRCUIT, PROBES, WAITING, POISON]
        for name in lists:
            keys += [name, f"delayed:{name}"]
        arguments: list[str | int] = [
            "w", LEASE_MS, room, size, self.number, "", limit, ramp_ms, "cb:", probe, token, "delayed:", beyond,
            alone_from, max_deaths, len(acks), len(returns), len(asides), len(offs), len(died), *acks, *returns,
            *(part for pair in asides for part in pair), *(part for pair in offs for part in pair), *died, *lists,
        ]  # fmt: skip
        found: Any = self.client.eval(script("claim"), len(keys), *keys, *arguments)
        return Answer(*found)

    def queue(self, *items: str, name: str = "q") -> None:
        """The first of these is the next."""
        self.client.lpush(name, *items)

    def hold(self, *tags: str) -> None:
        self.client.hset(HELD, mapping={tag: message(tag.partition(":")[0]) for tag in tags})

    def killed(self, item: str, deaths: int) -> None:
        """As if so many workers had died with it."""
        self.client.hset(DEATHS, digest(item), points(deaths))

    def names(self, items: list[bytes]) -> list[str]:
        return [item.decode().rsplit('"', 2)[1] for item in items]


@pytest.fixture
def worker(redis_client: redis.Redis) -> Worker:
    return Worker(redis_client)


class TestWithoutRoom:
    @pytest.mark.parametrize(("room", "size"), [(0, 1_000), (-1, 1_000), (10, 0), (10, -1)])
    @pytest.mark.parametrize("probe", ["", "local"])
    def test_nothing_is_taken_and_no_lease_begun(self, worker: Worker, room: int, size: int, probe: str) -> None:
        worker.queue(message("a"))
        worker.hold("1.1:q")
        found = worker.claim(room, size, probe=probe, acks=("1.1:q",))
        assert (found.status, found.items, found.holding) == (NOTHING, [], 0)
        assert worker.client.exists(LEASES) == 0


class TestLease:
    def test_begins_with_the_claim(self, worker: Worker) -> None:
        worker.claim()
        assert worker.client.zscore(LEASES, "w") == pytest.approx(now_ms() + LEASE_MS, abs=LEASE_MS / 2)

    def test_does_not_begin_while_the_gate_is_shut(self, worker: Worker) -> None:
        worker.client.set(GATE, "1")
        worker.queue(message("a"))
        assert worker.claim().status == SHUT
        assert worker.client.exists(LEASES) == 0


class TestSettling:
    def test_each_message_goes_where_it_belongs(self, worker: Worker) -> None:
        worker.hold("1.1:q", "1.2:q", "1.3:q", "1.4:q", "1.5:q", "1.6:q", "1.7:q", "1.8:q", "1.9:q")
        found = worker.claim(
            0,
            acks=("1.1:q", "1.2:q"),
            returns=("1.3:q", "1.4:q"),
            asides=(("1.5:q", "orders"), ("1.6:q", "payments")),
            offs=(("1.7:q", 500_000), ("1.8:q", 900_000)),
        )
        assert found.holding == 1
        assert worker.client.hkeys(HELD) == [b"1.9:q"]
        assert worker.names(worker.client.lrange("q", 0, -1)) == ["1.4", "1.3"]  # type: ignore[arg-type]
        assert worker.client.smembers(WAITING) == {b"orders:q", b"payments:q"}
        assert worker.client.llen("waiting:orders:q") == worker.client.llen("waiting:payments:q") == 1
        due: Any = worker.client.zrange("delayed:q", 0, -1, withscores=True)
        assert [round((at - now_ms()) / 100_000) for _, at in due] == [5, 9]

    def test_what_is_lost_is_moved_nowhere(self, worker: Worker) -> None:
        worker.claim(0, returns=("1.1:q",), asides=(("1.2:q", "orders"),), offs=(("1.3:q", 10),))
        assert worker.client.exists("q", "waiting:orders:q", "delayed:q") == 0

    def test_thousands_of_acks_are_all_of_them(self, worker: Worker) -> None:
        tags = [f"1.{n}:q" for n in range(2_001)]
        worker.hold(*tags)
        assert worker.claim(0, acks=tuple(tags)).holding == 0
        worker.hold(*tags)
        assert worker.claim(0, acks=tuple(tags[:1_000])).holding == 1_001

    def test_a_full_name_of_a_list_may_hold_colons(self, worker: Worker) -> None:
        worker.hold("1.1:a:b")
        worker.claim(0, returns=("1.1:a:b",))
        assert worker.client.llen("a:b") == 1


class TestTags:
    def test_say_claim_place_and_list(self, worker: Worker) -> None:
        worker.queue(message("a"), message("b"))
        worker.queue(message("c"), name="r")
        found = worker.claim(lists=("q", "r"))
        assert found.tags == [b"1.1:q", b"1.2:q", b"1.3:r"]
        assert worker.names(found.items) == ["a", "b", "c"]
        assert worker.client.hget(HELD, "1.3:r") == message("c").encode()
        worker.queue(message("d"))
        assert worker.claim().tags == [b"2.1:q"]


class TestCluster:
    @pytest.fixture(autouse=True)
    def shut(self, worker: Worker) -> None:
        worker.client.hset(CIRCUIT, mapping={"shut": "1", "trips": 1})
        worker.queue(message("a"), message("b"))

    def test_nothing_is_taken_while_it_is_away(self, worker: Worker) -> None:
        assert worker.claim().status == SHUT
        assert worker.claim(probe="topic:orders").status == SHUT

    @pytest.mark.parametrize("ago_ms", [LAPSES_MS + 1_000, -LAPSES_MS - LEASE_MS])
    def test_one_that_nobody_looks_at_holds_up_nothing(self, worker: Worker, ago_ms: int) -> None:
        """Or all would wait for ever where claims are done and reports are not; also by a clock that was wrong."""
        worker.looks(ago_ms)
        assert worker.names(worker.claim().items) == ["a", "b"]

    def test_while_somebody_looks_it_holds(self, worker: Worker) -> None:
        worker.looks(LAPSES_MS // 2)
        assert worker.claim().status == SHUT

    @pytest.mark.parametrize(
        ("till_ms", "at_ms", "status"),
        [
            (0, -LEASE_MS, SHUT),
            (LEASE_MS, -LEASE_MS, SHUT),
            (-1, -LEASE_MS, CLAIMED),
            (2 * LEASE_MS, LEASE_MS, CLAIMED),
        ],
    )
    def test_what_a_person_holds_open_ends_in_its_own_time(
        self, worker: Worker, till_ms: int, at_ms: int, status: int
    ) -> None:
        worker.client.delete("cb:workers")
        till = till_ms and now_ms() + till_ms
        worker.client.hset(CIRCUIT, mapping={"forced": "open", "forced_till": till, "forced_at": now_ms() + at_ms})
        assert worker.claim().status == status

    def test_what_a_person_holds_closed_does_not_hold_up(self, worker: Worker) -> None:
        worker.client.delete("cb:workers")
        worker.client.hset(CIRCUIT, mapping={"forced": "closed", "forced_till": 0})
        assert worker.claim().status == CLAIMED

    def test_one_message_probes_it(self, worker: Worker) -> None:
        worker.client.zadd(PROBES, {"t": now_ms() + LEASE_MS})
        assert worker.names(worker.claim(probe="cluster", token="t").items) == ["a"]  # noqa: S106  # no secret

    def test_a_probe_that_is_over_takes_nothing(self, worker: Worker) -> None:
        assert worker.claim(probe="cluster", token="t").status == SHUT  # noqa: S106
        worker.client.zadd(PROBES, {"t": now_ms() - 1})
        assert worker.claim(probe="cluster", token="t").status == SHUT  # noqa: S106

    def test_a_process_that_is_alone_probes_by_itself(self, worker: Worker) -> None:
        assert worker.names(worker.claim(probe="local").items) == ["a"]

    @pytest.mark.parametrize(("trips", "first"), [(1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "a"), (6, "b")])
    def test_after_many_rounds_every_second_probe_is_the_newest(self, worker: Worker, trips: int, first: str) -> None:
        worker.client.hset(CIRCUIT, "trips", trips)
        worker.client.zadd(PROBES, {"t": now_ms() + LEASE_MS})
        assert worker.names(worker.claim(probe="cluster", token="t").items) == [first]  # noqa: S106

    def test_what_is_no_probe_takes_the_oldest_first(self, worker: Worker) -> None:
        worker.client.hset(CIRCUIT, mapping={"shut": "0", "trips": 4})
        assert worker.names(worker.claim().items) == ["a", "b"]

    def test_a_probe_takes_what_was_put_aside_if_nothing_else_waits(self, worker: Worker) -> None:
        worker.client.delete("q")
        worker.client.sadd(WAITING, "orders:q")
        worker.client.lpush("waiting:orders:q", message("c"), message("d"))
        worker.client.hset("cb:topic:orders:st", "shut", "1")
        worker.client.zadd(PROBES, {"t": now_ms() + LEASE_MS})
        found = worker.claim(probe="cluster", token="t")  # noqa: S106
        assert (worker.names(found.items), found.suspected) == (["c"], [-1])
        assert worker.names(worker.claim(probe="local").items) == ["d"]


class TestRamp:
    def after(self, worker: Worker, passed_ms: int) -> None:
        worker.client.hset(CIRCUIT, "ramp_at", now_ms() - passed_ms)
        worker.queue(*(message(str(n)) for n in range(200)))

    def test_after_an_outage_claims_grow_slowly(self, worker: Worker) -> None:
        self.after(worker, LEASE_MS * 5)
        found = worker.claim(150, ramp_ms=LEASE_MS * 10)
        assert 25 <= len(found.items) <= 40, "a quarter of a hundred, once half of the time is over"

    def test_what_is_held_already_counts(self, worker: Worker) -> None:
        self.after(worker, LEASE_MS * 5)
        worker.hold(*(f"0.{n}:q" for n in range(20)))
        assert 5 <= len(worker.claim(150, ramp_ms=LEASE_MS * 10).items) <= 20

    def test_what_may_be_held_besides_does_not(self, worker: Worker) -> None:
        self.after(worker, LEASE_MS * 5)
        worker.hold(*(f"0.{n}:q" for n in range(20)))
        assert 25 <= len(worker.claim(150, ramp_ms=LEASE_MS * 10, beyond=20).items) <= 40

    def test_whoever_holds_enough_waits(self, worker: Worker) -> None:
        self.after(worker, LEASE_MS * 5)
        worker.hold(*(f"0.{n}:q" for n in range(60)))
        found = worker.claim(150, ramp_ms=LEASE_MS * 10)
        assert (found.status, found.items) == (RAMP, [])

    def test_whoever_holds_nothing_takes_one_at_once(self, worker: Worker) -> None:
        self.after(worker, 0)
        assert len(worker.claim(150, ramp_ms=10**9).items) == 1

    def test_nor_does_it_wait_in_the_very_millisecond_of_the_end(self, worker: Worker) -> None:
        worker.queue(*(message(str(n)) for n in range(300)))
        for attempt in range(200):
            seconds, microseconds = worker.client.time()
            worker.client.hset(CIRCUIT, "ramp_at", int(seconds) * 1000 + int(microseconds) // 1000 + attempt % 2)
            found = worker.claim(1, ramp_ms=10**9)
            assert found.status == CLAIMED
            worker.claim(0, acks=(found.tags[0].decode(),))

    def test_it_has_an_end(self, worker: Worker) -> None:
        self.after(worker, LEASE_MS)
        assert len(worker.claim(150, ramp_ms=1_000).items) == 150

    def test_a_clock_that_was_wrong_slows_nothing(self, worker: Worker) -> None:
        self.after(worker, -LEASE_MS)
        assert len(worker.claim(150, ramp_ms=LEASE_MS * 10).items) == 150


class TestPutAside:
    @pytest.fixture(autouse=True)
    def waiting(self, worker: Worker) -> None:
        worker.client.sadd(WAITING, "orders:q")
        worker.client.lpush("waiting:orders:q", message("a"), message("b"))
        worker.queue(message("c"))

    def test_comes_first_once_its_circuit_is_closed(self, worker: Worker) -> None:
        found = worker.claim()
        assert worker.names(found.items) == ["a", "b", "c"]
        assert found.suspected == [-1, -1, 0]
        assert worker.client.smembers(WAITING) == set()

    def test_waits_while_it_is_open(self, worker: Worker) -> None:
        worker.client.hset("cb:topic:orders:st", "shut", "1")
        assert worker.names(worker.claim().items) == ["c"]
        assert worker.client.smembers(WAITING) == {b"orders:q"}

    def test_does_not_wait_where_nobody_looks(self, worker: Worker) -> None:
        worker.client.hset("cb:topic:orders:st", "shut", "1")
        worker.looks(LAPSES_MS + 1_000)
        assert worker.names(worker.claim().items) == ["a", "b", "c"]

    def test_one_probes_it(self, worker: Worker) -> None:
        worker.client.hset("cb:topic:orders:st", "shut", "1")
        found = worker.claim(probe="topic:orders")
        assert (worker.names(found.items), found.suspected) == (["a"], [-1])

    def test_a_probe_of_another_topic_takes_nothing(self, worker: Worker) -> None:
        found = worker.claim(probe="topic:payments")
        assert (found.status, found.items) == (NOTHING, [])

    def test_of_a_list_that_the_worker_does_not_serve_stays(self, worker: Worker) -> None:
        worker.queue(message("d"), name="r")
        assert worker.names(worker.claim(lists=("r",)).items) == ["d"]

    def test_one_that_killed_a_worker_is_told_as_that(self, worker: Worker) -> None:
        worker.killed(message("a"), 1)
        assert worker.claim().suspected == [1, -1, 0]

    def test_is_bounded_by_room_and_bytes(self, worker: Worker) -> None:
        assert worker.names(worker.claim(1).items) == ["a"]
        worker.client.lpush("waiting:orders:q", message("d"))
        assert worker.names(worker.claim(10, 1).items) == ["b"]
        worker.client.lpush("waiting:orders:q", message("e"))
        assert worker.names(worker.claim(10, len(message("d"))).items) == ["d"]


class TestBytes:
    def test_the_first_shows_how_large_messages_are(self, worker: Worker) -> None:
        worker.queue(*(message(str(n), size=1_000) for n in range(10)))
        found = worker.claim(10, 3_000)
        assert worker.names(found.items) == ["0", "1", "2"]
        assert worker.client.llen("q") == 7

    def test_one_is_taken_however_large_it_is(self, worker: Worker) -> None:
        worker.queue(message("a", size=5_000), message("b"))
        assert worker.names(worker.claim(10, 1).items) == ["a"]

    def test_what_fills_them_exactly_is_the_last(self, worker: Worker) -> None:
        small, large = message("a"), message("b", size=500)
        worker.queue(small, large, message("c"))
        assert worker.names(worker.claim(10, len(small) + len(large)).items) == ["a", "b"]

    def test_what_is_too_much_goes_back_in_order(self, worker: Worker) -> None:
        worker.queue(message("a"), *(message(str(n), size=1_000) for n in range(10)))
        found = worker.claim(10, 3_000)
        assert worker.names(found.items) == ["a", "0", "1", "2"][: len(found.items)]
        assert worker.client.llen("q") == 11 - len(found.items)
        left = worker.claim(20).items
        assert worker.names(found.items + left) == ["a", *(str(n) for n in range(10))]


class TestSuspects:
    def test_one_is_claimed_alone(self, worker: Worker) -> None:
        worker.killed(message("b"), 3)
        worker.queue(message("a"), message("b"), message("c"))
        found = worker.claim()
        assert (worker.names(found.items), found.status) == (["a"], CLAIMED)
        assert worker.claim().status == SUSPECT
        found = worker.claim(acks=("1.1:q",))
        assert (worker.names(found.items), found.suspected) == (["b"], [3])
        assert worker.claim().status == SUSPECT, "nothing joins it"
        assert worker.names(worker.claim(acks=("3.1:q",)).items) == ["c"]

    def test_it_is_alone_from_as_many_deaths_as_it_is_told(self, worker: Worker) -> None:
        worker.killed(message("a"), 1)
        worker.queue(message("a"), message("b"))
        assert worker.names(worker.claim(alone_from=1).items) == ["a"]

    def test_one_that_killed_twice_is_none(self, worker: Worker) -> None:
        worker.killed(message("a"), 2)
        worker.queue(message("a"), message("b"))
        found = worker.claim()
        assert (worker.names(found.items), found.suspected) == (["a", "b"], [2, 0])

    def test_one_elsewhere_keeps_nobody_from_going_on(self, worker: Worker) -> None:
        worker.killed(message("elsewhere"), 3)
        worker.killed(message("0.1"), 2)
        worker.hold("0.1:q")
        worker.queue(message("a"))
        assert worker.claim().status == CLAIMED

    def test_what_has_no_tag_is_none(self, worker: Worker) -> None:
        worker.killed(message("b"), 3)
        worker.queue("garbage", message("a"))
        found = worker.claim()
        assert (len(found.items), found.suspected) == (2, [0, 0])

    def test_one_of_a_later_list_goes_before_what_comes_first(self, worker: Worker) -> None:
        worker.killed(message("b"), 3)
        worker.queue(message("a"))
        worker.queue(message("b"), message("c"), name="r")
        found = worker.claim(lists=("q", "r"))
        assert (worker.names(found.items), found.tags) == (["b"], [b"1.1:r"])

    def test_one_that_is_held_back_says_so(self, worker: Worker) -> None:
        worker.killed(message("a"), 3)
        worker.queue(message("a"))
        worker.hold("0.1:q", "0.2:q")
        assert worker.claim().status == SUSPECT

    def test_nothing_is_claimed_behind_one(self, worker: Worker) -> None:
        worker.killed(message("b"), 3)
        worker.queue(message("a", eta="2100-01-01T00:00:00+00:00"), message("b"), message("c"), message("d"))
        found = worker.claim()
        assert (worker.names(found.items), found.holding, worker.client.llen("q")) == (["b"], 1, 2)

    def test_one_that_is_due_is_claimed_alone_too(self, worker: Worker) -> None:
        worker.killed(message("b"), 3)
        worker.client.zadd("delayed:q", {message("a"): 1, message("b"): 2})
        assert worker.names(worker.claim().items) == ["a"]
        assert worker.names(worker.claim(acks=("1.1:q",)).items) == ["b"]


class TestDeadProcesses:
    """One of prefork died, and its parent lives: it says of which message."""

    def test_the_death_is_counted_and_the_message_waits_longer_each_time(self, worker: Worker) -> None:
        for deaths, pause_s in ((1, 2), (2, 4), (3, 8), (4, 16), (5, 32), (6, 60), (7, 60)):
            worker.hold("1.1:q", "1.2:q")
            found = worker.claim(0, died=("1.1:q",), max_deaths=8)
            assert found.holding == 1
            assert worker.client.hget(DEATHS, digest(message("1.1"))) == str(points(deaths)).encode()
            assert worker.client.zscore("delayed:q", message("1.1")) == pytest.approx(
                now_ms() + 1_000 * pause_s, abs=900
            )
        assert worker.client.exists("q", POISON) == 0

    def test_the_last_death_makes_it_poison(self, worker: Worker) -> None:
        worker.killed(message("1.1"), 2)
        worker.hold("1.1:q")
        assert worker.claim(0, died=("1.1:q",), max_deaths=3).holding == 0
        assert worker.client.lrange(POISON, 0, -1) == [f"q\n{message('1.1')}".encode()]
        assert worker.client.exists("delayed:q", DEATHS) == 0

    def test_it_is_told_again_in_vain(self, worker: Worker) -> None:
        worker.hold("1.1:q")
        for _ in range(2):
            worker.claim(0, died=("1.1:q", "9.9:q"))
        assert worker.client.hvals(DEATHS) == [str(points(1)).encode()]
        assert worker.client.zcard("delayed:q") == 1

    def test_a_long_message_is_known_by_its_ends(self, worker: Worker) -> None:
        """However long it is, and also where all but its ids is the same."""
        twins = [message("a", size=100_000), message("b", size=100_000)]
        worker.client.hset(HELD, mapping={f"1.{n}:q": item for n, item in enumerate(twins)})
        worker.claim(0, died=("1.0:q",))
        worker.queue(*reversed(twins))
        assert worker.claim(size=10**7).suspected == [0, 1]


class TestForgotten:
    @pytest.fixture(autouse=True)
    def killed(self, worker: Worker) -> None:
        for name in ("1.1", "1.2", "1.3", "1.4"):
            worker.killed(message(name), 1)
        worker.hold("1.1:q", "1.2:q", "1.3:q", "1.4:q")

    def remembered(self, worker: Worker) -> set[str]:
        found: Any = worker.client.hkeys(DEATHS)
        return {name for name in ("1.1", "1.2", "1.3", "1.4") if digest(message(name)).encode() in found}

    def test_what_is_settled_is_forgotten_and_what_goes_back_is_not(self, worker: Worker) -> None:
        asides, offs = (("1.3:q", "orders"),), (("1.4:q", 1_000),)
        worker.claim(0, acks=("1.1:q", "9.9:q"), returns=("1.2:q",), asides=asides, offs=offs)
        assert self.remembered(worker) == {"1.2", "1.3", "1.4"}

    def test_who_lost_its_lease_forgets_nothing(self, worker: Worker) -> None:
        """The message is another's by now, and may kill that one."""
        worker.client.delete(HELD)
        worker.claim(0, acks=("1.1:q",))
        assert self.remembered(worker) == {"1.1", "1.2", "1.3", "1.4"}


class TestDelayed:
    def test_what_is_due_comes_first(self, worker: Worker) -> None:
        worker.client.zadd("delayed:q", {message("a"): now_ms() - 1, message("b"): now_ms() + LEASE_MS})
        worker.queue(message("c"))
        found = worker.claim()
        assert worker.names(found.items) == ["a", "c"]
        assert found.next_due == pytest.approx(LEASE_MS, abs=LEASE_MS / 2)

    def test_nothing_that_is_delayed_is_never_due(self, worker: Worker) -> None:
        worker.queue(message("a"))
        assert worker.claim().next_due == -1

    def test_the_soonest_of_all_lists_counts(self, worker: Worker) -> None:
        for name, after in (("q", 3), ("r", 1), ("s", 2)):
            worker.client.zadd(f"delayed:{name}", {message(name): now_ms() + after * LEASE_MS})
        assert worker.claim(lists=("q", "r", "s")).next_due == pytest.approx(LEASE_MS, abs=LEASE_MS / 2)

    def test_what_is_due_and_has_no_room_is_due_before_all_others(self, worker: Worker) -> None:
        worker.client.zadd("delayed:q", {message("a"): 1, message("b"): 2})
        worker.client.zadd("delayed:r", {message("c"): now_ms() + LEASE_MS})
        assert worker.claim(1, lists=("q", "r")).next_due == 0

    def test_what_is_due_and_has_no_room_is_due_at_once(self, worker: Worker) -> None:
        worker.client.zadd("delayed:q", {message("a"): 1, message("b"): 2})
        found = worker.claim(1)
        assert (worker.names(found.items), found.next_due) == (["a"], 0)

    @pytest.mark.parametrize(("more", "taken"), [(0, ["a"]), (1, ["a", "b"])])
    def test_what_is_due_is_bounded_by_bytes(self, worker: Worker, more: int, taken: list[str]) -> None:
        worker.client.zadd("delayed:q", {message("a"): 1, message("b"): 2})
        assert worker.names(worker.claim(10, len(message("a")) + more).items) == taken
        assert worker.client.zcard("delayed:q") == 2 - len(taken)

    def test_a_thousand_are_put_aside_by_one_claim(self, worker: Worker) -> None:
        worker.queue(*(message(str(n), eta="2100-01-01T00:00:00+00:00") for n in range(1_500)))
        assert worker.claim(50).status == NOTHING
        moved = worker.client.zcard("delayed:q")
        assert 1_000 <= moved < 1_100
        worker.claim(50)
        assert worker.client.zcard("delayed:q") == 1_500

    @pytest.mark.parametrize(
        ("eta", "due_ms"),
        [
            ("2100-01-01T00:00:00+00:00", 4_102_444_800_000),
            ("2100-01-01T00:00:00", 4_102_444_800_000),
            ("2100-01-01T00:00:00Z", 4_102_444_800_000),
            ("2100-01-01 00:00:00.25+00:00", 4_102_444_800_250),
            ("2100-01-01T02:30:00+02:30", 4_102_444_800_000),
            ("2099-12-31T21:30:00-0230", 4_102_444_800_000),
            ("2100-02-28T23:59:59+00:00", 4_107_542_399_000),
            ("2100-03-01T00:00:00+00:00", 4_107_542_400_000),
            ("2096-02-29T00:00:00+00:00", 3_981_312_000_000),
            ("2400-02-29T12:34:56+00:00", 13_574_608_496_000),
            ("2100-12-31T23:59:59+00:00", 4_133_980_799_000),
            ("9998-12-31T00:00:00+00:00", 253_370_678_400_000),
        ],
    )
    def test_a_time_is_read(self, worker: Worker, eta: str, due_ms: int) -> None:
        worker.queue(message("a", eta=eta))
        assert worker.claim().items == []
        found: Any = worker.client.zrange("delayed:q", 0, -1, withscores=True)
        ((_, at),) = found
        assert at == due_ms

    @pytest.mark.parametrize(
        "eta",
        [
            "2020-01-01T00:00:00+00:00", "9999-01-01T00:00:00+00:00", "2100-00-01T00:00:00+00:00",
            "2100-13-01T00:00:00+00:00", "2100-01-00T00:00:00+00:00", "2100-01-32T00:00:00+00:00",
            "2100-02-29T00:00:00+00:00", "2097-02-29T00:00:00+00:00", "2100-04-31T00:00:00+00:00",
            "2100-01-01T24:00:00+00:00", "2100-01-01T00:60:00+00:00", "2100-01-01T00:00:60+00:00",
            "2100-01-01T00:00:00+0", "2100-01-01T00:00:00CET", "tomorrow",
        ],
    )  # fmt: skip
    def test_a_time_that_is_none_is_left_to_celery(self, worker: Worker, eta: str) -> None:
        worker.queue(message("a", eta=eta))
        assert worker.names(worker.claim().items) == ["a"]
