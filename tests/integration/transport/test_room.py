"""What a worker holds is bounded, and what is stuck leaves its room to others."""

from __future__ import annotations

import pytest
import redis
from celery.worker import state

from integration.transport.channels import QUEUE, Broker, Held, held, message, publish
from kafka_delivery import names
from kafka_delivery_worker.breaker import Breaker, Probe
from kafka_delivery_worker.breaker.outcomes import LOCAL
from kafka_delivery_worker.lease import Lease


class TestRoom:
    def test_what_an_earlier_channel_brought_and_is_in_flight_counts(
        self, broker: Broker, redis_url: str, redis_client: redis.Redis
    ) -> None:
        """Else each broken connection would allow as many messages again."""
        publish(redis_client, *(str(n) for n in range(50)))
        broker.consumer.qos(prefetch_count=10)
        broker.turn(lambda: len(broker.got) == 10)
        at_work = [Held(message) for message in broker.got]
        state.active_requests.update(at_work)
        broker.close()
        again = Broker(redis_url, prefetch=12)
        again.turn(lambda: len(again.got) == 2)
        again.look()
        assert len(again.got) == 2
        for one in at_work[:5]:
            one._message.ack()
        again.turn(lambda: len(again.got) == 7)
        again.look()
        assert len(again.got) == 7
        again.close()

    def test_what_is_stuck_for_a_topic_in_trouble_leaves_its_room_to_others(
        self,
        lease: Lease,
        still: Breaker,
        broker: Broker,
        redis_client: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """But not more than as many again; and where it does not hold the pool's threads."""
        publish(redis_client, *(str(n) for n in range(50)))
        broker.consumer.qos(prefetch_count=10)
        broker.turn(lambda: len(broker.got) == 10)
        broker.look()
        assert len(broker.got) == 10
        monkeypatch.setattr(still, "stuck", 4)
        broker.look()
        assert len(broker.got) == 10
        monkeypatch.setattr(lease, "pool_keeps_reserved", True)
        broker.turn(lambda: len(broker.got) == 14)
        broker.look()
        assert len(broker.got) == 14
        monkeypatch.setattr(still, "stuck", 40)
        broker.turn(lambda: len(broker.got) == 20)
        broker.look()
        assert len(broker.got) == 20

    def test_a_probe_comes_though_there_is_no_room(
        self,
        lease: Lease,
        still: Breaker,
        broker: Broker,
        redis_client: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What fills it may be stuck for two minutes; kombu reads no answer either where nothing may be consumed."""
        monkeypatch.setattr(lease, "pool_keeps_reserved", True)
        publish(redis_client, *(str(n) for n in range(50)))
        broker.consumer.qos(prefetch_count=10)
        broker.turn(lambda: len(broker.got) == 10)
        broker.look()
        monkeypatch.setattr(still._probes, "granted", Probe(LOCAL, "token"))
        broker.turn(lambda: len(broker.got) == 11)
        assert broker.got[-1].headers[names.PROBE] == "local|token"
        broker.look()
        assert len(broker.got) == 11

    @pytest.mark.parametrize("what", ["its script is not there", "its connection is not there"])
    def test_a_probe_for_which_nothing_could_be_asked_is_another_ones(
        self, still: Breaker, broker: Broker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        """And what is done with is told with the next claim."""
        publish(redis_client, "first")
        broker.turn(lambda: broker.got)
        broker.turn(lambda: broker.channel._asked == "wait")
        broker.turn(lambda: not broker.channel._asked)
        broker.got[0].ack()
        probe = still._probes.grant(Probe("cluster", "token"), 60)
        still._probes.granted = probe

        def away(*_: object) -> None:
            raise redis.ConnectionError

        with monkeypatch.context() as patch:
            if what == "its script is not there":
                broker.channel._script_id = None
                patch.setattr(redis_client, "script_load", away)
            else:
                patch.setattr(broker.channel, "_ask", away)
            with pytest.raises(redis.ConnectionError):
                broker.channel._claim(ahead=False)
        assert still.has_probe or still._probes.take_settled() == [(probe, "ignore", "")]
        broker.turn(lambda: not held(redis_client))

    def test_bytes_are_bounded_over_claims(
        self, lease: Lease, redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "_max_bytes", 100_000)
        large = [message(str(n), body="x" * 30_000) for n in range(20)]
        redis_client.lpush(QUEUE, *large)
        broker = Broker(redis_url)
        broker.turn(lambda: len(broker.got) == 4)
        asked = broker.asks()
        broker.look(10)
        assert len(broker.got) == 4
        assert asked == [], "nothing is asked for which there is no room"
        broker.got[0].ack()
        broker.got[1].ack()
        broker.turn(lambda: len(broker.got) == 6)
        assert len(held(redis_client)) == 4
        broker.close()
