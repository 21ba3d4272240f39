"""Dead-letter topics: whether they are there, and how a worker, or an operator through `doctor`, creates them."""

from __future__ import annotations

import logging
import threading
from time import monotonic
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # re-exported, not marked so

from kafka_delivery.errors import DeliveryError
from kafka_delivery.settings import Settings

from .classify import delivery_error
from .producer import MISSING, Producer, librdkafka_properties

log = logging.getLogger("kafka_delivery.topics")

REMEMBERED_S = 5.0
"""How long a worker believes that a topic is missing, or that it is not."""

LOOK_S = 2.0
"""How long it waits for the cluster to say so."""

ADMIN_TIMEOUT_S = 10.0
PRODUCER_ONLY = (
    "partitioner", "compression.type", "queue.buffering.max.messages", "queue.buffering.max.kbytes", "acks",
    "enable.idempotence", "linger.ms", "request.timeout.ms", "message.timeout.ms",
)  # fmt: skip


class DeadLetterTopics:
    """Knows which are missing, and makes these where the settings allow it. For use by any thread.

    librdkafka finds out that a topic is missing by waiting, for `topic_propagation_ms`; until then each dead letter for
    that topic would hold a thread.
    """

    def __init__(self, settings: Settings, producer: Producer) -> None:
        self._settings = settings
        self._producer = producer
        self._lock = threading.Lock()
        self._missing: dict[str, tuple[float, bool]] = {}

    def missing(self, topic: str) -> bool:
        """Whether there is no such topic; False also where the cluster does not say."""
        with self._lock:  # of many threads one asks
            known_at, missing = self._missing.get(topic, (-REMEMBERED_S, False))
            if monotonic() - known_at >= REMEMBERED_S:
                missing = self._producer.lacks(topic, LOOK_S)
                self._missing[topic] = monotonic(), missing
            return missing

    def create(self, topic: str, error: DeliveryError) -> bool:
        """Make `topic` if `error` says that it is missing; True if it is there now.

        Raises:
            ProducerError: this process can make no client to ask for it now.
        """
        if not self._settings.create_dead_letter_topics or error.code not in MISSING:
            return False
        s = self._settings
        with self._lock:  # of many threads that miss it, one creates it
            try:
                client = admin(s)
            except KafkaException as fault:  # say, a certificate that is not there now
                log.error("topic.no_client topic=%s code=%s", topic, fault.args[0].name())
                raise delivery_error(KafkaError(KafkaError._PURGE_QUEUE), topic, error.message_id) from None
            failure = create_topic(client, topic, s.dead_letter_partitions, s.dead_letter_replication)
            self._missing.pop(topic, None)
        if failure is not None:
            log.error("topic.not_created topic=%s code=%s", topic, failure.name())
            return False
        log.warning("topic.created topic=%s partitions=%d", topic, s.dead_letter_partitions)
        return True


def client_properties(settings: Settings) -> dict[str, Any]:
    """What a client that produces nothing needs of a producer's properties: its way to the cluster."""
    properties = librdkafka_properties(settings)
    return {name: value for name, value in properties.items() if name not in PRODUCER_ONLY}


def admin(settings: Settings, **options: Any) -> AdminClient:
    """An admin client with the producer's way to the cluster; `options` are its own, as ``logger``."""
    return AdminClient(client_properties(settings), **options)


def create_topic(client: AdminClient, topic: str, partitions: int, replication: int) -> KafkaError | None:
    """Create `topic`; None if it is there afterwards, whoever made it."""
    future = client.create_topics(
        [NewTopic(topic, num_partitions=partitions, replication_factor=replication)], operation_timeout=ADMIN_TIMEOUT_S
    )[topic]
    try:
        future.result(ADMIN_TIMEOUT_S)
    except KafkaException as failure:
        error: KafkaError = failure.args[0]
        return None if error.code() == KafkaError.TOPIC_ALREADY_EXISTS else error
    except TimeoutError:
        return KafkaError(KafkaError._TIMED_OUT)
    return None
