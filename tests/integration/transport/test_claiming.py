"""A channel asks when there is room, waits where there is nothing, and loses no answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis
from celery.worker import state

from integration.transport.channels import OTHER, QUEUE, Broker, Held, held, message, publish, queued
from kafka_delivery.names import DEFERRALS, GATE, PROBE, RELEASED
from kafka_delivery_worker import transport
from kafka_delivery_worker.lease import Lease, Settling, script
from kafka_delivery_worker.parking import ParkingStore
from servers import wait_until


class TestAsking:
    def test_the_first_question_reconciles_and_the_next_claims(
        self, broker: Broker, lease: Lease, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []

        def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(name)
                return original(*args, **kwargs)

            return call

        for owner, name in ((lease, "reconcile"), (lease, "start"), (broker.channel, "_claim")):
            monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
        publish(redis_client, "one")
        broker.turn(lambda: broker.got)
        assert calls[:3] == ["reconcile", "start", "_claim"]
        assert calls.count("reconcile") == calls.count("start") == 1

    def test_kombu_asks_when_nothing_is_asked_and_there_is_room(
        self, broker: Broker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[Any, bool]] = []
        start = broker.channel._brpop_start

        def spy() -> None:
            asked.append((broker.channel._in_poll, broker.channel.qos.can_consume()))
            start()

        monkeypatch.setattr(broker.channel, "_brpop_start", spy)
        broker.consumer.qos(prefetch_count=2)
        publish(redis_client, "one", "two", "three")
        broker.turn(lambda: len(broker.got) == 2)
        broker.look()
        assert broker.names == ["one", "two"]
        assert asked
        assert {(bool(poll), room) for poll, room in asked} == {(False, True)}
        broker.got[0].ack()
        broker.turn(lambda: len(broker.got) == 3)

    def test_an_idle_channel_waits_in_redis_and_asks_seldom(
        self, broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[Any, ...]] = []
        ask = broker.channel._ask
        broker.turn(lambda: broker.channel._asked == "wait")

        def noted(*question: Any) -> None:
            asked.append(question)
            ask(*question)

        monkeypatch.setattr(broker.channel, "_ask", noted)
        started = time.monotonic()
        broker.turn(lambda: len(asked) >= 10)
        # The wait that was under way and four more have ended; the fifth has been asked for.
        assert time.monotonic() - started >= 4 * (transport.IDLE_S - 0.001)  # Redis counts in milliseconds
        assert [(what, command) for what, command, *_ in asked[:10]] == 5 * [("claim", "EVALSHA"), ("wait", "BLMOVE")]
        assert {seconds for what, *_, seconds in asked if what == "wait"} == {transport.IDLE_S}

    def test_the_wait_ends_with_a_publish_and_takes_nothing(
        self, broker: Broker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would last for ten minutes."""
        monkeypatch.setattr(transport, "IDLE_S", 600)
        for n in range(3):
            broker.turn(lambda: broker.channel._asked == "wait")
            wait_until(lambda: redis_client.info("clients")["blocked_clients"] == 1, 60, "the wait to begin")
            publish(redis_client, str(n))
            broker.turn(lambda n=n: len(broker.got) > n)  # type: ignore[misc]
            broker.got[-1].ack()
        assert broker.names == [str(n) for n in range(3)]

    def test_nothing_is_asked_while_the_gate_is_shut_but_acks_are_sent(
        self, broker: Broker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """But for a look each half a second; TestEventLoop has the timer that wakes an idle event loop for it."""
        publish(redis_client, "one")
        broker.turn(lambda: broker.got)
        broker.turn(lambda: broker.channel._asked == "wait")
        now = [time.monotonic()]
        monkeypatch.setattr(transport, "monotonic", lambda: now[0])
        asked = broker.asks()
        redis_client.set(GATE, 1)
        publish(redis_client, "two")
        broker.turn(lambda: asked == ["claim"] and not broker.channel._asked)
        for looks in (2, 3, 4):
            now[0] += transport.SHUT_S - 0.01
            for _ in range(20):
                broker.turn_at_once()
            assert asked == ["claim"] * (looks - 1)
            now[0] += 0.01
            broker.turn(lambda n=looks: asked == ["claim"] * n and not broker.channel._asked)  # type: ignore[misc]
        broker.got[0].ack()
        broker.turn(lambda: not held(redis_client))
        broker.turn(lambda: not broker.channel._asked)
        assert broker.names == ["one"]
        redis_client.delete(GATE)
        now[0] += transport.SHUT_S
        broker.turn(lambda: len(broker.got) == 2)

    def test_lists_of_priorities_are_asked_the_highest_first(self, broker: Broker, redis_client: redis.Redis) -> None:
        for priority in (9, 3, 6):
            publish(redis_client, f"of {priority}", queue=f"{QUEUE}\x06\x16{priority}")
        publish(redis_client, "of 0")
        broker.turn(lambda: len(broker.got) == 4)
        assert broker.names == ["of 0", "of 3", "of 6", "of 9"]

    def test_queues_take_turns(self, lease: Lease, redis_url: str, redis_client: redis.Redis) -> None:
        publish(redis_client, *(f"a{n}" for n in range(20)))
        publish(redis_client, *(f"b{n}" for n in range(20)), queue=OTHER)
        broker = Broker(redis_url, (QUEUE, OTHER), prefetch=4)

        def work(message: Any) -> None:
            broker.got.append(message)
            message.ack()

        broker.on_message = work
        broker.turn(lambda: len(broker.got) == 40)
        assert {name[0] for name in broker.names[:12]} == {"a", "b"}
        broker.close()


class TestAnswers:
    def test_kombu_reads_when_the_socket_is_readable(self, broker: Broker) -> None:
        assert broker.channel.handlers["BRPOP"] == broker.channel._brpop_read
        sock = broker.channel.client.connection._sock if broker.channel.client.connection else None
        broker.turn(lambda: broker.channel._in_poll)
        sock = broker.channel.client.connection._sock
        assert broker.connection.transport.cycle._fd_to_chan[sock.fileno()] == (broker.channel, "BRPOP")

    def test_the_next_claim_is_under_way_while_messages_are_handed_out(
        self, broker: Broker, redis_client: redis.Redis
    ) -> None:
        under_way: list[str] = []
        publish(redis_client, *(str(n) for n in range(600)))

        def taken(message: Any) -> None:
            broker.got.append(message)
            under_way.append(broker.channel._asked)

        broker.on_message = taken
        broker.turn(lambda: len(broker.got) == 600)
        assert set(under_way[:500]) == {"claim"}
        assert broker.names == [str(n) for n in range(600)]

    def test_a_flush_of_scripts_costs_nothing(self, broker: Broker, redis_client: redis.Redis) -> None:
        publish(redis_client, "one")
        broker.turn(lambda: broker.got)
        broker.turn(lambda: broker.channel._asked == "wait")
        broker.got[0].ack()
        redis_client.script_flush()
        publish(redis_client, "two")
        broker.turn(lambda: len(broker.got) == 2)
        assert held(redis_client) == [message("two")]

    def test_a_full_redis_is_emptied_by_a_channel_that_is_opened_then(
        self, lease: Lease, redis_url: str, redis_client: redis.Redis
    ) -> None:
        """Kombu locks, notes bindings and waits with commands that a full Redis refuses."""
        publish(redis_client, *(str(n) for n in range(3000)))
        redis_client.config_set("maxmemory", "1mb")
        try:
            broker = Broker(redis_url, (QUEUE, OTHER))

            def taken(message: Any) -> None:
                broker.got.append(message)
                message.ack()

            broker.on_message = taken
            broker.turn(lambda: len(broker.got) == 3000)
            starts = redis_client.info("stats")["total_connections_received"]
            broker.look(10)  # with an empty queue, and still no memory for others
            assert redis_client.info("stats")["total_connections_received"] == starts
            broker.close()
        finally:
            redis_client.config_set("maxmemory", "0")
        assert broker.names == [str(n) for n in range(3000)]

    def test_a_connection_that_breaks_loses_and_repeats_nothing(
        self, broker: Broker, redis_url: str, redis_client: redis.Redis
    ) -> None:
        """One message is done and its ack not sent yet, one is being worked on, eight are not begun."""
        sent = publish(redis_client, *(str(n) for n in range(10)))
        broker.turn(lambda: len(broker.got) == 10)
        broker.turn(lambda: broker.channel._in_poll)
        at_work = Held(broker.got[1])
        state.active_requests.add(at_work)
        broker.got[0].ack()
        redis_client.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(redis.ConnectionError):
            broker.turn(lambda: False)
        broker.close()
        again = Broker(redis_url)
        again.turn(lambda: len(again.got) == 8)
        assert again.names == [str(n) for n in range(2, 10)]
        broker.got[1].ack()  # through the channel that is closed
        again.turn(lambda: sorted(held(redis_client)) == sorted(sent[2:]))
        again.close()

    def test_a_connection_that_kombu_replaces_without_a_word_loses_nothing(
        self, broker: Broker, redis_client: redis.Redis
    ) -> None:
        """As its check of silent connections does: no error is raised, and the next question follows."""
        sent = publish(redis_client, *(str(n) for n in range(6)))
        broker.consumer.qos(prefetch_count=3)
        broker.turn(lambda: len(broker.got) == 3)
        broker.got[0].ack()
        broker.channel._brpop_start()
        assert broker.channel._asked == "claim"
        wait_until(lambda: redis_client.llen(QUEUE) == 2, 60, "the claim to be done")
        broker.channel.client.connection.disconnect()
        broker.turn(lambda: len(broker.got) == 4)
        assert broker.names == ["0", "1", "2", "3"]
        assert sorted(held(redis_client) + queued(redis_client)) == sorted(sent[1:])

    def test_a_claim_that_is_done_after_its_connection_was_given_up_is_found(
        self, broker: Broker, lease: Lease, redis_client: redis.Redis
    ) -> None:
        """A server that hung works off what lies in its sockets, in any order; then the worker lives on for days."""
        broker.turn(lambda: broker.channel._asked == "wait")
        publish(redis_client, "lost and found")
        redis_client.eval(script("claim"), *lease.claim_arguments(1, [QUEUE], Settling.nothing()))
        broker.turn(lambda: broker.got)
        assert broker.names == ["lost and found"]

    def test_when_a_handler_fails_the_rest_of_the_claim_goes_back(
        self, broker: Broker, lease: Lease, redis_url: str, redis_client: redis.Redis
    ) -> None:
        publish(redis_client, *(str(n) for n in range(9)))

        def fail(message: Any) -> None:
            broker.got.append(message)
            state.active_requests.add(at_work.setdefault(message.headers["id"], Held(message)))
            if len(broker.got) == 4:
                raise redis.ConnectionError("events could not be sent")

        at_work: dict[str, Held] = {}
        broker.on_message = fail
        with pytest.raises(redis.ConnectionError):
            broker.turn(lambda: False)
        broker.close()
        again = Broker(redis_url)
        again.turn(lambda: len(again.got) == 5)
        assert again.names == [str(n) for n in range(4, 9)]
        assert len(lease.held) == 9
        again.close()

    @pytest.mark.parametrize(
        "garbage",
        [b"no json", b"[" * 100_000, b"[]", b"{}", b'{"properties": []}', b'{"properties": {}, "headers": "text"}',
         b'{"properties": {"delivery_info": 1}, "headers": {}}', b'{"properties": "x"}', b'"\xff"'],
    )  # fmt: skip
    def test_what_is_no_envelope_is_parked_and_the_next_one_comes(
        self, broker: Broker, redis_client: redis.Redis, garbage: bytes
    ) -> None:
        redis_client.lpush(QUEUE, garbage)
        publish(redis_client, "next")
        broker.turn(lambda: broker.got)
        (parked,) = ParkingStore(redis_client).list()
        assert parked.data["raw"].encode(errors="surrogateescape") == garbage
        broker.got[0].ack()
        broker.turn(lambda: not held(redis_client))

    def test_what_a_stranger_says_of_itself_counts_nothing_wherever_it_lies(
        self, broker: Broker, redis_client: redis.Redis
    ) -> None:
        """Only this worker knows which message is a probe, and which it took from a topic's own list."""
        claims = {PROBE: "cluster|forged", RELEASED: True, DEFERRALS: 1}
        headers = {"id": "one", "task": "kafka_delivery.send", "headers": {"theirs": 1, **claims}, **claims}
        redis_client.lpush(QUEUE, message("one", headers=headers))
        broker.turn(lambda: broker.got)
        assert broker.got[0].headers == {
            "id": "one", "task": "kafka_delivery.send", DEFERRALS: 1,
            "headers": {"theirs": 1, DEFERRALS: 1},
        }  # fmt: skip
