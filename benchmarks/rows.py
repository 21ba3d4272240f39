"""The rows of the table: each function measures one thing, ours and the peer's beside each other.

Where a rate is measured, messages in Celery's own format wait in a list before anything is timed; workers are started
and idle; the list then becomes their queue in one step. What is timed is the steady part of working it off.
"""

from __future__ import annotations

import os
import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace

from load import (
    STOCK_QUEUE,
    Process,
    Servers,
    Window,
    bare_loop,
    batch,
    call,
    drain,
    fill,
    finish,
    later,
    observe,
    our_worker,
    raw_producer,
    single,
    stock,
    stock_worker,
)

from kafka_delivery import settings
from kafka_delivery.names import DEAD_LETTER_QUEUE, QUEUE
from kafka_delivery.record import uuid7
from kafka_delivery_worker import breaker as circuit_breaker
from kafka_delivery_worker.embedded import free_port
from kafka_delivery_worker.metrics.meters import EndToEnd
from servers import wait_until

VALUE_SIZE = 200
BATCH = 500
INTERVAL_S = 0.03
FAR, FAR_S = 100, 3_600.0
DUE, SETTLE_S = 4, 0.5
"""Delayed messages in each of two queues of an idle worker: those of later, and those that become due meanwhile."""

LITTLE = 60
"""Bytes of a value in the row about memory: what is in flight is bounded in bytes, and is not the question there."""


@dataclass(frozen=True)
class Sizes:
    """How much each measurement does; `scaled` for trying whether all of it works."""

    rounds: int = 2
    singles: int = 60_000
    stock: int = 3_000
    batches: int = 800
    raw: int = 400_000
    window_s: float = 3.0
    calls_s: float = 2.0
    sends: int = 300
    idle_s: float = 10.0
    waiting: int = 1_000_000
    down_s: float = 15.0
    warm: int = 600_000

    @classmethod
    def short(cls) -> Sizes:
        return cls(
            rounds=1, singles=30_000, stock=2_500, batches=400, raw=200_000, calls_s=1.0, idle_s=5.0, waiting=200_000,
            warm=300_000,
        )  # fmt: skip

    def scaled(self, factor: float) -> Sizes:
        """The same with less of everything, but for the rounds."""
        return Sizes(
            rounds=self.rounds,
            singles=max(1_000, int(self.singles * factor)),
            stock=max(300, int(self.stock * factor)),
            batches=max(4, int(self.batches * factor)),
            raw=max(50_000, int(self.raw * factor)),
            window_s=self.window_s,
            calls_s=max(0.2, self.calls_s * factor),
            sends=max(20, int(self.sends * factor)),
            idle_s=max(1.0, self.idle_s * factor),
            waiting=max(5_000, int(self.waiting * factor)),
            down_s=max(1.0, self.down_s * factor),
            warm=max(10_000, int(self.warm * factor)),
        )


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: for programs.
        what: for people.
        unit: of both numbers.
        peer: who that is; "" where there is none and `wanted` speaks of our number, not of the ratio.
        wanted: the number that is wanted: at least, or at most if `at_most`; None for what is only to be known.
        aim: what would be better still.
        more: of one pass, for whoever looks closer: CPU time for each message, which other load disturbs less.
    """

    name: str
    what: str
    unit: str
    ours: float
    peer: str = ""
    peers: float | None = None
    wanted: float | None = None
    at_most: bool = False
    aim: float | None = None
    more: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return None if self.peers is None else self.ours / self.peers

    @property
    def met(self) -> bool | None:
        """Whether it is what is wanted; None where nothing is."""
        if self.wanted is None:
            return None
        judged = self.ours if self.ratio is None else self.ratio
        return judged <= self.wanted if self.at_most else judged >= self.wanted


def median(rows: list[Row]) -> Row:
    """Of several runs of one row: the medians of ours, of the ratios, which is what runs have in common, of more."""
    ours = statistics.median(row.ours for row in rows)
    ratios = [row.ratio for row in rows if row.ratio is not None]
    more = {name: statistics.median(row.more[name] for row in rows) for name in rows[0].more}
    return replace(rows[0], ours=ours, peers=ours / statistics.median(ratios) if ratios else None, more=more)


def costs(ours: Window, theirs: Window) -> dict[str, float]:
    """CPU time in microseconds for each message, and bytes in Redis while it waits, where that was looked at."""
    return {
        "our_worker_us": ours.worker_us,
        "peers_worker_us": theirs.worker_us,
        "our_redis_us": ours.redis_us,
        "peers_redis_us": theirs.redis_us,
        **{f"{whose}_redis_bytes": one.redis_bytes for whose, one in (("our", ours), ("peers", theirs))
           if one.redis_bytes},
    }  # fmt: skip


Measure = Callable[[], Window]


def alternating(rounds: int, *measures: Measure) -> list[Window]:
    """Each in turn, several times; for each the median. What disturbs the machine disturbs all of them."""
    runs = [[measure() for measure in measures] for _ in range(rounds)]
    return [_middle([run[place] for run in runs]) for place in range(len(measures))]


def _middle(windows: list[Window]) -> Window:
    return Window(*(statistics.median(numbers) for numbers in zip(*map(astuple, windows), strict=True)))


# -- what is measured, by us and by peers
@dataclass(frozen=True)
class Bench:
    """The servers, and how much is measured."""

    servers: Servers
    sizes: Sizes

    def ours(
        self,
        *arguments: str,
        count: int | None = None,
        size: int = VALUE_SIZE,
        topics: int = 1,
        workers: int = 1,
        start: Callable[[], Process] | None = None,
        distinct: bool = False,
    ) -> Window:
        """Plain sends through one worker (in-flight, leased), all confirmed; then exactly these are in Kafka.

        Args:
            arguments: of the worker.
            count, size: of the messages, and of their values.
            topics: which the messages take in turn.
            workers: how many.
            start: starts something else that does the same.
            distinct: also read all of them in the end, and look at their ids.
        """
        count = count or self.sizes.singles
        self.servers.empty()
        names = self.servers.topics(topics)
        before = self.servers.open(names)
        template, empty = single(self.servers, size), self.servers.memory()
        fill(self.servers, template, count, names)
        each = (self.servers.memory() - empty) / count
        started: list[Process] = []
        try:
            for _ in range(workers):
                process = start() if start else our_worker(self.servers, *arguments)
                started.append(process.__enter__())
            window = drain(self.servers, started, QUEUE, count, seconds=self.sizes.window_s)
            finish(self.servers, QUEUE)
        finally:
            for process in started:
                process.__exit__()
        self.servers.expect(names, before + count, distinct=distinct)
        return replace(window, redis_bytes=each)

    def bare(self) -> Window:
        """The same messages by a loop without Celery; the same check."""
        return self.ours(start=lambda: bare_loop(self.servers))

    def stock(self, task: str, pool: str, concurrency: int, *arguments: str) -> Window:
        """Tasks of stock Celery, from its own queue; settled is what it has acknowledged."""
        self.servers.empty()
        fill(self.servers, stock(self.servers, task, VALUE_SIZE), self.sizes.stock, self.servers.topics())
        with stock_worker(self.servers, pool, concurrency, *arguments) as worker:
            return drain(self.servers, [worker], STOCK_QUEUE, self.sizes.stock, seconds=self.sizes.window_s)

    def against_empty(self, *arguments: str, rounds: int) -> tuple[Window, str, Window]:
        """Plain sends, and Celery's empty task with the pool that is the fastest for it."""
        processes = os.cpu_count() or 1
        ours, solo, prefork = alternating(
            rounds,
            lambda: self.ours(*arguments, distinct=True),
            lambda: self.stock("empty", "solo", 1, *arguments),
            lambda: self.stock("empty", "prefork", processes, *arguments),
        )
        if solo.per_second > prefork.per_second:
            return ours, "solo", solo
        return ours, f"prefork {processes}", prefork

    def batches(self) -> Window:
        """`send_many` of 500 records through one worker; what counts is how many records are in Kafka."""
        self.servers.empty()
        names = self.servers.topics()
        fill(self.servers, batch(self.servers, BATCH, VALUE_SIZE), self.sizes.batches, names)
        with our_worker(self.servers) as worker:
            window = drain(
                self.servers,
                [worker],
                QUEUE,
                self.sizes.batches,
                seconds=self.sizes.window_s,
                delivered=lambda: self.servers.in_kafka(names),
                records=BATCH,
            )
            finish(self.servers, QUEUE)
        self.servers.expect(names, self.sizes.batches * BATCH)
        return window

    def raw(self, *, with_ids: bool) -> Window:
        """librdkafka alone with a callback for each record; what counts is how many records are in Kafka."""
        self.servers.empty()
        names = self.servers.topics()
        with raw_producer(self.servers, names[0], self.sizes.raw, VALUE_SIZE, with_ids=with_ids) as producer:
            # One is there already: with it the producer has become ready.
            window = observe(
                self.servers,
                [producer],
                lambda: self.servers.in_kafka(names) - 1,
                self.sizes.raw - 1,
                self.sizes.window_s,
                producer.begin,
            )
            producer.wait_end(60)
        self.servers.expect(names, self.sizes.raw)
        return window

    def caller(self, name: str) -> Window:
        """One process that queues records in a loop, and no worker."""
        self.servers.empty()
        before = self.servers.cpu()
        rate = float(call(self.servers, name, str(self.sizes.calls_s)))
        return Window(rate, (self.servers.cpu() - before) / rate / self.sizes.calls_s * 1e6, 0)


# -- rows
def singles(bench: Bench) -> list[Row]:
    """Confirmed single sends a second, one worker, 200-byte values; and what each costs the Redis server."""
    ours, pool, empty = bench.against_empty(rounds=bench.sizes.rounds)
    peer = f"Celery's empty task, {pool}"
    return [
        Row(
            "single",
            "single sends, one worker",
            "/s",
            ours.per_second,
            peer,
            empty.per_second,
            15,
            aim=25,
            more=costs(ours, empty),
        ),
        Row("redis-cpu", "Redis CPU for each, consuming", "us", ours.redis_us, peer, empty.redis_us, 0.1, at_most=True),
    ]


def tutorial(bench: Bench) -> list[Row]:
    """The same against a task that produces and flushes, in the better of two numbers of processes."""
    cores = os.cpu_count() or 1
    counts = (cores, 2 * cores)
    ours, *theirs = alternating(
        1, bench.ours, *(lambda count=count: bench.stock("tutorial", "prefork", count) for count in counts)
    )
    best = max(range(len(counts)), key=lambda place: theirs[place].per_second)
    peer = f"produce and flush, prefork {counts[best]}"
    theirs_best = theirs[best]
    more = costs(ours, theirs_best)
    return [
        Row("tutorial", "single sends, one worker", "/s", ours.per_second, peer, theirs_best.per_second, 20, more=more)
    ]


def bare(bench: Bench) -> list[Row]:
    """The same against a loop that claims, decodes, produces and acknowledges, without Celery."""
    ours, loop = alternating(bench.sizes.rounds, bench.ours, bench.bare)
    peer = "bare loop without Celery"
    return [
        Row(
            "bare",
            "single sends, one worker",
            "/s",
            ours.per_second,
            peer,
            loop.per_second,
            0.6,
            aim=0.9,
            more=costs(ours, loop),
        )
    ]


def events(bench: Bench) -> list[Row]:
    """Both with -E: all task events are published, and nobody listens."""
    ours, pool, empty = bench.against_empty("-E", rounds=1)
    peer = f"Celery's empty task, {pool}, events"
    return [
        Row(
            "events",
            "single sends with task events",
            "/s",
            ours.per_second,
            peer,
            empty.per_second,
            8,
            more=costs(ours, empty),
        )
    ]


def batches(bench: Bench) -> list[Row]:
    """Records a second by `send_many`, 500 a task, one worker."""
    ours, same, least = alternating(
        bench.sizes.rounds, bench.batches, lambda: bench.raw(with_ids=True), lambda: bench.raw(with_ids=False)
    )
    return [
        Row(
            "send-many",
            "records by send_many, 500 each",
            "/s",
            ours.per_second,
            "confluent-kafka, the same records, callbacks",
            same.per_second,
            0.4,
            aim=0.6,
            more=costs(ours, same) | {"peer_without_header_per_second": least.per_second},
        )
    ]


def calls(bench: Bench) -> list[Row]:
    """`.delay()` calls a second in one process, without a worker."""
    ours, theirs = alternating(2 * bench.sizes.rounds, lambda: bench.caller("ours"), lambda: bench.caller("stock"))
    peer = "Celery's .delay(), equal task"
    return [
        Row(
            "delay",
            ".delay() calls in one caller",
            "/s",
            ours.per_second,
            peer,
            theirs.per_second,
            2,
            aim=3,
            more=costs(ours, theirs),
        )
    ]


def bulk(bench: Bench) -> list[Row]:
    """Single sends a second that one bulk call queues."""
    ours, theirs = alternating(bench.sizes.rounds, lambda: bench.caller("bulk"), lambda: bench.caller("stock"))
    peer = "Celery's .delay(), equal task"
    return [
        Row(
            "bulk",
            "single sends queued by send.bulk",
            "/s",
            ours.per_second,
            peer,
            theirs.per_second,
            10,
            more=costs(ours, theirs),
        )
    ]


def idle(bench: Bench) -> list[Row]:
    """One send each 30 ms: from before `.delay()` to when the broker appended the record, by the clock of the one host.

    The broker's time has no fractions of a millisecond: one is added. Then nothing is sent, and what the worker costs
    by being there is measured: CPU from /proc, calls from Redis. It serves two queues, of sends and of dead letters; in
    both, many messages wait for a time far away, and a few become due while it is measured.
    """
    servers, seconds = bench.servers, bench.sizes.idle_s
    servers.empty()
    (topic,) = servers.topics(config={"message.timestamp.type": "LogAppendTime"})
    both = [topic, topic + settings.current().dead_letter_suffix]
    servers.create(both[1:])
    with our_worker(servers) as worker:
        for _ in range(FAR):
            later(topic, FAR_S)
        wait_until(lambda: servers.delayed() == 2 * FAR, 20, "the delayed messages to be put aside")
        call(servers, "paced", topic, "1", str(INTERVAL_S))
        finish(servers, QUEUE)  # the first record of a worker waits until its producer is connected
        began: dict[str, float] = call(servers, "paced", topic, str(bench.sizes.sends), str(INTERVAL_S))
        finish(servers, QUEUE)
        ended, there = servers.appended(topic), servers.in_kafka(both)
        for place in range(DUE):
            later(topic, SETTLE_S + seconds * (place + 1) / (DUE + 1))
        time.sleep(SETTLE_S)
        before = servers.stats(), worker.cpu()
        time.sleep(seconds)
        after = servers.stats(), worker.cpu()
        wait_until(lambda: servers.delayed() == 2 * FAR, 20, "what was due to be claimed")
        for queue in (QUEUE, DEAD_LETTER_QUEUE):
            finish(servers, queue)
    delivered = servers.in_kafka(both) - there
    if (delivered, servers.delayed()) != (2 * DUE, 2 * FAR):
        raise RuntimeError(f"{delivered} of {2 * DUE} were due, {servers.delayed()} of {2 * FAR} wait for later")
    latencies = [ended[name] + 1 - start * 1000 for name, start in began.items()]
    spent = after[0].time - before[0].time
    calls = (after[0].requests - before[0].requests) / spent
    more = {"commands_per_second": (after[0].commands - before[0].commands) / spent}
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return [
        Row("latency-p50", "idle: .delay() to delivered, p50", "ms", cuts[49], wanted=10, at_most=True),
        Row("latency-p99", "idle: .delay() to delivered, p99", "ms", cuts[98], wanted=20, at_most=True),
        Row("idle-cpu", "idle: a worker's CPU", "%", (after[1] - before[1]) / spent * 100, wanted=1, at_most=True),
        Row("idle-calls", "idle: a worker's calls to Redis", "/s", calls, wanted=20, at_most=True, more=more),
    ]


def breaker(bench: Bench) -> list[Row]:
    """What asking the circuit breaker and telling it costs, while it is closed: Python alone, no call to Redis."""
    servers = bench.servers
    servers.empty()
    one = circuit_breaker.current()

    def record() -> None:
        admission = one.admission("orders")
        assert admission is not None  # noqa: S101  # it is closed
        one.delivered(admission, "orders")

    times = 100_000
    spent = min(timeit.repeat(record, number=times, repeat=5)) / times
    one.stop()
    row = Row("breaker", "circuit breaker: Python for each record", "us", spent * 1e6, wanted=2, at_most=True)
    return [row]


def metrics(bench: Bench) -> list[Row]:
    """What metrics cost a record that is delivered, where they are on: Python alone. The rest is done when asked."""
    spread = EndToEnd()
    message_id = uuid7()
    times = 100_000
    spent = min(timeit.repeat(lambda: spread.arrived(message_id), number=times, repeat=5)) / times
    return [Row("metrics", "metrics: Python for each record", "us", spent * 1e6, wanted=1, at_most=True)]


def memory(bench: Bench) -> list[Row]:
    """How much a worker grows from its start, while very many records wait and Kafka is down."""
    bench.servers.empty()
    template = single(bench.servers, LITTLE)
    with our_worker(bench.servers, BOOTSTRAP_SERVERS=f"127.0.0.1:{free_port()}") as worker:
        before = most = worker.rss()
        fill(bench.servers, template, bench.sizes.waiting, ["orders"], into=QUEUE)
        until = time.monotonic() + bench.sizes.down_s
        while time.monotonic() < until:
            worker.check()
            most = max(most, worker.rss())
            time.sleep(0.1)
        if bench.servers.waiting(QUEUE) != bench.sizes.waiting:
            raise RuntimeError(f"{bench.servers.waiting(QUEUE)} of {bench.sizes.waiting} records wait")
    bench.servers.empty()
    what = f"Kafka down, {bench.sizes.waiting:,} wait: RSS grows by"
    return [Row("memory", what, "MB", (most - before) / 1e6, wanted=30, at_most=True)]


def more_workers(bench: Bench) -> list[Row]:
    """Two and four workers against one."""
    counts = (2, 4)
    one, *many = alternating(
        1,
        bench.ours,
        *(lambda count=count: bench.ours(workers=count, count=count * bench.sizes.singles) for count in counts),
    )
    return [
        _grown(f"workers-{count}", f"single sends, {count} workers", window, "1 worker", one)
        for count, window in zip(counts, many, strict=True)
    ]


def larger_values(bench: Bench) -> list[Row]:
    """Values of 1, 10 and 100 KB against those of 100 bytes."""
    few = bench.sizes.singles // 3
    counts = {1_000: few, 10_000: few // 3, 100_000: few // 15}
    small, *large = alternating(
        1,
        lambda: bench.ours(size=100, count=few),
        *(lambda size=size, count=count: bench.ours(size=size, count=count) for size, count in counts.items()),
    )
    return [
        _grown(f"value-{size}", f"single sends of {size // 1000} KB", window, "100 B", small)
        for size, window in zip(counts, large, strict=True)
    ]


def more_topics(bench: Bench) -> list[Row]:
    """Sends to 8 and 64 topics in turn against those to one; each topic has four partitions."""
    few = bench.sizes.singles // 3
    counts = (8, 64)
    one, *many = alternating(
        1,
        lambda: bench.ours(count=few),
        *(lambda count=count: bench.ours(topics=count, count=few) for count in counts),
    )
    return [
        _grown(f"topics-{count}", f"single sends to {count} topics", window, "1 topic", one)
        for count, window in zip(counts, many, strict=True)
    ]


def _grown(name: str, what: str, window: Window, least: str, small: Window) -> Row:
    return Row(name, what, "/s", window.per_second, least, small.per_second, more=costs(window, small))


Rows = Callable[[Bench], list[Row]]

SHORT: tuple[Rows, ...] = (singles, tutorial, bare, events, batches, calls, bulk, idle, breaker, metrics, memory)
FULL: tuple[Rows, ...] = (*SHORT, more_workers, larger_values, more_topics)
