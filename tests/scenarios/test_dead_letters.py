"""A record that Kafka refuses for good is kept in its dead-letter topic, as it was and with the reason in headers
that nobody can forge; what its dead-letter topic refuses too is parked whole.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import KafkaError

from kafka_delivery import Record, dead_letter, send, send_many
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import Parked, ParkingStore
from servers import Consumed, RealKafka, wait_until
from stack import Stack, message_id, stack
from watching import ALONE, emptied

REFUSED = KafkaError.POLICY_VIOLATION
"""A verdict on the topic: a dead letter at once."""

WORDS = {"original-topic", "error-message", "error-class", "error-code", "timestamp", "retry-count", "message-id"}


@pytest.fixture(scope="class")
def mock_system(redis_url: str) -> Iterator[Stack]:
    """One worker on a cluster that fails on demand."""
    with MockKafka() as kafka, stack(emptied(redis_url), kafka, TOPIC_PROPAGATION_MS=300) as system:
        system.worker(*ALONE)
        yield system


@pytest.fixture(scope="class")
def real_system(redis_url: str, real_kafka: RealKafka) -> Iterator[Stack]:
    """One worker, allowed to create dead-letter topics, on a real cluster; it makes a batch of what comes together."""
    changes = {"TOPIC_PROPAGATION_MS": 300, "LINGER_MS": 100, "CREATE_DEAD_LETTER_TOPICS": "true"}
    with stack(emptied(redis_url), real_kafka, **changes) as system:
        system.worker(*ALONE)
        yield system


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    """A name that no topic has yet."""
    return f"{request.node.name.replace('_', '-')[:60]}-{uuid.uuid4().hex[:8]}"


class TestOnAMockCluster:
    """What does not depend on the broker's own checks."""

    @pytest.fixture
    def system(self, mock_system: Stack, topic: str) -> Stack:
        mock_system.kafka.create_topic(topic)
        mock_system.kafka.create_topic(f"{topic}-dlq")
        return mock_system

    @pytest.mark.smoke
    def test_a_dead_letter_is_the_record_and_the_reason(self, system: Stack, topic: str) -> None:
        moment = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
        headers: list[tuple[str, str | bytes | None]] = [
            ("topic", "forged"),
            ("message-id", "forged"),
            ("error-class", "forged"),
            ("a", b"\x00\xff"),
            ("a", None),
            ("original-topic", "forged"),
            ("a", ""),
        ]
        before = datetime.now(UTC)
        refuse_next(system)
        sent = send.delay(topic, b"\x00secret\xff", key=b"k\x00", headers=headers, timestamp=moment)

        (letter,) = system.wait_for(f"{topic}-dlq", {sent.id})

        named = dict(letter.headers[:8])
        assert [name for name, _ in letter.headers[:8]] == [
            "original-topic",
            "error-message",
            "error-class",
            "error-code",
            "timestamp",
            "retry-count",
            "message-id",
            "record-timestamp",
        ]
        assert named["original-topic"] == topic.encode()
        assert named["error-class"] == b"RejectedError"
        assert named["error-code"] == str(REFUSED).encode()
        assert named["retry-count"] == b"0"
        assert named["message-id"] == sent.id.encode()
        assert b"POLICY_VIOLATION" in (named["error-message"] or b"")
        assert 0 < len(named["error-message"] or b"") <= 1024
        assert b"secret" not in (named["error-message"] or b"")
        died = datetime.fromisoformat((named["timestamp"] or b"").decode())
        assert before - timedelta(seconds=1) <= died <= datetime.now(UTC) + timedelta(seconds=1)

        assert letter.headers[8:] == [
            ("original-topic", b"forged"),
            ("original-message-id", b"forged"),
            ("original-error-class", b"forged"),
            ("original-a", b"\x00\xff"),
            ("original-a", None),
            ("original-original-topic", b"forged"),
            ("original-a", b""),
        ]
        assert (letter.key, letter.value) == (b"k\x00", b"\x00secret\xff")
        assert named["record-timestamp"] == b"1767323045678"
        # Its own time is now: for the record's, Kafka's retention might take it at once.
        assert before.timestamp() <= letter.timestamp / 1000 <= datetime.now(UTC).timestamp()
        assert system.read(topic) == []

    def test_a_header_of_the_users_cannot_pass_for_ours(self, system: Stack, topic: str) -> None:
        refuse_next(system)
        sent = send.delay(topic, "x", headers=dict.fromkeys(WORDS | {"topic"}, "forged"))

        (letter,) = system.wait_for(f"{topic}-dlq", {sent.id})

        first: dict[str, bytes | None] = {}
        for name, value in letter.headers:
            first.setdefault(name, value)
        assert {name for name in WORDS if first[name] == b"forged"} == set()
        assert first["original-topic"] == topic.encode()
        assert first["message-id"] == sent.id.encode()

    def test_a_tombstone_and_an_empty_key_stay_what_they_are(self, system: Stack, topic: str) -> None:
        refuse_next(system)
        sent = send.delay(topic, None, key="")

        (letter,) = system.wait_for(f"{topic}-dlq", {sent.id})

        assert (letter.value, letter.key) == (None, b"")

    def test_the_applications_own_dead_letter(self, system: Stack, topic: str) -> None:
        """An application gives up on a record for a reason of its own; its long text is cut at 1 KiB, not within a
        character."""
        text = "x" * 1023 + "\u00e9" + "rest"
        dead_letter.delay(topic, "v", message_id="mine", error_class="Mine", error_message=text, retry_count=3)

        (letter,) = system.wait_for(f"{topic}-dlq", {"mine"})

        said = dict(letter.headers)
        assert said["error-class"] == b"Mine"
        assert said["error-code"] == b""
        assert said["error-message"] == b"x" * 1023
        assert said["retry-count"] == b"3"

    @pytest.mark.smoke
    def test_without_topic_and_dead_letter_topic_it_is_parked_whole(self, mock_system: Stack, topic: str) -> None:
        headers = [("a", b"\x00"), ("a", None)]
        record = Record(topic, b"\x00\xff", "k", headers, partition=1, timestamp=1767323045678)
        send.apply_async((record,))

        (parked,) = mock_system.wait_parked()

        assert parked.id == record.id
        assert parked.kind == "dead-letter"
        assert parked.topic == topic
        assert parked.error_class == "RetriesExhaustedError"
        assert parked.error_code == KafkaError.UNKNOWN_TOPIC_OR_PART
        assert parked.retry_count == 2
        assert Record.from_wire(parked.data, "default") == record
        mock_system.wait_empty()
        wait_until(lambda: "parked" in counts.read(mock_system.redis)[topic], 60, "the counters")
        counted = counts.read(mock_system.redis)
        assert counted[topic] == {"retried": 2, "parked": 1}
        assert counted[f"{topic}-dlq"] == {"retried": 2}

    def test_many_are_parked_at_the_same_time(self, mock_system: Stack, topic: str) -> None:
        """Each thread of a worker parks at the same moment: all are kept, and none waits for another round."""
        before = {item.id for item in mock_system.parked()}
        mock_system.kafka.create_topic(topic)  # but not its dead-letter topic
        refuse_next(mock_system, 100)
        records = [Record(topic, str(n), partition=n % 4) for n in range(64)]
        send_many.delay(records)

        def parked() -> set[str]:
            return {item.id for item in mock_system.parked()} - before

        wait_until(lambda: parked() == {record.id for record in records}, 60, "64 parked")
        mock_system.wait_empty()
        assert "Too many connections" not in mock_system.workers[0].log
        assert "MaxConnectionsError" not in mock_system.workers[0].log


@pytest.mark.real
class TestOnARealCluster:
    """What only a broker with limits and permissions refuses."""

    def test_too_large_for_its_topic(self, real_system: Stack, real_kafka: RealKafka, topic: str) -> None:
        real_kafka.create_topic(topic, max_message_bytes=1000)
        real_kafka.create_topic(f"{topic}-dlq")
        value = os.urandom(3000)  # nothing that compression would make small
        sent = send.delay(topic, value, key="k")

        (letter,) = real_system.wait_for(f"{topic}-dlq", {sent.id})

        said = dict(letter.headers)
        assert said["error-class"] == b"RejectedError"
        assert said["error-code"] == str(KafkaError.MSG_SIZE_TOO_LARGE).encode()
        assert said["retry-count"] == b"0"
        assert (letter.key, letter.value) == (b"k", value)

    def test_too_large_for_its_dead_letter_topic_too(
        self, real_system: Stack, real_kafka: RealKafka, topic: str
    ) -> None:
        """It is parked whole, with what its value is to be recognised by, and found under its message id."""
        real_kafka.create_topic(topic, max_message_bytes=1000)
        real_kafka.create_topic(f"{topic}-dlq", max_message_bytes=1000)
        value = os.urandom(3000)
        sent = send.delay(topic, value, key="k", headers={"a": b"\x00"})

        wait_until(lambda: stored(real_system, sent.id) is not None, 60, "it to be parked")

        item = stored(real_system, sent.id)
        assert item is not None
        assert (item.kind, item.error_code, item.topic) == ("dead-letter", KafkaError.MSG_SIZE_TOO_LARGE, topic)
        assert (item.size, item.sha256) == (3000, hashlib.sha256(value).hexdigest())
        assert (item.key, item.headers, item.value) == (b"k", [("a", b"\x00")], value)
        real_system.wait_empty()
        assert real_system.read(topic, f"{topic}-dlq") == []  # nothing, and nothing shortened

        real_kafka.create_topic(f"{topic}-large")
        real_system.command("parked", "redrive", sent.id, "--to", f"{topic}-large", "--yes")
        (record,) = real_system.wait_for(f"{topic}-large", {sent.id})
        assert (record.key, record.value) == (b"k", value)
        assert stored(real_system, sent.id) is None

    def test_a_small_record_does_not_share_the_fate_of_a_large_one(
        self, real_system: Stack, real_kafka: RealKafka, topic: str
    ) -> None:
        """A batch is refused as a whole; each of its records is sent once more, alone."""
        real_kafka.create_topic(topic, partitions=1, max_message_bytes=1000)
        real_kafka.create_topic(f"{topic}-dlq")
        small = [Record(topic, f"small {n}") for n in range(3)]
        large = Record(topic, os.urandom(3000))
        batch = [small[0], large, *small[1:]]
        fates = send_many.apply_async((batch,), ignore_result=False).get(timeout=60)

        assert [fate["outcome"] for fate in fates] == ["delivered", "dead-lettered", "delivered", "delivered"]
        letters = real_system.wait_for(f"{topic}-dlq", {large.id})
        assert ids(letters) == [large.id]
        assert ids(real_system.read(topic)) == [one.id for one in small]

    def test_forbidden_topic(self, real_system: Stack, real_kafka: RealKafka, topic: str) -> None:
        real_kafka.create_topic(topic)
        real_kafka.create_topic(f"{topic}-dlq")
        real_kafka.deny_write(topic)
        sent = send.delay(topic, "x")

        (letter,) = real_system.wait_for(f"{topic}-dlq", {sent.id})

        said = dict(letter.headers)
        assert said["error-code"] == str(KafkaError.TOPIC_AUTHORIZATION_FAILED).encode()
        assert said["retry-count"] == b"2"
        assert real_system.read(topic) == []

    def test_a_missing_dead_letter_topic_is_created(
        self, real_system: Stack, real_kafka: RealKafka, topic: str
    ) -> None:
        before = real_system.parked()
        sent = send.delay(topic, "x")  # its topic is missing too, and stays so

        def there() -> bool:
            return f"{topic}-dlq" in real_kafka.admin.list_topics(timeout=5).topics

        wait_until(there, 60, "the dead-letter topic")
        (letter,) = real_system.wait_for(f"{topic}-dlq", {sent.id})

        assert dict(letter.headers)["original-topic"] == topic.encode()
        topics = real_kafka.admin.list_topics(timeout=5).topics
        assert len(topics[f"{topic}-dlq"].partitions) == 1
        assert topic not in topics
        assert real_system.parked() == before


def stored(system: Stack, item_id: str) -> Parked | None:
    return ParkingStore(system.redis).get(item_id)


def refuse_next(system: Stack, count: int = 1) -> None:
    assert isinstance(system.kafka, MockKafka)
    system.kafka.fail_next(REFUSED, count)


def ids(records: list[Consumed]) -> list[str]:
    return [message_id(record) for record in records]
