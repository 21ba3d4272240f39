"""What is done of a dead-letter topic is remembered in whatever order it was done, for as long as it must be."""

from __future__ import annotations

import json
import threading

import pytest
import redis

from kafka_delivery.names import AUDIT, REDRIVE
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker.redrive.done import SEGMENT, DoneOffsets, history, ranges
from kafka_delivery_worker.run_lock import NotAloneError, RunLock
from servers import wait_until

TOPIC = "orders-dlq"


@pytest.fixture
def client(redis_client: redis.Redis, redis_url: str) -> RedisClient:
    return RedisClient(Settings(redis_url=redis_url))


def test_marks_are_found_again(client: RedisClient) -> None:
    done = DoneOffsets(client, TOPIC)
    places = [(0, 0), (0, 7), (0, 8), (0, SEGMENT - 1), (0, SEGMENT), (0, 3 * SEGMENT + 5), (1, 1)]
    with RunLock(client, TOPIC) as lock:
        done.mark(lock, places)

    again = DoneOffsets(client, TOPIC)
    looked_at = [(0, n) for n in (0, 1, 7, 8, 9, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 5)] + [(1, 0), (1, 1)]
    assert [place for place in looked_at if again.is_done(*place)] == places
    assert again.count(0, 0, 4 * SEGMENT) == 6
    assert again.count(0, 1, SEGMENT) == 3
    assert again.count(0, 8, SEGMENT) == 2
    assert again.count(0, 9, 9) == 0
    assert again.count(2, 0, 100) == 0


def test_what_the_groups_offset_has_passed_is_dropped(client: RedisClient, redis_client: redis.Redis) -> None:
    done = DoneOffsets(client, TOPIC)
    with RunLock(client, TOPIC) as lock:
        done.begin(lock, "id", {0: 0, 1: 0}, [])
        done.mark(lock, [(0, n * SEGMENT + 1) for n in range(4)] + [(1, 1)])
        done.settle(lock, {0: 0, 1: 0}, {0: 2 * SEGMENT + 10})
    keys = {key.decode().removeprefix(REDRIVE + TOPIC) for key in redis_client.scan_iter(REDRIVE + "*")}
    assert keys == {"", ":0:2", ":0:3", ":1:0"}
    assert done.floors() == ("id", {0: 2 * SEGMENT + 10, 1: 0})
    assert redis_client.strlen(f"{REDRIVE}{TOPIC}:0:2") <= SEGMENT // 8


def test_a_partition_is_forgotten_alone(client: RedisClient) -> None:
    done = DoneOffsets(client, TOPIC)
    with RunLock(client, TOPIC) as lock:
        done.mark(lock, [(0, 1), (1, 1), (10, 1)])
        done.begin(lock, "id", {0: 0, 1: 0, 10: 0}, [1])
    again = DoneOffsets(client, TOPIC)
    assert [again.is_done(partition, 1) for partition in (0, 1, 10)] == [True, False, True]


def test_one_runs_and_the_other_is_told_who(client: RedisClient) -> None:
    """Sixteen want it at the same moment."""
    barrier = threading.Barrier(16)
    won: list[RunLock] = []
    refused: list[str] = []

    def want() -> None:
        lock = RunLock(client, TOPIC)
        barrier.wait(60)
        try:
            with lock:
                won.append(lock)
                wait_until(lambda: len(refused) == 15, 60, "the others to be refused")
        except NotAloneError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(won) == 1
    assert {str(won[0].runner) in said for said in refused} == {True}
    with RunLock(client, TOPIC):
        pass


def test_the_lock_is_renewed(client: RedisClient, redis_client: redis.Redis) -> None:
    waits: list[float | None] = []

    class Hasty(threading.Event):
        """Time that goes by at once, and is noted."""

        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(0.01)

    lock = RunLock(client, TOPIC, lock_s=60)
    lock._stop = Hasty()
    with lock:
        redis_client.pexpire(lock.key, 30_000)
        wait_until(lambda: int(redis_client.pttl(lock.key)) > 31_000, 60, "a renewal")
    assert set(waits) == {20.0}, "long before it would be over"
    assert not redis_client.exists(lock.key)


def test_who_lost_the_lock_marks_nothing(client: RedisClient, redis_client: redis.Redis) -> None:
    done = DoneOffsets(client, TOPIC)
    with RunLock(client, TOPIC, lock_s=60) as lost:
        redis_client.delete(lost.key)
        with RunLock(client, TOPIC) as other:
            with pytest.raises(NotAloneError, match="run it again"):
                done.mark(lost, [(0, 1)], {"verb": "discarded"})
            with pytest.raises(NotAloneError):
                done.check(lost)
            with pytest.raises(NotAloneError):
                done.begin(lost, "id", {0: 0}, [0])
            with pytest.raises(NotAloneError):
                done.settle(lost, {0: 0}, {0: 5})
            done.check(other)
            assert redis_client.get(other.key) == other.token.encode()
    assert not done.is_done(0, 1)
    assert done.floors() == ("", {})
    assert not redis_client.exists(AUDIT)


def test_who_lost_the_lock_does_not_release_the_others(client: RedisClient, redis_client: redis.Redis) -> None:
    with RunLock(client, TOPIC, lock_s=60) as lost:
        redis_client.set(lost.key, json.dumps({"host": "h", "pid": 1, "user": "u", "since": "s", "newer": 1}))
    assert redis_client.exists(lost.key)
    with pytest.raises(NotAloneError, match=r"u@h, process 1, since s"), RunLock(client, TOPIC):
        pass


def test_who_is_refused_is_told_who_holds_it_since_when_and_until_when(client: RedisClient) -> None:
    lock, other = RunLock(client, TOPIC, command="dead-letters redrive"), RunLock(client, TOPIC)
    with lock, pytest.raises(NotAloneError) as refused, other:
        pass
    assert str(refused.value).startswith(
        f"{TOPIC} is being worked on by {lock.runner.user}@{lock.runner.host}, process {lock.runner.pid}, "
        f"since {lock.runner.since} (kafka-delivery dead-letters redrive). Its lock ends in "
    )


@pytest.mark.parametrize("holder", [b"\xff", b"{}", b"[1]", b"7", b"text"])
def test_a_lock_that_is_none_of_ours_is_refused_without_a_name(
    client: RedisClient, redis_client: redis.Redis, holder: bytes
) -> None:
    lock = RunLock(client, TOPIC)
    redis_client.set(lock.key, holder, px=60_000)
    with pytest.raises(NotAloneError, match=r"nothing says by whom; its lock ends in [1-6][0-9]? s"), lock:
        pass
    redis_client.persist(lock.key)
    with pytest.raises(NotAloneError, match=rf"its lock ends never: delete {lock.key} in Redis"), lock:
        pass


@pytest.mark.parametrize("left_ms", [3_600_000, None])
def test_a_dead_ones_lock_ends_although_redis_clock_went_back(
    client: RedisClient, redis_client: redis.Redis, left_ms: int | None
) -> None:
    """It had ten seconds; they look like an hour by a clock that went back by an hour, or the time got lost."""
    dead = RunLock(client, TOPIC)
    redis_client.set(dead.key, dead.token, px=left_ms)
    with pytest.raises(NotAloneError, match=r"Its lock ends in 10 s unless"), RunLock(client, TOPIC):
        pass
    assert 0 < int(redis_client.pttl(dead.key)) <= 10_000


def test_marks_and_their_reason_are_one_step(client: RedisClient) -> None:
    done = DoneOffsets(client, TOPIC)
    with RunLock(client, TOPIC) as lock:
        done.mark(lock, [(0, n) for n in range(700)], {"verb": "discarded", "reason": "r"})
    done.note({"verb": "redriven"})
    newest = history(client, 10)
    assert [one["verb"] for one in newest] == ["redriven", "discarded", "discarded"]
    assert [(one["count"], one["places"]) for one in newest[:0:-1]] == [(500, "0:0-499"), (200, "0:500-699")]


@pytest.mark.parametrize(
    ("places", "short"),
    [
        ([], ""),
        ([(0, 1)], "0:1"),
        ([(0, 3), (0, 1), (0, 2), (1, 4), (1, 6), (2, 7)], "0:1-3,1:4,1:6,2:7"),
    ],
)
def test_ranges(places: list[tuple[int, int]], short: str) -> None:
    assert ranges(places) == short
