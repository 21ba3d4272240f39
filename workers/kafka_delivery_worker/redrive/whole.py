"""Dead letters that their topic did not take, whole, in the parking store: a redrive of a topic finds them there."""

from __future__ import annotations

from collections.abc import Iterator

from kafka_delivery.names import DEFAULT_CLUSTER

from ..dead_letter import DeadLetter, Origin
from ..parking import Parked, ParkingStore, fingerprint

KIND = "dead-letter"
"""Of items whose dead-letter topic refused them, for their size or another reason, or was missing."""


def letters(store: ParkingStore, topic: str, before_ms: int, cluster: str = DEFAULT_CLUSTER) -> Iterator[DeadLetter]:
    """Those that were meant for `topic`, the oldest first.

    Args:
        store: where they are.
        topic: the original one.
        before_ms: parked before that; a run does not take up what it made.
        cluster: the Kafka cluster that they are for; clusters may share the store.

    Raises:
        redis.exceptions.RedisError: Redis does not answer.
    """
    for item in store.list():
        meant = (item.kind, item.content, item.topic) == (KIND, "record", topic) and item.data[1] == cluster
        if meant and item.at_ms < before_ms:
            yield _letter(item)


def _letter(item: Parked) -> DeadLetter:
    value = item.value
    changed = item.sha256 is not None and fingerprint(value)["sha256"] != item.sha256
    return DeadLetter(
        partition=-1,
        offset=-1,
        parked_id=item.id,
        parked_at_ms=item.parked_at_ms,
        origin=Origin.OURS,
        topic=item.topic,
        key=item.key,
        value=value,
        headers=item.headers,
        timestamp_ms=item.timestamp_ms,
        message_id=item.message_id,
        error_class=item.error_class,
        error_code=item.error_code,
        error_message=item.error_message,
        at_ms=item.at_ms,
        retry_count=item.retry_count,
        redrive_count=item.redrive_count,
        problem="its value is not the one that was parked: look at it with `kafka-delivery parked show`"
        if changed
        else "",
    )
