"""Who is master, for all connections of a process: one place asks the Sentinels, and says which server was given up.

redis-py asks the Sentinels one after the other, each for as long as its timeout and its retries last, and each
connection finds out for itself that its server has become silent. A frozen server would cost one timeout after
another, and so would a frozen Sentinel. Here all Sentinels are asked at the same time. A worker asks them all the time.
When they name another master, all connections to the old one are shut down, so that nobody waits for it any longer, and
nobody goes on with it when it wakes up and still takes itself for the master.

A server that is merely slow is never given up here: only the Sentinels decide.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, NamedTuple

import redis
from kombu.transport import redis as kombu_redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, SentinelManagedConnection, SentinelManagedSSLConnection

log = logging.getLogger("kafka_delivery.sentinel")

WATCH_S = 1.0
"""How often a worker asks who is master (seconds)."""

FRESH_S = 0.5
"""An answer that is younger is not asked for again (seconds): a process makes many connections at a time."""

REMEMBERED_S = 60.0
"""How long an answer counts against older news from another Sentinel (seconds): one that was frozen names the old
master until it has heard from the others."""

OTHERS_S = 0.2
"""How long the other Sentinels may take beyond twice the time of the first (seconds). One of them may know better."""

PATIENCE_S = 10.0
"""How long a Sentinel may take to answer (seconds). Who asks may have less patience."""

Address = tuple[str, int]


class Answer(NamedTuple):
    """What a Sentinel says; no `master` while it takes it for down."""

    at: float
    epoch: int
    master: Address | None


class Master:
    """The master of one name, as the Sentinels see it; in a process there is one for each set of Sentinels and name.

    Args:
        sentinels: where they are.
        name: of the master.
        options: of connections to Sentinels: a password, TLS.
        min_others: other Sentinels that one must know, or its answer does not count.
    """

    def __init__(self, sentinels: Sequence[Address], name: str, options: dict[str, Any], min_others: int) -> None:
        self.addresses, self.name, self.options, self.min_others = tuple(sentinels), name, options, min_others
        timeouts = {"socket_timeout": PATIENCE_S, "socket_connect_timeout": PATIENCE_S}
        self._sentinels = [
            redis.Redis(host, port, **{**options, **timeouts}, retry=Retry(NoBackoff(), 0)) for host, port in sentinels
        ]
        self._changed = threading.Condition()
        self._asked: dict[int, float] = {}
        """Which Sentinel is being asked, and since when."""
        self._answers: dict[int, Answer] = {}
        self._faults: dict[int, str] = {}
        self._connections: weakref.WeakSet[Any] = weakref.WeakSet()
        self._current: Address | None = None
        self._watcher: threading.Thread | None = None

    def ask(self, patience_s: float) -> Address:
        """Return the address of the master.

        Raises:
            MasterNotFoundError: no Sentinel answers in time, or all take it for down.
        """
        with self._changed:
            began = monotonic()
            if not self._fresh(began - FRESH_S):
                self._ask_all(began)
                self._changed.wait_for(lambda: not self._asked or self._fresh(began), patience_s)
                # A frozen Sentinel must not hold anybody up, and one that knows better must be heard.
                took = monotonic() - began
                self._changed.wait_for(lambda: not self._asked, min(OTHERS_S + 2 * took, max(0.0, patience_s - took)))
            master = self._best(monotonic())
            said = ", ".join(
                f"{self.addresses[n][0]}:{self.addresses[n][1]} {why}" for n, why in sorted(self._faults.items())
            )
        if master is None:
            raise MasterNotFoundError(f"No master found for {self.name!r}" + (f" : {said}" if said else ""))
        self._drop_others(master)
        return master

    def _fresh(self, since: float) -> bool:
        return any(answer.at >= since for answer in self._answers.values())

    def _best(self, now: float) -> Address | None:
        """What the Sentinels with the newest configuration say; several may disagree on whether it is down."""
        recent = [answer for answer in self._answers.values() if answer.at >= now - REMEMBERED_S]
        newest = max((answer.epoch for answer in recent), default=0)
        up = [answer for answer in recent if answer.epoch == newest and answer.master is not None]
        return max(up, key=lambda answer: answer.at).master if up else None

    def _ask_all(self, now: float) -> None:
        for place in range(len(self._sentinels)):
            if place not in self._asked:
                self._asked[place] = now
                threading.Thread(
                    target=self._ask, args=(place,), name="kafka-delivery-sentinel-asks", daemon=True
                ).start()

    def _ask(self, place: int) -> None:
        answer, fault = None, ""
        try:
            masters: Any = self._sentinels[place].sentinel_masters()
            state = masters.get(self.name)
            if state is not None and state["num-other-sentinels"] >= self.min_others:
                down = state["is_sdown"] or state["is_odown"] or not state["is_master"]
                master = None if down else (state["ip"], state["port"])
                answer = Answer(monotonic(), int(state["config-epoch"]), master)
        except (RedisError, OSError) as error:
            fault = repr(error)
        finally:
            with self._changed:
                self._asked.pop(place, None)
                if answer is not None:
                    self._answers[place] = answer
                if fault:
                    self._faults[place] = fault
                else:
                    self._faults.pop(place, None)
                self._changed.notify_all()

    # -- connections to what was the master
    def add(self, connection: Any) -> None:
        """From now on the connection ends when another server is master."""
        with self._changed:
            self._connections.add(connection)
            if watching and self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="kafka-delivery-sentinel", daemon=True)
                self._watcher.start()

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(WATCH_S):
            try:
                self.ask(PATIENCE_S)
            except MasterNotFoundError:
                continue  # whoever connects says so
            except Exception as error:  # say, no thread to ask with; without the watch each connection waits by itself
                log.error("redis.not_watched error=%r", error)

    def _drop_others(self, master: Address) -> None:
        # Each time and not only at a change: one may have been under way to the old master meanwhile.
        with self._changed:
            before, self._current = self._current, master
            dropped = sum(one.drop() for one in self._connections if one.connected_to not in (None, master))
        if before not in (None, master) or dropped:
            log.warning("redis.master address=%s:%d dropped=%d", *master, dropped)


watching = False
"""Whether this process, and those that it forks, ask all the time."""

_masters: dict[Any, Master] = {}


def watch() -> None:
    """Ask all the time from now on; for workers, which wait on connections. A caller asks when it connects."""
    global watching
    watching = True


def master_of(manager: Any, name: str) -> Master:
    """Return this process's `Master` for one of redis-py's `Sentinel` and the name of a master."""
    kwargs = [client.connection_pool.connection_kwargs for client in manager.sentinels]
    addresses = tuple((one["host"], one["port"]) for one in kwargs)
    key = (os.getpid(), addresses, name)  # a fork brings another: the parent's threads and sockets are the parent's
    if key not in _masters:
        _masters.setdefault(key, Master(addresses, name, manager.sentinel_kwargs, manager.min_other_sentinels))
    return _masters[key]


class _Asks:
    """Stands for redis-py's `Sentinel` in a pool of connections, which asks it for the master.

    Args:
        manager: what it stands for.
        patience_s: how long the pool's connections wait for anything.
    """

    def __init__(self, manager: Any, patience_s: float) -> None:
        self._manager, self._patience_s = manager, patience_s

    def master(self, name: str) -> Master:
        """Return what this process knows of the master."""
        return master_of(self._manager, name)

    def discover_master(self, name: str) -> Address:
        """As redis-py's."""
        return self.master(name).ask(self._patience_s)


class _Guarded:
    """A connection to the master that the Sentinels name now; it ends when they name another.

    Attributes:
        connected_to: the server's address, or None.
    """

    connected_to: Address | None = None
    _sock: Any
    connection_pool: Any
    socket_connect_timeout: float | None

    def drop(self) -> bool:
        """End the connection under whoever waits on it, in any thread: it reads the end of the stream at once.

        Returns:
            Whether there was one. While it is being made there is none, and it must be dropped later.
        """
        sock = self._sock
        if sock is None:
            return False
        self.connected_to = None
        with suppress(OSError):
            # Not SSLSocket.shutdown: what is sent afterwards would go out in the clear.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        return True

    def connect(self) -> None:
        """As redis-py's."""
        if self._sock:
            return
        pool = self.connection_pool
        if not isinstance(pool.sentinel_manager, _Asks):
            pool.sentinel_manager = _Asks(pool.sentinel_manager, self.socket_connect_timeout or PATIENCE_S)
        self.connected_to = None
        pool.sentinel_manager.master(pool.service_name).add(self)
        super().connect()  # type: ignore[misc]

    def connect_to(self, address: Address) -> None:
        """As redis-py's."""
        self.connected_to = address
        super().connect_to(address)  # type: ignore[misc]


class GuardedConnection(_Guarded, SentinelManagedConnection):
    """Without TLS."""


class GuardedSSLConnection(_Guarded, SentinelManagedSSLConnection):
    """With TLS."""


class GuardedChannel(kombu_redis.SentinelChannel):  # type: ignore[misc]
    """Kombu's, with such connections."""

    connection_class = GuardedConnection
    connection_class_ssl = GuardedSSLConnection


class Transport(kombu_redis.SentinelTransport):  # type: ignore[misc]
    """Kombu's transport for sentinel://, with such connections."""

    Channel = GuardedChannel
