"""``kafka-delivery demo``: the whole way of a record, in less than a minute, with what goes wrong on that way."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import click
from confluent_kafka import KafkaException
from kombu.exceptions import KombuError
from redis.exceptions import RedisError
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kafka_delivery import InvalidRecordError, send, settings
from kafka_delivery.redis_client import RedisClient

from ..classify import FEW_RETRIES
from ..demo import (
    SMALL_TOPIC_BYTES,
    Account,
    DemoError,
    EmbeddedServers,
    GivenServers,
    Interrupted,
    Letter,
    Process,
    Reader,
    Servers,
    Signals,
    Topics,
    addresses,
    balance,
    listens,
    use,
    wait,
    worker_answers,
)
from ..embedded import free_port
from ..installation import AnotherKafkaError, Installation
from ..parking import ParkingStore
from ..redis_faults import sentence
from ..topics import admin
from .output import console
from .status import status

STREAM_S = 15.0
"""The records are spread over this time, so that the outage in the middle is seen for what it is."""

OUTAGE_S = 5.0
START_TIMEOUT_S = 40.0
PATIENCE_S = 60.0
"""How long the demo looks for a record while nothing moves, before it calls it lost."""

READ_LATE_S = 0.5
"""What the brokers sent before they went down is read and counted by then."""

KAFKA_TIMEOUT_S = 5.0
REDIS_TIMEOUT_S = 5.0

TOO_LARGE_BYTES = 50_000


@click.command()
@click.option(
    "--records", default=3_000, show_default=True, type=click.IntRange(min=30), help="How many orders are sent."
)
@click.option("--stay", is_flag=True, help="Keep servers, worker and Flower open at the end, until Ctrl-C.")
@click.option("--bootstrap-servers", metavar="HOST:PORT", help="A Kafka of your own instead of the embedded mock.")
@click.option("--redis-url", metavar="URL", help="A Redis of your own, and a database of it that nobody else uses.")
def command(records: int, stay: bool, bootstrap_servers: str | None, redis_url: str | None) -> None:
    """Show the whole way of a record: sends, an outage, refusals, dead letters, and where each record is at the end.

    Runs on embedded servers that need no installation, or on yours: give --bootstrap-servers and --redis-url together.
    Ends with exit code 1 if a record is lost.
    """
    if (bootstrap_servers is None) != (redis_url is None):
        raise click.UsageError("give --bootstrap-servers and --redis-url together, or neither for the embedded servers")
    given = GivenServers(redis_url, bootstrap_servers) if redis_url and bootstrap_servers else None
    out = console()
    try:
        with Signals() as signals:
            lost = _run(out, given or EmbeddedServers(), records, stay, signals)
    except Interrupted as signal:
        out.print(f"Stopped by {signal}; nothing is left running.")
        if given is not None and (left := _unfinished(_status())):
            out.print(f"{left:,} records are still in Redis; the next worker there delivers them to this run's topics.")
        raise SystemExit(128 + signal.number) from None
    except DemoError as error:
        raise click.ClickException(str(error)) from error
    out.print("\nWorker, Flower and servers are stopped." if given is None else "\nWorker and Flower are stopped.")
    raise SystemExit(1 if lost else 0)


def _run(out: Console, servers: Servers, records: int, stay: bool, signals: Signals) -> int:
    """Tell the story; return how many records were lost. Everything that was started is stopped on the way out."""
    run = uuid.uuid4().hex[:6]
    with ExitStack() as stack:
        with out.status("Starting ..."):
            stack.enter_context(servers)
            stage = _Stage(servers, run)
            stack.enter_context(stage.started(signals))
        story = _Story(out, stage, signals)
        story.heading()
        story.orders(records)
        story.too_large()
        story.missing_topic()
        story.expired()
        account = story.account()
        story.next_steps(stay)
        if stay:
            _stay(out, signals)
        return account.lost


def _check_given() -> None:
    """Make sure that both servers answer, and that nobody else's records would go through the demo's worker.

    Raises:
        DemoError: they do not, or they would.
    """
    s = settings.current()
    try:
        here = admin(s).list_topics(timeout=KAFKA_TIMEOUT_S).cluster_id or ""
    except KafkaException as error:
        raise DemoError(f"no Kafka answers at {s.bootstrap_servers}: {error.args[0].name()}") from error
    shown = settings.masked_url(s.redis_url)
    try:
        found = _status()
        Installation(RedisClient(s, REDIS_TIMEOUT_S), s).compare(here)
    except AnotherKafkaError as error:
        raise DemoError(str(error)) from error
    except (RedisError, KombuError, OSError) as error:
        raise DemoError(sentence(error, s)) from error
    busy = [f"{_unfinished(found)} messages"] if _unfinished(found) else []
    if busy or found["workers"]:
        raise DemoError(
            f"{shown} is in use: {', '.join([*busy, *found['workers']])}. The demo's worker would take records that "
            "are not its own; name another database of that Redis, as in redis://host:6379/9"
        )


def _status() -> dict[str, Any]:
    return status(RedisClient(settings.current(), REDIS_TIMEOUT_S))


def _unfinished(found: dict[str, Any]) -> int:
    """Messages that wait, for a worker or for their time, or are in one."""
    return int(sum(found["queues"].values()) + sum(found["delayed"].values()) + found["in_flight"])


def _stay(out: Console, signals: Signals) -> None:
    out.print("\n[bold]All of this stays open until Ctrl-C.[/bold]")
    try:
        signals.pause()
    except Interrupted:
        out.print("Stopping ...")


class _Stage:
    """What the story is played on: servers, topics, a worker, Flower, a reader."""

    def __init__(self, servers: Servers, run: str) -> None:
        use(servers)  # before anything reads a setting
        self.servers = servers
        # On somebody's servers, topics and workers of other runs may be around.
        self.mark = "" if isinstance(servers, EmbeddedServers) else f"-{run}"
        self.topics = Topics.named(self.mark)
        self.logs = Path(tempfile.mkdtemp(prefix="kafka-delivery-demo-"))
        self.worker_name = f"demo{self.mark}@localhost"
        self.flower_port = free_port()
        celery = ["-A", "kafka_delivery_worker"]
        self.worker = Process("the worker", [*celery, "worker", "-E", "-n", self.worker_name], self.logs / "worker.log")
        self.flower = Process(
            "Flower", [*celery, "flower", "--address=127.0.0.1", f"--port={self.flower_port}"], self.logs / "flower.log"
        )
        self.reader = Reader([self.topics.orders, self.topics.small], self.topics.dead_letters)

    @property
    def flower_url(self) -> str:
        return f"http://127.0.0.1:{self.flower_port}"

    @contextmanager
    def started(self, signals: Signals) -> Iterator[None]:
        """Start all and wait until it is ready; stop all at the end.

        Raises:
            DemoError: something did not start.
        """
        if isinstance(self.servers, GivenServers):
            _check_given()
        self.servers.create_topics(self.topics)
        with self.reader, self.worker, self.flower:
            try:
                for what, ready in self._starting().items():
                    if not wait(signals, ready, START_TIMEOUT_S, self.checks):
                        raise DemoError(f"{what} is not ready after {START_TIMEOUT_S:.0f} s; logs are in {self.logs}")
                yield
            finally:
                self.worker.tell_to_stop()  # at the same time, since both take a moment
                self.flower.tell_to_stop()

    @property
    def checks(self) -> list[Callable[[], None]]:
        """To be called while waiting: each raises DemoError when its part has failed."""
        return [self.worker.check, self.flower.check, self.reader.check]

    def _starting(self) -> dict[str, Callable[[], bool]]:
        return {
            "the new topic": lambda: self.reader.sees(self.topics.orders) and self.reader.sees(self.topics.small),
            "the worker": lambda: worker_answers(self.worker_name),
            "Flower": lambda: listens(self.flower_port),
        }


class _Story:
    """What is shown, step by step. This process acts as the web application."""

    def __init__(self, out: Console, stage: _Stage, signals: Signals) -> None:
        self._out = out
        self._stage = stage
        self._signals = signals
        self._topics = stage.topics
        self._reader = stage.reader
        redis = RedisClient(settings.current(), REDIS_TIMEOUT_S)
        self._parking = ParkingStore(redis.client, redis.prefix)
        self._accepted: list[str] = []
        self._shown: Letter | None = None

    # -- the heading
    def heading(self) -> None:
        servers = self._stage.servers
        embedded = isinstance(servers, EmbeddedServers)
        self._out.print("[bold]Records on their way from a web application to Kafka[/bold]\n")
        self._line("Redis", f"{settings.masked_url(servers.redis_url)}  ({'embedded Valkey' if embedded else 'yours'})")
        self._line("Kafka", f"{servers.bootstrap_servers}  ({'embedded mock' if embedded else 'yours'})")
        self._line("Worker", "celery -A kafka_delivery_worker worker -E")
        self._line("Flower", f"{self._stage.flower_url}  (the same tasks in a browser)")
        self._line("Log", f"{self._stage.worker.log}")
        if embedded:
            self._out.print(
                "\n[yellow]The embedded servers are for trying and for tests, never for production:[/yellow] they keep "
                "nothing on disk,\nand this Kafka is a mock in this process."
            )

    def _line(self, name: str, text: str) -> None:
        self._out.print(f"  {name:<8}{escape(text)}", soft_wrap=True)

    def _step(self, number: int, title: str) -> None:
        self._out.print(f"\n[bold cyan]{number}  {title}[/bold cyan]")

    def _say(self, text: str) -> None:
        self._show(Text.from_markup(text))

    def _show(self, what: RenderableType) -> None:
        self._out.print(Padding(what, (0, 0, 0, 3), expand=False))

    # -- orders, with an outage
    def orders(self, records: int) -> None:
        servers = self._stage.servers
        self._step(1, f"{records:,} times send.delay({self._topics.orders!r}, ...)")
        self._say("[dim]queued: .delay() returned.  delivered: another consumer has read the record from Kafka.[/dim]")
        if isinstance(servers, GivenServers):
            self._say("There will be no outage: these servers are not ours to stop. Stop a broker now to see one.")
        with _bars(self._out, records) as bars:
            outage = _Outage(servers, self._say)
            started = monotonic()
            for number in range(records):
                self._pause_until(started + number * STREAM_S / records)
                self._send_order(number)
                outage.step(number + 1 >= records // 3, number + 1, self._delivered)
                bars(number + 1, self._delivered)
            self._wait_for_orders(records, outage, bars)
        self._say(f"{self._delivered:,} of {records:,} are in Kafka; {len(self._reader.letters)} dead letters.")

    def _pause_until(self, moment: float) -> None:
        for check in self._stage.checks:
            check()
        self._signals.pause(moment - monotonic())

    def _send_order(self, number: int) -> None:
        order = {"order": number, "total": f"{number % 90 + 9}.90", "currency": "EUR"}
        self._accepted.append(send.delay(self._topics.orders, order, key=f"customer-{number % 500}").id)

    @property
    def _delivered(self) -> int:
        return len(self._reader.delivered)

    def _wait_for_orders(self, records: int, outage: _Outage, bars: Callable[[int, int], None]) -> None:
        def all_read() -> bool:
            outage.step(True, records, self._delivered)
            bars(records, self._delivered)
            return outage.over and self._delivered >= records

        self._wait(all_read, moved=lambda: self._delivered)

    def _wait(self, done: Callable[[], bool], moved: Callable[[], Any] = lambda: None) -> bool:
        return wait(self._signals, done, PATIENCE_S, self._stage.checks, moved)

    # -- what Kafka refuses
    def too_large(self) -> None:
        servers, size = self._stage.servers, f"{TOO_LARGE_BYTES // 1000} kB"
        self._step(2, "A record that is too large")
        try:
            send.delay(self._topics.orders, bytes(2_000_000))
        except InvalidRecordError as error:
            self._say("2 MB: InvalidRecordError, at once and in the application; nothing was queued:")
            self._show(Padding(Text(str(error), style="dim"), (0, 0, 0, 3), expand=False))
        if isinstance(servers, EmbeddedServers):
            servers.refuse_next_record()  # nothing else is on its way now
            self._say(f"{size}: refused by the broker (on command: the mock has no limits of its own).")
        else:
            self._say(f"{size}: refused by the broker; the topic has max.message.bytes={SMALL_TOPIC_BYTES}.")
        self._await_letter(self._send(self._topics.small, os.urandom(TOO_LARGE_BYTES)))  # random: lz4 cannot shrink it

    def missing_topic(self) -> None:
        self._step(3, f"A topic that does not exist: {self._topics.missing!r}")
        self._say(
            f"It may be about to exist, so there are {FEW_RETRIES} retries; "
            f"{settings.current().few_backoff_s} s apart here, 30 s by default."
        )
        self._await_letter(self._send(self._topics.missing, {"order": "for a topic with a typo"}))
        if self._shown is not None:
            self._say("Its headers, besides key and value as they were:")
            self._show(_columns(self._shown.headers))

    def _send(self, topic: str, value: Any) -> str:
        message_id: str = send.delay(topic, value).id
        self._accepted.append(message_id)
        return message_id

    def _await_letter(self, message_id: str) -> None:
        started = monotonic()
        with self._out.status("waiting for the dead letter"):
            self._wait(lambda: self._reader.letter(message_id) is not None)
        self._shown = self._reader.letter(message_id)
        if self._shown is None:
            self._say(
                f"[red]no dead letter within {PATIENCE_S:.0f} s[/red]; the log says more: {self._stage.worker.log}"
            )
            return
        self._say(f"Dead letter in {self._shown.topic} after {monotonic() - started:.1f} s.")

    # -- what comes too late
    def expired(self) -> None:
        self._step(4, "A send that expires before a worker comes to it")
        late = send.apply_async(
            (self._topics.orders, {"order": "too late"}), expires=datetime.now(UTC) - timedelta(seconds=1)
        )
        self._accepted.append(late.id)
        with self._out.status("waiting for the parking store"):
            self._wait(lambda: self._parking.get(late.id) is not None)
        item = self._parking.get(late.id)
        reason = "" if item is None else f": {item.error_message}"
        self._say(f"Parked in Redis, whole, until a person decides{escape(reason)}.")

    # -- the end
    def account(self) -> Account:
        self._step(5, "Where every record is, by message id, read back from Kafka and Redis")
        with self._out.status("reading to the end"):
            self._reader.finish()
        read = self._reader.delivered, [letter.message_id for letter in self._reader.letters]
        elsewhere = set(self._accepted) - read[0].keys() - set(read[1])
        parked = {message_id for message_id in elsewhere if self._parking.get(message_id) is not None}
        account = balance(self._accepted, *read, parked)
        self._print_account(account)
        return account

    def _print_account(self, account: Account) -> None:
        rows = [
            ("accepted", account.accepted, ".delay() returned"),
            ("delivered", account.delivered, f"read from {self._topics.orders}"),
            ("dead-lettered", account.dead_lettered, "read from dead-letter topics"),
            ("parked", account.parked, "kept in Redis"),
            ("duplicates", account.duplicates, "read more than once"),
            ("lost", account.lost, "in none of these places"),
        ]
        self._show(_columns([(name, f"{count:>7,}", where) for name, count, where in rows]))
        if not account.lost:
            self._say("[bold green]Nothing is lost.[/bold green]")
            return
        self._say(f"[bold red]{account.lost:,} are lost[/bold red], or late: {_unfinished(_status()):,} are in Redis.")
        self._say(f"The worker's log says more: {self._stage.worker.log}")

    def next_steps(self, stay: bool) -> None:
        servers = self._stage.servers
        self._out.print("\n[bold]Next[/bold]")
        if isinstance(servers, EmbeddedServers) and not stay:
            self._say("kafka-delivery demo --stay   keeps the servers and Flower, to try in another terminal:")
        else:
            for name, value in addresses(servers).items():
                self._out.print(f"   export {name}={settings.masked_url(value)}", soft_wrap=True, markup=False)
        self._say("kafka-delivery status        what waits, what is in flight, what became of records")
        self._say("kafka-delivery parked list   what could go nowhere, until a person decides")
        if stay:
            self._say(f"{self._stage.flower_url}       Flower: the same tasks in a browser")
        if isinstance(servers, GivenServers):
            self._say(f"Left behind: the topics demo-*{self._stage.mark}*, and one parked record.")


class _Outage:
    """All brokers of the mock are down for a while; `step` is called again and again, and says what happens."""

    def __init__(self, servers: Servers, say: Callable[[str], None]) -> None:
        self._kafka = servers.kafka if isinstance(servers, EmbeddedServers) else None
        self._say = say
        self._began: float | None = None
        self._told = False
        self._backlog: int | None = None
        self.over = self._kafka is None

    def step(self, due: bool, queued: int, delivered: int) -> None:
        if self._kafka is None or self.over:
            return
        now = monotonic()
        if self._began is None:
            if due:
                self._kafka.down()
                self._began = now
        elif not self._told:
            if now - self._began >= READ_LATE_S:
                self._tell("[red]all brokers are down[/red]", queued, delivered)
                self._told = True
        elif self._backlog is None:
            if now - self._began >= OUTAGE_S:
                self._tell(f"[green]up again[/green] after {OUTAGE_S:.0f} s", queued, delivered)
                self._kafka.up()
                self._backlog = queued
        elif delivered >= self._backlog:
            self._tell(f"caught up {now - self._began - OUTAGE_S:.1f} s later", queued, delivered)
            self.over = True

    def _tell(self, what: str, queued: int, delivered: int) -> None:
        padding = " " * (24 - len(Text.from_markup(what)))
        self._say(f"{what}{padding}queued {queued:>7,}   delivered {delivered:>7,}")


def _columns(rows: Iterable[tuple[str, ...]]) -> Table:
    """Columns without lines; what comes from Kafka is shown as it is, never read as markup."""
    drawn = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        drawn.add_row(Text(row[0], style="dim"), *(Text(cell, overflow="fold") for cell in row[1:]))
    return drawn


@contextmanager
def _bars(out: Console, total: int) -> Iterator[Callable[[int, int], None]]:
    """Two bars; yields what moves them."""
    columns = TextColumn("   {task.description:<10}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=out) as progress:
        queued, delivered = progress.add_task("queued", total=total), progress.add_task("delivered", total=total)

        def move(sent: int, read: int) -> None:
            progress.update(queued, completed=sent)
            progress.update(delivered, completed=read)

        yield move
