"""What `kafka-delivery demo` stands on: servers, processes, a reader of its own, and the account.

The story, with all that is said on the screen, is in `cli.demo`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]  # re-exported, not marked as such

from kafka_delivery import app, settings
from kafka_delivery.names import MESSAGE_ID
from kafka_delivery.settings import ENV_PREFIX, Settings

from .broadcast import Broadcast
from .embedded import MockKafka, OrphanGuard, Valkey
from .producer import librdkafka_properties
from .topics import ADMIN_TIMEOUT_S, PRODUCER_ONLY, admin, create_topic

PARTITIONS = 4
SMALL_TOPIC_BYTES = 10_000
"""`max.message.bytes` of the topic that refuses the oversize record."""

POLL_S = 0.05
READ_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 15.0
"""From SIGTERM to SIGKILL; more than the worker's own `QUICK["SHUTDOWN_TIMEOUT_S"]`."""

QUICK = {"FEW_BACKOFF_S": "1", "TOPIC_PROPAGATION_MS": "2000", "SHUTDOWN_TIMEOUT_S": "5"}
"""Settings that differ from the defaults only so that nobody has to wait a minute for a missing topic."""


class DemoError(Exception):
    """Raised when the demo cannot go on; the text says why and what to do."""


class Interrupted(Exception):
    """Raised where the demo waits, after a signal to stop.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into `Interrupted`, raised by `pause` only; a context manager.

    SIGHUP stays ignored where this process was started so: that is what `nohup` asks for. SIGINT is taken in any case.
    A shell ignores it for jobs in the background, CI systems are such shells, and Ctrl-C must still end the demo where
    a terminal sends it.

    An exception raised by the handler itself could come between the start of a process and the note that it has to be
    stopped, or in the middle of stopping it.
    """

    def __init__(self) -> None:
        self._told = Broadcast()
        self._number = 0
        self._before: dict[int, Any] = {}

    def pause(self, seconds: float | None = None) -> None:
        """Wait for `seconds`, or for a signal without them.

        Raises:
            Interrupted: a signal came, now or before.
        """
        if self._told.wait(None if seconds is None else max(0.0, seconds)):
            raise Interrupted(self._number)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self._number = number
        self._told.send()


# -- servers
@dataclass(frozen=True)
class Topics:
    """The demo's topics: one that works, one that takes small records only, and one that does not exist."""

    orders: str
    small: str
    missing: str

    @classmethod
    def named(cls, suffix: str) -> Topics:
        """The topics of one run; `suffix` tells runs on the same cluster apart."""
        return cls(f"demo-orders{suffix}", f"demo-images{suffix}", f"demo-ordres{suffix}")

    @property
    def dead_letters(self) -> list[str]:
        """The dead-letter topics of all three."""
        return [settings.current().dead_letter_topic(topic) for topic in (self.orders, self.small, self.missing)]


class EmbeddedServers:
    """A Valkey and a mock Kafka of our own, which can be broken on purpose."""

    def __init__(self) -> None:
        self._valkey = Valkey()
        self._kafka: MockKafka | None = None

    @property
    def redis_url(self) -> str:
        return self._valkey.url

    @property
    def bootstrap_servers(self) -> str:
        return self.kafka.bootstrap_servers

    @property
    def kafka(self) -> MockKafka:
        assert self._kafka is not None, "not started"  # noqa: S101  # a programming error, and mypy's question
        return self._kafka

    def create_topics(self, topics: Topics) -> None:
        for name in (topics.orders, topics.small, *topics.dead_letters):
            self.kafka.create_topic(name, PARTITIONS)

    def refuse_next_record(self) -> None:
        """Let the next record fail as too large: the mock has no limits. Twice, since it is resent alone once."""
        self.kafka.fail_next(KafkaError.MSG_SIZE_TOO_LARGE, count=2)

    def __enter__(self) -> Self:
        try:
            self._valkey.start()
            self._kafka = MockKafka()
        except (ImportError, RuntimeError, OSError) as error:
            self._valkey.stop()
            raise DemoError(str(error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.kafka.close()
        self._valkey.stop()


@dataclass(frozen=True)
class GivenServers:
    """Somebody's Redis and Kafka. The demo works beside what is there, and leaves its topics behind."""

    redis_url: str
    bootstrap_servers: str

    def create_topics(self, topics: Topics) -> None:
        """Make the topics; the worker makes the dead-letter topics when it needs them.

        Raises:
            DemoError: the cluster refused.
        """
        client = admin(settings.current())
        failure = create_topic(client, topics.orders, PARTITIONS, -1)
        if failure is not None:
            raise DemoError(f"Kafka refused to create the topic {topics.orders}: {failure.name()}")
        limit = {"max.message.bytes": str(SMALL_TOPIC_BYTES)}
        new = NewTopic(topics.small, num_partitions=PARTITIONS, replication_factor=-1, config=limit)
        try:
            client.create_topics([new], operation_timeout=ADMIN_TIMEOUT_S)[topics.small].result(ADMIN_TIMEOUT_S)
        except KafkaException as error:
            raise DemoError(f"Kafka refused to create the topic {topics.small}: {error.args[0].name()}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


Servers = EmbeddedServers | GivenServers


def use(servers: Servers) -> None:
    """Make `servers` those of this process and its children, before anything has read a setting.

    On embedded servers the user's own settings would only disturb. On given ones they say how to log in.
    """
    if isinstance(servers, EmbeddedServers):
        for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
            del os.environ[name]
    else:
        os.environ[f"{ENV_PREFIX}CREATE_DEAD_LETTER_TOPICS"] = "true"  # the mock cluster cannot
    os.environ |= {f"{ENV_PREFIX}{name}": value for name, value in QUICK.items()} | addresses(servers)


def addresses(servers: Servers) -> dict[str, str]:
    """The two settings that everyone sets."""
    return {
        f"{ENV_PREFIX}REDIS_URL": servers.redis_url,
        f"{ENV_PREFIX}BOOTSTRAP_SERVERS": servers.bootstrap_servers,
    }


# -- processes
class Process:
    """A `celery` command of our own; a context manager.

    It has a session of its own, because Ctrl-C in a terminal is for the demo, which then stops its children in order,
    and it dies with the demo, whatever kills that.
    """

    def __init__(self, name: str, arguments: list[str], log: Path) -> None:
        self.name = name
        self.log = log
        self._command = [sys.executable, "-P", "-m", "celery", *arguments]  # -P: the user may have a celery.py here
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: OrphanGuard | None = None
        self._told = False

    def check(self) -> None:
        """Make sure that it runs.

        Raises:
            DemoError: it has ended; the text ends with its log.
        """
        if self._process is None or self._process.poll() is None:
            return
        last = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise DemoError(
            f"{self.name} ended with exit code {self._process.returncode}; its log {self.log} ends:\n{last}"
        )

    def tell_to_stop(self) -> None:
        """SIGTERM, once: a worker that is told twice hurries. Leaving the context waits for the end."""
        if self._process is not None and not self._told:
            self._told = True
            self._process.terminate()

    def __enter__(self) -> Self:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603  # our own command
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        try:
            self._guard = OrphanGuard(self._process.pid)
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process, guard = self._process, self._guard
        if process is None or guard is None:
            return
        self.tell_to_stop()
        guard.release()  # before `wait` gives the pid free for others
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def worker_answers(name: str) -> bool:
    """Whether the worker of this name answers; waits for it half a second."""
    return bool(app.control.ping(destination=[name], timeout=0.5, limit=1))


def listens(port: int) -> bool:
    """Whether somebody accepts connections on a port of the loopback interface."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- reading back
@dataclass(frozen=True)
class Letter:
    """A dead letter, as a consumer sees it."""

    topic: str
    message_id: str
    headers: list[tuple[str, str]]


class Reader:
    """Reads topics back from Kafka in a thread, as any consumer would; a context manager.

    It knows nothing of the worker and its reports: a record counts when its ``message-id`` was read.

    Args:
        topics: those that take records.
        dead_letters: those that take dead letters; they may come to exist later.
    """

    def __init__(self, topics: Collection[str], dead_letters: Collection[str]) -> None:
        self.delivered: Counter[str] = Counter()
        self.letters: list[Letter] = []
        self._dead_letters = frozenset(dead_letters)
        self._topics = (*topics, *dead_letters)
        self._assigned: dict[tuple[str, int], TopicPartition] = {}
        self._finish = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="kafka-delivery-demo-reader", daemon=True)

    def sees(self, topic: str) -> bool:
        """Whether the topic exists and is being read."""
        return any(name == topic for name, _ in list(self._assigned))

    def letter(self, message_id: str) -> Letter | None:
        """The dead letter of a record, if it was read."""
        return next((letter for letter in list(self.letters) if letter.message_id == message_id), None)

    def check(self) -> None:
        """Make sure that it reads.

        Raises:
            DemoError: it does not.
        """
        if self._failure is not None:
            raise DemoError(f"reading back failed: {self._failure}") from self._failure

    def finish(self) -> None:
        """Read all that is in the topics now, and end.

        Raises:
            DemoError: not all could be read.
        """
        self._finish.set()
        self._thread.join()
        self.check()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._assigned.clear()  # nothing left to wait for
        self._finish.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            consumer = Consumer(_reading(settings.current()))
            try:
                while not self._finish.is_set():
                    self._assign_new(consumer)
                    self._read(consumer)
                self._read_to_the_end(consumer)
            finally:
                consumer.close()
        except Exception as error:
            self._failure = error

    def _assign_new(self, consumer: Consumer) -> None:
        for topic in (topic for topic in self._topics if not self.sees(topic)):
            try:
                found = consumer.list_topics(topic, timeout=1).topics[topic]
            except KafkaException:
                continue  # no broker: there are outages in this demo
            new = [TopicPartition(topic, number, OFFSET_BEGINNING) for number in found.partitions]
            if found.error is None and all(part.leader >= 0 for part in found.partitions.values()) and new:
                consumer.incremental_assign(new)
                self._assigned |= {(topic, partition.partition): partition for partition in new}

    def _read(self, consumer: Consumer) -> None:
        for message in consumer.consume(500, timeout=0.1):
            if message.error() is not None:
                continue  # the consumer mends itself
            pairs: Any = message.headers() or []  # Any: the stubs allow a dict, which never comes
            headers = [(name, "" if value is None else _text(value)) for name, value in pairs]
            message_id = dict(reversed(headers)).get(MESSAGE_ID, "")  # the first of a name counts
            topic = str(message.topic())
            if topic in self._dead_letters:
                self.letters.append(Letter(topic, message_id, headers))
            else:
                self.delivered[message_id] += 1

    def _read_to_the_end(self, consumer: Consumer) -> None:
        ends = {
            place: consumer.get_watermark_offsets(partition, timeout=READ_TIMEOUT_S)
            for place, partition in list(self._assigned.items())
        }
        left = {place: high for place, (low, high) in ends.items() if high > low}
        deadline = monotonic() + READ_TIMEOUT_S
        while left:
            self._read(consumer)
            positions = consumer.position([TopicPartition(*place) for place in left])
            left = {
                (p.topic, p.partition): left[p.topic, p.partition]
                for p in positions
                if p.offset < left[p.topic, p.partition]
            }
            if left and monotonic() > deadline:
                raise TimeoutError(f"not read to the end within {READ_TIMEOUT_S:.0f} s: {sorted(left)}")


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")


def _reading(s: Settings) -> dict[str, Any]:
    """A consumer's configuration with the producer's way to the cluster."""
    own = {*PRODUCER_ONLY, "message.max.bytes", "topic.metadata.propagation.max.ms"}
    return {name: value for name, value in librdkafka_properties(s).items() if name not in own} | {
        "client.id": "kafka-delivery-demo-reader",
        "group.id": "kafka-delivery-demo-reader",  # asked for by librdkafka, not used: partitions are assigned
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        "isolation.level": "read_committed",
        "fetch.wait.max.ms": 50,  # the mock answers a fetch only after this time, whatever comes meanwhile
        "reconnect.backoff.max.ms": 200,
        "log_level": 0,
        "error_cb": lambda _: None,
    }


# -- the account
@dataclass(frozen=True)
class Account:
    """What became of the accepted records, by message id."""

    accepted: int
    delivered: int
    dead_lettered: int
    parked: int
    duplicates: int
    lost: int


def balance(
    accepted: Collection[str], delivered: Mapping[str, int], letters: Iterable[str], parked: Collection[str]
) -> Account:
    """The account. A record in two places is a duplicate; one in no place is lost.

    Args:
        accepted: ids that `.delay()` returned.
        delivered: for each id how often it was read from its topic.
        letters: ids as they were read from dead-letter topics.
        parked: ids in the parking store.
    """
    ids = set(accepted)
    dead = Counter(letters)
    found = [ids & delivered.keys(), ids & dead.keys(), ids & set(parked)]
    copies = sum(delivered[i] for i in found[0]) + sum(dead[i] for i in found[1]) + len(found[2])
    places = set().union(*found)
    return Account(len(ids), len(found[0]), len(found[1]), len(found[2]), copies - len(places), len(ids) - len(places))


def wait(
    signals: Signals,
    done: Callable[[], bool],
    patience_s: float,
    checks: Iterable[Callable[[], None]] = (),
    moved: Callable[[], Any] = lambda: None,
) -> bool:
    """Wait until `done`; False when for `patience_s` seconds `moved` has not changed.

    Raises:
        Interrupted: a signal came.
        DemoError: raised by one of `checks`.
    """
    last, deadline = moved(), monotonic() + patience_s
    while not done():
        for check in checks:
            check()
        now = moved()
        if now != last:
            last, deadline = now, monotonic() + patience_s
        if monotonic() > deadline:
            return False
        signals.pause(POLL_S)
    return True
