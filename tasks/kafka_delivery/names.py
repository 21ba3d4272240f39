"""Names that others depend on: on the wire, in Redis, in Kafka headers. Chosen by hand, kept here and nowhere else.

A rename leaves an alias behind; whatever may change its shape carries a version.
"""

from __future__ import annotations

import re

APP = "kafka_delivery"

SEND = "kafka_delivery.send"
SEND_MANY = "kafka_delivery.send_many"
DEAD_LETTER = "kafka_delivery.dead_letter"

QUEUE = "kafka-delivery"
DEAD_LETTER_QUEUE = "kafka-delivery-dlq"

WIRE_VERSION = 1
"""Version of a record on the wire between caller and worker; a worker refuses (parks) what is newer than it knows."""

DEFERRALS = "kafka_delivery_deferrals"
"""Celery message header: how often the record was put back because of the cluster. Grows the pause, uses no attempt."""

REVIVED = "kafka_delivery_revived"
"""Celery message header: an operator sends it again, whatever revoked it before."""

MESSAGE_ID = "message-id"
"""Kafka header of every record: its id, which is its Celery task id too."""


class DeadLetterHeaders:
    """Kafka headers of a dead letter, in this order; a reader takes the first of a name."""

    ORIGINAL_TOPIC = "original-topic"
    ERROR_MESSAGE = "error-message"
    ERROR_CLASS = "error-class"
    ERROR_CODE = "error-code"
    TIMESTAMP = "timestamp"
    RETRY_COUNT = "retry-count"
    MESSAGE_ID = MESSAGE_ID
    OWN_PREFIX = "original-"


KEY_PREFIX = "kafka-delivery:"
PARKED = KEY_PREFIX + "parked:1"
"""Hash: parked id -> JSON of the parked item. The 1 is the version of its shape."""
PARKED_INDEX = KEY_PREFIX + "parked:1:at"
"""Sorted set: parked id by the time (ms) it was parked."""
COUNTS = KEY_PREFIX + "counts:1"
"""Hash: ``<outcome>:<topic>`` -> count since the beginning."""

# Of the leased transport. The 1 is the version of what lies under the name.
LEASES = KEY_PREFIX + "leases:1"
"""Sorted set: worker process -> when its lease ends (ms, by Redis's clock)."""
LEASE_CLOCK = KEY_PREFIX + "leases:1:clock"
"""Hash: ``beat``, when any worker renewed last; ``since``, from when on somebody always did (ms)."""
HELD = KEY_PREFIX + "held:1:"
"""Hash, one for each worker process: delivery tag -> message."""
DELAYED = KEY_PREFIX + "delayed:1:"
"""Sorted set, one for each list of a queue: message -> when it is due (ms)."""
DEATHS = KEY_PREFIX + "deaths:1"
"""Hash: delivery tag of the publisher -> workers that died while they held the message."""
POISON = KEY_PREFIX + "poison:1"
"""List: messages that took too many workers down, on their way to the parking store."""
GATE = KEY_PREFIX + "gate"
"""While it exists, no worker claims anything."""

WAITING = KEY_PREFIX + "waiting:1"
"""Set of ``<topic>:<list>`` whose records wait while the topic's circuit is open; each in a list of that name, behind
another colon."""

CIRCUITS = KEY_PREFIX + "cb:1:{{{cluster}}}:"
"""Base of the keys of a Kafka cluster's circuits; its hash tag keeps them in one slot."""
CLUSTER_SCOPE = "cluster"
TOPIC_SCOPE = "topic:"
PROBE = "kafka_delivery_probe"
"""Celery message header, from a worker to itself: this record is sent to see whether the circuit may close."""

RELEASED = "kafka_delivery_released"
"""Celery message header, from a worker to itself: it waited for its topic's circuit, and that is closed."""

TOPIC_MAX_LENGTH = 249
"""Kafka's limit for topic names (org.apache.kafka.common.internals.Topic)."""

_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


def is_topic_name(name: str) -> bool:
    """Whether Kafka accepts `name` for a topic (org.apache.kafka.common.internals.Topic)."""
    return _TOPIC.fullmatch(name) is not None and name not in (".", "..")
