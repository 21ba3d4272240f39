"""What a channel brought is acknowledged, goes back or is parked, also when it closes."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import redis
from celery.worker import state

from integration.transport.channels import QUEUE, Broker, Held, held, message, publish, queued
from kafka_delivery.names import DELAYED
from kafka_delivery_worker import transport
from kafka_delivery_worker.lease import Lease
from kafka_delivery_worker.parking import ParkingStore
from servers import wait_until


class TestQoS:
    def test_kombu_appends_before_the_consumer_sees_a_message(self, broker: Broker, redis_client: redis.Redis) -> None:
        seen: list[bool] = []
        broker.on_message = lambda message: seen.append(message.delivery_tag in broker.channel.qos._delivered)
        publish(redis_client, "one")
        broker.turn(lambda: seen)
        assert seen == [True]
        assert not redis_client.exists("unacked", "unacked_index")

    def test_an_ack_goes_with_the_next_claim(self, broker: Broker, lease: Lease, redis_client: redis.Redis) -> None:
        publish(redis_client, "one", "two")
        broker.turn(lambda: len(broker.got) == 2)
        broker.got[0].ack()
        assert [tag.partition(":")[2] for tag in lease.settling.acks] == [QUEUE]
        broker.turn(lambda: held(redis_client) == [message("two")])
        assert len(lease.held) == 1

    def test_a_reject_with_requeue_sends_it_to_the_end(self, broker: Broker, redis_client: redis.Redis) -> None:
        broker.consumer.qos(prefetch_count=1)
        publish(redis_client, "one", "two")
        broker.turn(lambda: broker.got)
        broker.got[0].reject(requeue=True)
        broker.turn(lambda: len(broker.got) == 2)
        broker.got[1].ack()
        broker.turn(lambda: len(broker.got) == 3)
        assert broker.names == ["one", "two", "one"]

    def test_a_reject_for_good_parks_it(self, broker: Broker, redis_client: redis.Redis) -> None:
        """Celery does that where it sees no way on, and a message would be gone."""
        publish(redis_client, "one")
        broker.turn(lambda: broker.got)
        broker.got[0].reject()
        broker.turn(lambda: not held(redis_client))
        (parked,) = ParkingStore(redis_client).list()
        assert (parked.id, parked.kind, parked.error_class) == ("one", "invalid", "Rejected")
        assert parked.data == {"queue": QUEUE, "envelope": json.loads(message("one"))}

    def test_one_that_cannot_be_parked_stays_in_the_queue(
        self, broker: Broker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(redis_client, "one")
        broker.turn(lambda: broker.got)

        def refuse(*_: Any) -> str:
            raise redis.ResponseError("no")

        monkeypatch.setattr(ParkingStore, "park_all", refuse)
        broker.got[0].reject()
        broker.turn(lambda: redis_client.zcard(DELAYED + QUEUE) == 1)
        broker.look()
        assert broker.names == ["one"], "it would come back at once, again and again"
        redis_client.zincrby(DELAYED + QUEUE, -60_000, message("one"))
        broker.turn(lambda: len(broker.got) == 2)
        assert broker.names == ["one", "one"]

    def test_a_channel_that_closes_gives_back_what_nobody_works_on_in_its_order(
        self, broker: Broker, lease: Lease, redis_client: redis.Redis
    ) -> None:
        sent = publish(redis_client, *(str(n) for n in range(8)))
        broker.consumer.qos(prefetch_count=6)
        broker.turn(lambda: len(broker.got) == 6)
        active, reserved = Held(broker.got[1]), Held(broker.got[3])
        state.active_requests.add(active)
        state.reserved_requests.add(reserved)
        broker.close()
        lease.reconcile()
        assert queued(redis_client) == [sent[0], *sent[2:]]
        assert held(redis_client) == [sent[1]]

    def test_what_waits_for_a_thread_is_worked_on(
        self, broker: Broker, lease: Lease, redis_client: redis.Redis
    ) -> None:
        """A pool of threads starts it all the same; returned too, it would be delivered twice."""
        lease.pool_keeps_reserved = True
        sent = publish(redis_client, "0", "1")
        broker.turn(lambda: len(broker.got) == 2)
        reserved = Held(broker.got[1])
        state.reserved_requests.add(reserved)
        broker.close()
        lease.reconcile()
        assert queued(redis_client) == sent[:1]
        assert held(redis_client) == sent[1:]

    def test_what_celerys_own_workers_left_behind_is_still_restored(
        self, lease: Lease, redis_url: str, redis_client: redis.Redis
    ) -> None:
        left = json.loads(message("left"))
        redis_client.hset("unacked", "tag of left", json.dumps([left, "", QUEUE]))
        redis_client.zadd("unacked_index", {"tag of left": time.time() - 7200})
        broker = Broker(redis_url)
        broker.turn(lambda: broker.got)
        assert broker.names == ["left"]
        assert not redis_client.exists("unacked", "unacked_index")
        broker.close()


class TestClosing:
    def test_an_answer_under_way_goes_back_to_the_front(
        self, broker: Broker, lease: Lease, redis_client: redis.Redis
    ) -> None:
        """A worker that stops has claimed ahead; nobody would work on it any more."""
        sent = publish(redis_client, *(str(n) for n in range(1200)))
        broker.turn(lambda: len(broker.got) == transport.CLAIM)
        wait_until(lambda: len(held(redis_client)) == 2 * transport.CLAIM, 60, "the claim ahead to be done")
        broker.consumer.cancel()
        broker.close()
        assert len(broker.got) == transport.CLAIM
        lease.stop()
        assert queued(redis_client) == sent

    def test_it_closes_all_the_way_although_the_connection_is_broken(
        self, broker: Broker, lease: Lease, redis_client: redis.Redis
    ) -> None:
        sent = publish(redis_client, "one", "two")
        broker.turn(lambda: len(broker.got) == 2)
        broker.turn(lambda: not broker.channel._in_poll)
        broker.channel._wait()
        broker.channel.client.connection._sock.shutdown(2)
        broker.channel.close()
        assert broker.channel.closed
        assert broker.channel not in broker.connection.transport.channels
        assert broker.channel not in broker.connection.transport.cycle._channels
        assert lease.held == {}
        lease.reconcile()
        assert queued(redis_client) == sent

    def test_a_queue_whose_messages_nobody_acknowledges_holds_none(
        self, lease: Lease, redis_url: str, redis_client: redis.Redis
    ) -> None:
        """Replies to remote control; kombu says so when it begins to consume."""
        broker = Broker(redis_url, ("replies",), no_ack=True)
        assert broker.channel._unacknowledged == {"replies"}
        publish(redis_client, "one", "two", queue="replies")
        broker.turn(lambda: len(broker.got) == 2)
        broker.turn(lambda: not held(redis_client))
        broker.turn(lambda: not broker.channel._in_poll)
        publish(redis_client, "three", queue="replies")
        broker.channel._empty = False
        broker.channel._brpop_start()
        assert broker.channel._asked == "claim"
        wait_until(lambda: bool(held(redis_client)), 60, "the claim to be done")
        broker.close()
        lease.stop()
        assert not redis_client.exists("replies")
