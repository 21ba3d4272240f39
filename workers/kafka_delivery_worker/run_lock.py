"""One operator's command at a time on what it acts on, also where one of them stood still for a while.

The lock is a string in Redis that ends by itself: its value, the token, says who holds it. A thread renews it. A
command that stood still longer than the lock lasts (SIGSTOP, a closed laptop, a Redis that was away) finds out with its
next write: each write is a script that compares the token first. So another command may have begun and ended meanwhile.
"""

from __future__ import annotations

import functools
import getpass
import importlib.resources
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from typing import Any, Self

from redis.exceptions import RedisError

from kafka_delivery.errors import KafkaDeliveryError
from kafka_delivery.names import DEFAULT_CLUSTER, redrive
from kafka_delivery.redis_client import RedisClient

log = logging.getLogger("kafka_delivery.redrive")

LOCK_S = 10.0
"""A command that died holds its lock for so long; one that lives renews three times as often."""


class NotAloneError(KafkaDeliveryError):
    """Raised when another command holds the lock, or may have held it meanwhile; the text says who and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Who runs.

    Attributes:
        host, pid, user: of the process.
        since: when it began (ISO 8601, UTC), by its own clock.
        command: what it runs, without its options; "" where an older version did not say.
        lock_s: how long its lock lasts when it is not renewed.
    """

    host: str
    pid: int
    user: str
    since: str
    command: str = ""
    lock_s: float = LOCK_S

    @classmethod
    def here(cls, command: str = "", lock_s: float = LOCK_S) -> Runner:
        """This process."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return cls(
            host=socket.gethostname(), pid=os.getpid(), user=_user(), since=since, command=command, lock_s=lock_s
        )

    def __str__(self) -> str:
        what = f" (kafka-delivery {self.command})" if self.command else ""
        return f"{self.user}@{self.host}, process {self.pid}, since {self.since}{what}"


class RunLock:
    """One run at a time on one thing; a context manager. A thread renews it; a dead process's ends by itself.

    Args:
        redis: where it is.
        what: is locked, for people; the name of a dead-letter topic, if there is no `key`.
        lock_s: how long a dead process holds it.
        key: its name in Redis without the prefix; by default that of the dead-letter topic.
        cluster: the Kafka cluster of that dead-letter topic.
        command: what wants it, without options, as another one that is refused is told.

    Raises:
        NotAloneError: on entry: another one runs; the text says who.
    """

    def __init__(
        self,
        redis: RedisClient,
        what: str,
        lock_s: float = LOCK_S,
        key: str = "",
        command: str = "",
        cluster: str = DEFAULT_CLUSTER,
    ) -> None:
        self.key = redis.prefix + (key or f"{redrive(cluster, what)}:lock")
        self.runner = Runner.here(command, lock_s)
        self.token = json.dumps(asdict(self.runner) | {"nonce": uuid.uuid4().hex})
        self._client = redis.client
        self._script = self._client.register_script(_script())
        self._what, self._lock_s = what, lock_s
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        mine, *held = self._ask("take", self.token, self._lock_s)
        if not mine:
            raise self._held(*held)
        threading.Thread(target=self._renew, name="kafka-delivery-run-lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        try:
            self._ask("give back", self.token, self._lock_s)  # if it is another's now, it stays
        except RedisError as error:
            log.warning("run_lock.not_given_back ends_in_s=%.0f error=%s", self._lock_s, type(error).__name__)

    def lost(self) -> NotAloneError:
        """What to raise when it is found to be another's, or nobody's."""
        return NotAloneError(
            f"the lock on {self._what} was lost: Redis did not hear from this process for {self._lock_s:.0f} s. "
            "Nothing more is done; run it again to go on"
        )

    def _ask(self, what: str, token: str, lock_s: float) -> list[Any]:
        reply: list[Any] = self._script([self.key], [what, token, int(lock_s * 1000)])
        return reply

    def _held(self, holder: bytes, ends_ms: int) -> NotAloneError:
        known = _read(holder)
        if known is None:
            ends = f"in {ends_ms / 1000:.0f} s" if ends_ms >= 0 else f"never: delete {self.key} in Redis"
            return NotAloneError(
                f"{self._what} is being worked on, and nothing says by whom; its lock ends {ends}. Wait for it"
            )
        if not 0 <= ends_ms <= known.lock_s * 1000:
            # Redis's clock went back since: from now on it has its own length, and who lives renews it anyway.
            self._ask("renew", holder.decode(), known.lock_s)
            ends_ms = int(known.lock_s * 1000)
        return NotAloneError(
            f"{self._what} is being worked on by {known}. Its lock ends in {max(1, round(ends_ms / 1000))} s unless "
            "that process renews it: wait for it; if it is dead, try again then"
        )

    def _renew(self) -> None:
        while not self._stop.wait(self._lock_s / 3):
            try:
                mine, *_ = self._ask("renew", self.token, self._lock_s)
            except RedisError:
                continue  # it may be back in time
            if not mine:
                return  # the next write finds out


def _read(token: bytes) -> Runner | None:
    """Who made a token; None if that was none of ours. A newer version may say more."""
    try:
        said = json.loads(token)
        return Runner(**{name: said[name] for name in Runner.__slots__ if name in said})
    except (ValueError, TypeError):
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return f"uid {os.getuid()}"


@functools.cache
def _script() -> str:
    return importlib.resources.files(__package__).joinpath("run_lock.lua").read_text()
