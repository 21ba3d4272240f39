"""What waits in a dead-letter topic: read in order, past what is done, without joining a consumer group.

The group of the topic has an offset per partition; its lag is the backlog, and every Kafka tool shows it. `DoneOffsets`
has what is done beyond it. Reading changes neither.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, NamedTuple

from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

from kafka_delivery.names import REDRIVE_GROUP, REDRIVE_OFFSET
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings

from ..dead_letter import DeadLetter, read
from ..installation import Installation
from ..producer import MISSING
from ..topics import admin, client_properties
from .done import DoneOffsets, RedriveError

librdkafka_log = logging.getLogger("kafka_delivery.librdkafka")

KAFKA_S = 10.0
"""For each answer of Kafka."""

PATIENCE_S = 30.0
"""A partition that is not at its end, and of which nothing comes for so long, is given up."""

POLL_S = 0.2

COORDINATOR_MOVES = (
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
)
"""While a broker takes over a group, or the first group of a cluster is made."""


@dataclass(frozen=True, slots=True)
class Span:
    """One partition of a dead-letter topic, at one moment.

    Attributes:
        partition: its number.
        low, end: the first offset that Kafka has, and the one behind the last.
        start: below it all is done.
        forgotten: what was remembered of it holds no more: the group's offset was reset, or the topic made anew.
    """

    partition: int
    low: int
    start: int
    end: int
    forgotten: bool = False


class Committed(NamedTuple):
    """The group's offset of a partition, and whether a run of ours moved it there, not a person."""

    at: int
    ours: bool

    def late(self, remembered: int | None) -> bool:
        """Whether a run put it behind what a newer run had reached."""
        return self.ours and remembered is not None and self.at < remembered


class Cluster:
    """The cluster's dead-letter topics, as its metadata says.

    Args:
        settings: the way to it.
        redis: where its records wait; it is the Kafka of that Redis's installation.

    Raises:
        KafkaException: it cannot be reached.
        AnotherKafkaError: its dead letters are another installation's, and would be sent to the wrong Kafka.
        redis.exceptions.RedisError: Redis does not answer.
    """

    def __init__(self, settings: Settings, redis: RedisClient) -> None:
        self.settings = settings
        self.admin: AdminClient = admin(settings, logger=librdkafka_log)
        self.metadata = self.admin.list_topics(timeout=KAFKA_S)
        Installation(redis, settings).compare(self.metadata.cluster_id or "")

    def dead_letter_topics(self) -> dict[str, list[str]]:
        """Dead-letter topics that exist, each with the topics whose letters it is for."""
        suffix, named = self.settings.dead_letter_suffix, self.settings.dead_letter_topics
        found: dict[str, list[str]] = {}
        for topic in self.metadata.topics:
            originals = [original for original, target in named.items() if target == topic]
            stem = topic.removesuffix(suffix)
            if topic.endswith(suffix) and stem and stem not in named:
                originals.append(stem)
            if originals:
                found[topic] = sorted(originals)
        return dict(sorted(found.items()))

    def dead_letter_topic(self, topic: str) -> str:
        """The dead-letter topic of `topic`, which exists.

        Raises:
            RedriveError: it does not; the text has near names.
        """
        letters = self.settings.dead_letter_topic(topic)
        if letters in self.metadata.topics:
            return letters
        known = self.dead_letter_topics()
        if topic in known:
            raise RedriveError(f"{topic} is a dead-letter topic itself; name the original: {' or '.join(known[topic])}")
        originals = sorted({original for some in known.values() for original in some})
        near = difflib.get_close_matches(topic, originals, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "`kafka-delivery dead-letters topics` lists what there is"
        )
        raise RedriveError(f"there is no topic {letters} with dead letters of {topic}; {hint}")


class Backlog:
    """The dead letters of one original topic; a context manager.

    Args:
        cluster: where they are.
        redis: where it is remembered what is done.
        topic: their dead-letter topic.
    """

    def __init__(self, cluster: Cluster, redis: RedisClient, topic: str) -> None:
        self.topic, self.group = topic, REDRIVE_GROUP + topic
        self.done = DoneOffsets(redis, topic, cluster.settings.cluster)
        self.topic_id = ""
        self.reached: dict[int, int] = {}
        """Partitions that `letters` has read to their ends, and where those were."""
        self._cluster = cluster
        self._consumer = Consumer(
            client_properties(cluster.settings)
            | {
                "group.id": self.group,  # joined by nobody: partitions are assigned
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",  # of what retention took away meanwhile
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 100,  # an end is told no sooner, and other questions wait behind it
                "queued.max.messages.kbytes": 16_384,  # memory stays flat
                "log_level": 3,  # not of each property of a producer that a consumer has no use for
                "error_cb": lambda _: None,  # a lost connection, which librdkafka mends
            },
            logger=librdkafka_log,
        )

    def __enter__(self) -> Backlog:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def spans(self) -> list[Span]:
        """The partitions as they are now.

        Raises:
            KafkaException: Kafka does not answer.
            redis.exceptions.RedisError: Redis does not.
        """
        self.topic_id = self._topic_id()
        committed = self._committed()
        known_id, floors = self.done.floors()
        another = bool(known_id and self.topic_id and known_id != self.topic_id)
        spans = []
        for partition, offset in committed.items():
            low, end = self._consumer.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=KAFKA_S)
            spans.append(_span(partition, low, end, offset, None if another else floors.get(partition)))
        return spans

    def missing(self, topics: Iterable[str]) -> list[str]:
        """Those of `topics` that are not there; asking makes none. One that may not be seen may well be there.

        Raises:
            KafkaException: Kafka does not answer.
        """
        errors = {topic: self._consumer.list_topics(topic, timeout=KAFKA_S).topics[topic].error for topic in topics}
        return [topic for topic, error in errors.items() if error is not None and error.code() in MISSING]

    def waiting(self, spans: Sequence[Span]) -> int:
        """How many offsets of `spans` are not done. Some may hold no record: transactions and compaction leave gaps."""
        return sum(
            span.end - span.start - (0 if span.forgotten else self.done.count(span.partition, span.start, span.end))
            for span in spans
        )

    def letters(
        self, spans: Sequence[Span], everything: bool = False, patience_s: float = PATIENCE_S
    ) -> Iterator[DeadLetter | None]:
        """The dead letters that wait, in order within a partition; None now and then, while nothing comes.

        Args:
            spans: where to look, up to their ends.
            everything: also what is done, as far as Kafka still has it.
            patience_s: how long nothing may come.

        Raises:
            KafkaException: a partition cannot be read.
            RedriveError: nothing came for `patience_s`.
        """
        starts = {span.partition: span.low if everything else span.start for span in spans}
        by_partition = {span.partition: span for span in spans}
        ends = {span.partition: span.end for span in spans if span.end > starts[span.partition]}
        self.reached = {span.partition: span.end for span in spans if span.partition not in ends}
        places = [TopicPartition(self.topic, partition, starts[partition]) for partition in ends]
        self._consumer.assign(places)
        self._consumer.resume(places)  # librdkafka remembers a pause beyond its assignment
        quiet_s = 0.0
        while ends:
            asked = monotonic()
            message: Any = self._consumer.poll(POLL_S)  # Any: the stubs let each field be None
            if message is None:
                quiet_s += monotonic() - asked
                if quiet_s > patience_s:
                    raise RedriveError(
                        f"Kafka sent nothing of {self.topic} for {patience_s:.0f} s, and partition {min(ends)} is not "
                        "at its end; `kafka-delivery doctor` says more"
                    )
                yield None
                continue
            quiet_s = 0.0
            partition, offset = message.partition(), message.offset()
            error: KafkaError | None = message.error()
            if error is not None and error.code() != KafkaError._PARTITION_EOF:
                raise KafkaException(error)
            if partition not in ends:
                continue
            wanted = everything or not self.is_done(by_partition[partition], offset)
            if error is None and offset < ends[partition] and wanted:
                yield read(message)
            # The last offsets need not hold a record: then the end is told as an error. It is told early, too, where a
            # transaction is still open: what is behind that was not read.
            if error is not None or offset >= ends[partition] - 1:
                self.reached[partition] = min(ends.pop(partition), offset if error is not None else offset + 1)
                self._consumer.pause([TopicPartition(self.topic, partition)])  # what came later is not asked for
        self._consumer.unassign()

    def is_done(self, span: Span, offset: int) -> bool:
        """Whether what lies at `offset` waits no more."""
        return offset < span.start or (not span.forgotten and self.done.is_done(span.partition, offset))

    def oldest(self, spans: Sequence[Span]) -> list[DeadLetter]:
        """The first dead letter that waits, of each partition that has one."""
        found = (next((one for one in self.letters([span]) if one is not None), None) for span in spans)
        return [letter for letter in found if letter is not None]

    def one(self, partition: int, offset: int) -> DeadLetter:
        """The dead letter at a place, waiting or done.

        Raises:
            RedriveError: nothing is there.
        """
        if partition not in self._partitions():
            raise RedriveError(f"{self.topic} has no partition {partition}, only {len(self._partitions())}")
        low, end = self._consumer.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=KAFKA_S)
        if low <= offset < end:
            for letter in self.letters([Span(partition, offset, offset, offset + 1)], everything=True):
                if letter is not None:
                    return letter
        raise RedriveError(
            f"nothing is at {partition}:{offset} of {self.topic}; Kafka has {low} to {end - 1} of that partition"
            if end > low
            else f"partition {partition} of {self.topic} is empty"
        )

    def commit(self, floors: Mapping[int, int], patience_s: float = KAFKA_S) -> None:
        """Move the group's offsets: below them all is done. Each says that a run of ours moved it.

        Args:
            floors: by partition.
            patience_s: how long Kafka may take.

        Raises:
            KafkaException: Kafka refuses, or does not answer in time.
            TimeoutError: it does not answer at all.
        """
        offsets = [TopicPartition(self.topic, partition, floor, REDRIVE_OFFSET) for partition, floor in floors.items()]

        def alter() -> list[TopicPartition]:
            asked = self._cluster.admin.alter_consumer_group_offsets(
                [ConsumerGroupTopicPartitions(self.group, offsets)], request_timeout=patience_s
            )
            altered: list[TopicPartition] = asked[self.group].result(patience_s + 1).topic_partitions
            return altered

        _of_the_coordinator(alter, patience_s)

    def _partitions(self) -> list[int]:
        topic = self._cluster.metadata.topics[self.topic]
        if topic.error is not None:
            raise KafkaException(topic.error)
        return sorted(topic.partitions)

    def _committed(self) -> dict[int, Committed | None]:
        """The group's offset of each partition; None where there is none."""
        asked = [TopicPartition(self.topic, partition) for partition in self._partitions()]
        found = _of_the_coordinator(lambda: self._consumer.committed(asked, timeout=KAFKA_S), KAFKA_S)
        return {
            one.partition: Committed(one.offset, ours=one.metadata == REDRIVE_OFFSET) if one.offset >= 0 else None
            for one in found
        }

    def _topic_id(self) -> str:
        """What tells the topic from one that had its name before; "" where the cluster does not say."""
        if self._cluster.metadata.controller_id not in self._cluster.metadata.brokers:
            return ""  # librdkafka's mock; it would be asked in vain
        asked = self._cluster.admin.describe_topics(TopicCollection([self.topic]), request_timeout=KAFKA_S)
        return str(asked[self.topic].result(KAFKA_S + 1).topic_id)


def _of_the_coordinator(ask: Callable[[], list[TopicPartition]], patience_s: float) -> list[TopicPartition]:
    """What a group's coordinator answers, once there is one.

    Raises:
        KafkaException: it refuses, or is not to be found for `patience_s`.
    """
    deadline = monotonic() + patience_s
    while True:
        try:
            answer = ask()
            for one in answer:
                if one.error is not None:
                    raise KafkaException(one.error)
            return answer
        except KafkaException as error:
            if error.args[0].code() not in COORDINATOR_MOVES or monotonic() > deadline:
                raise
        sleep(POLL_S)


def _span(partition: int, low: int, end: int, committed: Committed | None, remembered: int | None) -> Span:
    """Where the backlog of a partition starts, from what Kafka and we know of it.

    A group's offset that is gone was forgotten by Kafka for its age, and is known here; one that is lower than what is
    known here was reset by somebody who wants it all again, unless a run of ours moved it: that one stood still, and
    moved it after a newer run had gone further. Behind the end lies what was known of an older topic.
    """
    at = None if committed is None or committed.late(remembered) else committed.at
    forgotten = remembered is None or remembered > end or (at is not None and at < remembered)
    start = at if at is not None else remembered if remembered is not None and not forgotten else low
    if not low <= start <= end:
        start = low
    return Span(partition, low, start, end, forgotten)
