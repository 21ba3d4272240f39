"""What this project overrides of kombu and Celery, method by method: that it is still there with the same arguments,
that it is still called, when, and what it then does. An upgrade that breaks one of these breaks a test here first.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import json
import signal
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import billiard.pool
import celery.app.builtins
import kombu
import pytest
import redis
from celery import _state
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.events.dispatcher import EventDispatcher
from celery.worker import state
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.request import Request as CeleryRequest
from confluent_kafka import KafkaError
from kombu.asynchronous import Hub
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from kafka_delivery import app, base, celery_app, dead_letter, names, send, send_many
from kafka_delivery.delivery import BatchResult
from kafka_delivery.names import GATE, HELD
from kafka_delivery_worker import batch_lane, breaker, consumer, lane, pool, request, transport
from kafka_delivery_worker.breaker.outcomes import LOCAL
from kafka_delivery_worker.embedded import MockKafka, Valkey
from kafka_delivery_worker.lease import Lease, Settling, script
from kafka_delivery_worker.parking import ParkingStore
from kafka_delivery_worker.producer import Outgoing, Report
from servers import AnyRedis, wait_until
from stack import stack
from watching import other_worker

QUEUE = "kafka-delivery"
OTHER = "kafka-delivery-dlq"

OVERRIDDEN = {
    # Of ours: what the same method of kombu or Celery takes; "=" is a default.
    "Message.__init__": "self payload channel= **kwargs",
    "Message.serializable": "self",
    "Message.body": "",
    "Message.ack": "self multiple=",
    "QoS.can_consume": "self",
    "QoS.append": "self message delivery_tag",
    "QoS.ack": "self delivery_tag",
    "QoS.reject": "self delivery_tag requeue=",
    "QoS.restore_unacked": "self client=",
    "QoS.restore_visible": "self start= num= interval=",
    "Channel.__init__": "self *args **kwargs",
    "Channel._create_client": "self asynchronous=",
    "Channel.basic_consume": "self queue *args **kwargs",
    "Channel._queue_bind": "self exchange routing_key pattern queue",
    "Channel._brpop_start": "self timeout=",
    "Channel._brpop_read": "self **options",
    "Channel.close": "self",
    "Transport.register_with_event_loop": "self connection loop",
    "Consumer.__init__": (
        "self on_task_request init_callback= hostname= pool= app= timer= controller= hub= amqheartbeat= "
        "worker_options= disable_rate_limits= initial_prefetch_count= prefetch_multiplier= **kwargs"
    ),
    "Consumer.create_task_handler": "self promise=",
    "Consumer.on_decode_error": "self message exc",
    "Consumer.on_unknown_message": "self body message",
    "Consumer.on_unknown_task": "self body message exc",
    "Consumer.on_invalid_task": "self body message exc",
    "Request.__init__": (
        "self message on_ack= hostname= eventer= app= connection_errors= request_dict= task= on_reject= body= headers= "
        "decoded= utc= maybe_make_aware= maybe_iso8601= **opts"
    ),
    "Request._announce_revoked": "self reason terminated signum expired",
    "Request.on_failure": "self exc_info send_failed_event= return_ok=",
    "Request.reject": "self requeue=",
    "Request.info": "self safe=",
    "Request.on_retry": "self exc_info",
    "Request.revoked": "self",
    "TaskPool.__init__": "self *args **kwargs",
    "TaskPool.register_with_event_loop": "self loop",
    "TaskPool.on_apply": "self target args= kwargs= callback= accept_callback= **_",
    "TaskPool.on_stop": "self",
    "TaskPool._get_info": "self",
    "LaneRequest.__init__": (
        "self message on_ack= hostname= eventer= app= connection_errors= request_dict= task= on_reject= body= headers= "
        "decoded= utc= maybe_make_aware= maybe_iso8601= **opts"
    ),
    "LaneRequest.delivery_info": "self",
    "LaneRequest.acknowledge": "self",
    "LaneRequest.cancel": "self pool signal= emit_retry=",
    "LaneRequest.terminate": "self pool signal=",
}

OF_CALLERS = {
    # The same of what callers load too, and of what only stands for something of Celery's. What is no method there has
    # no arguments.
    "IsolatedCelery.__init__": (
        "self main= loader= backend= amqp= events= log= control= set_as_current= tasks= broker= include= changes= "
        "config_source= fixups= task_cls= autofinalize= namespace= strict_typing= config_source_silent= **kwargs"
    ),
    "IsolatedCelery.finalize": "self auto=",
    "IsolatedCelery.pool": "self",
    "IsolatedCelery.connection": (
        "self hostname= userid= password= virtual_host= port= ssl= connect_timeout= transport= transport_options= "
        "heartbeat= login_method= failover_strategy= **kwargs"
    ),
    "IsolatedCelery.connection_for_read": "self url= **kwargs",
    "IsolatedCelery.connection_for_write": "self url= **kwargs",
    "IsolatedCelery.backend_cls": "",
    "IsolatedCelery._load_config": "self",
    "IsolatedCelery._after_fork": "self",
    "IsolatedAMQP.producer_pool": "self",
    "IsolatedAMQP._create_task_sender": "self",
    "Loader.read_configuration": "self env=",
    "DeliveryTask.max_retries": "",
    "DeliveryTask.apply_async": "self args= kwargs= task_id= producer= link= link_error= shadow= **options",
    "DeliveryTask.signature": "self args= *starargs **starkwargs",
    "DeliveryTask.AsyncResult": "self task_id **kwargs",
    "DeliveryTask.__call__": "self *args **kwargs",
    "DeliveryTask.retry": "self args= kwargs= exc= throw= eta= countdown= max_retries= **options",
    "Send.delay": "self *args **kwargs",
    "Send.run": "self *args **kwargs",
    "SendMany.delay": "self *args **kwargs",
    "SendMany.run": "self *args **kwargs",
    "DeadLetter.delay": "self *args **kwargs",
    "DeadLetter.run": "self *args **kwargs",
    "BatchResult.get": (
        "self timeout= propagate= interval= callback= no_ack= on_message= disable_sync_subtasks= on_interval="
    ),
    "_AnnouncedEvents.send": "self type blind= utcoffset= retry= retry_policy= Event= **fields",
}

STANDS_FOR: dict[type, type] = {lane._AnnouncedEvents: EventDispatcher}
"""What is handed to Celery in the place of its own, and is not derived from it."""

CLASSES = {
    each.__name__: each
    for each in (
        transport.Message,
        transport.QoS,
        transport.Channel,
        transport.Transport,
        consumer.Consumer,
        request.Request,
        pool.TaskPool,
        lane.LaneRequest,
    )
}

CLASSES_OF_CALLERS = {
    each.__name__: each
    for each in (
        celery_app.IsolatedCelery,
        celery_app.IsolatedAMQP,
        celery_app.Loader,
        base.DeliveryTask,
        type(send),
        type(send_many),
        type(dead_letter),
        BatchResult,
        lane._AnnouncedEvents,
    )
}

ALL_CLASSES, ALL_OVERRIDDEN = CLASSES | CLASSES_OF_CALLERS, OVERRIDDEN | OF_CALLERS

NOTHING = object()


def upstream(ours: type, name: str) -> Any:
    """The same attribute of the nearest class that is not ours; NOTHING if there is none."""
    for each in STANDS_FOR.get(ours, ours).__mro__[ours not in STANDS_FOR :]:
        if not each.__module__.startswith("kafka_delivery") and each is not object and name in vars(each):
            return vars(each)[name]
    return NOTHING


def parameters(method: Any) -> str:
    marks: dict[int, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    function = method.fget if isinstance(method, property) else method
    if not callable(function):
        return ""
    return " ".join(
        marks.get(p.kind, "") + p.name + ("" if p.default is p.empty else "=")
        for p in inspect.signature(function).parameters.values()
    )


class TestSignatures:
    def test_every_method_that_is_overridden_is_listed_here(self) -> None:
        found = {
            f"{name}.{method}"
            for name, ours in ALL_CLASSES.items()
            for method, value in vars(ours).items()
            if inspect.isfunction(value) or isinstance(value, property)
            if upstream(ours, method) is not NOTHING and not (ours in STANDS_FOR and method == "__init__")
        }
        assert found == set(ALL_OVERRIDDEN)

    @pytest.mark.parametrize("name", ALL_OVERRIDDEN)
    def test_it_is_still_there_with_the_same_arguments(self, name: str) -> None:
        ours, _, method = name.partition(".")
        found = upstream(ALL_CLASSES[ours], method)
        assert found is not NOTHING
        assert parameters(found) == ALL_OVERRIDDEN[name]

    def test_nothing_of_kombus_is_overridden_by_accident(self) -> None:
        """Names of our own on a channel that kombu uses for something else."""
        own = {"_asked", "_sent", "_quiet_until", "_empty", "_next_due", "_reconciled", "_script_id", "_cached_client"}
        methods = {n for n, v in vars(transport.Channel).items() if inspect.isfunction(v)} - {
            name.partition(".")[2] for name in OVERRIDDEN
        }
        assert (own | methods | {"lease", "_unacknowledged"}) & set(dir(kombu_redis.Channel)) == set()
        assert own <= set(vars(transport.Channel))

    def test_the_strategy_of_a_task_is_where_celery_looks_for_it(self) -> None:
        from celery.app.task import Task
        from celery.worker import strategy

        assert Task.Strategy == "celery.worker.strategy:default"
        assert parameters(strategy.default).split()[:3] == ["task", "app", "consumer"]
        assert parameters(Task.start_strategy) == "self app consumer **kwargs"
        assert send.Strategy == f"{lane.__name__}:{lane.strategy.__name__}"


# -- kombu's event loop, with a channel of ours


class Broker:
    """A consuming channel on kombu's event loop, as a worker has it."""

    def __init__(self, url: str, queues: tuple[str, ...] = (QUEUE,), prefetch: int = 1000, **options: Any) -> None:
        self.connection = kombu.Connection(
            url, transport="kafka_delivery_worker.transport:Transport", transport_options={"socket_timeout": 5}
        )
        self.connection.connect()
        self.hub = Hub()
        self.connection.transport.register_with_event_loop(self.connection.connection, self.hub)
        self.channel = self.connection.default_channel
        self.got: list[Any] = []
        self.on_message: Callable[[Any], None] = self.got.append
        self.consumer = kombu.Consumer(
            self.channel,
            [kombu.Queue(name, kombu.Exchange(name), routing_key=name) for name in queues],
            on_message=lambda message: self.on_message(message),
            **options,
        )
        self.consumer.qos(prefetch_count=prefetch)
        self.consumer.consume()
        self.loop = self.hub.create_loop()

    def turn(self, until: Callable[[], Any], timeout: float = 10) -> None:
        """Let the event loop turn until something is true."""
        deadline = time.monotonic() + timeout
        while not until():
            assert time.monotonic() < deadline
            next(self.loop)

    def rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.turn(lambda: time.monotonic() > end)

    def close(self) -> None:
        self.connection.close()
        self.hub.close()

    @property
    def names(self) -> list[str]:
        return [message.headers["id"] for message in self.got]


def without_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's breaker learn nothing any more; the tick that may have been under way is over."""
    looked = threading.Event()
    monkeypatch.setattr(breaker.current(), "tick", looked.set)
    breaker.current()._wake.set()
    assert looked.wait(10)


@pytest.fixture
def lease(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lease]:
    """This process's, in an empty Redis."""
    lease = Lease(lambda: redis_client, 30)
    monkeypatch.setattr(transport, "process_lease", lambda: lease)
    yield lease
    lease.stop()
    state.reset_state()


@pytest.fixture
def broker(lease: Lease, redis_url: str) -> Iterator[Broker]:
    broker = Broker(redis_url)
    yield broker
    broker.close()


def message(name: str, **more: Any) -> bytes:
    body = base64.b64encode(json.dumps([[name], {}, {}]).encode()).decode()
    properties = {"body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": QUEUE}}
    return json.dumps(
        {
            "body": body,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"id": name, "task": "kafka_delivery.send"},
            "properties": {"correlation_id": name, "delivery_tag": f"tag of {name}", **properties},
            **more,
        }
    ).encode()


def publish(client: redis.Redis, *names: str, queue: str = QUEUE) -> list[bytes]:
    sent = [message(name) for name in names]
    client.lpush(queue, *sent)
    return sent


def queued(client: AnyRedis, queue: str = QUEUE) -> list[bytes]:
    return list(reversed(client.lrange(queue, 0, -1)))


def held(client: AnyRedis) -> list[bytes]:
    return [item for key in client.scan_iter(HELD + "*") for item in client.hvals(key)]


class Held:
    """As much of a request as a channel looks at."""

    def __init__(self, message: Any) -> None:
        self._message = message


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
        broker.rest(1)
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
        assert time.monotonic() - started >= 4 * transport.IDLE_S
        assert [(what, command) for what, command, *_ in asked[:10]] == 5 * [("claim", "EVALSHA"), ("wait", "BLMOVE")]
        assert {seconds for what, *_, seconds in asked if what == "wait"} == {transport.IDLE_S}

    def test_the_wait_ends_with_a_publish_and_takes_nothing(self, broker: Broker, redis_client: redis.Redis) -> None:
        delays = []
        for n in range(7):
            published: list[float] = []
            threading.Timer(  # noted first: the message may be here before the reply to its publisher
                0.3 + n * 0.03, lambda n=n, p=published: (p.append(time.monotonic()), publish(redis_client, str(n)))
            ).start()
            broker.turn(lambda n=n: len(broker.got) > n)  # type: ignore[misc]
            delays.append(time.monotonic() - published[0])
            broker.got[-1].ack()
        assert broker.names == [str(n) for n in range(7)]
        assert sorted(delays)[3] < 0.05

    def test_nothing_is_asked_while_the_gate_is_shut_but_acks_are_sent(
        self, broker: Broker, redis_client: redis.Redis
    ) -> None:
        publish(redis_client, "one")
        broker.turn(lambda: broker.got)
        redis_client.set(GATE, 1)
        publish(redis_client, "two")
        broker.rest(0.7)
        before = redis_client.info("commandstats")["cmdstat_evalsha"]["calls"]
        broker.rest(1.2)
        assert redis_client.info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 4
        broker.got[0].ack()
        broker.turn(lambda: not held(redis_client), 1)
        assert broker.names == ["one"]
        redis_client.delete(GATE)
        broker.turn(lambda: len(broker.got) == 2, 1.5)  # an idle event loop is woken to look

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
            broker.rest(1)  # with an empty queue, and still no memory for others
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
            broker.rest(2)
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
        wait_until(lambda: redis_client.llen(QUEUE) == 2, 5, "the claim to be done")
        broker.channel.client.connection.disconnect()
        broker.turn(lambda: len(broker.got) == 4)
        assert broker.names == ["0", "1", "2", "3"]
        assert sorted(held(redis_client) + queued(redis_client)) == sorted(sent[1:])

    def test_a_claim_that_is_done_after_its_connection_was_given_up_is_found(
        self, broker: Broker, lease: Lease, redis_client: redis.Redis
    ) -> None:
        """A server that hung works off what lies in its sockets, in any order; then the worker lives on for days."""
        broker.rest(0.5)
        publish(redis_client, "lost and found")
        redis_client.eval(script("claim"), *lease.claim_arguments(1, [QUEUE], Settling.nothing()))
        broker.turn(lambda: broker.got, 3)
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
            broker.turn(lambda: False, 2)
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
        again.rest(0.5)
        assert len(again.got) == 2
        for one in at_work[:5]:
            one._message.ack()
        again.turn(lambda: len(again.got) == 7)
        again.rest(0.3)
        assert len(again.got) == 7
        again.close()

    def test_what_is_stuck_for_a_topic_in_trouble_leaves_its_room_to_others(
        self, lease: Lease, broker: Broker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """But not more than as many again; and where it does not hold the pool's threads."""
        publish(redis_client, *(str(n) for n in range(50)))
        broker.consumer.qos(prefetch_count=10)
        broker.turn(lambda: len(broker.got) == 10)
        broker.rest(0.3)
        assert len(broker.got) == 10
        without_ticks(monkeypatch)  # they would find nothing stuck
        monkeypatch.setattr(breaker.current(), "stuck", 4)
        broker.rest(0.3)
        assert len(broker.got) == 10
        monkeypatch.setattr(lease, "pool_keeps_reserved", True)
        broker.turn(lambda: len(broker.got) == 14)
        broker.rest(0.3)
        assert len(broker.got) == 14
        monkeypatch.setattr(breaker.current(), "stuck", 40)
        broker.turn(lambda: len(broker.got) == 20)
        broker.rest(0.3)
        assert len(broker.got) == 20

    def test_a_probe_comes_though_there_is_no_room(
        self, lease: Lease, broker: Broker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What fills it may be stuck for two minutes; kombu reads no answer either where nothing may be consumed."""
        monkeypatch.setattr(lease, "pool_keeps_reserved", True)
        publish(redis_client, *(str(n) for n in range(50)))
        broker.consumer.qos(prefetch_count=10)
        broker.turn(lambda: len(broker.got) == 10)
        broker.rest(0.3)
        without_ticks(monkeypatch)  # they would take it back
        monkeypatch.setattr(breaker.current()._probes, "granted", breaker.Probe(LOCAL, "token"))
        broker.turn(lambda: len(broker.got) == 11, 2)
        assert broker.got[-1].headers[names.PROBE] == "local|token"
        broker.rest(0.3)
        assert len(broker.got) == 11

    def test_bytes_are_bounded_over_claims(
        self, lease: Lease, redis_url: str, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "_max_bytes", 100_000)
        large = [message(str(n), body="x" * 30_000) for n in range(20)]
        redis_client.lpush(QUEUE, *large)
        broker = Broker(redis_url)
        broker.turn(lambda: len(broker.got) == 4)
        before = redis_client.info("commandstats")["cmdstat_evalsha"]["calls"]
        broker.rest(0.5)
        assert len(broker.got) == 4
        assert redis_client.info("commandstats")["cmdstat_evalsha"]["calls"] - before < 5
        broker.got[0].ack()
        broker.got[1].ack()
        broker.turn(lambda: len(broker.got) == 6)
        assert len(held(redis_client)) == 4
        broker.close()


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
        assert (parked.id, parked.kind, parked.error_class) == ("one", "undecodable", "Rejected")
        assert parked.data == {"queue": QUEUE, "envelope": json.loads(message("one"))}

    def test_one_that_cannot_be_parked_stays_in_the_queue(
        self, broker: Broker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(redis_client, "one")
        broker.turn(lambda: broker.got)

        def refuse(*_: Any) -> str:
            raise redis.ResponseError("no")

        monkeypatch.setattr(ParkingStore, "park", refuse)
        broker.got[0].reject()
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
        wait_until(lambda: len(held(redis_client)) == 2 * transport.CLAIM, 5, "the claim ahead to be done")
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
        wait_until(lambda: bool(held(redis_client)), 5, "the claim to be done")
        broker.close()
        lease.stop()
        assert not redis_client.exists("replies")


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
            assert sorted(every) == [transport.SHUT_S, 1, 10, 10, 25, 25]
            hub.close()

    def test_sentinels_transport_is_kombus_with_our_channel(self) -> None:
        ours = transport.SentinelTransport
        assert ours.default_port == kombu_redis.SentinelTransport.default_port == 26379
        assert ours.Channel.__mro__[1:3] == (transport.Channel, kombu_redis.SentinelChannel)
        for name in ("connection_class", "connection_class_ssl", "from_transport_options", "_get_pool"):
            assert getattr(ours.Channel, name) is getattr(kombu_redis.SentinelChannel, name)


class Producer:
    """As much of a producer as the pool uses."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.reports: list[Callable[[Report], None]] = []
        self.fault: Exception | None = None

    def poll_by_caller(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def produce(self, outgoing: Outgoing, on_report: Callable[..., None], *what: Any) -> None:
        if self.fault:
            raise self.fault
        self.in_flight += 1
        self.reports.append(partial(on_report, *what))
        self.wake()

    def serve(self, timeout_s: float) -> None:
        while self.reports:
            self.in_flight -= 1
            self.reports.pop()(Report(None))


OUTGOING = Outgoing("topic", b"", None, [], None, 1)


class TestPool:
    @pytest.fixture
    def producer(self, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> Producer:
        monkeypatch.setattr(pool, "process_lease", lambda: lease)
        made = Producer()
        worker = SimpleNamespace(producer=made, breaker=SimpleNamespace(shut=False, stuck=0))
        monkeypatch.setattr("kafka_delivery_worker.engine.current", lambda: worker)
        return made

    @pytest.fixture
    def hub(self) -> Iterator[Hub]:
        hub = Hub()
        yield hub
        hub.close()

    @pytest.fixture
    def ours(self, producer: Producer, hub: Hub) -> Iterator[pool.TaskPool]:
        ours = pool.TaskPool(2, app=SimpleNamespace(conf=SimpleNamespace()))
        ours.register_with_event_loop(hub)
        yield ours
        ours.on_stop()

    def test_it_says_what_celery_must_not_do_after_a_broken_connection(self, ours: pool.TaskPool, lease: Lease) -> None:
        assert ours.app.conf.worker_enable_prefetch_count_reduction is False
        assert lease.pool_keeps_reserved

    def test_reports_are_collected_by_one_timer(self, ours: pool.TaskPool, producer: Producer, hub: Hub) -> None:
        """However many wake it, of whatever thread, and however often a connection broke."""
        laters: list[float] = []
        later = hub.call_later

        def call_later(delay: float, *args: Any) -> Any:
            laters.append(delay)
            return later(delay, *args)

        hub.call_later = call_later
        reported: list[Report] = []

        def report(_: str, one: Report) -> None:
            ours.landed(1, 1)
            reported.append(one)

        for _ in range(3):
            ours.launch(OUTGOING, 1, report, "what")
            ours._polling = False
            producer.wake()
            ours.register_with_event_loop(hub)
        loop = hub.create_loop()
        deadline = time.monotonic() + 5
        while not reported:
            assert time.monotonic() < deadline
            next(loop)
        assert laters == [pool.POLL_S]
        assert (len(reported), ours.in_flight, ours.bytes_in_flight) == (3, 0, 0)
        for _ in range(3):
            next(loop)
        assert laters == [pool.POLL_S]

    def test_reports_are_collected_whatever_else_is_due(
        self, ours: pool.TaskPool, producer: Producer, hub: Hub
    ) -> None:
        """Kombu fires ten timers a turn, and a turn may take a second: behind a thousand nobody would look."""
        fired: list[int] = []
        for number in range(1_000):
            hub.timer.call_at(time.monotonic() - 60, fired.append, (number,))
        reported: list[Report] = []
        ours.launch(OUTGOING, 1, lambda _, report: reported.append(report), "what")
        loop = hub.create_loop()
        while not reported:
            assert len(fired) < 100
            hub.call_soon(lambda: None)  # so that the turn does not wait
            next(loop)

    def test_after_each_poll_the_lanes_settle_what_was_reported(
        self, ours: pool.TaskPool, producer: Producer, hub: Hub
    ) -> None:
        reported: dict[str, Report] = {}
        settled: list[set[str]] = []
        ours.lanes = {"task": SimpleNamespace(settle=lambda: settled.append(set(reported)))}
        ours.launch(OUTGOING, 1, reported.__setitem__, "one")
        ours._poll_on()
        ours.launch(OUTGOING, 1, reported.__setitem__, "two")
        ours._poll()
        ours.launch(OUTGOING, 1, reported.__setitem__, "three")
        ours.on_stop()
        assert settled == [{"one"}, {"one", "two"}, {"one", "two", "three"}]

    def test_what_librdkafka_does_not_take_is_not_in_flight(self, ours: pool.TaskPool, producer: Producer) -> None:
        producer.fault = OverflowError("no such timestamp")
        with pytest.raises(OverflowError):
            ours.launch(OUTGOING, 10, lambda *_: None, "what")
        with pytest.raises(OverflowError):
            ours.launch_all([OUTGOING] * 3, 10, lambda *_: None)
        assert (ours.in_flight, ours.bytes_in_flight) == (0, 0)

    def test_a_batch_for_which_there_is_no_room_begins_when_there_is_in_order(
        self, ours: pool.TaskPool, producer: Producer, hub: Hub
    ) -> None:
        begun: list[int] = []
        producer.in_flight = pool.BATCHED
        producer.reports = [lambda _: None] * pool.BATCHED
        for number in range(3):
            ours.when_room(partial(begun.append, number))
        assert begun == []
        ours._poll_on()
        assert begun == [0, 1, 2]
        ours.when_room(partial(begun.append, 3))
        assert begun == [0, 1, 2, 3]

    def test_batches_that_are_stuck_leave_their_room_to_others(self, ours: pool.TaskPool, producer: Producer) -> None:
        """But not more than as many again."""
        begun: list[int] = []
        producer.in_flight = pool.BATCHED
        producer.reports = [lambda _: None] * 2 * pool.BATCHED
        ours._breaker.stuck = 3 * pool.BATCHED
        ours.when_room(partial(begun.append, 1))
        assert begun == [1]
        producer.in_flight = 2 * pool.BATCHED
        ours.when_room(partial(begun.append, 2))
        assert begun == [1]

    def test_one_that_cannot_begin_does_not_keep_the_next_from_it(
        self, ours: pool.TaskPool, producer: Producer, hub: Hub
    ) -> None:
        begun: list[int] = []

        def fail() -> None:
            raise redis.ConnectionError

        producer.in_flight = pool.BATCHED
        ours.when_room(fail)
        ours.when_room(partial(begun.append, 1))
        producer.in_flight = 0
        with pytest.raises(redis.ConnectionError):
            ours._poll_on()
        loop = hub.create_loop()
        deadline = time.monotonic() + 5
        while not begun:
            assert time.monotonic() < deadline
            next(loop)

    @pytest.mark.parametrize("fails", ["on_accepted", "on_success"])
    def test_a_message_whose_thread_fails_outside_of_its_task_goes_back(
        self, ours: pool.TaskPool, hub: Hub, fails: str
    ) -> None:
        """Events could not be sent, say. A thread's error is nobody's; the message would be held for ever."""
        calls: list[str] = []

        class Failing:
            id = name = "one"

            def on_accepted(self, *_: Any) -> None:
                state.task_accepted(self)
                if fails == "on_accepted":
                    raise redis.ConnectionError

            def on_success(self, *_: Any) -> None:
                raise redis.ConnectionError

            def reject(self, requeue: bool) -> None:
                calls.append(f"reject requeue={requeue} {self in state.active_requests}")

        failing = Failing()
        ours.apply_async(
            lambda: (0, None, 0.0), (), {}, accept_callback=failing.on_accepted, callback=failing.on_success
        )
        wait_until(lambda: bool(hub._ready), 5, "the event loop to be told")
        for callback in hub._pop_ready():
            callback()
        assert calls == ["reject requeue=True False"]


class TestRequest:
    @pytest.mark.parametrize(("countdown", "waits"), [(-1, False), (60, True)])
    def test_what_is_due_does_not_wait_for_celerys_timer(self, countdown: float, waits: bool) -> None:
        """That one does ten a turn; a topic that refuses thousands of records has thousands of retries due at once."""
        eta = (datetime.now(UTC) + timedelta(seconds=countdown)).isoformat()
        sent = kombu.Message(
            body='[[[2, "", "t", "v"]], {}, {}]', content_type="application/json", content_encoding="utf-8",
            headers={"id": "one", "task": send.name, "eta": eta}, delivery_info={},
        )  # fmt: skip
        made = request.Request(sent, app=app, task=send, headers=sent.headers, body=sent.body, decoded=False, utc=True)
        assert (made.eta is not None) is waits
        assert made.request_dict["eta"] == eta


class TestLane:
    @pytest.fixture
    def ours(self) -> lane.Lane:
        ours = object.__new__(lane.Lane)
        ours.events = False
        ours.pid = 1
        nothing = dict.fromkeys(("sent_again", "tell_breaker", "delivered"), lambda *_: None)
        ours._engine = SimpleNamespace(outcomes={}, **nothing)  # type: ignore[assignment]
        ours._breaker = SimpleNamespace(shut=False, shut_topics=set())  # type: ignore[assignment]
        ours._reports = {}
        ours._reported = ours._reports.__setitem__
        ours._consumer = SimpleNamespace(call_soon_ack=lambda *_: None, on_task_message=set())
        ours.pool = SimpleNamespace(stopping=False, landed=lambda *_: None)
        ours.app = ours.hostname = ours.eventer = None
        ours.task = send
        return ours

    @pytest.fixture
    def sent(self) -> SimpleNamespace:
        """A message, and what was done with it."""
        done: list[str] = []
        return SimpleNamespace(
            headers={"id": "one", "task": send.name}, properties={}, delivery_info={}, delivery_tag="1.1:q", done=done,
            ack_log_error=None, reject_log_error=None, ack=lambda: done.append("ack"),
            reject=lambda requeue: done.append(f"reject requeue={requeue}"),
        )  # fmt: skip

    def fail(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")

    def failed(self, ours: lane.Lane, sent: SimpleNamespace) -> None:
        self.reported(ours, sent, Report(KafkaError(KafkaError._MSG_TIMED_OUT)))
        ours.settle()

    def reported(self, ours: lane.Lane, sent: SimpleNamespace, report: Report) -> lane.LaneRequest:
        request = lane.LaneRequest(sent, sent.headers, ours)
        request.topic, request.admission, request.size = "topic", 1, 10
        lane.begun(request)
        ours._reports[request] = report
        return request

    def test_a_failed_send_that_cannot_go_on_goes_back(self, ours: lane.Lane, sent: SimpleNamespace) -> None:
        ours._resume = self.fail
        self.failed(ours, sent)
        assert sent.done == ["reject requeue=True"]
        assert ours._engine.outcomes == {}

    def test_the_outcome_of_one_that_was_revoked_meanwhile_is_forgotten(
        self, ours: lane.Lane, sent: SimpleNamespace
    ) -> None:
        """Else the next send of that id, which an operator may ask for, would have failed before it began."""
        ours._resume = lambda *_: None
        self.failed(ours, sent)
        assert ours._engine.outcomes == {}

    def test_the_outcome_of_one_that_goes_on_is_at_hand(self, ours: lane.Lane, sent: SimpleNamespace) -> None:
        going_on = lane.LaneRequest(sent, sent.headers, ours)
        ours._resume = lambda *_: state.task_reserved(going_on)
        self.failed(ours, sent)
        assert ours._engine.outcomes.keys() == {"one"}
        state.reset_state()

    def test_while_the_worker_stops_a_failed_send_is_left_to_the_end_of_the_lease(
        self, ours: lane.Lane, sent: SimpleNamespace
    ) -> None:
        ours.pool.stopping = True
        ours._resume = self.fail
        self.failed(ours, sent)
        assert sent.done == []

    def test_in_an_outage_it_waits_in_redis_and_no_thread_is_troubled(
        self, ours: lane.Lane, sent: SimpleNamespace
    ) -> None:
        """A thousand that time out together would cost a thousand tasks, and their memory."""
        ours._resume = self.fail
        sent.channel = SimpleNamespace(
            give_back=lambda tag: sent.done.append(f"back {tag}"), put_aside=lambda *what: sent.done.append(what)
        )
        ours._breaker.shut = True  # type: ignore[misc]
        self.failed(ours, sent)
        ours._breaker.shut = False  # type: ignore[misc]
        ours._breaker.shut_topics = {"topic"}  # type: ignore[assignment]
        self.failed(ours, sent)
        assert sent.done == ["back 1.1:q", ("1.1:q", "topic")]
        ours._breaker.shut_topics = {"another"}  # type: ignore[assignment]
        self.failed(ours, sent)
        assert sent.done[2:] == ["reject requeue=True"], "it went Celery's way"

    def test_all_reports_of_a_poll_are_told_at_once_by_what_they_were_sent_under(
        self, ours: lane.Lane, sent: SimpleNamespace
    ) -> None:
        told: list[Any] = []
        ours._engine.tell_breaker = lambda *what: told.append(what)  # type: ignore[method-assign]
        ours._engine.delivered = lambda *what: told.append(what)  # type: ignore[method-assign]
        ours.pool.landed = lambda *what: told.append(what)
        ours._resume = self.fail
        good, bad = Report(None, None, 0, 7, 1), Report(KafkaError(KafkaError._MSG_TIMED_OUT))
        for number, report in enumerate((good, bad, good)):
            sent.headers = {"id": str(number), "task": send.name}
            self.reported(ours, sent, report)
        self.reported(ours, sent, good).admission = 2
        ours.settle()
        assert told == [
            (3, 30), (1, "topic", [good, bad, good]), ("topic", [("0", good), ("2", good)]),
            (1, 10), (2, "topic", [good]), ("topic", [("2", good)]),
        ]  # fmt: skip
        assert sorted(sent.done) == ["ack", "ack", "ack", "reject requeue=True"]
        ours.settle()
        assert len(told) == 6

    def test_events_that_redis_does_not_take_hold_up_no_other_send(
        self, ours: lane.Lane, sent: SimpleNamespace
    ) -> None:
        ours.eventer = SimpleNamespace(send=self.fail)
        for number in range(2):
            sent.headers = {"id": str(number), "task": send.name}
            self.reported(ours, sent, Report(None)).told = True
        ours.settle()
        assert sent.done == ["ack", "ack"]
        assert (state.requests, len(state.active_requests)) == ({}, 0)

    def test_what_an_earlier_connection_sent_is_settled_by_the_lane_of_the_next(
        self, ours: lane.Lane, sent: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The pool knows only the lanes of the connection that it has."""

        def current() -> SimpleNamespace:
            return SimpleNamespace(**vars(ours._engine), breaker=None)

        monkeypatch.setattr("kafka_delivery_worker.engine.current", current)
        monkeypatch.setattr("celery.worker.strategy.default", lambda *_: "strategy")
        ours.pool.lanes = {}
        consumer_ = SimpleNamespace(pool=ours.pool, hostname="", event_dispatcher=None)
        for kind in (lane.Lane, batch_lane.BatchLane):
            assert lane.lane_of(kind, send, app, consumer_) == "strategy"
            before = ours.pool.lanes[send.name]
            request = self.reported(before, sent, Report(None))
            record = Outgoing("topic", b"", None, [], None, 1)
            if isinstance(before, batch_lane.BatchLane):
                sent.body = b""
                batch = batch_lane.Batch(request, ["one"], [record], {"topic": 1}, {0: Report(None)})
                before._batches.append(batch)
            lane.lane_of(kind, send, app, consumer_)
            assert ours.pool.lanes[send.name] is not before
            ours.pool.lanes[send.name].settle()
            assert (sent.done.pop(), sent.done, state.requests) == ("ack", [], {})
            ours.pool.lanes.clear()

    def test_one_that_cannot_be_launched_is_not_active(self, ours: lane.Lane, sent: SimpleNamespace) -> None:
        ours.pool.launch = self.fail
        with pytest.raises(RuntimeError):
            ours._start(sent, sent.headers, OUTGOING, 1, 10)
        assert (state.requests, len(state.active_requests), len(state.reserved_requests)) == ({}, 0, 0)

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_batch_tells_the_circuits_poll_by_poll_and_is_done_with_its_last_report(
        self, ours: lane.Lane, sent: SimpleNamespace, fails: bool
    ) -> None:
        """Where one failed, it is the task that counts the others, which would be counted twice otherwise."""
        told: list[Any] = []
        of_batches = object.__new__(batch_lane.BatchLane)
        of_batches.__dict__.update(vars(ours))
        ours._engine.tell_breaker = lambda *what: told.append(what)  # type: ignore[method-assign]
        ours._engine.delivered = lambda *what: told.append(what)  # type: ignore[method-assign]
        of_batches._resume = lambda *_: told.append([*ours._engine.outcomes["one"]])
        sent.body = b"four"
        ours.pool.landed = lambda *what: told.append(what)
        topics, good = ["a", "b", "a"], Report(None)
        last = Report(KafkaError(KafkaError._MSG_TIMED_OUT)) if fails else good
        request = lane.LaneRequest(sent, sent.headers, ours)
        lane.begun(request)
        records = [Outgoing(topic, b"", None, [], None, 1) for topic in topics]
        batch = batch_lane.Batch(request, ["0", "1", "2"], records, {"a": 1, "b": 2})
        of_batches._batches = [batch]
        of_batches.settle()
        assert told == []
        batch.reports |= {2: good, 1: good}
        of_batches.settle()
        assert told == [(1, "a", [good]), (2, "b", [good])]
        assert request in state.active_requests
        told.clear()
        batch.reports[0] = last
        of_batches.settle()
        of_batches.settle()
        assert told[:2] == [(1, "a", [last]), (3, 4)]
        assert told[2:] == (
            [[last, good, good]] if fails else [("a", [("0", last), ("2", good)]), ("b", [("1", good)])]
        )
        assert sent.done == ([] if fails else ["ack"])
        assert (state.requests, len(state.active_requests), of_batches._batches) == ({}, 0, [])


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

    def test_attributes_of_celery(self) -> None:
        assert {"reserved_requests", "active_requests", "requests", "revoked", "should_terminate"} <= set(vars(state))
        assert parameters(state.task_reserved).startswith("request ")
        assert parameters(state.task_accepted).startswith("request ")
        assert parameters(state.task_ready).startswith("request successful= ")
        assert isinstance(state.reserved_requests.data, set)
        assert isinstance(state.active_requests.data, set)
        assert parameters(CeleryConsumer.call_soon_ack) == "self p *args **kwargs"
        assert CeleryRequest.acknowledged is False
        assert app.conf.worker_enable_prefetch_count_reduction in (True, False)
        with ThreadPool(1).executor as executor:
            executor.submit(print).result(5)
            assert [thread.is_alive() for thread in executor._threads] == [True]
        assert not any(thread.is_alive() for thread in executor._threads)

    def test_a_lane_leaves_celerys_state_as_celery_does(self) -> None:
        """`lane.begun`, `lane.ended` and `Lane._succeeded` do what these three functions of Celery's do."""
        one, two = (CeleryRequest.__new__(lane.LaneRequest) for _ in range(2))
        one.id, two.id = "one", "two"
        one.name = two.name = send.name
        of_sends = object.__new__(lane.Lane)
        of_sends.task = send
        state.reset_state()
        try:
            lane.begun(one)
            assert ({**state.requests}, {*state.active_requests}) == ({"one": one}, {one})
            lane.ended(one)
            assert (state.requests, len(state.active_requests)) == ({}, 0)
            of_sends._succeeded(1)
            ours = dict(state.total_count), state.all_total_count[0]
            state.reset_state()
            state.task_reserved(two)
            state.task_accepted(two)
            assert ({**state.requests}, {*state.active_requests}) == ({"two": two}, {two})
            assert ours == (dict(state.total_count), state.all_total_count[0]) == ({send.name: 1}, 1)
            lane.ended(two)
            assert (state.requests, len(state.active_requests)) == ({}, 0)
            state.task_accepted(two)
            lane.begun(one)
            state.task_ready(two)
            state.task_ready(one)
            assert (state.requests, len(state.active_requests)) == ({}, 0)
        finally:
            state.reset_state()

    def test_attributes_of_an_app(self) -> None:
        """Of Celery's own, which an isolated one must not change."""
        stranger = celery.Celery("stranger", broker="memory://", set_as_current=False)
        try:
            assert stranger in _state._get_active_apps()
            assert app not in _state._get_active_apps()
        finally:
            _state._deregister_app(stranger)
        assert stranger not in _state._get_active_apps()
        assert isinstance(_state._on_app_finalizers, set)
        own = [each for each in _state._on_app_finalizers if each.__module__ == celery.app.builtins.__name__]
        assert {parameters(each) for each in own} == {"app"}
        for register in own:
            register(stranger)
        assert {"celery.chain", "celery.group", "celery.chord"} <= set(stranger._tasks)
        used = {"_pool", "_preconf", "_pending", "_tasks", "_finalize_mutex", "finalized", "on_after_finalize"}
        assert used <= set(dir(stranger))
        assert parameters(celery.Celery._ensure_after_fork) == "self"
        assert stranger.amqp._producer_pool is None
        assert "backend_cls" in celery.Celery._get_backend.__code__.co_names
        assert callable(celery.Task._get_app)

    def test_what_a_stopping_child_of_prefork_waits_for(self) -> None:
        """It is a global of a module, read each time."""
        limit = "GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT"
        assert isinstance(getattr(billiard.pool, limit), int)
        assert limit in billiard.pool.Worker._ensure_messages_consumed.__code__.co_names
        assert billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_INTERVAL == 0.1


SMALL = {"MAX_RECORD_BYTES": 10_000, "PARKED_MAX_BYTES": 40_000}

SPIES = """
    import functools, importlib, os
    from kafka_delivery_worker import app

    def spy(ours, name):
        original = vars(ours)[name]
        if isinstance(original, property):
            return

        @functools.wraps(original)
        def called(self, *args, **kwargs):
            os.write(2, f"CALLED {ours.__name__}.{name}\\n".encode())
            return original(self, *args, **kwargs)

        setattr(ours, name, called)

    for module, name in MODULES:
        ours = getattr(importlib.import_module(module), name)
        for method in METHODS:
            if method.partition(".")[0] == name:
                spy(ours, method.partition(".")[2])
"""


def test_in_the_life_of_a_worker_each_is_called(tmp_path: Path) -> None:
    """Plain and odd sends, garbage, a revoke, remote control, a broken connection, and a stop that does not wait."""
    code = f"MODULES = {[(c.__module__, c.__name__) for c in CLASSES.values()]}\nMETHODS = {list(OVERRIDDEN)}\n"
    with Valkey() as valkey, MockKafka() as kafka, stack(valkey.url, kafka, LEASE_S=5, **SMALL) as system:
        kafka.create_topic("t")
        worker = other_worker(system, tmp_path, code + textwrap.dedent(SPIES), "-E")

        def calls() -> list[str]:
            return [line.split()[1] for line in worker.log.splitlines() if line.startswith("CALLED ")]

        first = send.delay("t", "plain")
        system.wait_for("t", {first.id})
        system.wait_empty()
        order = calls()
        kafka.fail_next(KafkaError.FENCED_LEADER_EPOCH)
        again = send.delay("t", "retried")
        system.wait_for("t", {again.id})
        place = -1
        for name in (
            "TaskPool.__init__", "Consumer.__init__", "Channel.__init__", "Transport.register_with_event_loop",
            "Channel.basic_consume", "Consumer.create_task_handler", "TaskPool.register_with_event_loop",
            "QoS.can_consume", "Channel._brpop_start", "Channel._brpop_read", "Message.__init__", "QoS.append",
            "LaneRequest.__init__", "LaneRequest.acknowledge", "QoS.ack",
        ):  # fmt: skip
            place = order.index(name, place + 1)

        wanted = send.apply_async(("t", "with a result"), ignore_result=False)
        assert wanted.get(timeout=20)["message_id"] == wanted.id
        send.apply_async(("t", "expired"), expires=-1)
        good = json.loads(message("x"))
        for spoil in (
            {"body": "no json"},
            {"headers": {"id": "1", "task": "unheard of"}},
            {"headers": {"id": "2"}},
            {"headers": {"id": "3", "task": send.name, "eta": "never"}},
            {"headers": {"id": "4", "task": send.name, "eta": "9999-12-31T23:59:59-14:00"}},
        ):
            system.redis.lpush(QUEUE, json.dumps(good | spoil))
        system.wait_parked(6)
        system.wait_empty()
        system.redis.hset(names.PARKED, "large", b"x" * SMALL["PARKED_MAX_BYTES"])  # there is no room for another
        system.redis.delete(names.PARKED_ROOM)
        app.send_task(send.name, ("no topic!", "v"), queue=QUEUE)
        wait_until(lambda: "Request.on_failure" in calls(), 20, "the refusal")

        kafka.down()
        stuck = send.delay("t", "stuck")
        inspect_ = app.control.inspect(timeout=5, limit=1)
        wait_until(lambda: stuck.id in str(inspect_.active() or {}), 20, "the send to be active")
        app.control.revoke(stuck.id, terminate=True, reply=True, timeout=5, limit=1)
        inspect_.stats()
        before = calls().count("Channel._brpop_start")
        system.redis.client_kill_filter(_type="normal", skipme=True)
        wait_until(lambda: calls().count("Consumer.create_task_handler") == 2, 20, "the worker to connect again")
        wait_until(lambda: calls().count("Channel._brpop_start") > before, 20, "the worker to ask again")
        worker.signal(signal.SIGQUIT)
        worker.process.wait(20)
        # Properties; `inspect` above sees the one, and all messages are read by the other.
        assert set(OVERRIDDEN) - set(calls()) == {"LaneRequest.delivery_info", "Message.body"}
        assert queued(system.redis), "the send that was in flight is back in its queue, at once"
