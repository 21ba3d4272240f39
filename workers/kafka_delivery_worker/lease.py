"""What a worker process holds of the queues, and its lease on it.

A message that a worker claims moves, in the same step, from its list into a hash of that worker, where it stays until
it is settled. The worker renews one lease for all of them. When it dies, its lease ends, and another worker returns
what the hash holds to the front of the lists. Scripts do each step as a whole; Redis's clock is the only one.

The lease is the process's, not the connection's: a connection that breaks and comes back loses nothing and repeats
nothing. It is renewed by a thread of its own, so that a busy event loop does not lose it.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.resources
import logging
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple

from kombu.exceptions import KombuError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from kafka_delivery import names
from kafka_delivery.errors import ParkingFullError
from kafka_delivery.faults import QUEUE_FAULTS

from . import parked_items
from .parked_items import Reason
from .parking import Parked, ParkingStore

log = logging.getLogger("kafka_delivery.lease")

UNBOUNDED = 2**40

CLAIM_BYTES = 8 * 1024 * 1024
"""Of messages that one claim may bring. As many as may be held would keep Redis, and then the event loop, from all else
for a third of a second, and be in memory twice."""

FORGOTTEN_S = 86_400
"""For how long it is known which worker has read a message that may have killed it; as long as deaths are counted."""


ALONE_FROM = 3
"""Deaths of workers from which a message is claimed alone, or the last but one that the setting allows: at least one
death must show which of those that were held together is to blame."""

LONGEST_PAUSE_MS = 60_000
"""Of a message that is put off, in milliseconds; see `failures`, `parking` and claim.lua."""

PRELUDES = {"claim": ("deaths",), "reap": ("deaths",)}
"""What lies before a script, and is shared with others."""


@functools.cache
def script(name: str) -> str:
    """The source of a Lua script that lies beside this module, with what it shares with others before it."""
    files = importlib.resources.files(__package__)
    return "".join(files.joinpath(f"{part}.lua").read_text() for part in (*PRELUDES.get(name, ()), name))


class Settling(NamedTuple):
    """Delivery tags of messages that are done with, that go to the end of their lists, that are put aside, each with
    its topic, that are put off, each with the milliseconds until it is handed out again, and whose process died."""

    acks: list[str]
    returns: list[str]
    asides: list[tuple[str, str]]
    offs: list[tuple[str, int]]
    died: list[str]

    @classmethod
    def nothing(cls) -> Settling:
        """Where there is nothing to tell."""
        return cls([], [], [], [], [])


class Renewed(NamedTuple):
    """How many workers' leases were over, and in how many seconds somebody should look again."""

    over: int
    soonest_s: float


class Lease:
    """The messages that this process holds.

    `claimed`, `settled`, `returned` and `forget` are called from the event loop's thread; the renewing thread touches
    nothing of what they change.

    Args:
        connect: gives a `redis.Redis` whose keys are not prefixed; called when one is first needed.
        seconds: how long a lease lasts without renewal.
        prefix: of every key, kombu's ``global_keyprefix``.
        max_bytes: of messages that may be held at a time.
        cluster: the Kafka cluster whose circuits decide what may be claimed.
        ramp_s: how long claims grow to their full number after one of them was open.
        on_parked: called with the topic, or "", of each item that was parked and never reached a task.
        max_deaths: processes that may die with a message before it is parked, see `ALONE_FROM`.
        parked_max_bytes: of Redis's memory that parked items may take; 0 for any.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        seconds: float,
        prefix: str = "",
        max_bytes: int = UNBOUNDED,
        max_deaths: int = 5,
        cluster: str = "default",
        ramp_s: float = 0.0,
        parked_max_bytes: int = 0,
        on_parked: Callable[[str], None] = lambda topic: None,
    ) -> None:
        self.owner = uuid.uuid4().hex
        self.milliseconds = int(seconds * 1000)
        self.prefix = prefix
        self.leases, self.clock, self.deaths, self.poison, self.gate = (
            prefix + name for name in (names.LEASES, names.LEASE_CLOCK, names.DEATHS, names.POISON, names.GATE)
        )
        self.began, self.ended = prefix + names.LEASES_BEGAN, prefix + names.LEASES_ENDED
        self.apart = prefix + names.POISON_APART
        self.held_key = prefix + names.HELD + self.owner
        self.held: dict[str, int] = {}
        """Delivery tag -> size of what this process works on or is about to."""
        self.settling = Settling.nothing()
        self.pool_keeps_reserved = False
        """Whether the pool works on all that it was given also after a connection broke; it sets this."""
        self._bytes = 0
        self._max_bytes = max_bytes
        self._max_deaths = max_deaths
        self._alone_from = min(ALONE_FROM, max_deaths - 1)
        self._parked_max_bytes = parked_max_bytes
        self.circuits = prefix + names.CIRCUITS.format(cluster=cluster)
        self.waiting = prefix + names.WAITING
        self.ramp_ms = int(ramp_s * 1000)
        self._claims = 0
        self._lists: list[str] = []
        self._connect = connect
        self.on_parked = on_parked
        self._redis: Any = None
        self._stop = threading.Event()
        self._stopped = False
        self._renewer: threading.Thread | None = None

    @property
    def redis(self) -> Any:
        """The client for everything but claims.

        Raises:
            redis.exceptions.ConnectionError: Redis cannot be reached.
        """
        if self._redis is None:
            try:
                self._redis = self._connect()
            except KombuError as error:  # Celery's consumer reconnects on Redis's own errors, and dies of kombu's
                raise RedisConnectionError(str(error)) from error
        return self._redis

    @functools.cached_property
    def parking(self) -> ParkingStore:
        """Where goes what is no message, or too dangerous.

        Raises:
            redis.exceptions.ConnectionError: Redis cannot be reached.
        """
        return ParkingStore(self.redis, self.prefix, self._parked_max_bytes)

    # -- claims; the channel sends them on its own connection
    def claim_arguments(
        self,
        room: int,
        lists: list[str],
        settling: Settling,
        limit: int = UNBOUNDED,
        probe: tuple[str, str] = ("", ""),
        beyond: int = 0,
    ) -> list[Any]:
        """Keys and arguments of claim.lua, for a number of the claim's own.

        Args:
            room: how many messages may come, at most.
            lists: the lists to claim from, in this order, without the prefix.
            settling: what to settle in the same step.
            limit: how many messages may be held, which grows to this after an outage.
            probe: scope and token of the probe that the one message is which may come.
            beyond: how many may be held besides at any time, of topics in trouble.
        """
        self._claims += 1
        self._lists = lists or self._lists
        circuit = f"{self.circuits}{names.CLUSTER_SCOPE}:"
        keys = [self.gate, self.leases, self.held_key, self.deaths, f"{circuit}st", f"{circuit}p", self.waiting]
        keys.append(self.poison)
        for name in lists:
            keys += [self.prefix + name, self.prefix + names.DELAYED + name]
        counts = [len(tags) for tags in settling]
        settled: list[Any] = [*settling.acks, *settling.returns]
        settled += [part for pair in (*settling.asides, *settling.offs) for part in pair]
        settled += settling.died
        most = min(self.room_for_bytes(beyond), CLAIM_BYTES)
        if probe[0]:
            most = max(most, 1)  # it is one message, and what fills the room may wait for it
        arguments = [self.owner, self.milliseconds, room, most, self._claims, self.prefix]
        arguments += [limit, self.ramp_ms, self.circuits, *probe, self.prefix + names.DELAYED, beyond]
        arguments += [self._alone_from, self._max_deaths]
        return [len(keys), *keys, *arguments, *counts, *settled, *lists]

    def room_for_bytes(self, stuck: int = 0) -> int:
        """Bytes that may be claimed now, if so many of the messages held are stuck for topics in trouble."""
        share = min(1.0, stuck / len(self.held)) if self.held else 0.0  # nobody knows the topic of each
        beyond = min(self._max_bytes, int(self._bytes * share))
        return max(0, self._max_bytes + beyond - self._bytes)

    def claimed(self, tags: list[str], items: list[bytes]) -> None:
        """These are this process's to work on."""
        sizes = list(map(len, items))
        self.held.update(zip(tags, sizes, strict=True))
        self._bytes += sum(sizes)

    def has_room_for(self, size: int) -> bool:
        """Whether a message that is held may take so many bytes more. Alone it always may."""
        return len(self.held) <= 1 or self._bytes + size <= self._max_bytes

    def grown(self, tag: str, size: int) -> None:
        """A message that is held takes so many bytes more, decompressed."""
        if tag in self.held:
            self.held[tag] += size
            self._bytes += size

    def forget(self, tag: str) -> None:
        """Nobody here works on the message any more; `reconcile` or `stop` returns it to the front of its list."""
        self._bytes -= self.held.pop(tag, 0)

    def settled(self, tag: str) -> None:
        """The message is elsewhere, or done with."""
        self._bytes -= self.held.pop(tag, 0)  # as `forget`, without a call for each message
        self.settling.acks.append(tag)

    def returned(self, tag: str) -> None:
        """The message goes to the end of its list."""
        self.forget(tag)
        self.settling.returns.append(tag)

    def put_aside(self, tag: str, topic: str) -> None:
        """The message waits in a list of its topic's own until that topic's circuit closes."""
        self.forget(tag)
        self.settling.asides.append((tag, topic))

    def put_off(self, tag: str, seconds: float) -> None:
        """The message waits in Redis before anybody is handed it again: at once, it would come back at once."""
        self.forget(tag)
        self.settling.offs.append((tag, int(seconds * 1000)))

    def child_died(self, tag: str) -> None:
        """A process of this worker died while it worked on the message, and had nothing else in its hands.

        The death is counted where those of workers are. The message waits, longer with each death, until it is parked.
        """
        self.forget(tag)
        self.settling.died.append(tag)

    @property
    def to_settle(self) -> bool:
        """Whether there is anything to tell Redis."""
        return any(self.settling)

    def knows(self, holding: int) -> bool:
        """Whether so many messages held in Redis can all be known here."""
        return holding <= len(self.held) + sum(len(tags) for tags in self.settling)

    def take_settled(self) -> Settling:
        """What to send with the next claim; give it back with `untake_settled` if that failed."""
        taken, self.settling = self.settling, Settling.nothing()
        return taken

    def untake_settled(self, taken: Settling) -> None:
        """Settling twice changes nothing, so what may have been sent is sent again."""
        now = self.settling
        self.settling = Settling(
            taken.acks + now.acks,
            taken.returns + now.returns,
            taken.asides + now.asides,
            taken.offs + now.offs,
            taken.died + now.died,
        )

    def flush(self) -> None:
        """Settle now.

        Raises:
            redis.exceptions.RedisError: it is not settled; nothing is forgotten.
        """
        settling = self.take_settled()
        try:
            self.redis.eval(script("claim"), *self.claim_arguments(0, [], settling))
        except BaseException:
            self.untake_settled(settling)
            raise

    def reconcile(self) -> None:
        """Return to the front of the lists, in order, what is held in Redis and nobody here works on.

        An answer that never came had claimed it, or a connection broke before it was begun.

        Raises:
            redis.exceptions.RedisError: try again.
        """
        self.flush()
        unknown = [tag for tag in (t.decode() for t in self.redis.hkeys(self.held_key)) if tag not in self.held]
        if unknown:
            returned, _ = self._reap(self.owner, *unknown, died=False)
            log.warning("lease.reconciled returned=%d", returned)

    # -- the lease
    def start(self) -> None:
        """Renew now, and from now on in a thread; safe to repeat.

        Before the first claim it must be known when this worker began: the first message may kill it.

        Raises:
            redis.exceptions.RedisError: it is not renewed; try again.
        """
        if self._renewer is None:
            self._beat()
            self._renewer = threading.Thread(target=self._run, name="kafka-delivery-lease", daemon=True)
            self._renewer.start()
            atexit.register(self._at_exit, os.getpid())

    def stop(self) -> None:
        """End the lease; what is still held goes back to the front of its lists, in order. Safe to repeat.

        Raises:
            redis.exceptions.RedisError: then it goes back when the lease runs out.
        """
        if self._stopped:
            return
        self._stop.set()
        if self._renewer is not None:
            self._renewer.join(5)
        self.flush()
        self._reap(self.owner, died=False)
        self._stopped = True

    def _at_exit(self, pid: int) -> None:
        # A cold shutdown ends the process without Celery's signal; what it held must not wait for the lease to run
        # out, and must not count as a death.
        if pid != os.getpid():
            return
        try:
            self.stop()
        except QUEUE_FAULTS as error:
            log.warning("lease.not_returned error=%s", type(error).__name__)

    def _run(self) -> None:
        every = self.milliseconds / 3000
        fault = ""
        while True:
            wait, began = every, monotonic()
            try:
                wait = min(every, self.renew().soonest_s)
                self.park_poison()
                fault = ""
            except Exception as error:  # whatever it is: without this thread others would take what is worked on here
                if type(error).__name__ != fault:  # said once for each outage, not every ten seconds
                    fault = type(error).__name__
                    log.warning("lease.not_renewed error=%s", fault)
            # Where Redis is slow, the time that it took is a part of the pause, or a short lease would run out.
            if self._stop.wait(min(every, 1.0) if fault else max(0.0, wait - (monotonic() - began))):
                return

    def renew(self) -> Renewed:
        """Renew the lease, and return to the queues what workers held whose lease is over.

        Raises:
            redis.exceptions.RedisError: it is not renewed.
        """
        soonest, over, set_back = self._beat()
        if set_back:
            self._recall()
        for owner in over:
            try:
                returned, poisonous = self._reap(owner.decode(), died=True)
            except ResponseError as error:  # of one, say a list that is none; it must not keep the others'
                log.error("lease.not_reaped worker=%s error=%s", owner.decode(), error)
                continue
            if returned >= 0:
                log.warning("lease.reaped worker=%s returned=%d poisonous=%d", owner.decode(), returned, poisonous)
        return Renewed(len(over), soonest / 1000)

    def _beat(self) -> tuple[int, list[bytes], bytes]:
        keys = [self.leases, self.clock, self.began]
        soonest, over, set_back = self.redis.eval(script("renew"), len(keys), *keys, self.owner, self.milliseconds)
        return soonest, over, set_back

    def _recall(self) -> None:
        """Let end what was put off by a clock that was ahead: it would wait for as long as that was wrong."""
        if not self._lists:  # it has claimed nothing yet, and does not know what there is
            return
        recalled = 0
        for name in self._lists:
            cursor = b"0"
            while True:
                key = self.prefix + names.DELAYED + name
                cursor, some = self.redis.eval(script("recall"), 1, key, cursor, LONGEST_PAUSE_MS)
                recalled += some
                if cursor == b"0":
                    break
        self.redis.hdel(self.clock, "set_back")
        log.warning("lease.clock_set_back recalled=%d", recalled)

    def _reap(self, owner: str, *tags: str, died: bool) -> tuple[int, int]:
        keys = [self.leases, self.prefix + names.HELD + owner, self.deaths, self.poison, self.began, self.ended]
        arguments = [owner, self.prefix, self._max_deaths, self._alone_from, self.milliseconds, "1" if died else "0"]
        returned, poisonous = self.redis.eval(script("reap"), len(keys), *keys, *arguments, *tags)
        return returned, poisonous

    def park_poison(self) -> None:
        """Move what killed too many workers to the parking store. Interrupted, it is done again and changes nothing.

        A message is parked as its records, or whole where reading it killed a worker again.

        What finds no room there stays on its way.

        Raises:
            redis.exceptions.RedisError: what is left is still on its way.
        """
        while (entry := self.redis.lindex(self.poison, 0)) is not None:
            digest = hashlib.sha256(entry).hexdigest()
            items = self._items_of(entry, digest)
            if items is None:
                return
            try:
                kept = self.parking.park_all(items)
            except ParkingFullError:  # the store has said so
                return
            self.redis.lrem(self.poison, 1, entry)
            self.redis.hdel(self.apart, digest)
            self.parked(items, kept)

    def _items_of(self, entry: bytes, digest: str) -> list[Parked] | None:
        """What a poisonous message is parked as; None while another worker finds out.

        What killed workers may kill this one when it is read. So a worker that reads it leaves its name beside it, and
        takes that away when it has survived; where the name of a dead worker is, the message is not read again.
        """
        queue, _, envelope = entry.decode(errors="surrogateescape").partition("\n")
        died = f"{self._max_deaths} processes died while they held it"
        why = Reason(kind="poison", error_class="WorkerLost", error_message=died)
        if not self.redis.hsetnx(self.apart, digest, self.owner):
            reader = self.redis.hget(self.apart, digest)
            if reader is None or (reader.decode() != self.owner and self.redis.zscore(self.leases, reader) is not None):
                return None
            if reader.decode() != self.owner:
                return parked_items.of_raw(queue, envelope, why, apart=False)
        self.redis.expire(self.apart, FORGOTTEN_S)
        items = parked_items.of_raw(queue, envelope, why)
        self.redis.hdel(self.apart, digest)
        return items

    def parked(self, items: Sequence[Parked], kept: Sequence[str]) -> None:
        """Count and log what never reached a task and was parked, under these ids."""
        for item, item_id in zip(items, kept, strict=True):
            log.error("message.parked kind=%s topic=%s parked_id=%s", item.kind, item.topic, item_id)
            try:
                self.on_parked(item.topic or "")
            except Exception as error:  # say, no thread for the counters; what is parked is parked
                log.error("record.not_told message_id=%s error=%s", item.message_id, type(error).__name__)
