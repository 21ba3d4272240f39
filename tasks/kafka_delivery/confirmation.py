"""Send a record and wait until it is known where it is: `send_and_wait` and, for asyncio, `asend_and_wait`.

The record goes the way of every other, through the queue, so nothing is lost when the wait ends early or the process
dies. A caller who need not know sends with `send.delay` and is free at once.
"""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from celery.result import EagerResult
from celery.states import SUCCESS

from .circuits import OPEN, circuit
from .delivery import send
from .errors import CircuitBreakerOpen, DeliveryTimeoutError, EnqueueError, KafkaDeliveryError
from .outcomes import Awaited, listener
from .record import Headers, Key, Record, Value
from .results import Delivered
from .threads import in_thread


def send_and_wait(
    topic: str,
    value: Value,
    key: Key = None,
    headers: Headers | None = None,
    *,
    partition: int | None = None,
    timestamp: datetime | int | None = None,
    message_id: str | UUID | None = None,
    timeout: float = 10.0,
) -> Delivered:
    """Queue a record as `send.delay` does, and return when it has its place in Kafka.

    Args:
        topic, value, key, headers, partition, timestamp, message_id: as for `send.delay`.
        timeout: seconds that it may take. Retries go on meanwhile, and after it.

    Returns:
        Where the record is.

    Raises:
        InvalidRecordError: the record was refused; nothing was queued.
        CircuitBreakerOpen: Kafka or the topic is known to be down; nothing was queued. Not looked at again later:
            a record that is queued waits, also for a circuit that opens meanwhile.
        EnqueueError: Redis did not confirm; sending again with the `message_id` of the error is safe.
        RejectedError, RetriesExhaustedError: Kafka's verdict. The record is a dead letter.
        DeliveryTimeoutError: it is on its way; its `message_id` says which.
    """
    until = time.monotonic() + timeout
    record = Record(topic, value, key, headers, partition, timestamp, message_id)
    result = _queue(record, repeated=message_id is not None)
    if isinstance(result, EagerResult):
        return _place(record, result.state, result.result)
    with listener().awaiting(record.id) as awaited:
        try:
            meta = awaited.future.result(max(0.0, until - time.monotonic()))
        except TimeoutError:
            if awaited.gives_up():
                raise _on_its_way(record, timeout, awaited) from awaited.attempt
            meta = awaited.future.result()
    return _place(record, meta["status"], meta["result"])


async def asend_and_wait(
    topic: str,
    value: Value,
    key: Key = None,
    headers: Headers | None = None,
    *,
    partition: int | None = None,
    timestamp: datetime | int | None = None,
    message_id: str | UUID | None = None,
    timeout: float = 10.0,
) -> Delivered:
    """As `send_and_wait`, from an event loop, which it does not block; no thread is held while it waits.

    When the task that awaits it is cancelled, the record may be queued or not, see `Send.adelay`.
    """
    until = time.monotonic() + timeout
    record = Record(topic, value, key, headers, partition, timestamp, message_id)
    queue = partial(_queue, record, repeated=message_id is not None)
    result = await in_thread(queue, partial(EnqueueError, record.id))
    if isinstance(result, EagerResult):
        return _place(record, result.state, result.result)
    with listener().awaiting(record.id) as awaited:
        try:
            meta = await asyncio.wait_for(asyncio.wrap_future(awaited.future), max(0.0, until - time.monotonic()))
        except TimeoutError:
            if awaited.gives_up():
                why = partial(_on_its_way, record, timeout, awaited)
                raise await in_thread(
                    why, partial(DeliveryTimeoutError, record.topic, record.id, timeout)
                ) from awaited.attempt
            meta = awaited.future.result()
    return _place(record, meta["status"], meta["result"])


def _queue(record: Record, repeated: bool) -> Any:
    """Queue the record, unless a circuit is open.

    Args:
        record: what to queue.
        repeated: its id may have been used before.
    """
    known = circuit(record.topic)
    if known.state == OPEN:
        problem = f"nothing was queued: the circuit of the {known.scope} is open"
        raise CircuitBreakerOpen(problem, record.topic, record.id, known.retry_after)
    if repeated:
        listener().forget(record.id)
    return send.enqueue(*send.encode((record,), {}, None), {}, listening=True)


def _on_its_way(record: Record, timeout: float, awaited: Awaited) -> DeliveryTimeoutError:
    known = circuit(record.topic)
    if known.state == OPEN:
        reason, retry_after = f"it waits: the circuit of the {known.scope} is open", known.retry_after
    else:
        reason, retry_after = "an attempt failed, and it is tried again" if awaited.attempt else "", None
    return DeliveryTimeoutError(record.topic, record.id, timeout, reason, retry_after)


def _place(record: Record, state: str, result: Any) -> Delivered:
    """Where the record is, by the final state of its task.

    Raises:
        KafkaDeliveryError: it is not in its topic.
    """
    if state == SUCCESS:
        place: Delivered = result
        return place
    if isinstance(result, KafkaDeliveryError):
        raise result
    # Revoked, expired, or an error that this version does not know.
    raise KafkaDeliveryError(f"message {record.id} is parked: {type(result).__name__}") from result
