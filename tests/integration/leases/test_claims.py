"""What is claimed is held in the same step, in its order and within its bounds; a lost answer loses nothing."""

from __future__ import annotations

import pytest
import redis

from integration.leases.workers import (
    CLAIMED,
    NOTHING,
    NOTHING_TO_SETTLE,
    OTHER,
    QUEUE,
    SHUT,
    Worker,
    delayed,
    ends,
    in_future,
    message,
    now,
    publish,
    queued,
)
from kafka_delivery import names
from kafka_delivery_worker import lease
from kafka_delivery_worker.lease import script
from servers import AnyRedis


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

    def test_one_claim_brings_no_more_than_redis_can_spare_the_time_for(
        self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However much may be held: all of that in one answer would be in memory twice."""
        assert lease.CLAIM_BYTES == 8 * 1024 * 1024
        monkeypatch.setattr(lease, "CLAIM_BYTES", 100_000)
        worker, size = Worker(client), 25_000
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
