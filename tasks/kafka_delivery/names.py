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
"""The queues of the default cluster; see `queue` and `dead_letter_queue` for those of another one."""

DEFAULT_CLUSTER = "default"
"""Name of the Kafka cluster of an installation that names none."""

WIRE_VERSION = 1
"""Version of a record on the wire between caller and worker; a worker refuses (parks) what is newer than it knows."""

DEFERRALS = "kafka_delivery_deferrals"
"""Celery message header: how often the record was put back because of the cluster. Grows the pause, uses no attempt."""

DEFERRED_EVENT = "task-deferred"
"""Celery event, beside its own ``task-retried``: the record waits for Kafka, no attempt was used. Flower, which makes a
state of an event's name, shows it as DEFERRED."""

REVIVED = "kafka_delivery_revived"
"""Celery message header: an operator sends it again, whatever revoked it before."""

REDRIVES = "kafka_delivery_redrives"
"""Celery message header: how often the record was sent again from its dead-letter topic, this time included."""

MESSAGE_ID = "message-id"
"""Kafka header of every record: its id, which is its Celery task id too."""

REDRIVE_COUNT = "redrive-count"
"""Kafka header of a record that was sent again from its dead-letter topic, and of its next dead letter: how often."""


class DeadLetterHeaders:
    """Kafka headers of a dead letter, in this order; a reader takes the first of a name."""

    ORIGINAL_TOPIC = "original-topic"
    ERROR_MESSAGE = "error-message"
    ERROR_CLASS = "error-class"
    ERROR_CODE = "error-code"
    TIMESTAMP = "timestamp"
    RETRY_COUNT = "retry-count"
    MESSAGE_ID = MESSAGE_ID
    RECORD_TIMESTAMP = "record-timestamp"  # ms since the epoch; the dead letter's own is when it was written
    REDRIVE_COUNT = REDRIVE_COUNT  # only where the record was redriven
    OWN_PREFIX = "original-"


class SpringHeaders:
    """Kafka headers of a dead letter as Spring Kafka writes them (KafkaHeaders.DLT_*); a reader takes the last of a
    name. Written are those that are known here."""

    ORIGINAL_TOPIC = "kafka_dlt-original-topic"
    ORIGINAL_PARTITION = "kafka_dlt-original-partition"
    ORIGINAL_TIMESTAMP = "kafka_dlt-original-timestamp"
    ORIGINAL_TIMESTAMP_TYPE = "kafka_dlt-original-timestamp-type"
    EXCEPTION_FQCN = "kafka_dlt-exception-fqcn"
    EXCEPTION_MESSAGE = "kafka_dlt-exception-message"


class ConnectHeaders:
    """The same as Kafka Connect writes them (org.apache.kafka.connect.runtime.errors.DeadLetterQueueReporter)."""

    TOPIC = "__connect.errors.topic"
    PARTITION = "__connect.errors.partition"
    STAGE = "__connect.errors.stage"
    EXCEPTION_CLASS = "__connect.errors.exception.class.name"
    EXCEPTION_MESSAGE = "__connect.errors.exception.message"
    RECORD_TIMESTAMP = "__connect.errors.record.timestamp"  # ms since the epoch; our own: Connect has no name for it


KEY_PREFIX = "kafka-delivery:"
PARKED = KEY_PREFIX + "parked:1"
"""Hash: parked id -> JSON of the parked item. The 1 is the version of its shape."""
PARKED_INDEX = KEY_PREFIX + "parked:1:at"
"""Sorted set: parked id by the time (ms) it was parked."""
PARKED_ROOM = KEY_PREFIX + "parked:1:room"
"""Hash: ``bytes`` that parked items take, of how many ``items`` that was counted, when, and whether it is estimated."""
PARKED_LOCK = KEY_PREFIX + "parked:1:lock"
"""String: which command redrives or discards parked items now."""
RELEASE_LOCK = KEY_PREFIX + "release:1:lock"
"""String: which `kafka-delivery release` gives messages back now."""
COUNTS = KEY_PREFIX + "counts:1"
"""Hash: ``<outcome>:<topic>`` -> count since the beginning."""

REDRIVE_GROUP = "kafka-delivery-redrive."
"""Consumer group of a dead-letter topic, of that name behind it: its lag is what waits for a redrive or a discard."""
REDRIVE_OFFSET = "kafka-delivery:1"
"""Metadata of an offset of such a group that a run moved. One without it was moved by a person."""
REDRIVE = KEY_PREFIX + "redrive:1:"
"""Of a dead-letter topic, of that name behind it. Hash: ``topic-id``, and partition -> offset below which all is done;
with ``:lock``, who runs now; with ``:<partition>:<segment>``, bits of the offsets above that are done too."""
AUDIT = KEY_PREFIX + "audit:1"
"""Stream: what operators discarded or sent again from dead-letter topics, with who and why."""

# Of the leased transport. The 1 is the version of what lies under the name.
LEASES = KEY_PREFIX + "leases:1"
"""Sorted set: worker process -> when its lease ends (ms, by Redis's clock)."""
LEASE_CLOCK = KEY_PREFIX + "leases:1:clock"
"""Hash: ``beat``, when any worker renewed last; ``since``, from when on somebody always did; ``set_back``, when the
clock was, until what was put off by it is recalled (ms)."""
LEASES_BEGAN = KEY_PREFIX + "leases:1:began"
"""Hash: worker process -> ``<when it began>:<how long its lease is>`` (ms). Workers of older versions have no entry."""
LEASES_ENDED = KEY_PREFIX + "leases:1:ended"
"""Hash: worker process that died lately -> ``<when it began>:<when it renewed last>`` (ms). It expires by itself."""
HELD = KEY_PREFIX + "held:1:"
"""Hash, one for each worker process: delivery tag -> message."""
DELAYED = KEY_PREFIX + "delayed:1:"
"""Sorted set, one for each list of a queue: message -> when it is due (ms)."""
DEATHS = KEY_PREFIX + "deaths:2"
"""Hash: digest of a message -> points for the deaths of processes that held it; see deaths.lua. Version 1, which older
workers write, has delivery tags for digests."""
POISON = KEY_PREFIX + "poison:1"
"""List: messages that took too many workers down, on their way to the parking store."""
FAILED = KEY_PREFIX + "failed:1:"
"""Hash, one for each message id: worker process -> how often it failed at that message by a fault of its own."""
PAUSED = KEY_PREFIX + "paused:1"
"""Hash: worker process that pauses itself -> JSON with ``why``, ``since_ms`` and ``at_ms``, when it last said so."""
POISON_APART = KEY_PREFIX + "poison:1:apart"
"""Hash: digest of one of these -> worker process that is taking it apart. One that died of it leaves its name there."""
GATE = KEY_PREFIX + "gate"
"""While it exists, no worker claims anything."""

WAITING = KEY_PREFIX + "waiting:1"
"""Set of ``<topic>:<list>`` whose records wait while the topic's circuit is open; each in a list of that name, behind
another colon."""

CLUSTERS = KEY_PREFIX + "clusters:1"
"""Hash: name of a Kafka cluster (``KAFKA_DELIVERY_CLUSTER``) -> the id that this Kafka has given itself."""

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

CLUSTER_MAX_LENGTH = 100
"""With it the name of a queue stays below the 255 bytes that RabbitMQ takes."""

_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")
_CLUSTER = re.compile(r"[a-zA-Z0-9._-]{1,100}")


def is_topic_name(name: str) -> bool:
    """Whether Kafka accepts `name` for a topic (org.apache.kafka.common.internals.Topic)."""
    return _TOPIC.fullmatch(name) is not None and name not in (".", "..")


def is_cluster_name(name: str) -> bool:
    """Whether `name` can be part of the name of a queue, of a key and of an option of ``celery worker``."""
    return _CLUSTER.fullmatch(name) is not None


def queue(cluster: str) -> str:
    """Return the queue of sends for the Kafka cluster of this name."""
    return QUEUE + _suffix(cluster)


def dead_letter_queue(cluster: str) -> str:
    """Return the queue of dead letters for the Kafka cluster of this name."""
    return DEAD_LETTER_QUEUE + _suffix(cluster)


def is_another_clusters(name: str, cluster: str) -> bool:
    """Whether `name` is that of a queue of another Kafka cluster than this one."""
    ours = (queue(cluster), dead_letter_queue(cluster))
    return name not in ours and any(name == one or name.startswith(f"{one}.") for one in (QUEUE, DEAD_LETTER_QUEUE))


def _suffix(cluster: str) -> str:
    return "" if cluster == DEFAULT_CLUSTER else f".{cluster}"


def redrive(cluster: str, topic: str) -> str:
    """Return the base of the keys of a dead-letter topic in the Kafka cluster of this name.

    No topic has a slash in its name, so that of one cluster's topic is never that of another's.
    """
    return REDRIVE + topic if cluster == DEFAULT_CLUSTER else f"{REDRIVE}{cluster}/{topic}"
