"""The rules of leases, one by one, against real servers: what is claimed, what is settled, what is returned and when.

Whatever is refused, repeated, raced or interrupted: a message is in a list, in a delayed set, in a worker's hands or in
the parking store, and in one of them only.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError
from redis.retry import Retry

from kafka_delivery import names
from kafka_delivery_worker.lease import CLAIM_BYTES, Lease, Settling, script
from kafka_delivery_worker.parking import ParkingStore
from servers import AnyRedis, wait_until

QUEUE = "kafka-delivery"
OTHER = "kafka-delivery-dlq"
NOTHING, CLAIMED, SUSPECT, RAMP, SHUT = 0, 1, 2, 3, -1

NOTHING_TO_SETTLE = Settling.nothing()

RELEASED = -1

DEATHS = 5
"""What a message may cause by default before it is parked."""


@pytest.fixture(params=["wheel", pytest.param("redis-server", marks=pytest.mark.real)])
def client(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    """An empty Valkey, and an empty Redis."""
    if request.param == "wheel":
        yield request.getfixturevalue("redis_client")
        return
    with redis.Redis.from_url(request.getfixturevalue("real_redis").url, socket_timeout=5) as client:
        client.flushall()
        yield client


class Answer(NamedTuple):
    """What a claim answers."""

    status: int
    items: list[bytes]
    tags: list[bytes]
    suspected: list[int]
    next_due: int
    holding: int


class Worker:
    """A worker process as Redis sees it."""

    def __init__(self, client: redis.Redis, seconds: float = 30, prefix: str = "", max_bytes: int = 2**40) -> None:
        self.client: AnyRedis = client
        self.lease = Lease(lambda: client, seconds, prefix, max_bytes)

    def claim(
        self,
        room: int = 500,
        lists: tuple[str, ...] = (QUEUE,),
        acks: Sequence[bytes] = (),
        returns: Sequence[bytes] = (),
    ) -> Answer:
        settling = Settling([*acks], [*returns], [], [])  # type: ignore[list-item]
        arguments = self.lease.claim_arguments(room, list(lists), settling)
        answer = Answer(*self.client.eval(script("claim"), *arguments))
        self.lease.claimed([tag.decode() for tag in answer.tags], answer.items)
        return answer

    @property
    def holds(self) -> list[bytes]:
        """Of its messages, in the order in which they were claimed."""
        held = self.client.hgetall(self.lease.held_key)
        return [held[tag] for tag in sorted(held, key=lambda t: [int(n) for n in t.partition(b":")[0].split(b".")])]

    def dies(self) -> None:
        """Its lease is over, and others have been renewing theirs all the time."""
        self.client.zadd(self.lease.leases, {self.lease.owner: now(self.client) - 1})

    def reaps(self, dead: Worker) -> tuple[int, int]:
        return self.lease._reap(dead.lease.owner, died=True)


def now(client: redis.Redis) -> int:
    seconds, microseconds = client.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def message(name: Any, *, eta: str | None = None, size: int = 0, **more: Any) -> bytes:
    """An envelope as Celery writes it."""
    headers = {
        "lang": "py",
        "task": "kafka_delivery.send",
        "id": str(name),
        "eta": eta,
        "expires": None,
    }
    return json.dumps(
        {
            "body": "x" * size,
            "content-type": "application/json",
            "headers": {**headers, "retries": 0, "argsrepr": "('topic', 3 bytes)", "kwargsrepr": "{}", **more},
            "properties": {"correlation_id": str(name), "delivery_info": {}, "delivery_tag": f"tag of {name}"},
        }
    ).encode()


def publish(client: redis.Redis, *messages: bytes, queue: str = QUEUE) -> list[bytes]:
    client.lpush(queue, *messages)
    return list(messages)


def queued(client: AnyRedis, queue: str = QUEUE) -> list[bytes]:
    """What waits in a list, the next one first."""
    return list(reversed(client.lrange(queue, 0, -1)))


def delayed(client: AnyRedis, queue: str = QUEUE) -> list[bytes]:
    return list(client.zrange(names.DELAYED + queue, 0, -1))


def ends(client: redis.Redis, owner: str) -> float:
    """When a lease is over, in milliseconds."""
    score = client.zscore(names.LEASES, owner)
    assert score is not None
    return score


def delayed_pass(client: redis.Redis, ms: int) -> None:
    """For what is delayed, so much time goes by."""
    for item in delayed(client):
        client.zincrby(names.DELAYED + QUEUE, -ms, item)


def in_future(seconds: float, zone: timezone = UTC) -> datetime:
    return datetime.now(zone) + timedelta(seconds=seconds)


class TestWhatIsClaimed:
    def test_the_oldest_come_first_and_lists_in_the_order_in_which_they_are_named(self, client: redis.Redis) -> None:
        here = publish(client, *(message(n) for n in range(3)))
        there = publish(client, *(message(f"other {n}") for n in range(3)), queue=OTHER)
        worker = Worker(client)

        assert worker.claim(4, (OTHER, QUEUE)).items == [*there, here[0]]
        assert worker.claim(4, (QUEUE, OTHER)).items == here[1:]
        assert worker.claim(4, (QUEUE, OTHER)) == (NOTHING, [], [], [], -1, 6)

    def test_what_is_claimed_is_held_in_the_same_step_under_the_list_it_came_from(self, client: redis.Redis) -> None:
        here, there = publish(client, message(1), message(2)), publish(client, message(3), queue=OTHER)
        worker = Worker(client)
        before = now(client)
        answer = worker.claim(5, (QUEUE, OTHER))
        after = now(client)
        assert client.hgetall(worker.lease.held_key) == dict(zip(answer.tags, here + there, strict=True))
        assert [tag.partition(b":")[2].decode() for tag in answer.tags] == [QUEUE, QUEUE, OTHER]
        assert client.llen(QUEUE) == client.llen(OTHER) == 0
        assert before + 30_000 <= ends(client, worker.lease.owner) <= after + 30_000

    def test_no_more_than_there_is_room_for(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(120)))
        worker = Worker(client)
        assert worker.claim(0) == (NOTHING, [], [], [], -1, 0)
        assert worker.claim(1).items == sent[:1]
        assert worker.claim(77).items == sent[1:78]
        assert queued(client) == sent[78:]

    @pytest.mark.parametrize("sizes", [[1000] * 100, [10] * 60 + [1000] * 40, [1000, 10] * 50, [50_000] * 3])
    def test_bytes_are_exceeded_by_one_message_at_most(self, client: redis.Redis, sizes: list[int]) -> None:
        sent = publish(client, *(message(n, size=size) for n, size in enumerate(sizes)))
        worker = Worker(client, max_bytes=20_000)
        items = worker.claim().items
        assert sum(map(len, items[:-1])) < 20_000 <= sum(map(len, items))
        assert items + queued(client) == sent
        assert worker.claim().items == []

    def test_bytes_that_are_due_are_bounded_too(self, client: redis.Redis) -> None:
        sent = [message(n, size=1000) for n in range(100)]
        client.zadd(names.DELAYED + QUEUE, {item: n for n, item in enumerate(sent)})
        items = Worker(client, max_bytes=20_000).claim().items
        assert sum(map(len, items[:-1])) < 20_000 <= sum(map(len, items))
        assert items + queued(client) + delayed(client) == sent

    def test_one_claim_brings_no_more_than_redis_can_spare_the_time_for(self, client: redis.Redis) -> None:
        """However much may be held: all of that in one answer would be in memory twice."""
        worker, size = Worker(client), CLAIM_BYTES // 4
        publish(client, *(message(n, size=size) for n in range(8)))
        assert 4 <= len(worker.claim().items) < 8
        assert len(worker.claim().items) > 0

    def test_what_is_settled_makes_room_for_bytes(self, client: redis.Redis) -> None:
        publish(client, *(message(n, size=1000) for n in range(20)))
        worker = Worker(client, max_bytes=5_000)
        first = worker.claim()
        for tag in first.tags:
            worker.lease.settled(tag.decode())
        assert worker.lease.room_for_bytes() == 5_000
        assert len(worker.claim(acks=first.tags).items) == len(first.items)

    def test_a_prefix_of_all_keys_is_kept(self, client: AnyRedis) -> None:
        sent = publish(client, message(1), message(2, eta=in_future(60).isoformat()), queue=f"x:{QUEUE}")
        worker = Worker(client, prefix="x:")
        assert worker.claim().items == sent[:1]
        worker.claim(0, returns=list(client.hkeys(worker.lease.held_key)))
        assert queued(client, f"x:{QUEUE}") == sent[:1]
        worker.lease.renew()
        worker.claim()
        worker.lease.stop()
        assert queued(client, f"x:{QUEUE}") == sent[:1]
        assert [key for key in client.scan_iter() if not key.startswith(b"x:")] == []


class TestWhatIsSettled:
    def test_an_ack_is_done_in_the_step_that_claims(self, client: redis.Redis) -> None:
        sent = publish(client, message(1), message(2))
        worker = Worker(client)
        first = worker.claim(1)
        assert worker.claim(1, acks=first.tags).items == sent[1:]
        assert worker.holds == sent[1:]

    def test_thousands_of_acks_fit_into_one_step(self, client: redis.Redis) -> None:
        publish(client, *(message(n) for n in range(2500)))
        worker = Worker(client)
        tags = [tag for _ in range(5) for tag in worker.claim(500).tags]
        assert worker.claim(0, acks=tags).holding == 0

    def test_a_return_goes_to_the_end_of_its_own_list(self, client: redis.Redis) -> None:
        here, there = publish(client, message(1), message(2)), publish(client, message(3), message(4), queue=OTHER)
        worker = Worker(client)
        one, other = worker.claim(1, (QUEUE,)), worker.claim(1, (OTHER,))
        worker.claim(0, returns=[*one.tags, *other.tags])
        assert queued(client) == here[::-1]
        assert queued(client, OTHER) == there[::-1]
        assert worker.holds == []

    @pytest.mark.parametrize("what", ["acks", "returns"])
    def test_settling_twice_is_settling_once(self, client: redis.Redis, what: str) -> None:
        publish(client, message(1))
        worker = Worker(client)
        tags = worker.claim(1).tags
        settled: dict[str, Any] = {what: tags}
        worker.claim(0, **settled)
        after = queued(client)
        worker.claim(0, **settled)
        worker.claim(0, acks=tags, returns=tags)
        assert queued(client) == after
        assert worker.holds == []

    def test_nothing_is_forgotten_while_redis_is_away(self, client: redis.Redis) -> None:
        publish(client, message(1), message(2))
        worker = Worker(client)
        done, back = (tag.decode() for tag in worker.claim(2).tags)
        worker.lease.settled(done)
        worker.lease.returned(back)
        worker.lease._redis = redis.Redis(port=1, socket_connect_timeout=0.1, retry=Retry(NoBackoff(), 0))
        with pytest.raises(redis.ConnectionError):
            worker.lease.flush()
        worker.lease._redis = client
        worker.lease.flush()
        assert queued(client) == [message(2)]
        assert worker.holds == []

    def test_a_worker_whose_lease_was_reaped_settles_nothing_any_more(self, client: redis.Redis) -> None:
        """It was stopped for longer than its lease, and goes on; its messages are another's by now."""
        sent = publish(client, message(1), message(2), message(3))
        stopped, other = Worker(client), Worker(client)
        stale = stopped.claim(3)
        stopped.dies()
        assert other.reaps(stopped) == (3, 0)
        assert other.claim(1).items == sent[:1]

        stopped.claim(0, acks=stale.tags[:2], returns=stale.tags[1:])

        assert other.holds == sent[:1]
        assert queued(client) == sent[1:]
        assert stopped.claim(1).items == sent[1:2]
        assert stopped.claim(0, acks=stale.tags).holding == 1  # nor what it claimed since


class TestAnswersThatWereLost:
    def test_the_next_claim_does_not_overwrite_what_it_brought(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(6)))
        worker = Worker(client)
        worker.client.eval(script("claim"), *worker.lease.claim_arguments(3, [QUEUE], NOTHING_TO_SETTLE))
        assert worker.claim(3).items == sent[3:]
        assert worker.holds == sent

    def test_it_returns_to_the_front_in_its_order(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(25)))
        worker = Worker(client)
        known = worker.claim(3)
        for _ in range(2):  # an answer, and one that came after its connection had been given up
            worker.client.eval(script("claim"), *worker.lease.claim_arguments(11, [QUEUE], NOTHING_TO_SETTLE))
        worker.lease.settled(known.tags[0].decode())
        worker.lease.reconcile()
        assert queued(client) == sent[3:]
        assert worker.holds == sent[1:3]
        assert client.zscore(names.LEASES, worker.lease.owner)

    def test_the_next_answer_tells_that_more_is_held_than_is_known(self, client: redis.Redis) -> None:
        publish(client, *(message(n) for n in range(6)))
        worker = Worker(client)
        assert worker.lease.knows(worker.claim(2).holding)
        worker.lease.settled("1.1:kafka-delivery")  # not sent yet: Redis still holds it
        assert worker.lease.knows(worker.claim(0).holding)
        worker.client.eval(script("claim"), *worker.lease.claim_arguments(2, [QUEUE], NOTHING_TO_SETTLE))
        assert not worker.lease.knows(worker.claim(2).holding)


FUTURE = {
    "+00:00": lambda: in_future(3600).isoformat(),
    "no fraction": lambda: in_future(3600).replace(microsecond=0).isoformat(),
    "milliseconds": lambda: in_future(3600).isoformat(timespec="milliseconds"),
    "Z": lambda: in_future(3600).replace(tzinfo=None).isoformat() + "Z",
    "naive": lambda: in_future(3600).replace(tzinfo=None).isoformat(),
    "blank": lambda: in_future(3600).isoformat(" "),
    "+05:30": lambda: in_future(3600, timezone(timedelta(hours=5, minutes=30))).isoformat(),
    "-0800": lambda: in_future(3600, timezone(timedelta(hours=-8))).strftime("%Y-%m-%dT%H:%M:%S%z"),
    "+14:00": lambda: in_future(3600, timezone(timedelta(hours=14))).isoformat(),
}

PAST: dict[str, Callable[[], str]] = {
    "past": lambda: in_future(-1).isoformat(),
    "+14:00": lambda: in_future(-1, timezone(timedelta(hours=14))).isoformat(),
    "-12:00": lambda: in_future(-1, timezone(timedelta(hours=-12))).isoformat(),
    "long ago": lambda: "1969-12-31T23:59:59Z",
}

NOT_UNDERSTOOD = (
    "", "never", "2999", "2999-01-01", "2999-01-01T00:00", "2999-13-01T00:00:00Z", "2999-00-01T00:00:00Z",
    "2999-02-29T00:00:00Z", "2999-04-31T00:00:00Z", "2999-01-00T00:00:00Z", "2999-01-01T24:00:00Z",
    "2999-01-01T00:60:00Z", "2999-01-01T00:00:60Z", "9999-12-31T23:59:59-14:00", "29990-01-01T00:00:00Z",
    "2999-01-01T00:00:00 Europe/Berlin", "2999-01-01T00:00:00+1", "20990101T000000Z", 'a"b', "2999-01-01T00:00:00Z" * 3,
)  # fmt: skip


class TestDelayed:
    @pytest.mark.parametrize("form", FUTURE)
    def test_a_future_one_waits_in_the_delayed_set(self, client: AnyRedis, form: str) -> None:
        late, soon = publish(client, message(1, eta=FUTURE[form]()), message(2))
        worker = Worker(client)
        answer = worker.claim()
        assert answer.items == [soon]
        assert delayed(client) == [late]
        (score,) = client.zmscore(names.DELAYED + QUEUE, [late])
        assert score == pytest.approx(now(client) + 3_600_000, abs=3000)
        assert answer.next_due == pytest.approx(3_600_000, abs=3000)

    @pytest.mark.parametrize("form", PAST)
    def test_a_past_one_is_due(self, client: redis.Redis, form: str) -> None:
        sent = publish(client, message(1, eta=PAST[form]()), message(2))
        assert Worker(client).claim().items == sent

    @pytest.mark.parametrize("eta", NOT_UNDERSTOOD)
    def test_one_that_is_not_understood_is_left_to_celery(self, client: redis.Redis, eta: str) -> None:
        """Else it would wait for ever, or for a time that Celery does not mean."""
        sent = publish(client, message(1, eta=eta), message(2))
        assert Worker(client).claim().items == sent

    def test_the_days_of_a_long_time_are_counted_right(self, client: AnyRedis) -> None:
        days = [
            datetime(y, m, d, tzinfo=UTC)
            for y in (2096, 2099, 2100, 2101, 2400)
            for m, d in ((2, 28), (3, 1), (12, 31))
        ]
        days += [datetime(2096, 2, 29, 1, 2, 3, 456000, tzinfo=UTC), datetime(2400, 2, 29, tzinfo=UTC)]
        publish(client, *(message(day, eta=day.isoformat()) for day in days))
        assert Worker(client).claim().items == []
        scores = dict(client.zrange(names.DELAYED + QUEUE, 0, -1, withscores=True))
        assert scores == {message(day, eta=day.isoformat()): day.timestamp() * 1000 for day in days}

    def test_they_come_back_when_due_in_the_order_in_which_they_are_due(self, client: redis.Redis) -> None:
        at = [in_future(seconds).isoformat() for seconds in (3600.6, 3600.2, 3600.4, 7200)]
        sent = publish(client, *(message(n, eta=eta) for n, eta in enumerate(at)))
        worker = Worker(client)
        assert worker.claim().status == NOTHING
        delayed_pass(client, 3_601_000)
        assert worker.claim().items == [sent[1], sent[2], sent[0]]
        assert delayed(client) == [sent[3]]
        assert worker.holds == [sent[1], sent[2], sent[0]]

    def test_never_early(self, client: redis.Redis) -> None:
        eta = in_future(0.3)
        publish(client, message(1, eta=eta.isoformat()))
        worker = Worker(client)
        while not worker.claim().items:
            pass
        assert now(client) / 1000 >= eta.timestamp() - 0.001

    def test_what_is_due_is_claimed_before_what_was_queued_since(self, client: redis.Redis) -> None:
        (due,) = publish(client, message("due", eta=in_future(3600).isoformat()))
        worker = Worker(client)
        assert worker.claim().items == []
        (new,) = publish(client, message("new"))
        delayed_pass(client, 3_601_000)
        assert worker.claim().items == [due, new]

    def test_each_list_has_a_set_of_its_own(self, client: redis.Redis) -> None:
        eta = in_future(60).isoformat()
        publish(client, message(1, eta=eta))
        publish(client, message(2, eta=eta), queue=OTHER)
        Worker(client).claim(5, (QUEUE, OTHER))
        assert (delayed(client), delayed(client, OTHER)) == ([message(1, eta=eta)], [message(2, eta=eta)])

    def test_a_million_of_them_do_not_hold_redis_up(self, client: redis.Redis) -> None:
        """One claim puts a thousand aside; the script would else run for seconds, in which Redis serves nobody."""
        eta = in_future(3600).isoformat()
        publish(client, *(message(n, eta=eta) for n in range(2500)), message("last"))
        worker = Worker(client)
        assert worker.claim().items == []
        assert 1000 <= client.zcard(names.DELAYED + QUEUE) < 1050
        claimed = [worker.claim().items for _ in range(2)]
        assert claimed == [[], [message("last")]]
        assert client.zcard(names.DELAYED + QUEUE) == 2500

    @pytest.mark.parametrize(
        "more",
        [
            {"argsrepr": """('"eta": "2999-01-01T00:00:00Z"',)"""},
            {"argsrepr": 'topic "eta": "2999-01-01T00:00:00+00:00", '},
            {"stamps": {"eta": "2999-01-01T00:00:00+00:00"}},
            {"x-trace": {"eta": "2999-01-01T00:00:00+00:00"}},
        ],
    )
    def test_only_celerys_own_header_says_when(self, client: redis.Redis, more: dict[str, Any]) -> None:
        sent = publish(client, message(1, **more))
        assert Worker(client).claim().items == sent

    def test_a_body_that_is_not_encoded_says_nothing_either(self, client: redis.Redis) -> None:
        body = json.dumps([["topic", {"eta": "2999-01-01T00:00:00+00:00"}], {}, {}])
        raw = json.loads(message(1)) | {"body": body}
        sent = publish(client, json.dumps(raw).encode())
        assert Worker(client).claim().items == sent


class TestPutOff:
    """What cannot be done now waits in Redis, where it takes no place in a worker."""

    def test_it_is_handed_out_again_when_its_pause_is_over_and_not_before(self, client: redis.Redis) -> None:
        sent = publish(client, message(1), message(2))
        worker = Worker(client)
        first, second = (tag.decode() for tag in worker.claim().tags)
        before = now(client)
        worker.lease.put_off(first, 0.5)
        worker.lease.put_off(second, 60)
        assert worker.lease.held == {}
        assert worker.lease.to_settle
        worker.lease.flush()
        assert (worker.holds, queued(client), delayed(client)) == ([], [], sent)
        while not (answer := worker.claim()).items:
            assert 0 < answer.next_due <= 500
        assert answer.items == sent[:1]
        assert now(client) >= before + 500
        assert delayed(client) == sent[1:]

    def test_in_the_step_of_a_claim_that_settles_others(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(4)))
        worker = Worker(client)
        done, back, off = (tag.decode() for tag in worker.claim(3).tags)
        worker.lease.settled(done)
        worker.lease.returned(back)
        worker.lease.put_off(off, 60)
        arguments = worker.lease.claim_arguments(1, [QUEUE], worker.lease.take_settled())
        assert Answer(*client.eval(script("claim"), *arguments)).items == sent[3:]
        assert (worker.holds, queued(client), delayed(client)) == (sent[3:], [sent[1]], [sent[2]])

    def test_each_list_and_prefix_has_its_own(self, client: redis.Redis) -> None:
        list_ = f"{OTHER}\x06\x163"
        client.lpush(f"our:{list_}", message(1))
        worker = Worker(client, prefix="our:")
        (tag,) = worker.claim(lists=(list_,)).tags
        worker.lease.put_off(tag.decode(), 60)
        worker.lease.flush()
        assert client.zrange(f"our:{names.DELAYED}{list_}", 0, -1) == [message(1)]
        assert worker.claim(lists=(list_,)).next_due > 50_000

    def test_nothing_is_forgotten_while_redis_is_away(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        worker = Worker(client)
        (tag,) = worker.claim().tags
        worker.lease.put_off(tag.decode(), 60)
        worker.lease._redis = redis.Redis(port=1, socket_connect_timeout=0.1, retry=Retry(NoBackoff(), 0))
        with pytest.raises(redis.ConnectionError):
            worker.lease.flush()
        worker.lease._redis = client
        worker.lease.flush()
        worker.lease.flush()
        assert (worker.holds, delayed(client)) == ([], sent)

    def test_a_worker_whose_lease_was_reaped_puts_nothing_off_any_more(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        stopped, other = Worker(client), Worker(client)
        (tag,) = stopped.claim().tags
        stopped.dies()
        assert other.reaps(stopped) == (1, 0)
        stopped.lease.put_off(tag.decode(), 60)
        stopped.lease.flush()
        assert (queued(client), delayed(client)) == (sent, [])

    def test_a_full_redis_lets_it_pass(self, client: redis.Redis, full: Callable[[], None]) -> None:
        sent = publish(client, message(1))
        worker = Worker(client)
        (tag,) = worker.claim().tags
        full()
        worker.lease.put_off(tag.decode(), 60)
        worker.lease.flush()
        assert (worker.holds, delayed(client)) == ([], sent)


class TestGate:
    def test_while_it_is_shut_nothing_is_claimed_but_everything_is_settled(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(4)))
        worker = Worker(client)
        taken = worker.claim(2)
        client.zadd(names.DELAYED + QUEUE, {message("due"): 1})
        client.set(names.GATE, 1)
        answer = worker.claim(acks=taken.tags[:1], returns=taken.tags[1:])
        assert answer == (SHUT, [], [], [], -1, 0)
        assert queued(client) == [*sent[2:], sent[1]]
        assert delayed(client) == [message("due")]
        client.delete(names.GATE)
        assert worker.claim().status == CLAIMED


def killed(client: redis.Redis, *sent: bytes, times: int, queue: str = QUEUE) -> None:
    """Let so many workers die with these messages, one after the other, starting with them in their list."""
    for _ in range(times):
        worker = Worker(client)
        while missing := set(sent) - set(worker.holds):
            assert worker.claim(lists=(queue,)).status == CLAIMED, missing
        worker.dies()
        Worker(client).reaps(worker)


class TestDeaths:
    def test_only_a_reaping_counts(self, client: redis.Redis) -> None:
        publish(client, message(1))
        for _ in range(DEATHS + 1):
            worker = Worker(client)
            tags = worker.claim().tags
            worker.claim(0, returns=tags)
            worker.claim()
            worker.lease.forget(tags[0].decode())
            worker.lease.reconcile()
            worker.claim()
            worker.lease.stop()
        assert not client.exists(names.DEATHS, names.POISON)
        assert Worker(client).claim().suspected == [0]

    def test_each_is_counted_and_told(self, client: redis.Redis) -> None:
        publish(client, message(1), message(2))
        killed(client, message(1), message(2), times=2)
        publish(client, message(3))
        assert Worker(client).claim().suspected == [2, 2, 0]
        assert 0 < client.ttl(names.DEATHS) <= 86400

    def test_a_header_of_the_callers_does_not_count_for_the_message(self, client: redis.Redis) -> None:
        """All that carry the same would be suspects together."""
        one, two = (message(n, delivery_tag="same", x={"delivery_tag": "same"}) for n in (1, 2))
        publish(client, one)
        killed(client, one, times=2)
        publish(client, two)
        assert Worker(client).claim().suspected == [2, 0]

    def test_a_suspect_is_claimed_alone_by_a_worker_that_holds_nothing_else(self, client: redis.Redis) -> None:
        first, suspect, *rest = publish(client, *(message(n) for n in range(5)))
        client.hset(names.DEATHS, "tag of 1", 3)
        worker = Worker(client)
        before = worker.claim()
        assert before.items == [first]
        assert worker.claim().status == SUSPECT
        assert queued(client) == [suspect, *rest]
        alone = worker.claim(acks=before.tags)
        assert (alone.items, alone.suspected) == ([suspect], [3])
        assert queued(client) == rest
        assert worker.claim().status == SUSPECT  # nothing joins it: an innocent one would be blamed with it
        assert queued(client) == rest
        assert worker.claim(acks=alone.tags).items == rest

    def test_of_two_suspects_one_is_claimed_at_a_time(self, client: redis.Redis) -> None:
        sent = publish(client, message(1), message(2), message(3))
        client.hset(names.DEATHS, mapping={"tag of 1": 3, "tag of 2": 4})
        worker = Worker(client)
        one = worker.claim()
        assert one.items == sent[:1]
        assert worker.claim().status == SUSPECT
        two = worker.claim(acks=one.tags)
        assert two.items == sent[1:2]
        assert worker.claim(acks=two.tags).items == sent[2:]

    def test_a_list_that_is_never_empty_does_not_keep_a_suspect_of_another_waiting(self, client: redis.Redis) -> None:
        """Nor what waits behind it: priorities come first, and there is always something in the first list."""
        behind = publish(client, message("suspect"), message("behind"), queue=OTHER)
        client.hset(names.DEATHS, "tag of suspect", 3)
        worker = Worker(client)
        got: list[bytes] = []
        tags: list[bytes] = []
        for n in range(6):
            publish(client, message(n), message(f"{n}+"))
            answer = worker.claim(4, (QUEUE, OTHER), acks=tags)
            got += answer.items
            tags = answer.tags
        assert set(behind) <= set(got)

    @pytest.mark.parametrize("busy", [False, True])
    def test_a_suspect_that_is_due_is_alone_too(self, client: redis.Redis, busy: bool) -> None:
        publish(client, message("before"))
        worker = Worker(client)
        before = worker.claim().tags
        client.hset(names.DEATHS, "tag of 1", 3)
        client.zadd(names.DELAYED + QUEUE, {message(1): 2, message(2): 3})
        if busy:
            assert worker.claim().status == SUSPECT
        alone = worker.claim(acks=before)
        assert alone.items == [message(1)]
        assert worker.claim(acks=alone.tags).items == [message(2)]

    def test_a_suspect_behind_others_waits_in_its_place(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(9)))
        client.hset(names.DEATHS, "tag of 4", 3)
        assert Worker(client).claim().items == sent[:4]
        assert queued(client) == sent[4:]

    def test_a_message_that_took_five_workers_down_is_parked_and_what_was_with_it_is_not(
        self, client: redis.Redis
    ) -> None:
        poison, innocent = message("poison"), message("innocent")
        publish(client, innocent, poison)
        killed(client, innocent, poison, times=3)
        worker = Worker(client)
        alone = worker.claim()
        assert alone.items == [innocent]
        assert worker.claim(acks=alone.tags).items == [poison]
        worker.dies()
        survivor = Worker(client)
        assert survivor.reaps(worker) == (1, 0)
        worker = Worker(client)
        assert worker.claim().items == [poison]
        worker.dies()
        assert survivor.reaps(worker) == (0, 1)
        assert client.llen(QUEUE) == 0

        counted: list[None] = []
        survivor.lease.on_parked = lambda: counted.append(None)
        survivor.lease.park_poison()

        assert len(counted) == 1
        (parked,) = ParkingStore(client).list()
        assert (parked.id, parked.kind, parked.content) == ("poison", "poison", "message")
        assert parked.data == {"queue": QUEUE, "raw": poison.decode()}
        assert client.llen(names.POISON) == 0

    def test_poison_that_is_no_text_is_parked_too(self, client: redis.Redis) -> None:
        raw = message("poison").replace(b"topic", b"\xff\xfe")
        publish(client, raw)
        killed(client, raw, times=DEATHS)
        Worker(client).lease.park_poison()
        (parked,) = ParkingStore(client).list()
        assert parked.data["raw"].encode(errors="surrogateescape") == raw

    def test_poison_is_parked_once_by_many(self, client: AnyRedis) -> None:
        publish(client, message("poison"))
        killed(client, message("poison"), times=DEATHS)
        entry = client.lindex(names.POISON, 0)
        Worker(client).lease.park_poison()
        client.rpush(names.POISON, entry)  # as it is for one that was interrupted before it could remove it
        Worker(client).lease.park_poison()
        assert ParkingStore(client).count() == 1
        assert client.llen(names.POISON) == 0


class TestReaping:
    def test_everything_returns_to_the_front_of_its_list_the_oldest_first(self, client: redis.Redis) -> None:
        here = publish(client, *(message(n) for n in range(230)))
        there = publish(client, *(message(f"other {n}") for n in range(15)), queue=OTHER)
        worker = Worker(client)
        for _ in range(12):  # past "9.", so that numbers are not sorted as text
            worker.claim(20, (QUEUE, OTHER))
        worker.dies()
        assert Worker(client).reaps(worker) == (240, 0)
        assert queued(client) == here
        assert queued(client, OTHER) == there
        assert worker.holds == []
        assert client.zscore(names.LEASES, worker.lease.owner) is None

    def test_of_a_living_worker_nothing_is_returned(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        worker = Worker(client)
        worker.claim()
        assert Worker(client).reaps(worker) == (-1, 0)
        assert worker.holds == sent

    def test_a_stopping_worker_returns_its_own_and_ends_its_lease(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(9)))
        worker = Worker(client)
        worker.lease.start()
        answers = worker.claim(4), worker.claim(3)
        worker.lease.settled(answers[0].tags[0].decode())
        worker.lease.returned(answers[1].tags[0].decode())
        worker.lease.stop()
        assert queued(client) == [*sent[1:4], *sent[5:], sent[4]]
        assert client.zscore(names.LEASES, worker.lease.owner) is None
        worker.lease.stop()
        assert client.llen(QUEUE) == 8

    def test_of_many_who_look_one_does_it(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(1000)))
        worker = Worker(client)
        for _ in range(2):
            worker.claim()
        worker.dies()
        barrier = threading.Barrier(24)
        outcomes: list[tuple[int, int]] = []

        def reap() -> None:
            with redis.Redis(port=client.get_connection_kwargs()["port"]) as own:
                own.ping()
                barrier.wait(10)
                outcomes.append(Worker(own).reaps(worker))

        threads = [threading.Thread(target=reap) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

        assert sorted(outcomes) == [(0, 0)] * 23 + [(1000, 0)]
        assert queued(client) == sent
        assert set(client.hvals(names.DEATHS)) == {b"1"}

    def test_one_that_cannot_be_returned_does_not_keep_others(self, client: redis.Redis) -> None:
        publish(client, message(1), queue=OTHER)
        sent = publish(client, message(2))
        stuck, dead, living = Worker(client), Worker(client), Worker(client)
        stuck.claim(1, (OTHER,))
        dead.claim(1, (QUEUE,))
        client.set(OTHER, "no list")
        long_renewed(client)
        client.zadd(names.LEASES, {stuck.lease.owner: 1, dead.lease.owner: 2})
        living.lease.renew()
        assert queued(client) == sent
        assert stuck.holds == [message(1)]
        client.delete(OTHER)
        living.lease.renew()
        assert queued(client, OTHER) == [message(1)]


def long_renewed(client: redis.Redis, since_ms: int = 600_000) -> None:
    """As if workers had been renewing without a gap for so long."""
    at = now(client)
    client.hset(names.LEASE_CLOCK, mapping={"beat": at, "since": at - since_ms})


def leases_pass(client: AnyRedis, ms: int) -> None:
    """For leases, and for who has been renewing them, so much time goes by."""
    for name in ("beat", "since"):
        client.hincrby(names.LEASE_CLOCK, name, -ms)
    for owner in client.zrange(names.LEASES, 0, -1):
        client.zincrby(names.LEASES, -ms, owner)


CIRCUIT = "kafka-delivery:cb:1:{default}:cluster:"
OF_TOPIC = "kafka-delivery:cb:1:{default}:topic:orders:st"


class TestCircuits:
    """What is claimed while a circuit is open, and after it; what decides is written by the circuits' own scripts."""

    def claim(self, worker: Worker, room: int = 500, limit: int = 1_000, probe: tuple[str, str] = ("", ""),
              asides: Sequence[tuple[bytes, str]] = (), lists: tuple[str, ...] = (QUEUE,),
              beyond: int = 0) -> Answer:  # fmt: skip
        settling = Settling([], [], [*asides], [])  # type: ignore[list-item]
        arguments = worker.lease.claim_arguments(room, list(lists), settling, limit, probe, beyond)
        return Answer(*worker.client.eval(script("claim"), *arguments))

    def test_while_the_clusters_is_shut_nothing_is(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        client.hset(CIRCUIT + "st", "shut", "1")
        assert self.claim(Worker(client)).status == SHUT
        assert queued(client) == sent

    def test_a_probe_is_one_message_and_needs_a_lease_that_lasts(self, client: redis.Redis) -> None:
        oldest, *rest = publish(client, *(message(n) for n in range(5)))
        client.hset(CIRCUIT + "st", "shut", "1")
        client.zadd(CIRCUIT + "p", {"over": now(client) - 1, "good": now(client) + 5_000})
        assert self.claim(Worker(client), probe=("cluster", "none")).status == SHUT
        assert self.claim(Worker(client), probe=("cluster", "over")).status == SHUT
        assert self.claim(Worker(client), probe=("cluster", "good")).items == [oldest]
        assert queued(client) == rest

    def test_after_many_rounds_the_newest_is_tried_too(self, client: redis.Redis) -> None:
        """The oldest may be of a topic that is in trouble, and hide that the cluster is well."""
        sent = publish(client, *(message(n) for n in range(5)))
        client.hset(CIRCUIT + "st", mapping={"shut": "1", "trips": "4"})
        client.zadd(CIRCUIT + "p", {"good": now(client) + 5_000})
        assert self.claim(Worker(client), probe=("cluster", "good")).items == [sent[-1]]
        client.hset(CIRCUIT + "st", "trips", "5")
        assert self.claim(Worker(client), probe=("cluster", "good")).items == [sent[0]]

    def test_after_it_claims_grow(self, client: redis.Redis) -> None:
        publish(client, *(message(n) for n in range(1_000)))
        worker = Worker(client)
        worker.lease.ramp_ms = 10_000
        held = 0
        for passed, most in ((0, 1), (1_000, 11), (2_000, 42), (5_000, 255), (9_900, 1_000)):
            began = now(client) - passed
            client.hset(CIRCUIT + "st", mapping={"shut": "0", "ramp_at": began})
            held += len(self.claim(worker).items)
            held += len(self.claim(worker).items)
            later = math.ceil(1_000 * ((now(client) - began) / worker.lease.ramp_ms) ** 2)  # if it took its time
            assert most * 0.9 <= held <= max(most, later)
        client.hset(CIRCUIT + "st", "ramp_at", now(client) - 10_000)
        assert self.claim(worker).status in (CLAIMED, NOTHING)

    def test_a_worker_that_holds_enough_for_now_is_told_to_wait(self, client: redis.Redis) -> None:
        publish(client, *(message(n) for n in range(10)))
        worker = Worker(client)
        worker.lease.ramp_ms = 100_000
        # From 10 to 14 s on it may hold two.
        client.hset(CIRCUIT + "st", mapping={"shut": "0", "ramp_at": now(client) - 10_500})
        assert len(self.claim(worker, limit=100).items) <= 2
        assert self.claim(worker, limit=100).status == RAMP

    def test_what_is_stuck_takes_no_room_of_those_that_grow(self, client: redis.Redis) -> None:
        publish(client, *(message(n) for n in range(1_000)))
        worker = Worker(client)
        assert len(worker.claim(100).items) == 100
        worker.lease.ramp_ms = 100_000
        client.hset(CIRCUIT + "st", mapping={"shut": "0", "ramp_at": now(client) - 10_500})
        assert self.claim(worker, limit=100).status == RAMP
        assert 1 <= len(self.claim(worker, limit=100, beyond=100).items) <= 2

    def test_what_is_put_aside_waits_for_its_topic_in_its_order(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(6)))
        client.hset(OF_TOPIC, "shut", "1")
        worker = Worker(client)
        first = worker.claim(4)
        self.claim(worker, 0, asides=[(tag, "orders") for tag in first.tags])
        rest = worker.claim()
        assert rest.items == sent[4:]
        self.claim(worker, 0, asides=[(tag, "orders") for tag in rest.tags])
        assert worker.claim().items == []
        assert worker.holds == []
        assert client.llen(names.WAITING + ":orders:" + QUEUE) == 6
        later = publish(client, message("later"))
        client.hset(OF_TOPIC, "shut", "0")
        released = worker.claim()
        assert released.items == sent + later
        assert released.suspected == [RELEASED] * 6 + [0], "who has not heard yet must not put them aside again"
        assert worker.claim().items == []
        assert client.scard(names.WAITING) == 0

    def test_a_probe_of_a_topic_takes_one_of_its_own(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(3)))
        others = publish(client, message("other"))
        client.hset(OF_TOPIC, "shut", "1")
        worker = Worker(client)
        claimed = worker.claim(3)
        self.claim(worker, 0, asides=[(tag, "orders") for tag in claimed.tags])
        assert self.claim(worker, probe=("topic:orders", "t")).items == sent[:1]
        assert self.claim(worker, probe=("topic:none", "t")).items == []
        assert queued(client) == others

    def test_where_only_topics_in_trouble_wait_one_of_them_is_the_clusters_probe(self, client: redis.Redis) -> None:
        """Else the cluster's circuit would wait for a record, and these for the cluster's circuit."""
        sent = publish(client, *(message(n) for n in range(3)))
        client.hset(OF_TOPIC, "shut", "1")
        worker = Worker(client)
        claimed = worker.claim(3)
        self.claim(worker, 0, asides=[(tag, "orders") for tag in claimed.tags])
        client.hset(CIRCUIT + "st", "shut", "1")
        client.zadd(CIRCUIT + "p", {"good": now(client) + 5_000})
        other = publish(client, message("other"))
        assert self.claim(worker, probe=("cluster", "good")).items == other, "what flows comes first"
        assert self.claim(worker, probe=("cluster", "good")).items == sent[:1]

    def test_who_does_not_serve_the_queue_does_not_take_what_waits_for_a_topic(self, client: redis.Redis) -> None:
        publish(client, message(1))
        worker = Worker(client)
        claimed = worker.claim()
        self.claim(worker, 0, asides=[(tag, "orders") for tag in claimed.tags])
        assert self.claim(Worker(client), lists=(OTHER,)).items == []
        assert len(self.claim(Worker(client), lists=(QUEUE, OTHER)).items) == 1

    def test_what_waited_returns_to_its_queue_if_its_worker_dies(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        worker, dead, other = Worker(client), Worker(client), Worker(client)
        claimed = worker.claim()
        self.claim(worker, 0, asides=[(tag, "orders") for tag in claimed.tags])
        assert self.claim(dead).items == sent
        dead.dies()
        assert other.reaps(dead) == (1, 0)
        assert queued(client) == sent

    def test_a_worker_that_lost_its_lease_puts_nothing_aside(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        slow, other = Worker(client), Worker(client)
        claimed = slow.claim()
        slow.dies()
        other.reaps(slow)
        self.claim(slow, 0, asides=[(tag, "orders") for tag in claimed.tags])
        assert queued(client) == sent
        assert client.llen(names.WAITING + ":orders:" + QUEUE) == 0


class TestRenewal:
    def test_it_prolongs_the_lease_and_says_whose_is_over(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        dead, living = Worker(client), Worker(client)
        dead.claim()
        long_renewed(client)
        assert living.lease.renew().over == 0
        client.zadd(names.LEASES, {dead.lease.owner: now(client) - 1, living.lease.owner: now(client) - 1})
        before = now(client)
        assert living.lease.renew().over == 1
        assert queued(client) == sent
        assert before + 30_000 <= ends(client, living.lease.owner) <= now(client) + 30_000

    def test_without_renewals_for_a_while_no_lease_is_called_over(self, client: redis.Redis) -> None:
        """Redis was down, or hung: those who hold something could not renew, and may be alive."""
        sent = publish(client, message(1))
        silent, living = Worker(client, 0.6), Worker(client, 0.6)
        silent.claim()
        long_renewed(client)
        client.hset(names.LEASE_CLOCK, "beat", now(client) - 400)
        client.zadd(names.LEASES, {silent.lease.owner: now(client) - 300})
        started = time.monotonic()
        assert living.lease.renew().over == 0
        while not living.lease.renew().over:
            assert silent.holds == sent
            time.sleep(0.1)
        renewed_s = (now(client) - int(client.hget(names.LEASE_CLOCK, "since") or 0)) / 1000
        assert time.monotonic() - started >= 0.6
        assert renewed_s < 1.2  # a gap while this one renews, too, proves nothing
        assert queued(client) == sent

    def test_one_who_renews_late_again_and_again_proves_nothing(self, client: redis.Redis) -> None:
        publish(client, message(1))
        silent, slow = Worker(client, 0.2), Worker(client, 0.2)
        silent.claim()
        for _ in range(5):
            assert slow.lease.renew().over == 0
            time.sleep(0.15)

    def test_the_first_worker_of_all_waits_for_a_whole_lease(self, client: redis.Redis) -> None:
        publish(client, message(1))
        dead, first = Worker(client, 0.3), Worker(client, 0.3)
        dead.claim()
        dead.dies()
        assert first.lease.renew().over == 0
        assert client.hgetall(names.LEASE_CLOCK)

    @pytest.mark.parametrize("wrong_ms", [3_600_000, 365 * 86_400_000])
    def test_a_clock_that_was_set_back_keeps_nothing_for_as_long_as_it_was_wrong(
        self, client: redis.Redis, wrong_ms: int
    ) -> None:
        sent = publish(client, message(1))
        dead, living = Worker(client, 300), Worker(client, 300)
        dead.claim()
        before = now(client) + wrong_ms
        client.hset(names.LEASE_CLOCK, mapping={"beat": before, "since": before - 600_000})
        client.zadd(names.LEASES, {dead.lease.owner: before + 200_000, living.lease.owner: before + 300_000})
        for _ in range(3):
            assert living.lease.renew().over == 0
            assert dead.holds == sent
            leases_pass(client, 100_000)
        assert living.lease.renew().over == 1
        assert queued(client) == sent

    def test_a_clock_that_was_set_forward_calls_no_lease_over(self, client: redis.Redis) -> None:
        publish(client, message(1))
        holder, living = Worker(client), Worker(client)
        holder.claim()
        before = now(client) - 3_600_000
        client.hset(names.LEASE_CLOCK, mapping={"beat": before, "since": before - 600_000})
        client.zadd(names.LEASES, {holder.lease.owner: before + 30_000, living.lease.owner: before + 30_000})
        assert living.lease.renew().over == 0
        assert len(holder.holds) == 1

    def test_it_says_when_the_next_lease_may_be_over(self, client: redis.Redis) -> None:
        """So that what a dead worker held comes back within its lease, not at the next look after it."""
        first, second = Worker(client, 30), Worker(client, 30)

        def looks_after(end: int) -> bool:
            """Whether the millisecond after `end` is the next at which it looks."""
            before = now(client)
            soonest_s = first.lease.renew().soonest_s
            return (end + 1 - now(client)) / 1000 <= soonest_s <= (end + 1 - before) / 1000

        long_renewed(client)
        assert 29 < first.lease.renew().soonest_s < 30.1
        client.zadd(names.LEASES, {second.lease.owner: (end := now(client) + 10_000)})
        assert looks_after(end)
        long_renewed(client, since_ms=10_000)
        since = int(client.hget(names.LEASE_CLOCK, "since") or 0)
        assert looks_after(since + 30_000), "before a whole lease has been renewed nobody looks"

    def test_a_lease_that_lies_in_a_far_future_ends(self, client: redis.Redis) -> None:
        publish(client, message(1))
        dead, living = Worker(client), Worker(client)
        dead.claim()
        client.zadd(names.LEASES, {dead.lease.owner: now(client) + 30 * 86_400_000})
        long_renewed(client)
        living.lease.renew()
        assert ends(client, dead.lease.owner) <= now(client) + 30_000

    def test_leases_of_another_length_are_left_alone(self, client: redis.Redis) -> None:
        """A setting is changed worker by worker."""
        long, short = Worker(client, 120), Worker(client, 2)
        long.lease.renew()
        long_renewed(client)
        short.lease.renew()
        assert ends(client, long.lease.owner) > now(client) + 100_000

    def test_whatever_fails_the_renewing_goes_on(
        self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        worker = Worker(client, 0.3)
        failures: list[Exception] = [ValueError("not Redis's"), redis.ConnectionError("gone"), RuntimeError("odd")]
        monkeypatch.setattr(worker.lease, "park_poison", lambda: failures and (_ for _ in ()).throw(failures.pop()))
        worker.lease.start()
        wait_until(lambda: not failures, 5, "three failures")
        client.delete(names.LEASES)
        wait_until(lambda: bool(client.exists(names.LEASES)), 5, "another renewal")
        assert [r.message for r in caplog.records if r.name == "kafka_delivery.lease"] == [
            f"lease.not_renewed error={kind}" for kind in ("RuntimeError", "ConnectionError", "ValueError")
        ]
        worker.lease.stop()


@pytest.fixture
def full(client: redis.Redis) -> Iterator[Callable[[], None]]:
    """Call it to fill Redis up; it is emptied of its limit at the end."""

    def fill() -> None:
        client.config_set("maxmemory", "1mb")
        with pytest.raises(OutOfMemoryError):
            client.set("one more", 1)

    yield fill
    client.config_set("maxmemory", "0")


@pytest.fixture
def read_only(client: redis.Redis) -> Iterator[Callable[[], None]]:
    """Call it to make a replica of Redis, as a failover does; it is a master again at the end."""

    def degrade() -> None:
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(ReadOnlyError):
            client.set("one more", 1)

    yield degrade
    client.replicaof("NO", "ONE")


def everything(client: redis.Redis) -> dict[bytes, Any]:
    return {key: client.dump(key) for key in client.scan_iter() if key != b"one more"}


class TestRefusals:
    def test_a_full_redis_can_be_emptied(
        self, client: redis.Redis, full: Callable[[], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        """By a worker that has nothing to acknowledge too: one that was started to help."""
        sent = publish(client, *(message(n, size=1000) for n in range(3000)))
        full()
        worker = Worker(client)
        first = worker.claim()
        got, tags = first.items, first.tags
        assert len(got) == 500
        while tags:
            answer = worker.claim(acks=tags)
            got, tags = got + answer.items, answer.tags
        assert got == sent

    def test_a_full_redis_lets_leases_be_renewed_reaped_and_given_back(
        self, client: redis.Redis, full: Callable[[], None]
    ) -> None:
        sent = publish(client, *(message(n, size=1000) for n in range(3000)))
        dead, living = Worker(client), Worker(client)
        dead.claim()
        living.claim()
        long_renewed(client)
        dead.dies()
        full()
        assert living.lease.renew().over == 1
        living.lease.stop()
        assert sorted(queued(client)) == sorted(sent)

    def test_a_redis_that_may_only_be_read_loses_nothing(
        self, client: redis.Redis, read_only: Callable[[], None]
    ) -> None:
        publish(client, *(message(n) for n in range(10)))
        worker, dead = Worker(client), Worker(client)
        tags = worker.claim(3).tags
        dead.claim(3)
        dead.dies()
        read_only()
        before = everything(client)
        for attempt in (
            worker.claim,
            lambda: worker.claim(acks=tags),
            lambda: worker.claim(returns=tags),
            worker.lease.renew,
            lambda: worker.reaps(dead),
        ):
            with pytest.raises(ReadOnlyError):
                attempt()
        assert everything(client) == before

    @pytest.mark.parametrize("setting", ["min-replicas-to-write"])
    def test_a_redis_without_its_replicas_loses_nothing(self, client: redis.Redis, setting: str) -> None:
        publish(client, *(message(n) for n in range(10)))
        worker = Worker(client)
        tags = worker.claim(3).tags
        client.config_set(setting, 1)
        try:
            before = everything(client)
            ways: list[dict[str, Any]] = [{}, {"acks": tags}, {"returns": tags}]
            for settled in ways:
                with pytest.raises(ResponseError, match="NOREPLICAS"):
                    worker.claim(**settled)
            assert everything(client) == before
        finally:
            client.config_set(setting, 0)

    @pytest.mark.parametrize(
        "key", [names.LEASES, names.DEATHS, "held", OTHER, names.DELAYED + QUEUE, names.DELAYED + OTHER]
    )
    def test_a_key_of_a_wrong_type_loses_nothing(self, client: redis.Redis, key: str) -> None:
        """Two lists with messages; whichever is claimed first, and whatever else is in the way."""
        sent = publish(client, *(message(n) for n in range(10)))
        worker = Worker(client)
        client.set(worker.lease.held_key if key == "held" else key, "of no use")
        for lists in ((QUEUE, OTHER), (OTHER, QUEUE)):
            with pytest.raises(ResponseError, match="WRONGTYPE"):
                worker.claim(5, lists)
            assert queued(client) == sent
        client.delete(worker.lease.held_key if key == "held" else key)
        assert worker.claim(20, (QUEUE, OTHER)).items == sent

    def test_a_flush_of_all_scripts_is_not_noticed(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        worker = Worker(client)
        worker.claim()
        client.script_flush()
        worker.lease.renew()
        client.script_flush()
        worker.lease.flush()
        client.script_flush()
        worker.lease.stop()
        assert queued(client) == sent
