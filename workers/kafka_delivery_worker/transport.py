"""Celery's Redis transport, but what a worker takes is leased to it in the same step.

Publishers need nothing of this: messages lie in the same lists in the same form, and Celery's own transport can read
them. What is changed is how a consuming channel gets its messages, through the three methods that kombu calls around
its BRPOP (`_brpop_start`, `_brpop_read`, and `QoS`), and each change is pinned by a test.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Collection
from contextlib import suppress
from queue import Empty
from time import monotonic
from typing import Any, ClassVar

import redis as redis_py
from celery.worker import state
from kombu.transport import redis, virtual

from kafka_delivery import settings
from kafka_delivery.base import REQUEUE_PAUSE_S, pause_of
from kafka_delivery.errors import ParkingFullError
from kafka_delivery.faults import QUEUE_FAULTS
from kafka_delivery.marks import drop_fleeting
from kafka_delivery.names import PROBE, RELEASED
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.sentinel import GuardedChannel

from . import breaker, engine, parked_items
from .breaker import Breaker, Probe
from .decoding import MAX_DEPTH, is_deeper, loads, unbase64
from .decompression import decompress, most_bytes
from .lease import Lease, Settling, script
from .parked_items import Reason
from .parking import Parked

log = logging.getLogger("kafka_delivery.transport")

CLAIM = 150
"""Messages that one claim may bring: enough that its round trip costs nothing, as the next is on its way meanwhile.

What is claimed counts as in flight while it waits for its turn, and so does what waits for its report to be read: with
500, half of what may be in flight was not in Kafka's hands.
"""

IDLE_S = 0.2
"""How long an idle worker waits in Redis for the list of sends to fill. The other lists and what becomes due are looked
at this often: five times a second and worker, ten calls."""

NOTHING, CLAIMED, SUSPECT, RAMP, SHUT = 0, 1, 2, 3, -1
"""What claim.lua answers."""

CAME_FROM_ITS_TOPICS_LIST = -1
"""What it answers instead of a suspicion."""

SHUT_S = 0.5
"""How often a worker looks whether the gate is open again."""

RAMP_S = 0.02
"""How soon it looks again after an outage, when it holds as many messages as it may already."""

SLOW_S = 3.0
"""A Redis that answers within this time is slow, not away: also a short lease can be renewed there (seconds)."""

OVERDUE_LOOK_S = 1.0
"""How often a worker looks whether an answer of Redis is overdue."""

PAUSES = {SHUT: SHUT_S, SUSPECT: SHUT_S, RAMP: RAMP_S}

COUNTED_BYTES = 2_048
"""Of a message whose brackets are counted."""

PUBLISHERS_TAG = "publishers-tag"
"""Where a claimed message keeps the delivery tag that its publisher gave it."""


@functools.cache
def process_lease() -> Lease:
    """The lease of this worker process."""
    s = settings.current()
    # A renewal that hangs must leave time for one.
    redis = RedisClient(s, min(s.worker_socket_timeout_s, max(s.lease_s / 3, SLOW_S)))
    return Lease(
        lambda: redis.client,
        s.lease_s,
        redis.prefix,
        s.max_in_flight_bytes,
        s.max_deaths,
        cluster=s.cluster,
        ramp_s=s.ramp_s,
        parked_max_bytes=s.parked_max_bytes,
        on_parked=_count_parked,
    )


def _count_parked(topic: str) -> None:
    engine.current().count("parked", topic)


class Message(virtual.Message):
    """A message whose body is decoded when somebody looks at it.

    Attributes:
        put_off_s: when it goes back to its queue, it waits there for so long before it is handed out again (seconds).
        child_died: whether it goes back because a process died that worked on it; its pause grows with each of these.
    """

    put_off_s = 0.0
    child_died = False
    _body: bytes | None = None

    def __init__(self, payload: dict[str, Any], channel: Any = None, **_: Any) -> None:
        properties = payload["properties"]
        self._raw = payload
        self.errors: list[Any] = []
        self.channel = channel
        self.delivery_tag = properties["delivery_tag"]
        self.content_type = payload.get("content-type")
        self.content_encoding = payload.get("content-encoding")
        self.delivery_info = properties["delivery_info"]
        self.headers = payload["headers"]
        self.properties = properties
        self._decoded_cache = None
        self._state = "RECEIVED"
        self.accept = None
        if self.headers.get("compression"):
            try:
                self.body = decompress(self.body, self.headers["compression"])
            except Exception:  # kombu hands it to `on_decode_error`
                self.errors.append(sys.exc_info())
            else:
                self.channel.lease.grown(self.delivery_tag, len(self.body))

    @property
    def body(self) -> Any:
        """The body as its publisher encoded it."""
        body = self._body
        if body is None:
            body = self._raw.get("body") or b""
            if self.properties.get("body_encoding") == "base64":
                body = unbase64(body)
            elif isinstance(body, str):
                body = body.encode()
            self._body = body
        return body

    @body.setter
    def body(self, body: Any) -> None:
        self._body = body

    def ack(self, multiple: bool = False) -> None:
        """As kombu's, without looking first for a consumer that wants no acknowledgements: those get no `Message`."""
        if self.acknowledged:
            raise self.MessageStateError(f"Message already acknowledged with state: {self._state}")
        self.channel.qos.ack(self.delivery_tag)
        self._state = "ACK"

    def serializable(self) -> dict[str, Any]:
        """The envelope as it lay in the queue, with the delivery tag that its publisher gave it."""
        raw = {**self._raw, "properties": dict(self.properties)}
        raw["properties"]["delivery_tag"] = raw.pop(PUBLISHERS_TAG, None)
        return raw


class QoS(redis.QoS):
    """What this channel has handed to the worker; in Redis it lies in the process's lease."""

    def can_consume(self) -> bool:
        """Whether another message may be handed to the worker; a probe always, or what is stuck would keep it away.

        Without it kombu would not read the answer to a claim either, until the probe that it brings has expired.
        """
        channel: Channel = self.channel
        if super().can_consume() or channel._asked:
            return True
        if not channel.lease.pool_keeps_reserved:
            return False
        return channel.breaker.has_probe or len(self._delivered) < self.prefetch_count + channel.beyond

    def append(self, message: Any, delivery_tag: str) -> None:
        """The claim has recorded it already."""
        self._delivered[delivery_tag] = message

    def ack(self, delivery_tag: str) -> None:
        """Settled with the next claim."""
        self.channel.lease.settled(delivery_tag)
        self._delivered.pop(delivery_tag, None)

    def forget(self, delivery_tag: str) -> None:
        """It is not this channel's any more. Kombu remembers to do this later, for other threads; ours is one."""
        self._delivered.pop(delivery_tag, None)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """To the end of its list with the next claim; what Celery would drop, say for an impossible ETA, is parked."""
        message = self._delivered.get(delivery_tag)
        if message is not None and requeue and message.child_died:
            self.channel.lease.child_died(delivery_tag)
        elif message is not None and requeue and message.put_off_s:
            self.channel.lease.put_off(delivery_tag, message.put_off_s)
        elif requeue or message is None:
            self.channel.lease.returned(delivery_tag)
        else:
            self.channel.park_rejected(message)
        self.forget(delivery_tag)

    def restore_unacked(self, client: Any = None) -> None:
        """The channel ends, the process need not: what is being worked on stays leased, the rest goes back, in order.

        The next channel returns it, or the end of the lease.
        """
        self._flush()
        lease = self.channel.lease
        at_work = {request._message.delivery_tag for request in _members(state.active_requests)}
        if lease.pool_keeps_reserved:
            at_work |= {request._message.delivery_tag for request in _members(state.reserved_requests)}
        for tag in list(self._delivered):
            if tag not in at_work:
                lease.forget(tag)
        self._delivered.clear()

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """As kombu's, for what Celery's own workers left behind; a full Redis lets nobody lock."""
        with suppress(redis_py.exceptions.OutOfMemoryError):
            super().restore_visible(*args, **kwargs)


class Channel(redis.Channel):
    """A channel that claims instead of popping."""

    QoS = QoS
    Message = Message

    _asked = ""
    """What was asked and not answered yet."""
    _sent = Settling.nothing()
    _probe: Probe | None = None
    _quiet_until = 0.0
    _empty = False
    _next_due = -1
    _reconciled = False
    _script_id: str | None = None
    _cached_client: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unacknowledged: set[str] = set()

    @functools.cached_property
    def lease(self) -> Lease:
        """The lease of this process; every channel shares it."""
        return process_lease()

    @property
    def breaker(self) -> Breaker:
        """The circuit breaker of this process."""
        return breaker.current()

    def _create_client(self, asynchronous: bool = False) -> Any:
        # Kombu makes a client for each operation; it is thread-safe and may be kept as long as its pool.
        if asynchronous:
            return super()._create_client(True)
        if self._cached_client is None or self._cached_client.connection_pool is not self.pool:
            self._cached_client = super()._create_client()
        return self._cached_client

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        """As kombu's; remembers the queues whose messages nobody will acknowledge (replies to remote control)."""
        if no_ack:
            self._unacknowledged.add(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _queue_bind(self, *args: Any, **kwargs: Any) -> None:
        # A full Redis refuses to note the binding; for the queues that we consume it says what is known anyway.
        with suppress(redis_py.exceptions.OutOfMemoryError):
            super()._queue_bind(*args, **kwargs)

    # -- claims
    def _brpop_start(self, timeout: float | None = None) -> None:
        """Called on every turn of the event loop while nothing is asked; asks, if there is room."""
        if self._asked:  # kombu gave the connection up and made another, without a word
            self._answer_lost()
        to_settle = self.lease.to_settle
        if not to_settle and monotonic() < self._quiet_until:
            return
        if not self._reconciled:
            self.lease.reconcile()
            self.lease.start()
            self.breaker.claim_by(self._look)
            self._reconciled = True
        if self._empty and not to_settle and not self.breaker.shut:
            self._wait()
        else:
            self._claim(ahead=False)

    def _look(self) -> None:
        """Called by the breaker's thread: claims may be allowed now, or a probe."""
        self._quiet_until = 0.0
        connection = self.connection  # read once: the event loop's thread may close the channel
        if connection is not None and connection.hub is not None:
            connection.hub.call_soon(lambda: None)  # a turn of the event loop

    def _answer_lost(self) -> None:
        """It may have been done or not; both are fine to ask again. What it brought, if anything, is reconciled."""
        self._not_done()
        self._reconciled = False

    def _not_done(self) -> None:
        self.lease.untake_settled(self._sent)
        self._sent = Settling.nothing()
        self._asked = ""
        if self._probe is not None:
            self.breaker.unused(self._probe)
            self._probe = None

    def _room(self) -> int:
        if self.lease.room_for_bytes(self.beyond) <= 0:
            return 0
        limit = self.qos.prefetch_count
        if not limit:
            return CLAIM
        # Not what kombu counts: after a reconnect, what an earlier channel brought is still in flight.
        return int(min(CLAIM, limit + self.beyond - len(self.lease.held)))

    @property
    def beyond(self) -> int:
        """How many messages may be held besides: what librdkafka holds for topics in trouble leaves its room to others.

        Not more than as many again, or one topic after another would fill the memory. In another pool than ours they
        hold its threads, and who is claimed besides would only wait for one.
        """
        return min(int(self.qos.prefetch_count), self.breaker.stuck) if self.lease.pool_keeps_reserved else 0

    def _claim(self, *, ahead: bool) -> None:
        lists = self._lists()
        room = self._room()
        probes = bool(lists) and not ahead and self.breaker.has_probe
        if self.breaker.shut and not probes:
            room = 0  # also where Redis does not know, or no longer
        if not lists or (room <= 0 and not self.lease.to_settle and not probes):
            self._quiet_until = monotonic() + SHUT_S if self.breaker.shut else 0.0
            return
        if ahead and room < CLAIM // 4:
            return  # not worth its round trip; what is being worked on makes room
        if self._script_id is None:
            self._script_id = self.lease.redis.script_load(script("claim"))
        self._sent = self.lease.take_settled()
        self._probe = probe = self.breaker.take_probe() if probes else None
        if self.breaker.shut and probe is None:  # it is another's by now
            room = 0
        try:
            self._ask_for(lists, room, probe)
        except BaseException:  # kombu closes the channel, which gives back only what it knows to be asked
            self._answer_lost()
            raise

    def _ask_for(self, lists: list[str], room: int, probe: Probe | None) -> None:
        limit = int(self.qos.prefetch_count) or CLAIM
        arguments = self.lease.claim_arguments(
            max(room, 0 if probe is None else 1), lists, self._sent, limit, probe or ("", ""), self.beyond
        )
        self._ask("claim", "EVALSHA", self._script_id, *arguments)

    def _wait(self) -> None:
        """Wait in Redis until a list has something, taking nothing out: its last message moves to its end.

        Of several queues it is that of sends: a request waits for these, and the wait takes one list.
        """
        queues, sends = self.active_queues, settings.current().queue
        first = self.lease.prefix + (sends if sends in queues else queues[0])
        seconds = IDLE_S if self._next_due < 0 else min(IDLE_S, self._next_due / 1000 + 0.001)
        self._empty = False
        self._ask("wait", "BLMOVE", first, first, "RIGHT", "RIGHT", seconds)

    def _ask(self, what: str, *command: Any) -> None:
        connection = self.client.connection
        self._in_poll, self._brpop_sent_at, self._asked = connection, monotonic(), what
        connection.send_command(*command)

    def give_up_overdue(self) -> None:
        """Drop the connection when an answer takes longer than any socket may: nobody reads while it does not come.

        Kombu notices that as well, but only 26 to 51 seconds later.
        """
        connection = self._in_poll
        if not connection or self._brpop_sent_at is None or not self.socket_timeout:
            return
        waited = monotonic() - self._brpop_sent_at
        sock = connection._sock
        if waited <= self.socket_timeout + IDLE_S or sock is None or redis._socket_readable(sock):
            return
        log.warning("queue.silent asked=%s seconds=%.0f", self._asked, waited)
        connection.disconnect()

    def _lists(self) -> list[str]:
        queues = self._queue_cycle.consume(len(self.active_queues))
        return [self._q_for_pri(queue, priority) for priority in self.priority_steps for queue in queues]

    def _brpop_read(self, **options: Any) -> bool:
        """Called when the answer is there."""
        try:
            reply = self.client.parse_response(self.client.connection, "EVALSHA", **options)
        except redis_py.exceptions.NoScriptError:  # Redis was restarted, or its scripts were flushed
            self._script_id = None
            self._not_done()
            raise Empty from None
        except redis_py.exceptions.OutOfMemoryError:  # waiting in Redis is refused while it is full; claims are not
            self._not_done()
            self._quiet_until = monotonic() + IDLE_S
            raise Empty from None
        except BaseException:
            self._answer_lost()
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        asked, self._asked, self._sent = self._asked, "", Settling.nothing()
        if asked == "wait":
            raise Empty
        probe, self._probe = self._probe, None
        if probe is not None and (self._closing or not reply[1]):
            self.breaker.unused(probe)
        return self._claimed(probe, *reply)

    def _claimed(
        self,
        probe: Probe | None,
        status: int,
        items: list[bytes],
        tags: list[bytes],
        suspected: list[int],
        next_due: int,
        holding: int,
    ) -> bool:
        self._next_due = next_due
        names = [tag.decode() for tag in tags]
        if self._closing:  # nobody works on it here; it is reconciled, but for what nobody would acknowledge
            for name in names:
                if _queue(name, self.sep) in self._unacknowledged:
                    self.lease.settled(name)
            raise Empty
        self.lease.claimed(names, items)
        if not self.lease.knows(holding):  # an earlier claim was done after its connection had been given up
            self._reconciled = False
        if status != CLAIMED:
            self._empty = status == NOTHING and self._room() > 0
            self._quiet_until = monotonic() + PAUSES.get(status, 0.0)
            raise Empty
        self._empty = False
        self._queue_cycle.rotate(_queue(names[-1], self.sep))
        place = 0
        try:
            if self._reconciled and self.qos.can_consume():
                self._claim(ahead=True)  # Redis works on it while we work on this one
            for place, name in enumerate(names):
                self._hand_out(items[place], name, suspected[place], probe)
        except BaseException:
            for name in names[place:]:  # it goes back; but for one that the consumer has
                if name not in self.qos._delivered:
                    self.lease.forget(name)
            self._reconciled = False
            raise
        return True

    def _hand_out(self, item: bytes, tag: str, deaths: int, probe: Probe | None) -> None:
        try:
            payload = _envelope(loads(item))
            # To count is quicker than to look, where there is little to count.
            many = len(item) > COUNTED_BYTES or item.count(b"{") + item.count(b"[") > MAX_DEPTH
            if many and is_deeper(payload, MAX_DEPTH):
                raise RecursionError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._quarantine(item, tag, error)
            if probe is not None:
                self.breaker.not_sent(probe.mark)
            return
        properties = payload["properties"]
        headers = payload["headers"]
        if headers.get("compression") and not self.lease.has_room_for(most_bytes()):
            self.lease.put_off(tag, REQUEUE_PAUSE_S)  # what it takes, decompressed, is not known before
            if probe is not None:
                self.breaker.not_sent(probe.mark)
            return
        drop_fleeting(headers)  # nobody's but ours, and those of this claim
        if probe is not None:
            headers[PROBE] = probe.mark
        if deaths == CAME_FROM_ITS_TOPICS_LIST:
            headers[RELEASED] = True
        payload[PUBLISHERS_TAG] = properties.get("delivery_tag")
        properties["delivery_tag"] = tag
        if deaths > 0:
            headers["redelivered"] = properties["delivery_info"]["redelivered"] = True
        queue = _queue(tag, self.sep)
        if queue in self._unacknowledged:
            self.lease.settled(tag)
        self.connection._deliver(payload, queue)

    def put_aside(self, tag: str, topic: str) -> None:
        """A message whose topic's circuit is open waits in a list of that topic's own."""
        self.lease.put_aside(tag, topic)
        self.qos.forget(tag)

    def give_back(self, tag: str) -> None:
        """A message that nobody here may work on now returns to the front of its list."""
        self.lease.forget(tag)
        self.qos.forget(tag)
        self._reconciled = False

    def _quarantine(self, item: bytes, tag: str, error: Exception) -> None:
        """Keep what is no Celery message at all; Celery's transport ends the worker over it."""
        reason = Reason(
            kind="undecodable", error_class=type(error).__name__, error_message="it is not a Celery message"
        )
        self._park(tag, [parked_items.of_bytes(tag.partition(":")[2], item, reason)])

    def park_rejected(self, message: Any) -> None:
        """Keep what a consumer rejects without wanting it back."""
        reason = Reason(kind="invalid", error_class="Rejected", error_message="Celery rejected it")
        tag, body = message.delivery_tag, parked_items.body_of(message)
        self._park(
            tag,
            parked_items.of_message(_queue(tag, self.sep), message.serializable(), message.headers, body, reason),
        )

    def _park(self, tag: str, items: list[Parked]) -> None:
        try:
            kept = self.lease.parking.park_all(items)
        except (ParkingFullError, *QUEUE_FAULTS) as fault:  # then it must stay in the queue
            self.lease.put_off(tag, pause_of(fault))
            return
        self.lease.settled(tag)
        self.lease.parked(items, kept)

    def close(self) -> None:
        """As kombu's; what an answer that is still under way brings is returned by the next channel, or at the end."""
        self._closing = True
        if self._in_poll:  # kombu would read it too, but leave the rest undone where that fails
            with suppress(Empty, *QUEUE_FAULTS):
                self._brpop_read()
            self._in_poll = None
        if self._asked:
            self._answer_lost()
        super().close()


class Transport(redis.Transport):
    """For redis://, rediss:// and sockets. Named by the setting ``broker_transport``."""

    Channel = Channel
    hub: Any = None
    _timers: ClassVar[list[Any]] = []
    """Of the last connection that the event loop had; they would go on for ever, one more after each reconnect."""

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.hub = loop
        super().register_with_event_loop(connection, loop)
        while self._timers:
            self._timers.pop().cancel()
        self._timers.append(loop.call_repeatedly(SHUT_S, lambda: None))  # an idle event loop would not look at the gate
        self._timers.append(loop.call_repeatedly(OVERDUE_LOOK_S, self._give_up_overdue))

    def _give_up_overdue(self) -> None:
        for channel in tuple(self.cycle._channels):
            channel.give_up_overdue()


class SentinelChannel(Channel, GuardedChannel):
    """The same, and it asks Sentinel for the master."""


class SentinelTransport(Transport):
    """For sentinel://."""

    default_port = redis.SentinelTransport.default_port
    Channel = SentinelChannel


def _queue(tag: str, separator: str) -> str:
    """The queue of a delivery tag: its list, without a priority."""
    name = tag[tag.index(":") + 1 :]
    return name if separator not in name else name[: name.index(separator)]


def _envelope(payload: Any) -> dict[str, Any]:
    """`payload`, if kombu and Celery can look at it without falling over its shape.

    Raises:
        TypeError, KeyError: they cannot.
    """
    properties = payload["properties"]
    if type(payload) is not dict or type(properties) is not dict:
        raise TypeError("it is no object")
    if type(payload.get("headers")) is dict and type(properties.get("delivery_info")) is dict:
        return payload
    for part, name in ((payload, "headers"), (properties, "delivery_info")):
        if part.get(name) is None:
            part[name] = {}
        elif type(part[name]) is not dict:
            raise TypeError(f"{name} is no object")
    return payload


def _members(requests: Any) -> Collection[Any]:
    """What is in one of Celery's weak sets of requests, which threads change meanwhile."""
    return [request for request in (ref() for ref in tuple(requests.data)) if request is not None]
