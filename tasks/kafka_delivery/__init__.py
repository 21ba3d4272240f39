"""Deliver records from a web application to Kafka without losing them::

    from kafka_delivery import send

    send.delay("orders", {"id": 42, "total": "9.90"}, key="42")

The record waits in Redis; a Celery worker delivers it and knows that it arrived. Importing this package opens no
connection, reads no setting and leaves an application's own Celery alone.
"""

from .celery_app import app
from .circuits import Circuit, circuit
from .confirmation import asend_and_wait, send_and_wait
from .dead_letters import dead_letter
from .delivery import send, send_many
from .errors import (
    BacklogFullError,
    BulkEnqueueError,
    CircuitBreakerOpen,
    DeliveryError,
    DeliveryTimeoutError,
    EnqueueError,
    InvalidRecordError,
    KafkaDeliveryError,
    NotInWorkerError,
    ParkingFullError,
    ProducerError,
    RejectedError,
    RetriableError,
    RetriesExhaustedError,
    SettingsError,
    UnavailableError,
)
from .record import Record
from .results import Delivered, Fate, Result

__all__ = [
    "BacklogFullError",
    "BulkEnqueueError",
    "Circuit",
    "CircuitBreakerOpen",
    "Delivered",
    "DeliveryError",
    "DeliveryTimeoutError",
    "EnqueueError",
    "Fate",
    "InvalidRecordError",
    "KafkaDeliveryError",
    "NotInWorkerError",
    "ParkingFullError",
    "ProducerError",
    "Record",
    "RejectedError",
    "Result",
    "RetriableError",
    "RetriesExhaustedError",
    "SettingsError",
    "UnavailableError",
    "app",
    "asend_and_wait",
    "circuit",
    "dead_letter",
    "send",
    "send_and_wait",
    "send_many",
]


@app.on_after_finalize.connect
def _register_tasks(sender: object, **_: object) -> None:
    # Not at import: registering reads the settings, which an application may still be making.
    for task in (send, send_many, dead_letter):
        app.register_task(task)
