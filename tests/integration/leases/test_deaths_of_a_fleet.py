"""A death tells of a message only if another worker, which was there, lives on, or if there was no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from integration.leases.simulated import LEASE_S, LOOK_S, Fleet
from integration.leases.workers import QUEUE, message, publish, queued
from kafka_delivery import names

INNOCENT, POISON, OTHER_POISON = message("innocent"), message("poison"), message("another poison")
EIGHT = [f"w{n}" for n in range(8)]


@pytest.fixture
def fleet(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    return Fleet(client, monkeypatch)


def long_there(fleet: Fleet, *workers: str) -> None:
    for worker in workers:
        fleet.start(worker)
        fleet.passes(1)
    fleet.passes(3 * LEASE_S)


def lone_worker(fleet: Fleet) -> None:
    """A supervisor starts another, as always."""
    long_there(fleet, "a")
    assert fleet.processes[0].claim()
    fleet.kill("a")
    fleet.passes(2)
    fleet.start("a again")


def others_live_on(fleet: Fleet) -> None:
    long_there(fleet, "a", "b", "c")
    assert fleet.processes[0].claim()
    fleet.kill("a")


def others_came_later(fleet: Fleet) -> None:
    """They were not there, so that they live says nothing; but nobody else was there either."""
    lone_worker(fleet)
    fleet.start("b")


def the_host_is_gone(fleet: Fleet) -> None:
    long_there(fleet, *EIGHT)
    assert fleet.processes[3].claim()
    fleet.kill(*EIGHT)
    fleet.passes(20)
    for worker in EIGHT:
        fleet.start(worker + " again")


def the_host_is_gone_and_comes_back_late(fleet: Fleet) -> None:
    long_there(fleet, *EIGHT)
    assert fleet.processes[3].claim()
    fleet.kill(*EIGHT)
    fleet.passes(10 * LEASE_S)
    for worker in EIGHT:
        fleet.start(worker + " again")


def one_host_of_two_is_gone(fleet: Fleet) -> None:
    long_there(fleet, *EIGHT)
    assert fleet.processes[3].claim()
    fleet.kill(*EIGHT[:4])


def the_rest_of_the_fleet_died_long_before(fleet: Fleet) -> None:
    long_there(fleet, "a", "b")
    fleet.kill("b")
    fleet.passes(1.5 * LEASE_S)
    assert fleet.processes[0].claim()
    fleet.kill("a")
    fleet.start("c")


def the_rest_of_the_fleet_stopped(fleet: Fleet) -> None:
    """They have survived, and went as told."""
    long_there(fleet, "a", "b")
    assert fleet.processes[0].claim()
    fleet.kill("a")
    fleet.passes(5)
    fleet.kill("b")
    fleet.processes[1].lease._reap("b", died=False)
    fleet.start("c")


def a_worker_of_an_older_version_lives_on(fleet: Fleet) -> None:
    long_there(fleet, "a", "old")
    fleet.client.hdel(names.LEASES_BEGAN, "old")
    assert fleet.processes[0].claim()
    fleet.kill("a")


def workers_of_an_older_version_die_together(fleet: Fleet) -> None:
    long_there(fleet, "a", "b")
    assert fleet.processes[0].claim()
    fleet.kill("a", "b")
    fleet.client.delete(names.LEASES_BEGAN)
    fleet.start("c")


def it_took_another_setting_along(fleet: Fleet) -> None:
    """The lease that a worker has is its own; who looks has another."""
    fleet.start("a", 2 * LEASE_S)
    fleet.start("b", 2 * LEASE_S)
    fleet.passes(6 * LEASE_S)
    assert fleet.processes[0].claim()
    fleet.kill("a", "b")
    fleet.start("c", LEASE_S / 3)
    fleet.passes(2 * LEASE_S)


@pytest.mark.parametrize(
    ("happens", "counts"),
    [
        (lone_worker, True),
        (others_live_on, True),
        (others_came_later, True),
        (the_host_is_gone, False),
        (the_host_is_gone_and_comes_back_late, False),
        (one_host_of_two_is_gone, True),
        (the_rest_of_the_fleet_died_long_before, True),
        (the_rest_of_the_fleet_stopped, True),
        (a_worker_of_an_older_version_lives_on, True),
        (workers_of_an_older_version_die_together, False),
        (it_took_another_setting_along, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_death(fleet: Fleet, happens: Callable[[Fleet], None], counts: bool) -> None:
    publish(fleet.client, INNOCENT)
    happens(fleet)
    fleet.passes(3 * LEASE_S)
    assert queued(fleet.client) == [INNOCENT]
    assert fleet.deaths(INNOCENT) == (1 if counts else 0.1)


def restarted_at_once(fleet: Fleet, life_s: float, rounds: int, together: bool) -> int:
    """Eight workers under a supervisor; each is killed again and again, with what it holds. Return how many died."""
    died = 0
    for place in range(8):
        fleet.start(f"0-{place}")
    fleet.passes(life_s)
    for number in range(1, rounds + 1):
        for place in range(8):
            fleet.passes(0 if together else life_s / 8)
            for process in fleet.living:
                process.claim()
            fleet.kill(f"{number - 1}-{place}")
            died += 1
            if not together:
                fleet.start(f"{number}-{place}")
        if together:
            fleet.passes(1)
            for place in range(8):
                fleet.start(f"{number}-{place}")
            fleet.passes(life_s)
    return died


@pytest.mark.parametrize("together", [True, False], ids=["together", "one after the other"])
@pytest.mark.parametrize("life_s", [2.0, 5.0, 12.0])
def test_a_crash_loop_of_eight_parks_nothing(fleet: Fleet, life_s: float, together: bool) -> None:
    sent = publish(fleet.client, *(message(n) for n in range(40)))
    died = restarted_at_once(fleet, life_s, int(6 * LEASE_S / life_s), together)
    assert died >= 100
    fleet.passes(3 * LEASE_S)
    assert max(map(fleet.deaths, sent)) < 1, "nobody survived, and yet it counts"
    assert fleet.poisonous == []
    last = fleet.living[0]
    got = set(last.claim())
    last.delivers()
    assert got == set(sent), "what comes back is claimed one by one"
    assert not fleet.client.exists(names.DEATHS)


def test_killing_a_fleet_one_by_one_counts_once_for_a_message(fleet: Fleet) -> None:
    """As a rough deployment does."""
    publish(fleet.client, INNOCENT)
    long_there(fleet, *EIGHT)
    assert fleet.processes[0].claim()
    for worker in EIGHT:
        fleet.kill(worker)
        fleet.passes(1)
        fleet.start(worker + " again")
        fleet.passes(4)
    fleet.passes(2 * LEASE_S)
    assert fleet.deaths(INNOCENT) == 1


def kills_whoever_has_it(fleet: Fleet, *poison: bytes, restart_s: float, most_s: float = 40 * LEASE_S) -> None:
    """Let time go by until the poison is found out; who claims it dies, and is started again a moment later."""
    waiting: list[float] = []
    number = 0
    while set(fleet.poisonous) != set(poison) and fleet.real < most_s:
        fleet.passes(0.5)
        for process in fleet.living:
            if set(process.claim()) & set(poison):
                fleet.kill(process.name)
                waiting.append(fleet.real + restart_s)
            else:
                process.delivers()
        for _ in [at for at in waiting if at <= fleet.real]:
            waiting.pop(0)
            number += 1
            fleet.start(f"again {number}")


@pytest.mark.parametrize("restart_s", [1, 2 * LEASE_S], ids=["restarted at once", "restarted late"])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_poison_is_found_out(fleet: Fleet, workers: int, restart_s: float) -> None:
    publish(fleet.client, message("before"), POISON, message("behind"))
    long_there(fleet, *EIGHT[:workers])
    kills_whoever_has_it(fleet, POISON, restart_s=restart_s)
    assert fleet.poisonous == [POISON]
    fleet.passes(2 * LEASE_S + restart_s)
    for process in fleet.living:
        process.claim()
        process.delivers()
    assert queued(fleet.client) == []
    assert not fleet.client.exists(names.DEATHS)


def test_more_poison_than_workers_is_found_out(fleet: Fleet) -> None:
    """Each of the fleet dies with one of them, all at the same time, so that none survives any."""
    sent = publish(fleet.client, *(message(f"poison {n}") for n in range(6)))
    long_there(fleet, "a", "b")
    kills_whoever_has_it(fleet, *sent, restart_s=1, most_s=200 * LEASE_S)
    assert sorted(fleet.poisonous) == sorted(sent)


def test_what_kills_the_whole_host_each_time_is_found_out_in_the_end(fleet: Fleet) -> None:
    """Everybody dies with it, also who does not hold it; what was in the same hands is innocent."""
    publish(fleet.client, INNOCENT, POISON)
    for number in range(60):
        fleet.start(f"a{number}")
        fleet.start(f"b{number}")
        fleet.passes(2.5 * LEASE_S)
        for process in fleet.living:
            if POISON in process.claim():
                break
            process.delivers()
        fleet.kill(*(process.name for process in fleet.living))
        if fleet.poisonous:
            break
    assert fleet.poisonous == [POISON]
    assert number > 30, "a few of these deaths prove nothing"


class TestIsolation:
    @pytest.mark.parametrize(("max_deaths", "alone_from"), [(2, 1), (3, 2), (4, 3), (5, 3), (20, 3)])
    def test_it_begins_before_the_last_death(
        self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, max_deaths: int, alone_from: int
    ) -> None:
        fleet = Fleet(client, monkeypatch, max_deaths)
        publish(client, INNOCENT, POISON)
        long_there(fleet, "a", "b")
        for number in range(alone_from):
            worker = fleet.start(f"dies {number}")
            assert worker.claim() == [INNOCENT, POISON], "too early"
            fleet.kill(worker.name)
            fleet.passes(1.5 * LEASE_S)
        assert fleet.processes[0].claim() == [INNOCENT]
        fleet.processes[0].delivers()
        for number in range(alone_from, max_deaths):
            assert fleet.poisonous == []
            worker = fleet.start(f"dies {number}")
            assert worker.claim() == [POISON]
            fleet.kill(worker.name)
            fleet.passes(1.5 * LEASE_S)
        assert fleet.poisonous == [POISON]


class TestClocks:
    @pytest.mark.parametrize("wrong_s", [3_600, 86_400 * 30])
    def test_a_lease_by_a_clock_that_was_ahead_lasts_for_its_own_length(self, fleet: Fleet, wrong_s: float) -> None:
        """The failover comes between two renewals; nobody has seen the clock go back."""
        publish(fleet.client, INNOCENT)
        long_there(fleet, "a", "b")
        fleet.processes[0].claim()
        fleet.kill("a")
        fleet.client.zincrby(names.LEASES, wrong_s * 1000, "a")
        fleet.passes(LOOK_S + LEASE_S + LOOK_S)
        assert queued(fleet.client) == [INNOCENT]

    def test_a_lease_keeps_the_length_that_its_worker_gave_it(self, fleet: Fleet) -> None:
        fleet.start("short", LEASE_S / 10)
        fleet.start("long", 10 * LEASE_S)
        before = fleet.client.zscore(names.LEASES, "long")
        fleet.passes(LEASE_S)
        assert fleet.client.zscore(names.LEASES, "long") == before

    @pytest.mark.parametrize("steps", [(-3_600,), (3_600,), (-120, 120), (120, -120), (-300, 600, -600, 300)])
    def test_a_clock_that_goes_back_and_forth_takes_nothing_from_the_living(
        self, fleet: Fleet, steps: tuple[float, ...]
    ) -> None:
        publish(fleet.client, INNOCENT)
        long_there(fleet, "a", "b", "c")
        assert fleet.processes[0].claim()
        for step in steps:
            fleet.step_clock(step)
            fleet.passes(LOOK_S + 1)
        fleet.passes(3 * LEASE_S)
        assert queued(fleet.client) == []
        assert fleet.client.hlen(names.HELD + "a") == 1
        assert fleet.client.zcard(names.LEASES) == 3

    @pytest.mark.parametrize("steps", [(-3_600,), (3_600,), (-120, 120), (120, -120), (-300, 600, -600, 300)])
    def test_nor_does_it_keep_what_the_dead_held(self, fleet: Fleet, steps: tuple[float, ...]) -> None:
        publish(fleet.client, INNOCENT)
        long_there(fleet, "a", "b", "c")
        assert fleet.processes[0].claim()
        fleet.kill("a")
        for step in steps:
            fleet.step_clock(step)
            fleet.passes(LOOK_S + 1)
        fleet.passes(2 * LEASE_S + 2 * LOOK_S)
        assert queued(fleet.client) == [INNOCENT]
        assert fleet.deaths(INNOCENT) == 1, "others lived on"

    def test_what_was_put_off_by_a_clock_that_was_ahead_waits_no_longer(self, fleet: Fleet) -> None:
        """What waits for a time of its own waits for that."""
        put_off, later = publish(fleet.client, message("put off"), message("later", eta="2100-01-01T00:00:00+00:00"))
        long_there(fleet, "a", "b")
        assert fleet.processes[0].claim() == [put_off]
        fleet.processes[0].lease.put_off(next(iter(fleet.processes[0].lease.held)), 5)
        fleet.processes[0].delivers()
        fleet.step_clock(-3_600)
        fleet.passes(2 * LOOK_S)
        assert fleet.processes[0].claim() == [put_off]
        assert fleet.client.zrange(names.DELAYED + QUEUE, 0, -1) == [later]
        assert not fleet.client.hexists(names.LEASE_CLOCK, "set_back"), "it would be looked for at each renewal"

    def test_a_pause_of_its_own_length_is_kept(self, fleet: Fleet) -> None:
        (put_off,) = publish(fleet.client, message("put off"))
        long_there(fleet, "a")
        (worker,) = fleet.processes
        assert worker.claim() == [put_off]
        fleet.step_clock(-3_600)
        worker.lease.put_off(next(iter(worker.lease.held)), 60)
        worker.delivers()
        fleet.passes(2 * LOOK_S)
        assert worker.claim() == []
        fleet.passes(60)
        assert worker.claim() == [put_off]

    def test_no_worker_began_later_than_now(self, fleet: Fleet) -> None:
        """Else a clock that went back would make strangers of workers that die together."""
        publish(fleet.client, INNOCENT)
        long_there(fleet, *EIGHT)
        fleet.step_clock(-3_600)
        fleet.passes(LEASE_S)
        assert fleet.processes[0].claim()
        fleet.kill(*EIGHT)
        fleet.passes(2)
        fleet.start("again")
        fleet.passes(3 * LEASE_S)
        assert fleet.deaths(INNOCENT) == 0.1


class TestWhatIsLeft:
    def test_nothing_of_a_thousand_workers_that_came_and_went(self, fleet: Fleet) -> None:
        """A third stop, the others are killed, some with messages that are delivered later."""
        keeper = fleet.start("keeper")
        for number in range(1_000):
            worker = fleet.start(f"w{number}")
            publish(fleet.client, message(number))
            worker.claim()
            if number % 3 == 0:
                worker.lease._reap(worker.name, died=False)
            worker.alive = False
            if number % 50 == 0:
                fleet.passes(1)
        fleet.passes(4 * LEASE_S)
        while keeper.claim():
            keeper.delivers()
        assert fleet.client.zcard(names.LEASES) == fleet.client.hlen(names.LEASES_BEGAN) == 1
        assert not fleet.client.exists(names.DEATHS)
        assert 0 < fleet.client.pttl(names.LEASES_ENDED) <= 4 * LEASE_S * 1000, "by Redis's own clock"
        assert not list(fleet.client.scan_iter(names.HELD + "*"))
        fleet.client.hset(names.LEASES_BEGAN, "of an older version", "1:1")
        keeper.lease._reap("keeper", died=False)
        assert not fleet.client.exists(names.LEASES, names.LEASES_BEGAN)

    def test_graves_are_levelled_also_where_workers_die_all_the_time(self, fleet: Fleet) -> None:
        fleet.start("keeper")
        for number in range(100):
            fleet.start(f"w{number}").alive = False
            fleet.passes(LEASE_S / 2)
        assert fleet.client.hlen(names.LEASES_ENDED) < 15

    def test_what_workers_of_an_older_version_leave_behind(self, fleet: Fleet) -> None:
        """They take a lease away, and know nothing of the rest."""
        long_there(fleet, "a", "b", "c")
        fleet.kill("a", "b")
        fleet.client.zrem(names.LEASES, "a", "b")
        fleet.passes(LEASE_S)
        assert fleet.client.hkeys(names.LEASES_BEGAN) == [b"c"]

    def test_the_memory_of_deaths_is_bounded(self, fleet: Fleet) -> None:
        """Of messages that nobody settled: whoever took them away told no lease."""
        fleet.client.hset(names.DEATHS, mapping={f"digest {n}": 10 for n in range(100_000)})
        publish(fleet.client, INNOCENT)
        others_live_on(fleet)
        fleet.passes(3 * LEASE_S)
        assert fleet.client.hlen(names.DEATHS) == 1
        assert fleet.deaths(INNOCENT) == 1
