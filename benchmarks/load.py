"""Servers, filled queues, and measuring from outside: what is left in Redis, what is in Kafka, what /proc says.

Linux only.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import redis
from confluent_kafka import KafkaException, Producer, TopicPartition
from confluent_kafka.admin import NewTopic, OffsetSpec  # type: ignore[attr-defined]  # re-exported, not marked as such

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from callers import noise

from kafka_delivery import Record, dead_letter, send, send_many
from kafka_delivery.names import DELAYED, HELD, LEASES, QUEUE
from kafka_delivery.record import uuid7
from kafka_delivery.settings import ENV_PREFIX
from kafka_delivery_worker.embedded import OrphanGuard
from servers import LEADERLESS, RealKafka, RealRedis, read_all, wait_until
from stack import message_id

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PARTITIONS = 4
STOCK_QUEUE = "celery"
SAMPLE_S = 0.02
WARM, TAIL = 0.15, 0.05
"""Shares of the messages: those before a window begins, and those left when it ends."""

STALLED_S = 30.0
"""Nothing at all was done for so long: the measurement is given up."""

UNSETTLED = """
local held = redis.call('HLEN', KEYS[3])
for _, owner in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do held = held + redis.call('HLEN', ARGV[1] .. owner) end
return held + redis.call('LLEN', KEYS[1])
"""
"""At one moment: what a worker takes between two questions would be in neither answer."""

_ID = "01900000-0000-7000-8000-0123456789ab"
_TOPIC = "topic-of-the-template"
_TAG, _BODY = "@TAG@", "@BODY@"
_TICKS = os.sysconf("SC_CLK_TCK")
_PUSH_BYTES = 4_000_000


@dataclass(frozen=True)
class Window:
    """What happened while it was steady.

    Attributes:
        per_second: messages that were settled, or records that were there.
        redis_us, worker_us: CPU time for each of them, of the server and of all processes of the workers.
        redis_bytes: memory of the server that each of them took while it waited; 0 where that was not looked at.
    """

    per_second: float
    redis_us: float
    worker_us: float
    redis_bytes: float = 0.0


class Stats(NamedTuple):
    """Counters of the Redis server, without what asks for them.

    Attributes:
        time: when they were read.
        commands: executed, in scripts too.
        requests: sent by clients; a script is one.
    """

    time: float
    commands: int
    requests: int


class _Point(NamedTuple):
    time: float
    done: int
    redis: float
    workers: float


class Servers:
    """A real Kafka and a real Redis, and what is asked of them from outside."""

    def __init__(self, kafka: RealKafka, server: RealRedis) -> None:
        self.kafka = kafka
        self.server = server
        self.redis: Any = redis.Redis.from_url(server.url, socket_timeout=60)
        self._unsettled = self.redis.register_script(UNSETTLED)
        self._topics = itertools.count()

    def env(self, **changes: str) -> dict[str, str]:
        """An environment for one of our processes, or for a peer."""
        ours = {
            "REDIS_URL": self.server.url,
            "BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "TRANSPORT": "leased",
            "POOL": "in-flight",
            **changes,
        }
        foreign = (ENV_PREFIX, "CELERY_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return clean | {ENV_PREFIX + name: value for name, value in ours.items()}

    # -- Redis
    def empty(self) -> None:
        """Forget everything, and let no rest of it be written while something is measured."""
        self.redis.flushall()
        self.redis.bgrewriteaof()
        wait_until(self._aof_is_quiet, 60, "the AOF to be rewritten")

    def _aof_is_quiet(self) -> bool:
        info = self.redis.info("persistence")
        return not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]

    def waiting(self, queue: str) -> int:
        """Messages that are not settled: in the queue, or held by a worker."""
        return int(self._unsettled(keys=[queue, LEASES, "unacked"], args=[HELD]))

    def delayed(self) -> int:
        """Messages that wait in Redis for their time."""
        return sum(self.redis.zcard(key) for key in self.redis.scan_iter(DELAYED + "*", count=1000))

    def cpu(self) -> float:
        """Seconds of CPU that the Redis server has used."""
        info = self.redis.info("cpu")
        return float(info["used_cpu_sys"] + info["used_cpu_user"])

    def memory(self) -> int:
        """Bytes of memory that the data of the Redis server take."""
        return int(self.redis.info("memory")["used_memory_dataset"])

    def stats(self) -> Stats:
        """What the Redis server has done until now."""
        commands = self.redis.info("commandstats")
        reads = self.redis.info("stats")["total_reads_processed"]
        executed = sum(stat["calls"] for name, stat in commands.items() if name != "cmdstat_info")
        return Stats(time.monotonic(), executed, reads - commands.get("cmdstat_info", {"calls": 0})["calls"])

    # -- Kafka
    def topics(self, count: int = 1, config: dict[str, str] | None = None) -> list[str]:
        """New topics, which can be written to."""
        names = [f"bench-{next(self._topics)}" for _ in range(count)]
        self.create(names, config)
        return names

    def create(self, names: list[str], config: dict[str, str] | None = None) -> None:
        """Topics of these names, of four partitions each."""
        made = self.kafka.admin.create_topics([NewTopic(name, PARTITIONS, 1, config=config or {}) for name in names])
        for future in made.values():
            future.result(30)

        def led() -> bool:
            known = self.kafka.admin.list_topics(timeout=10).topics
            return all(
                name in known
                and len(known[name].partitions) == PARTITIONS
                and all(part.leader >= 0 for part in known[name].partitions.values())
                for name in names
            )

        wait_until(led, 30, f"no leaders for {len(names)} topics")

    def open(self, topics: list[str]) -> int:
        """Write a record into each partition, the first of which takes Kafka longest; return how many."""
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap_servers})
        for name in topics:
            for part in range(PARTITIONS):
                producer.produce(name, b"", partition=part, headers={"message-id": f"first-{name}-{part}"})
        producer.flush(60)
        return len(topics) * PARTITIONS

    def in_kafka(self, topics: list[str]) -> int:
        """Records in topics that nothing but idempotent producers wrote to: there, each has an offset."""
        end: Any = OffsetSpec
        places = {TopicPartition(name, part): end.latest() for name in topics for part in range(PARTITIONS)}
        deadline = time.monotonic() + 30
        while True:
            try:
                return sum(int(future.result(10).offset) for future in self.kafka.admin.list_offsets(places).values())
            except KafkaException as error:
                # On a busy machine a broker may miss its heartbeats, and lead in a new epoch after that.
                if error.args[0].code() not in LEADERLESS or time.monotonic() > deadline:
                    raise
                self.kafka.admin.list_topics(timeout=10)

    def appended(self, topic: str) -> dict[str, int]:
        """The records of a topic, read by a consumer of its own: message id -> timestamp (ms)."""
        records = read_all(self.kafka.bootstrap_servers, [topic], timeout=60)
        return {message_id(record): record.timestamp for record in records}

    def expect(self, topics: list[str], count: int, *, distinct: bool = False) -> None:
        """Check that exactly `count` records are in Kafka.

        Args:
            distinct: also read them, and check that each has a message id of its own.

        Raises:
            RuntimeError: it is another number.
        """
        found = self.in_kafka(topics)
        if found != count:
            raise RuntimeError(f"{found} records are in Kafka, and {count} were sent")
        if distinct:
            ids = {name for topic in topics for name in self.appended(topic)}
            if len(ids) != count:
                raise RuntimeError(f"{len(ids)} different records are in Kafka, and {count} were sent")


@contextmanager
def start_servers(warm_records: int) -> Iterator[Servers]:
    """Start both; Kafka's first seconds are its compiler's, so it is warmed up with `warm_records` first.

    The AOF is rewritten between measurements and not in the middle of one.
    """
    with (
        tempfile.TemporaryDirectory(prefix="kafka-delivery-bench-") as directory,
        RealRedis(Path(directory) / "redis", options={"auto-aof-rewrite-percentage": "0"}) as server,
        RealKafka(Path(directory) / "kafka") as kafka,
    ):
        both = Servers(kafka, server)
        os.environ.update(both.env())  # this process is the application that fills queues
        (topic,) = both.topics()
        with Process(both, [sys.executable, "peers.py", "raw", topic, str(warm_records), "200", "0"]) as producing:
            producing.begin()
            producing.wait_end(120)
        try:
            yield both
        finally:
            both.redis.close()


class Process:
    """A worker or a peer, in a process group of its own, which ends with this object."""

    def __init__(self, servers: Servers, command: list[str], **settings: str) -> None:
        self._command = command
        self._env = servers.env(**settings)
        self._log = tempfile.NamedTemporaryFile(prefix="kafka-delivery-bench-", suffix=".log")  # noqa: SIM115

    def __enter__(self) -> Self:
        read, self._input = os.pipe()
        self._process = subprocess.Popen(  # noqa: S603  # our own programs
            self._command,
            cwd=HERE,
            env=self._env,
            stdin=read,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        os.close(read)
        self._guard = OrphanGuard(self.pid)
        try:
            wait_until(lambda: self._ended() or " ready." in self.log, 60, f"{self._command[-1]} is not ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Nothing is handed back: what was to be measured is measured, and the next one begins with an empty Redis.
        self._guard.release()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._input)
        self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def _ended(self) -> bool:
        if self._process.poll() not in (None, 0):
            raise RuntimeError(f"a process ended: {self.log[-2000:]}")
        return self._process.returncode == 0

    def begin(self) -> None:
        """Send a line of input, for which a peer may wait."""
        os.write(self._input, b"\n")

    def check(self) -> None:
        """Raises RuntimeError when the process has failed."""
        self._ended()

    def wait_end(self, timeout: float) -> None:
        """Wait until the process has ended well."""
        wait_until(self._ended, timeout, f"{self._command[-1]} does not end")

    def cpu(self) -> float:
        """Seconds of CPU that its processes have used."""
        return sum(int(fields[11]) + int(fields[12]) for fields in self._stats()) / _TICKS

    def rss(self) -> int:
        """Bytes of memory that its processes have."""
        return sum(int(fields[21]) for fields in self._stats()) * os.sysconf("SC_PAGE_SIZE")

    def _stats(self) -> Iterator[list[str]]:
        """Of each process of the group, the fields of /proc/<pid>/stat from the state on (man 5 proc)."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if int(fields[2]) == self.pid:
                yield fields


def our_worker(servers: Servers, *arguments: str, **settings: str) -> Process:
    """A worker of ours, in flight and leased."""
    command = [str(BIN / "celery"), "-A", "kafka_delivery_worker", "worker", "--loglevel=INFO"]
    return Process(servers, [*command, "-n", f"{uuid7()}@bench", *arguments], **settings)


def stock_worker(servers: Servers, pool: str, concurrency: int, *arguments: str) -> Process:
    """A worker of stock Celery with the tasks of `peers`."""
    command = [str(BIN / "celery"), "-A", "peers", "worker", "--loglevel=WARNING", f"--pool={pool}"]
    return Process(servers, [*command, f"--concurrency={concurrency}", *arguments])


def bare_loop(servers: Servers) -> Process:
    """The loop without Celery."""
    return Process(servers, [sys.executable, "peers.py", "bare"])


def raw_producer(servers: Servers, topic: str, count: int, size: int, *, with_ids: bool) -> Process:
    """librdkafka alone; it begins at once. With ids, its records are those that a worker would send."""
    return Process(servers, [sys.executable, "peers.py", "raw", topic, str(count), str(size), str(int(with_ids))])


def call(servers: Servers, *arguments: str) -> Any:
    """Run one of `callers` and return what it prints."""
    done = subprocess.run(  # noqa: S603  # our own program
        [sys.executable, "callers.py", *arguments],
        cwd=HERE,
        env=servers.env(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"callers.py {arguments[0]} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


# -- filled queues
@dataclass(frozen=True)
class Template:
    """A message as Celery wrote it, with places for what differs from one to the next."""

    envelope: list[str]
    body: list[str]
    value: str

    @classmethod
    def written(cls, servers: Servers, write: Callable[..., Any], value: str, queue: str) -> Template:
        """The message that `write()` puts into its queue; nobody works on that yet.

        Args:
            value: what is replaced in it by the value of each record; "" for nothing.
            queue: where it is then, and is taken out again.
        """
        write()
        envelope = json.loads(servers.redis.rpop(queue))
        body = b64decode(envelope["body"]).decode()
        envelope["properties"]["delivery_tag"] = _TAG
        envelope["body"] = _BODY
        places = re.compile("|".join(f"({re.escape(text)})" for text in (_ID, _TOPIC, _TAG, _BODY, value) if text))
        return cls(_parts(places, json.dumps(envelope)), _parts(places, body), value)

    def message(self, place: int, topic: str) -> str:
        """The message number `place`, with a new id."""
        message_id = uuid7()
        given = {_ID: message_id, _TOPIC: topic, _TAG: f"{message_id}-tag"}
        if self.value:
            given[self.value] = noise(place, len(self.value))
        given[_BODY] = b64encode("".join([given.get(part, part) for part in self.body]).encode()).decode()
        return "".join([given.get(part, part) for part in self.envelope])


def _parts(places: re.Pattern[str], text: str) -> list[str]:
    return [part for part in places.split(text) if part]


def single(servers: Servers, size: int) -> Template:
    """A plain send of ours with a value of `size` characters."""
    value = noise(1, size)
    write = functools.partial(send.apply_async, (_TOPIC, value), {"message_id": _ID})
    return Template.written(servers, write, value, QUEUE)


def batch(servers: Servers, records: int, size: int) -> Template:
    """A batch of ours; its records differ from each other, and only in their ids from those of the next batch."""
    members = [Record(_TOPIC, noise(place, size), message_id=f"{_ID}.{place}") for place in range(records)]
    return Template.written(servers, functools.partial(send_many.apply_async, (members,), task_id=_ID), "", QUEUE)


def stock(servers: Servers, task: str, size: int) -> Template:
    """A call of a task of `peers`, with a topic and a value."""
    import peers  # reads the environment, which `start_servers` made

    value = noise(1, size)
    write = functools.partial(getattr(peers, task).apply_async, (_TOPIC, value), task_id=_ID)
    return Template.written(servers, write, value, STOCK_QUEUE)


def fill(servers: Servers, template: Template, count: int, topics: list[str], into: str = "filled") -> None:
    """Write `count` messages into a list, the topics in turn."""
    chunk: list[str] = []
    size = 0
    for place in range(count):
        chunk.append(template.message(place, topics[place % len(topics)]))
        size += len(chunk[-1])
        if size > _PUSH_BYTES or place == count - 1:
            servers.redis.lpush(into, *chunk)
            chunk, size = [], 0


def later(topic: str, seconds: float) -> None:
    """Queue a send and a dead letter that are due in so many seconds."""
    for task in (send, dead_letter):
        task.apply_async((topic, noise(0, 200)), countdown=seconds)


# -- measuring
def drain(
    servers: Servers,
    workers: list[Process],
    queue: str,
    count: int,
    *,
    seconds: float,
    delivered: Callable[[], int] | None = None,
    records: int = 1,
) -> Window:
    """Hand the list "filled" to idle workers in one step, and measure while they work it off.

    The window begins when some have been done and ends after `seconds`, or when few are left.

    Args:
        count: the messages in the list.
        delivered: what is done by now, where messages are too coarse; by default what is not waiting.
        records: of each message, which is what is counted then.
    """
    total = count * records

    def settled() -> int:
        return (count - servers.waiting(queue)) * records

    def hand_over() -> None:
        servers.redis.rename("filled", queue)

    return observe(servers, workers, delivered or settled, total, seconds, hand_over)


def observe(
    servers: Servers,
    workers: list[Process],
    done: Callable[[], int],
    total: int,
    seconds: float,
    begin: Callable[[], None] | None = None,
) -> Window:
    """The steady part of going from nothing to `total`; the whole where it goes too fast to see one.

    Args:
        begin: what sets it off, where it has not begun yet.
    """

    def point(progress: int | None = None) -> _Point:
        now, progress = time.monotonic(), done() if progress is None else progress
        return _Point(now, progress, servers.cpu(), sum(worker.cpu() for worker in workers))

    start, first = point(0 if begin else None), None
    if begin:
        begin()
    progress, moved = start.done, start.time
    while progress < total * (1 - TAIL) and (first is None or time.monotonic() - first.time < seconds):
        time.sleep(SAMPLE_S)
        before, progress = progress, done()
        if progress > before:
            moved = time.monotonic()
        elif time.monotonic() - moved > STALLED_S:
            raise RuntimeError(f"only {progress} of {total} were done, and no more for {STALLED_S:.0f} s")
        for worker in workers:
            worker.check()
        if first is None and progress >= total * WARM:
            first = point()
    last = point()
    if first is None or last.done - first.done < total / 10:
        first = start
    count = last.done - first.done
    if count <= 0:
        raise RuntimeError(f"{first.done} of {total} were done before it began, and {last.done} in the end")
    return Window(
        per_second=count / (last.time - first.time),
        redis_us=(last.redis - first.redis) / count * 1e6,
        worker_us=(last.workers - first.workers) / count * 1e6,
    )


def finish(servers: Servers, queue: str, timeout: float = 60) -> None:
    """Wait until nothing is left."""
    wait_until(lambda: servers.waiting(queue) == 0, timeout, f"{queue} to be empty")
