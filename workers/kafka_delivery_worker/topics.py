"""Topics that a worker, or an operator through `doctor`, may create."""

from __future__ import annotations

import logging
import threading

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # re-exported, not marked so

from kafka_delivery.errors import DeliveryError
from kafka_delivery.settings import Settings

from .producer import librdkafka_properties

log = logging.getLogger("kafka_delivery.topics")

MISSING = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC)
ADMIN_TIMEOUT_S = 10.0
PRODUCER_ONLY = (
    "partitioner", "compression.type", "queue.buffering.max.messages", "queue.buffering.max.kbytes", "acks",
    "enable.idempotence", "linger.ms", "request.timeout.ms", "message.timeout.ms",
)  # fmt: skip


class TopicCreator:
    """Makes a missing dead-letter topic, where the settings allow it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()

    def create(self, topic: str, error: DeliveryError) -> bool:
        """Make `topic` if `error` says that it is missing; True if it is there now."""
        if not self._settings.create_dead_letter_topics or error.code not in MISSING:
            return False
        s = self._settings
        with self._lock:  # of many threads that miss it, one creates it
            failure = create_topic(admin(s), topic, s.dead_letter_partitions, s.dead_letter_replication)
        if failure is not None:
            log.error("topic.not_created topic=%s code=%s", topic, failure.name())
            return False
        log.warning("topic.created topic=%s partitions=%d", topic, s.dead_letter_partitions)
        return True


def admin(settings: Settings) -> AdminClient:
    """An admin client with the producer's way to the cluster."""
    properties = librdkafka_properties(settings)
    return AdminClient({name: value for name, value in properties.items() if name not in PRODUCER_ONLY})


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
