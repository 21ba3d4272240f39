"""How a process hears what became of records that it waits for: one thread, one connection, however many wait.

A worker writes a wanted result to Redis and publishes it (Celery's result backend). Celery's own client subscribes in
each thread that calls `get`, and holds that thread while it waits; an event loop has none to spare. Here one thread
subscribes for all, and who waits has a future.

What is published while nobody is subscribed is lost. So a result is asked for each time its subscription was confirmed,
also after a reconnect, and heard from then on; it does not matter whether the record was queued before or after.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from celery.states import READY_STATES
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from . import settings
from .celery_app import app
from .errors import EnqueueError
from .faults import said_by
from .redis_client import RedisClient

log = logging.getLogger("kafka_delivery.outcomes")

LOOK_S = 5.0
"""How often results are asked for all the same (seconds): a firewall may have dropped the connection silently."""

PAUSE_S = 0.5
"""Between two attempts to reach a Redis that is away (seconds)."""

IDLE_S = 30.0
"""The thread and its connection end when nobody has waited for so long (seconds)."""


class Awaited:
    """What became of one record, as far as it is known here.

    Attributes:
        future: the result as Celery keeps it, once it is final.
        attempt: the error of the last attempt, where there will be another.
    """

    def __init__(self) -> None:
        self.future: Future[dict[str, Any]] = Future()
        self.attempt: BaseException | None = None

    def tell(self, meta: dict[str, Any]) -> bool:
        """Return whether somebody has the result now: not one who has given up."""
        if meta["status"] not in READY_STATES:
            self.attempt = meta["result"] if isinstance(meta["result"], BaseException) else None
        elif not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(meta)
            return True
        return False

    def gives_up(self) -> bool:
        """Leave the result to who asks for it later; False if it has come."""
        return self.future.cancel()


class Listener:
    """The one thread of a process that hears results.

    Methods may be called from any thread and never wait for Redis.
    """

    def __init__(self, s: settings.Settings) -> None:
        self._timeout_s = s.enqueue_timeout_s
        self._redis = RedisClient(s, s.enqueue_timeout_s)
        self._backend = app.backend
        self._lock = threading.Lock()
        self._waiting: defaultdict[str, set[Awaited]] = defaultdict(set)
        self._thread: threading.Thread | None = None
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
            # Other settings, or a fork, bring another listener. At the process's exit the thread still waits on it.
            weakref.finalize(self, end.close).atexit = False

    @contextmanager
    def awaiting(self, task_id: str) -> Iterator[Awaited]:
        """Listen for the result of a task while the block runs."""
        awaited, key = Awaited(), self._backend.get_key_for_task(task_id).decode()
        with self._lock:
            self._waiting[key].add(awaited)
            if self._thread is None:
                self._start()
        self._rouse()
        try:
            yield awaited
        finally:
            with self._lock:
                self._waiting[key].discard(awaited)
                if not self._waiting[key]:
                    del self._waiting[key]
            self._rouse()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="kafka-delivery-outcomes", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system allows no more; the record is queued, and who waits next tries again
            log.warning("outcomes.not_heard error=%r waiting=%d", str(error), len(self._waiting))
        else:
            self._thread = thread

    def forget(self, task_id: str) -> None:
        """Remove a result that an earlier send with the same id has left; it would pass for that of the next.

        Raises:
            EnqueueError: Redis did not confirm.
        """
        try:
            self._redis.client.delete(self._backend.get_key_for_task(task_id))
        except (RedisError, KombuError, OSError) as error:
            raise EnqueueError(task_id, said_by(error)) from error

    def _rouse(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it has not even looked yet
            self._wake.send(b"\0")

    # -- in the thread
    def _run(self) -> None:
        while self._wanted(ending=True):
            try:
                with self._redis.client.pubsub() as pubsub:
                    self._listen(pubsub)
            except Exception as error:  # whatever it is: without this thread nobody would hear anything
                if waiting := self._wanted():
                    log.warning("outcomes.not_heard error=%s waiting=%d", type(error).__name__, len(waiting))
                    time.sleep(PAUSE_S)

    def _wanted(self, ending: bool = False) -> set[str]:
        """Keys that somebody waits for; with none of them the thread may end."""
        with self._lock:
            if ending and not self._waiting:
                self._thread = None
            return set(self._waiting)

    def _listen(self, pubsub: Any) -> None:
        """Until nobody has waited for long."""
        subscribed: set[str] = set()
        look = time.monotonic() + LOOK_S
        idle = time.monotonic() + IDLE_S
        while True:
            wanted = self._wanted()
            if new := wanted - subscribed:
                pubsub.subscribe(*new)
            if gone := subscribed - wanted:
                pubsub.unsubscribe(*gone)
            subscribed = wanted
            now = time.monotonic()
            if wanted:
                idle = now + IDLE_S
            elif now > idle:
                return
            if now > look:
                if self._ask(wanted):
                    return  # it should have been heard: the connection is deaf
                look = now + LOOK_S
            self._wait(pubsub, min(look, idle) - now)
            self._hear(pubsub)

    def _wait(self, pubsub: Any, timeout_s: float) -> None:
        """Until something was published, somebody came or went, or the time is over."""
        connection = pubsub.connection
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            if connection is not None and connection._sock is not None:  # as kombu and Celery wait for it
                if connection.can_read(timeout=0):
                    return
                selector.register(connection._sock, selectors.EVENT_READ)
            selector.select(timeout_s)
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass

    def _hear(self, pubsub: Any) -> None:
        confirmed: list[str] = []
        heard: dict[str, bytes] = {}
        while pubsub.connection is not None and pubsub.connection.can_read(timeout=0):
            message = pubsub.get_message(timeout=self._timeout_s)
            if message is None:
                continue
            if message["type"] == "subscribe":
                confirmed.append(message["channel"].decode())
            elif message["type"] == "message":
                heard[message["channel"].decode()] = message["data"]
        for key, payload in heard.items():
            self._tell(key, payload)
        if confirmed:
            self._ask(confirmed)

    def _ask(self, keys: Iterable[str]) -> bool:
        """Look for results; return whether there was one."""
        keys = list(keys)
        stored = self._redis.client.mget(keys) if keys else []
        told = [self._tell(key, payload) for key, payload in zip(keys, stored, strict=True) if payload is not None]
        return any(told)

    def _tell(self, key: str, payload: bytes) -> bool:
        """Tell who waits; return whether it is final."""
        meta = self._backend.decode_result(payload)
        with self._lock:
            waiting = tuple(self._waiting.get(key, ()))
        told = [awaited.tell(meta) for awaited in waiting]  # each of them
        if any(told):
            self._redis.client.delete(key)  # it was read
        return meta["status"] in READY_STATES


_kept: tuple[settings.Settings, int, Listener] | None = None


def listener() -> Listener:
    """The listener of this process, kept as long as the settings stay; its parent's thread did not survive the fork."""
    global _kept
    s, pid = settings.current(), os.getpid()
    if _kept is None or _kept[0] is not s or _kept[1] != pid:
        _kept = s, pid, Listener(s)
    return _kept[2]
