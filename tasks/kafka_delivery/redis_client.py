"""A Redis client of our own, made as the queue's is, and kept: kombu makes one for each operation."""

from __future__ import annotations

import os
from typing import Any

import redis

from .celery_app import OneTransport, sentinel_transport, tls, transport_options
from .settings import Settings

MAX_CONNECTIONS = 1_000
"""Of one process: as many as threads may want at once. Kombu's 10 would refuse the eleventh instead of waiting."""


AT_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}
"""How kombu makes its first connection, which by default it tries twice more, two seconds apart."""


class RedisClient:
    """A client that reads a URL exactly as the queue does: TLS, Sentinel, sockets, passwords. Connects on first use.

    Args:
        settings: where Redis is, and kombu's options for it.
        socket_timeout_s: for each socket operation, in seconds; by default a worker's.

    Attributes:
        prefix: of every key, kombu's ``global_keyprefix``. The client does not add it: kombu's own, which does, leaves
            all but the first key of a script without.
    """

    def __init__(self, settings: Settings, socket_timeout_s: float | None = None) -> None:
        timeout = settings.worker_socket_timeout_s if socket_timeout_s is None else socket_timeout_s
        options = transport_options(settings, timeout) | {"max_connections": MAX_CONNECTIONS} | AT_ONCE
        self._connection = OneTransport(
            settings.redis_url, ssl=tls(settings), transport=sentinel_transport(settings), transport_options=options
        )
        self.prefix: str = settings.redis_options.get("global_keyprefix", "")
        self._client: Any = None
        self._kept: Any = None
        self._pid = 0

    @property
    def client(self) -> Any:
        """A `redis.Redis`, safe to use from many threads; another one after a fork.

        Raises:
            redis.exceptions.ConnectionError: Redis cannot be reached.
        """
        if self._client is None or self._pid != os.getpid():
            self._kept = self._connection.clone()
            channel = self._kept.default_channel
            self._client = redis.Redis(connection_pool=channel.pool)
            # Else a child of prefork would disconnect it when it is born (kombu's Channel._after_fork), under a lock
            # that a thread of its parent may have held at the fork: it would wait for ever.
            channel._pool = None
            self._pid = os.getpid()
        return self._client


_kept: tuple[Settings, RedisClient] | None = None


def kept_client(settings: Settings) -> RedisClient:
    """The caller's client, kept as long as the settings stay."""
    global _kept
    if _kept is None or _kept[0] is not settings:
        _kept = settings, RedisClient(settings, settings.enqueue_timeout_s)
    return _kept[1]
