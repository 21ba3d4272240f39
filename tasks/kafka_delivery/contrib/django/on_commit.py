"""Sends that wait for a transaction to be committed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, transaction

from kafka_delivery import settings
from kafka_delivery.errors import EnqueueError
from kafka_delivery.record import Record

from .signals import record_not_queued

log = logging.getLogger("kafka_delivery.django")

PATIENCE = 4
"""How long the sends of one commit may wait for a Redis that fails, in `enqueue_timeout_s`.

A request that made a hundred of them would otherwise wait a hundred times, until its server kills it; and nobody would
hear of the rest.
"""


class _Waited(threading.local):
    """By this thread, for a Redis that failed.

    Attributes:
        s: seconds in vain, in the commit that is going on.
        until: when the last such wait ended (`time.monotonic`).
    """

    s = 0.0
    until = 0.0


_waited = _Waited()


def queue_on_commit(
    sender: type, queue: Callable[[], object], records: Sequence[Record], message_id: str, using: str | None
) -> None:
    """Call `queue` when the transaction is committed, or at once where there is none; its failure is reported.

    Args:
        sender: of the signal.
        queue: raises `EnqueueError`.
        records: what it queues.
        message_id: of the record or the batch.
        using: the alias of the database; by default Django's default.

    Raises:
        ImproperlyConfigured: the app is not installed, and Django's settings for it would not be heeded.
        TransactionManagementError: autocommit is off, and no transaction of Django's is open.
    """
    if not apps.is_installed("kafka_delivery.contrib.django"):
        raise ImproperlyConfigured('delay_on_commit() needs "kafka_delivery.contrib.django" in INSTALLED_APPS')
    alias = using or DEFAULT_DB_ALIAS
    patience_s = PATIENCE * settings.current().enqueue_timeout_s
    # Hooks of a commit run one after the other: who is in a transaction has none of an earlier one to wait for. Without
    # a transaction each call is a commit, and only time tells one request from the next.
    if transaction.get_connection(alias).in_atomic_block or time.monotonic() - _waited.until > patience_s:
        _waited.s = 0.0

    def send_after_commit() -> None:
        started = time.monotonic()
        too_late = _waited.s >= patience_s
        try:
            if too_late:
                raise EnqueueError(message_id, f"not tried: this commit has waited {patience_s:g} s for Redis in vain")
            queue()
        except Exception as error:
            if not too_late:
                _waited.until = time.monotonic()
                _waited.s += _waited.until - started
            log.error(
                "record.not_queued message_id=%s records=%d database=%s error=%s reason=%r",
                message_id,
                len(records),
                alias,
                type(error).__name__,
                getattr(error, "reason", ""),
            )
            record_not_queued.send_robust(sender, records=list(records), error=error, using=alias)
            if not isinstance(error, EnqueueError):
                raise  # a fault in the code, which Django logs with its traceback, and goes on

    # Robust: what fails here keeps no other hook from running, and makes no failure of a request that is done.
    transaction.on_commit(send_after_commit, using=alias, robust=True)
