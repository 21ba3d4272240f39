"""The worker's Celery app: the callers' app with a worker's settings, started and stopped with the engine."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
from itertools import zip_longest
from typing import Any

import billiard.pool
from celery import signals
from celery.concurrency.prefork import TaskPool as PreforkPool

from kafka_delivery import app, sentinel, settings
from kafka_delivery.celery_app import broker_options, result_timeouts, sentinel_transport
from kafka_delivery.errors import SettingsError
from kafka_delivery.faults import QUEUE_FAULTS
from kafka_delivery.redis_client import RedisClient

from . import decompression, engine, logs
from .client import NotMadeError
from .dotted import load
from .installation import AnotherKafkaError, Installation
from .producer import ask_for_id, check_properties

log = logging.getLogger("kafka_delivery.worker")

IN_FLIGHT_POOL = "kafka_delivery_worker.pool:TaskPool"
DEFAULT_POOL = "threads"
"""All threads share one producer, and a thread that waits for a report costs nothing but its stack."""

START_S = 2.0
"""How long a worker that starts waits for Kafka's id, in seconds. Without it the worker starts, too."""

FLOWER_DEFAULTS = {
    "FLOWER_ADDRESS": "127.0.0.1",  # its /metrics and /healthcheck ask nobody for a password
    "FLOWER_TASKS_COLUMNS": "uuid,state,args,exception,name,received,worker",
}
"""How Flower starts on this app; its own command line, flowerconfig.py and the environment come before these."""

FOREIGN_VARIABLES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")


@functools.cache
def worker_app() -> Any:
    """The app, with a worker's settings.

    Raises:
        SettingsError: a setting is wrong; nothing was started.
    """
    s = settings.current()
    missing = check_properties(s)
    if missing:
        log.warning("worker.no_client reason=%r", missing)  # it waits for that, as for a Kafka that is away
    if _is_flower(sys.argv):
        for variable, value in FLOWER_DEFAULTS.items():
            os.environ.setdefault(variable, value)
    elif s.on_dead_letter:
        load("KAFKA_DELIVERY_ON_DEAD_LETTER", s.on_dead_letter)
    sentinel.watch()
    pool = _asked_pool(sys.argv)
    # Where messages are not leased, a connection that breaks gives back what is in flight, and all of it is sent twice.
    in_flight = s.pool == "in-flight" and s.leases
    if pool == "prefork":
        # A stopping child waits up to 30 s (300 x 0.1) for its parent to read its last results, which the parent does
        # not do while it stops; then a supervisor's patience is at its end. What is not read is delivered again.
        billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 20
    app.conf.update(
        **broker_options(s, s.worker_socket_timeout_s),
        broker_transport=_transport(s),
        **result_timeouts(s, s.worker_socket_timeout_s, max_retries=20),
        worker_pool=pool or (IN_FLIGHT_POOL if in_flight else DEFAULT_POOL),
        # Processes are bounded by cores, which is Celery's default; threads by how many sends may wait.
        worker_concurrency={"prefork": None, "solo": 1}.get(pool, s.concurrency),
        worker_prefetch_multiplier=1,  # what a stopping or dying worker holds is what it must give back
        # After a reconnect Celery would leave room for less, and raise it again from the threads that acknowledge: each
        # asks RabbitMQ, on the connection that the event loop reads, and both hang.
        worker_enable_prefetch_count_reduction=False,
        worker_consumer="kafka_delivery_worker.consumer:Consumer",
        worker_hijack_root_logger=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the record's report decides, not the queue's link
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0, "interval_step": 0.5, "interval_max": 1},
    )
    decompression.bound_kombu()
    logs.be_plain()
    logs.be_terse()
    if s.log_format == "json":
        logs.use_json()
    signals.celeryd_after_setup.connect(_started)
    if in_flight and not pool:
        signals.worker_ready.connect(_settle_down)
    if s.metrics_port:
        signals.worker_ready.connect(_serve_metrics)
        signals.worker_process_init.connect(_serve_metrics)  # a child of prefork, which delivers by itself
    signals.worker_shutting_down.connect(_told_to_stop)
    signals.worker_process_shutdown.connect(_process_ends)
    signals.worker_shutdown.connect(_worker_ends)
    return app


def _transport(s: settings.Settings) -> str | None:
    """The transport that takes messages; None for the one that the URL names."""
    if _is_flower(sys.argv):
        return None
    if not s.leases:
        return sentinel_transport(s) if s.queue_on_redis else None
    kind = "Transport" if sentinel_transport(s) is None else "SentinelTransport"
    return f"kafka_delivery_worker.transport:{kind}"


def _is_flower(argv: list[str]) -> bool:
    """Whether this is `celery flower`, which takes no messages, and knows queues by Celery's own transports only."""
    return "flower" in argv and "worker" not in argv


def _asked_pool(argv: list[str]) -> str:
    """The pool named on the command line, "" for none.

    Celery cannot tell `-P prefork` from no choice, since that is its default, and would take the configured pool
    (celery/bin/worker.py, WorkersPool.convert).
    """
    for option, value in zip_longest(argv, argv[1:], fillvalue=""):
        if option in ("-P", "--pool"):
            return value
        if option.startswith("--pool="):
            return option.removeprefix("--pool=")
        if option.startswith("-P"):
            return option.removeprefix("-P")
    return ""


def _started(instance: Any, **_: Any) -> None:
    _refuse_redis_cluster(settings.current())
    _refuse_another_kafka(settings.current())
    try:
        check_time_limits(settings.current(), instance.pool_cls, instance.time_limit, instance.soft_time_limit)
    except SettingsError as error:
        # Not as it is: Celery logs what a signal's receiver raises, and goes on.
        raise SystemExit(f"kafka-delivery: {error}") from None
    if not settings.current().leases:
        log.warning("worker.celery_transport: messages have the guarantees of Celery and its broker, which are weaker")
    log.warning("worker.settings %r", settings.current())
    for variable in FOREIGN_VARIABLES:
        if os.environ.get(variable):
            log.warning("worker.ignored variable=%s use=KAFKA_DELIVERY_REDIS_URL", variable)


def check_time_limits(s: settings.Settings, pool: Any, hard: float | None, soft: float | None) -> None:
    """Refuse a worker's time limit that ends an attempt before its report can be there; other pools have no limits.

    Raises:
        SettingsError: it does.
    """
    if not (isinstance(pool, type) and issubclass(pool, PreforkPool)):
        return
    for option, limit in (("--time-limit", hard), ("--soft-time-limit", soft)):
        if limit and limit < s.attempt_timeout_s:
            raise SettingsError(
                f"{option}={limit:g} (or task{option[1:].replace('-', '_')}) ends a process before Kafka has confirmed "
                "its record, which would be sent again and again: leave it out, or give at least "
                f"{s.attempt_timeout_s:g}, which is twice the wait for a report "
                f"({settings.ENV_PREFIX}MESSAGE_TIMEOUT_MS and {settings.REPORT_GRACE_MS} ms)"
            )


def _refuse_another_kafka(s: settings.Settings) -> None:
    """Compare Kafka with the one that the cluster's name stands for; each client is compared once more when it is made.

    Raises:
        SystemExit: it is another one.
    """
    try:
        Installation(RedisClient(s), s).remember(ask_for_id(s, START_S))
    except AnotherKafkaError as error:
        # Not as it is: Celery logs what a signal's receiver raises, and goes on.
        raise SystemExit(f"kafka-delivery: {error}") from None
    except NotMadeError as error:
        log.warning("worker.kafka_not_compared reason=%r", str(error))
    except QUEUE_FAULTS as error:  # it is away; the worker waits for it
        log.warning("worker.kafka_not_compared error=%s", type(error).__name__)


def _refuse_redis_cluster(s: settings.Settings) -> None:
    """Kombu cannot use one: a worker would fail at its first message that lies on another node."""
    if not s.queue_on_redis:
        return
    try:
        clustered = RedisClient(s).client.info("cluster")["cluster_enabled"]
    except QUEUE_FAULTS as error:  # it is away; the worker waits for it
        log.warning("worker.redis_not_checked error=%s", type(error).__name__)
        return
    if clustered:
        # Not an ordinary error: Celery logs those that a signal's receiver raises, and goes on.
        raise SystemExit(
            "kafka-delivery: KAFKA_DELIVERY_REDIS_URL names a Redis Cluster, which Celery cannot use; "
            "name a single Redis or Valkey, or one behind Sentinel"
        )


def _settle_down(**_: Any) -> None:
    # Records in flight set off full collections of Celery's whole heap, a quarter of what a send costs. What is there
    # once the worker is ready stays.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 2, 5)  # a failure leaves cycles with a copy of its traceback


def _serve_metrics(**_: Any) -> None:
    _serve_metrics_of(os.getpid())


@functools.cache
def _serve_metrics_of(pid: int) -> None:
    """Once in a process: the pool `solo` sends both signals in the same one."""
    from .metrics.worker import serve  # where nobody asks for metrics, prometheus_client is not loaded

    serve(engine.current(), settings.current())


def _told_to_stop(how: str = "", **_: Any) -> None:
    # Runs in a signal handler: a Broadcast only closes a file.
    if engine.stopping.sent or how == "Cold":
        engine.hurrying.send()
    engine.stopping.send()


def _process_ends(**_: Any) -> None:
    # A cold stop may end here without a word before. A thread whose record the client drops now must give its message
    # back, and not queue another one beside it.
    engine.stopping.send()
    engine.close()


def _worker_ends(**_: Any) -> None:
    _process_ends()
    if settings.current().leases:
        from .transport import process_lease

        try:
            process_lease().stop()
        except QUEUE_FAULTS as error:  # then it runs out
            log.warning("lease.not_returned error=%s", type(error).__name__)
