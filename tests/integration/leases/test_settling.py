"""What is settled is settled once, by the worker that holds it, and what is put off waits in Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from integration.leases.workers import (
    OTHER,
    QUEUE,
    Answer,
    Worker,
    delayed,
    delayed_pass,
    message,
    now,
    publish,
    queued,
)
from kafka_delivery import names
from kafka_delivery_worker.lease import script


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


class TestPutOff:
    """What cannot be done now waits in Redis, where it takes no place in a worker."""

    def test_it_is_handed_out_again_when_its_pause_is_over_and_not_before(self, client: redis.Redis) -> None:
        sent = publish(client, message(1), message(2))
        worker = Worker(client)
        first, second = (tag.decode() for tag in worker.claim().tags)
        worker.lease.put_off(first, 3600)
        worker.lease.put_off(second, 7200)
        assert worker.lease.held == {}
        assert worker.lease.to_settle
        before = now(client)
        worker.lease.flush()
        after = now(client)
        assert (worker.holds, queued(client), delayed(client)) == ([], [], sent)
        due = client.zscore(names.DELAYED + QUEUE, sent[0])
        assert due is not None
        assert before + 3_600_000 <= due <= after + 3_600_000.5  # the half says that it is put off
        answer = worker.claim()
        assert answer.items == []
        assert int(due) - now(client) <= answer.next_due <= due - after
        delayed_pass(client, 3_000_000)
        assert worker.claim().items == []
        delayed_pass(client, 600_000)
        assert worker.claim().items == sent[:1]
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
        worker.lease.put_off(tag.decode(), 3600)
        worker.lease.flush()
        assert client.zrange(f"our:{names.DELAYED}{list_}", 0, -1) == [message(1)]
        assert worker.claim(lists=(list_,)).next_due > 3_000_000

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
