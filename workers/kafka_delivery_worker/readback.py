"""Reads topics back to find one record: from about the time that its id tells, to where they end now.

A record lies behind the first one of its time, however late it was delivered, so the time bounds the beginning; nothing
but its being found bounds the end. It is known by its header, whatever its topic, key and partition.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from kafka_delivery.names import MESSAGE_ID
from kafka_delivery.settings import Settings

from .producer import MISSING, librdkafka_properties
from .topics import PRODUCER_ONLY

ANSWER_S = 10.0
"""How long the cluster may be silent before it is given up."""

SKEW_MS = 60_000
"""How much a caller's clock may be ahead of what stamps a topic's records."""

TAIL = 1_000
"""Records at the end of a partition that are looked at where none is as late as the id: clocks differ, and the mock
cluster knows no times."""

BATCH, POLL_S = 1_000, 0.05
"""So many at a time, or as many as came in so many seconds: less than that is waited for."""

BUFFER_KB = 16_384
"""What the consumer fetches ahead; a record may be as large as a broker takes."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A record in a topic; `headers` are the first of each name."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    headers: dict[str, str]


def told_ms(message_id: str) -> int | None:
    """The time that a message id tells, in ms since the epoch: a UUIDv7 does, others do not."""
    try:
        made = uuid.UUID(message_id)
    except ValueError:
        return None
    return made.int >> 80 if made.version == 7 else None


class Readback:
    """Looks for one record. Looking again begins where it ended; a context manager.

    Args:
        settings: the way to the cluster is the producer's.
        message_id: what to look for.
        since_ms: the time of the first records that are looked at; None for all there are.
        limit: records that are looked at, in all.
        admit: called with the id of the Kafka, "" if it has none; it raises if that is not the one that is meant.
    """

    def __init__(
        self,
        settings: Settings,
        message_id: str,
        since_ms: int | None,
        limit: int,
        admit: Callable[[str], None] = lambda kafka: None,
    ) -> None:
        self._admit = admit
        properties = {
            name: value for name, value in librdkafka_properties(settings).items() if name not in PRODUCER_ONLY
        }
        self._consumer = Consumer(
            properties
            | {
                "group.id": "kafka-delivery-trace",  # librdkafka wants one; nothing is committed and no group is joined
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "fetch.wait.max.ms": 20,  # a broker answers a connection's requests in turn, also questions for offsets
                "queued.max.messages.kbytes": BUFFER_KB,
                "log_level": 0,  # it would warn of each property that is a producer's
            }
        )
        self._wanted = message_id.encode()
        self.since_ms = since_ms
        self._next: dict[tuple[str, int], int] = {}
        self._left: dict[tuple[str, int], int] = {}
        self.limit = limit
        self.looked = 0
        self.missing: set[str] = set()
        """Topics that there are not."""

    def __enter__(self) -> Readback:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    @property
    def left(self) -> int:
        """Records that were not looked at, for the limit."""
        return sum(self._left.values())

    def look(
        self, topics: Iterable[str], watch: Callable[[int, int], None] = lambda looked, there: None
    ) -> Sighting | None:
        """The first record of that id in these topics, or None.

        Raises:
            confluent_kafka.KafkaException: the cluster refuses.
            TimeoutError: it does not answer.
        """
        ends = {place: end for topic in topics for place, end in self._ends(topic).items()}
        open_ = {place for place, end in ends.items() if self._next[place] < end}
        there = sum(ends[place] - self._next[place] for place in open_)
        looked = 0
        if not open_:
            return None
        self._consumer.assign([TopicPartition(topic, number, self._next[topic, number]) for topic, number in open_])
        heard = monotonic()
        while open_ and self.looked < self.limit:
            messages = self._consumer.consume(min(BATCH, self.limit - self.looked), POLL_S)
            if messages:
                heard = monotonic()
            elif monotonic() - heard > ANSWER_S:
                raise TimeoutError
            for message in messages:
                place = (str(message.topic()), int(message.partition() or 0))
                error = message.error()
                if error is not None:
                    _check(error)
                    if error.code() == KafkaError._PARTITION_EOF:
                        self._next[place] = ends[place]
                        open_.discard(place)
                    continue
                if place not in open_:
                    continue  # it came after the question for the end
                self._next[place] = int(message.offset() or 0) + 1
                if self._next[place] >= ends[place]:
                    open_.discard(place)
                looked += 1
                self.looked += 1
                headers = _headers(message)
                if headers.get(MESSAGE_ID) == self._wanted:
                    return _sighting(message, headers)
            watch(looked, there)
        self._left |= {place: end - self._next[place] for place, end in ends.items()}
        return None

    def _ends(self, topic: str) -> dict[tuple[str, int], int]:
        """Where each partition ends; on the way, where to begin is found out."""
        metadata = self._consumer.list_topics(topic, timeout=ANSWER_S)
        self._admit(metadata.cluster_id or "")
        found = metadata.topics[topic]
        if found.error is not None:
            if found.error.code() in MISSING:
                self.missing.add(topic)
                return {}
            raise KafkaException(found.error)
        ends = {}
        for number in found.partitions:
            place = (topic, number)
            low, ends[place] = self._consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=ANSWER_S)
            if place not in self._next:
                self._next[place] = max(low, self._begin(topic, number, low, ends[place]))
        return ends

    def _begin(self, topic: str, number: int, low: int, end: int) -> int:
        if self.since_ms is None:
            return low
        (found,) = self._consumer.offsets_for_times(
            [TopicPartition(topic, number, max(0, self.since_ms))], timeout=ANSWER_S
        )
        if found.error is not None:
            raise KafkaException(found.error)
        return found.offset if found.offset >= 0 else end - TAIL


def _check(error: KafkaError) -> None:
    """Raise what will not pass: the others are the cluster's, and show as silence if they stay."""
    if error.fatal() or error.code() in (
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
    ):
        raise KafkaException(error)


def _headers(message: Message) -> dict[str, Any]:
    headers: dict[str, Any] = {}
    given: Any = message.headers()  # confluent-kafka's types say a mapping, or text; it is pairs
    for name, value in given or ():
        headers.setdefault(name, value)
    return headers


def _sighting(message: Message, headers: dict[str, Any]) -> Sighting:
    _, timestamp_ms = message.timestamp()
    texts = {name: value.decode(errors="replace") for name, value in headers.items() if isinstance(value, bytes)}
    return Sighting(
        str(message.topic()), int(message.partition() or 0), int(message.offset() or 0), timestamp_ms, texts
    )
