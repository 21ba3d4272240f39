"""Our Celery app, isolated from every other one in the process.

Callers and workers share one app, because a retry and a dead letter are published through the app that runs the
task. An application that imports us usually has a Celery app of its own, and must not notice ours:

- it never becomes the current app, has no fix-ups, and takes nothing from ``CELERY_*`` variables: those speak to the
  application's app, and ``CELERY_BROKER_URL`` would otherwise redirect our sends to the application's broker
  (celery/app/utils.py, `Settings.broker_url`);
- it leaves other people's `shared_task`s alone, which Celery offers to every app it knows.
"""

from __future__ import annotations

import os
import ssl
import threading
from typing import Any, ClassVar

import celery.app.builtins  # registers Celery's own tasks as finalizers, which `finalize` below picks out
from celery import Celery, _state
from celery.app.amqp import AMQP
from celery.loaders.app import AppLoader
from kombu import Connection, Exchange, Queue
from kombu.pools import ProducerPool
from kombu.utils.functional import maybe_evaluate

from . import settings
from .names import APP, DEAD_LETTER, SEND, SEND_MANY

CALLBACK_QUEUE = "celery"
"""Where a callback goes that names no queue: Celery's default queue, on which the user's own workers listen."""


class Loader(AppLoader):
    """Celery's loader reads the module in ``CELERY_CONFIG_MODULE`` for every app; ours takes nothing from it."""

    override_backends: ClassVar = {
        "redis": "kafka_delivery.result_backend:RedisBackend",
        "rediss": "kafka_delivery.result_backend:RedisBackend",
        "sentinel": "kafka_delivery.result_backend:SentinelBackend",
    }
    """Result backends by the scheme of their URL; loaded when one is needed."""

    def read_configuration(self, env: str = "") -> dict[str, Any]:
        return {}


class OneTransport(Connection):
    """A connection that keeps its transport when it goes on to the next URL of several.

    Kombu's takes the one that the URL's scheme names, and a worker would go on without leases: several Sentinels are
    several URLs, and the next one's turn comes with the first attempt to connect that fails.
    """

    _initial_params: dict[str, Any]

    def switch(self, conn_str: str) -> None:
        super().switch(conn_str)
        self.transport_cls = self._initial_params["transport"]


class IsolatedAMQP(AMQP):
    """Celery's takes its producers from a group that all apps of a process share, and resize."""

    Connection = OneTransport
    _producer_pool: Any
    _confirming_pool: Any = None

    @property
    def producer_pool(self) -> Any:
        if self._producer_pool is None:
            self._producer_pool = ProducerPool(self.app.pool, limit=self.app.pool.limit)
        return self._producer_pool

    @property
    def confirming_pool(self) -> Any:
        """Producers that wait for RabbitMQ to confirm each message.

        Only tasks need that. While RabbitMQ is short of memory it confirms nothing; a worker's event loop, which
        publishes its heartbeats and its replies to remote control, must then go on, or nobody would empty the queues.
        """
        if self._confirming_pool is None:
            self.app._ensure_after_fork()
            connections = self.app.connection_for_write(transport_options={"confirm_publish": True})
            limit = self.app.conf.broker_pool_limit
            self._confirming_pool = ProducerPool(connections.Pool(limit=limit), limit=limit)
        return self._confirming_pool

    def _create_task_sender(self) -> Any:
        """As Celery's; to RabbitMQ a message counts as sent when it has confirmed that a queue has it."""
        send = super()._create_task_sender()

        def confirmed(producer: Any, name: str, message: Any, **options: Any) -> Any:
            s = settings.current()
            if not s.queue_on_amqp:
                return send(producer, name, message, **options)
            patience_s = s.worker_socket_timeout_s if self.app.current_worker_task else s.enqueue_timeout_s
            with self.confirming_pool.acquire(block=True) as own:
                try:
                    return send(own, name, message, **{"confirm_timeout": patience_s, "mandatory": True} | options)
                except BaseException:
                    # Its confirmation may still come, and would be taken for that of the next message.
                    own.connection.collect()
                    raise

        return confirmed


class IsolatedCelery(Celery):
    """A Celery app that takes its connections from our settings only and other people's tasks not at all."""

    amqp_cls = IsolatedAMQP
    finalized: bool
    _pool: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # shared_task registers itself with every app that Celery lists; ours is not on the list.
        _state._deregister_app(self)

    def finalize(self, auto: bool = False) -> None:
        """As `Celery.finalize`, without the `shared_task`s that others registered."""
        with self._finalize_mutex:
            if self.finalized:
                return
            self.finalized = True
            for register in tuple(_state._on_app_finalizers):
                if register.__module__ == celery.app.builtins.__name__:
                    register(self)
            while self._pending:
                maybe_evaluate(self._pending.popleft())
            for task in self._tasks.values():
                task.bind(self)
            self.on_after_finalize.send(sender=self)

    def _after_fork(self) -> None:
        super()._after_fork()
        if "amqp" in self.__dict__:
            self.amqp._confirming_pool = None
        self._local = threading.local()  # with the result backend, whose subscription is the parent's
        self._backend_cache = None

    @property
    def pool(self) -> Any:
        """Our own pool of connections; Celery's would set the limit of everybody's (kombu.pools.set_limit)."""
        if self._pool is None:
            self._ensure_after_fork()
            self._pool = self.connection_for_write().Pool(limit=self.conf.broker_pool_limit)
        return self._pool

    def connection(self, hostname: str | None = None, **kwargs: Any) -> Any:
        """As `Celery.connection`, to our queue; what Flower and the worker's banner use."""
        return super().connection(hostname or settings.current().queue_url, **kwargs)

    def connection_for_read(self, url: str | None = None, **kwargs: Any) -> Any:
        """As `Celery.connection_for_read`, to our queue whatever ``CELERY_BROKER_READ_URL`` says."""
        return super().connection_for_read(url or settings.current().queue_url, **kwargs)

    def connection_for_write(self, url: str | None = None, **kwargs: Any) -> Any:
        """As `Celery.connection_for_write`, to our queue whatever ``CELERY_BROKER_WRITE_URL`` says."""
        return super().connection_for_write(url or settings.current().queue_url, **kwargs)

    @property
    def backend_cls(self) -> str:
        """The result backend; being set here it comes before ``CELERY_RESULT_BACKEND`` (Celery._get_backend)."""
        return settings.current().redis_url

    @backend_cls.setter
    def backend_cls(self, value: Any) -> None:
        pass  # Celery.__init__ assigns what it was given, which is nothing

    def _load_config(self) -> Any:
        # A worker has given its own already; the callers' came later and won, with their short timeouts.
        self._preconf.update({**configuration(settings.current()), **self._preconf})
        return super()._load_config()


def configuration(s: settings.Settings) -> dict[str, Any]:
    """Celery's settings for callers; a worker adds its own."""
    return {
        "broker_url": s.queue_url,
        "result_backend": s.redis_url,
        **broker_options(s, s.enqueue_timeout_s),
        "broker_transport": sentinel_transport(s) if s.queue_on_redis else None,
        "broker_use_ssl": tls(s) if s.queue_on_redis else None,
        "redis_backend_use_ssl": tls(s),
        # A caller waits for Redis twice at most: once on a connection that died while idle, once on a new one.
        "task_publish_retry_policy": {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0},
        "broker_connection_max_retries": None,  # a worker outlives any outage of Redis
        "broker_connection_retry_on_startup": True,
        "broker_channel_error_retry": True,  # else one READONLY or OOM reply ends the worker
        **result_timeouts(s, s.enqueue_timeout_s, max_retries=0),
        "result_expires": s.result_expires_s,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_queues": [Queue(name, Exchange(name, type="direct"), routing_key=name) for name in s.queues],
        "task_routes": {
            SEND: {"queue": s.queue},
            SEND_MANY: {"queue": s.queue},
            DEAD_LETTER: {"queue": s.dead_letter_queue},
        },
        "task_default_queue": CALLBACK_QUEUE,
        "timezone": "UTC",
        "enable_utc": True,
    }


def broker_options(s: settings.Settings, socket_timeout_s: float) -> dict[str, Any]:
    """Celery's settings for connections to where messages wait."""
    if s.queue_on_redis:
        return {"broker_transport_options": transport_options(s, socket_timeout_s)}
    if s.queue_on_amqp:
        return {"broker_transport_options": {}, "broker_connection_timeout": socket_timeout_s}
    return {"broker_transport_options": {}}


def transport_options(s: settings.Settings, socket_timeout: float) -> dict[str, Any]:
    """Options of kombu's Redis transport; without socket timeouts a hung Redis blocks for ever."""
    return {
        "socket_timeout": socket_timeout,
        "socket_connect_timeout": socket_timeout,
        "socket_keepalive": True,
        "visibility_timeout": s.visibility_timeout_s,
        **s.redis_options,
    }


def sentinel_transport(s: settings.Settings) -> str | None:
    """The transport behind Sentinel, which asks them in a way of our own; None for kombu's, which the URL names."""
    return "kafka_delivery.sentinel:Transport" if s.redis_url.lower().startswith("sentinel://") else None


def result_timeouts(s: settings.Settings, socket_timeout_s: float, max_retries: int) -> dict[str, Any]:
    """Celery's settings for how long a result may wait for Redis; by default it tries twenty times."""
    return {
        "redis_socket_timeout": socket_timeout_s,
        "redis_socket_connect_timeout": socket_timeout_s,
        "result_backend_transport_options": {**s.redis_options, "retry_policy": {"max_retries": max_retries}},
    }


def tls(s: settings.Settings) -> dict[str, Any] | None:
    """Kombu verifies no certificate unless told to. ``?ssl_...`` in the URL replaces this; redis-py then verifies."""
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED} if s.redis_url.lower().startswith("rediss://") else None


app = IsolatedCelery(APP, set_as_current=False, fixups=[], loader=Loader)

if hasattr(os, "register_at_fork"):  # Celery sees forks of its own pool only, and no server's that has loaded us
    os.register_at_fork(after_in_child=app._after_fork)


def reload() -> None:
    """Take the settings anew, also in a process that has sent something: for tests that change them.

    Raises:
        SettingsError: a setting is wrong.
    """
    settings.current.cache_clear()
    if app.configured:
        app.conf.update(configuration(settings.current()))
    app._after_fork()  # drops the connection pools and the result backend
    app.__dict__.pop("amqp", None)  # with the queues and routes of another cluster
