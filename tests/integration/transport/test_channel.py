"""Clients, messages and timers are kombu's, but for what is changed on purpose."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import Any

import kombu
import pytest
import redis
from kombu.asynchronous import Hub
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from integration.transport.channels import QUEUE, Broker, message, publish
from kafka_delivery import sentinel
from kafka_delivery_worker import transport
from kafka_delivery_worker.lease import Lease
from overridden import parameters


class TestClients:
    def test_kombu_makes_one_for_each_operation_and_gets_the_same(
        self, lease: Lease, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[bool] = []
        original = kombu_redis.Channel._create_client

        def create(self: Any, asynchronous: bool = False) -> Any:
            made.append(asynchronous)
            return original(self, asynchronous)

        monkeypatch.setattr(kombu_redis.Channel, "_create_client", create)
        with kombu.Connection(redis_url, transport="kafka_delivery_worker.transport:Transport") as connection:
            channel = connection.default_channel
            for _ in range(3):
                channel._size(QUEUE)
                channel._put(QUEUE, json.loads(message("x")))
            assert made == [True, False]  # the one for blocking commands and events, and the one for all else
            channel._disconnect_pools()
            assert channel._size(QUEUE) == 3
            assert made == [True, False, False]

    def test_it_is_the_asynchronous_one_that_tells_kombu_of_a_disconnect(self, broker: Broker) -> None:
        assert broker.channel._create_client() is broker.channel._create_client()
        assert broker.channel._create_client(True) is not broker.channel._create_client(True)
        broker.turn(lambda: broker.channel._in_poll)
        broker.channel.client.connection.disconnect()
        assert broker.channel._in_poll is None


class TestMessage:
    @pytest.mark.parametrize(
        "more",
        [
            {},
            {"body": "plain \u00e4", "properties": {"delivery_tag": "t", "delivery_info": {"routing_key": "q"}}},
            {"content-type": None, "content-encoding": None},
            {"body": None},
            {
                "body": base64.b64encode(zlib.compress(b"[]")).decode(),
                "headers": {"compression": "application/x-gzip", "id": "1"},
            },
            {"headers": {"compression": "unheard of"}},
        ],
    )
    def test_it_is_the_same_as_kombus(self, broker: Broker, more: dict[str, Any]) -> None:
        ours, theirs = (
            each(json.loads(message("one", **more)), channel=broker.channel)
            for each in (transport.Message, virtual.Message)
        )
        for name in kombu.message.Message.__slots__:
            if name not in ("__dict__", "body"):
                assert getattr(ours, name) == getattr(theirs, name), name
        assert [type(error[1]) for error in ours.errors] == [type(error[1]) for error in theirs.errors]
        if not theirs.errors:
            assert (ours.body or None) == (theirs.body or None)
        if more == {}:
            assert ours.payload == theirs.payload == [["one"], {}, {}]

    def test_the_breaker_may_look_while_the_connection_is_made_anew(self, broker: Broker) -> None:
        """It does so in its own thread; an error would end its round, with all that comes after."""
        kept, broker.channel.connection = broker.channel.connection, None
        broker.channel._look()
        broker.channel.connection = kept

    def test_its_body_is_decoded_when_somebody_looks(self, broker: Broker) -> None:
        looked = transport.Message(json.loads(message("one", body="not base64!")), channel=broker.channel)
        with pytest.raises(binascii.Error):
            _ = looked.body
        with pytest.raises(AttributeError):
            _ = looked.unheard_of
        again = transport.Message(json.loads(message("one")), channel=broker.channel)
        assert again.body is again.body

    def test_kombu_makes_the_channels_own(self, broker: Broker, redis_client: redis.Redis) -> None:
        publish(redis_client, "one")
        broker.turn(lambda: broker.got)
        assert type(broker.got[0]) is transport.Message
        assert type(broker.channel.qos) is transport.QoS


class TestEventLoop:
    def test_kombu_registers_what_it_did_and_a_timer_of_ours(self, lease: Lease, redis_url: str) -> None:
        every: list[float] = []

        class Loop(Hub):  # type: ignore[misc]
            def call_repeatedly(self, delay: float, *args: Any) -> Any:
                every.append(delay)
                return super().call_repeatedly(delay, *args)

        with kombu.Connection(redis_url, transport="kafka_delivery_worker.transport:Transport") as connection:
            connection.connect()
            hub = Loop()
            connection.transport.register_with_event_loop(connection.connection, hub)
            assert sorted(every) == [transport.SHUT_S, 1, transport.OVERDUE_LOOK_S, 10, 10, 25, 25]
            for _ in range(3):  # as after a reconnect
                connection.transport.register_with_event_loop(connection.connection, hub)
            going_on = [entry for _, _, entry in hub.timer._queue if not entry.canceled]
            assert len(going_on) == 7
            hub.close()

    def test_sentinels_transport_is_kombus_with_our_channel(self) -> None:
        ours = transport.SentinelTransport
        assert ours.default_port == kombu_redis.SentinelTransport.default_port == 26379
        assert ours.Channel.__mro__[1:4] == (transport.Channel, sentinel.GuardedChannel, kombu_redis.SentinelChannel)
        for name in ("from_transport_options", "_get_pool"):
            assert getattr(ours.Channel, name) is getattr(kombu_redis.SentinelChannel, name)
        for name in ("connection_class", "connection_class_ssl"):
            kombus = getattr(kombu_redis.SentinelChannel, name)
            assert issubclass(getattr(ours.Channel, name), (kombus, *kombus.__bases__))


class TestUsed:
    """What is used of kombu and Celery although it is not theirs to give."""

    def test_attributes_of_a_channel(self, broker: Broker) -> None:
        channel = broker.channel
        assert {"_in_poll", "_brpop_sent_at", "_closing", "sep", "priority_steps"} <= set(dir(kombu_redis.Channel))
        assert channel._queue_cycle.consume(1) == [QUEUE]
        channel._queue_cycle.rotate("no such queue")
        assert channel.active_queues == [QUEUE]
        assert channel._q_for_pri(QUEUE, 3) == f"{QUEUE}\x06\x163"
        assert channel.connection is broker.connection.transport
        assert parameters(type(channel.connection)._deliver) == "self message queue"
        assert parameters(kombu_redis.Channel._flush_brpop_reauth) == "self"
        assert channel.qos.can_consume()
        assert (dict(channel.qos._delivered), channel.qos._dirty) == ({}, set())
