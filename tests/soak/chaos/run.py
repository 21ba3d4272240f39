"""Chaos: an application sends, workers and servers are killed, frozen and refused, and in the end nothing is missing.

Real Apache Kafka and real Redis, worker processes under a supervisor, faults drawn from a seed. When the faults are
over and everything has drained, an independent consumer reads all topics, and the account is made by message id:
accepted = delivered + dead-lettered + parked + discarded by an operator. Only what the load has sent to topics that do
not exist may be a dead letter or parked: whatever else happens, happens around a record and is not charged to it. The
same account holds what strangers have put into the queue. Nothing is in the Kafka of an installation that tried to
join, and no circuit has opened while Kafka was well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from certificates import Authority
from kafka_delivery_worker.embedded import MockKafka
from proxy import Proxy
from servers import RealKafka, RealRedis, SecureKafka, wait_until
from stack import Stack, leftovers
from strangers import zoo

from . import account, circuits, plan
from .account import Accepted, Account
from .application import TOPIC, Sent
from .circuits import History, Opening, Outage
from .faults import Faults, Files
from .operators import COMMANDS, Operators, Ran
from .processes import ApplicationProcess, Exit, Joined, Joiners, Supervisor
from .trail import trails

START_S = 120
EARLIER = 30
"""Records of each topic that does not exist, parked before the run."""
LOOKED_AT = 20
"""Messages in the queue, twice a second."""
LATE_S = 60
DRAIN_S = 150
BAR_S = 1
STATUS_S = 10
LONG_S, MIN_KILLS = 1_200, 40
"""In a run of so many seconds, so many workers have to be killed for it to prove something."""
MIN_WELL = 1 / 3
"""For such a share of it Kafka has to be well: else a circuit could hardly open without a reason."""

SHOWN = 10
"""Of what is lost, and of what is wrong."""
NEAR_S = 10
"""Faults this close to what was last seen of such a message are named with it."""

REDIS = {
    "appendfsync": "always",  # what Redis has confirmed survives its SIGKILL, so that nothing lost is Redis's loss
    "aof-timestamp-enabled": "yes",
    "aof-disable-auto-gc": "yes",  # the whole history stays readable for `trail`
    "auto-aof-rewrite-min-size": "256mb",
}

SETTINGS = {
    "LEASE_S": plan.LEASE_S,
    "MESSAGE_TIMEOUT_MS": 8_000,  # shorter than some outages of Kafka here, so that records time out
    "REQUEST_TIMEOUT_MS": 3_000,
    "TOPIC_PROPAGATION_MS": 3_000,
    "WORKER_SOCKET_TIMEOUT_S": 3,
    "SHUTDOWN_TIMEOUT_S": 5,
    "MAX_RETRIES": 8,
    "RETRY_BACKOFF_MAX_S": 4,
    "FEW_BACKOFF_S": 3,
    "DEFER_MAX_S": 4,
}
LEASED = {"TRANSPORT": "leased", "POOL": "in-flight"}
STOCK = {
    "TRANSPORT": "celery",
    "POOL": "threads",
    "VISIBILITY_TIMEOUT_S": 32,  # the least: more than twice the wait for a report and the longest pause
    "REDIS_OPTIONS": json.dumps(
        {"unacked_restore_interval": 1, "unacked_restore_throttle": 1, "unacked_mutex_expire": 5}
    ),
}


@dataclass
class Options:
    seconds: float
    seed: int
    workers: int
    rate: float
    stock: bool
    only: tuple[str, ...] = ()

    @property
    def lanes(self) -> tuple[plan.Lane, ...]:
        return plan.lanes(self.only, self.stock)

    @property
    def kinds(self) -> set[str]:
        """Kinds of faults that come."""
        return {kind for lane in self.lanes for kind in lane.kinds}


@dataclass
class Outcome:
    """What a run ended with."""

    options: Options
    took_s: float
    drained_s: float | None
    account: Account
    faults: list[tuple[float, str, str]]
    exits: list[Exit]
    left: dict[str, int]
    idle_workers: int
    trails: dict[str, list[tuple[int, str]]]
    began: float
    wrapped: Counter[str] = field(default_factory=Counter)
    without_client: int = 0
    nested: int = 0
    not_concluded: int = 0
    renewed: int = 0
    openings: list[Opening] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    paused: int = 0
    ran: list[Ran] = field(default_factory=list)
    joined: list[Joined] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return len(self.account.lost)

    @property
    def kills(self) -> int:
        """Worker processes that a SIGKILL ended."""
        return sum(exit_.why == plan.KILL and exit_.code == -signal.SIGKILL for exit_ in self.exits)

    @property
    def opened_wrongly(self) -> list[Opening]:
        """Circuits that opened while Kafka was well."""
        return circuits.without_reason(self.openings, self.outages, (TOPIC, *account.DEAD_LETTER_TOPICS))

    @property
    def well_s(self) -> float:
        """For how long Kafka was well, of the whole run."""
        return circuits.well_s(self.began, self.began + self.took_s, self.outages)

    @property
    def let_in(self) -> list[Joined]:
        """Workers of another installation that did not refuse to start."""
        return [one for one in self.joined if not one.refused]

    @property
    def failed_commands(self) -> list[Ran]:
        """Commands of operators that ended as none may."""
        return [one for one in self.ran if one.failed]

    @property
    def not_redriven(self) -> int:
        """Records that redrives call delivered, and that are not there."""
        return max(0, sum(one.delivered for one in self.ran) - self.account.redriven.total())

    @property
    def caught(self) -> Counter[str]:
        """How many commands stood still in the middle, by their fault."""
        return Counter(one.kind for one in self.ran if one.caught)

    def problems(self) -> list[str]:
        """Why the run has failed; nothing when it is as it should be.

        Of Celery's own transport a loss is what is wanted: it proves that the harness would notice one of ours.
        """
        if self.options.stock:
            return [] if self.lost else ["nothing was lost: the harness would not notice a loss"]
        found: dict[str, object] = {
            f"{self.lost} accepted records are nowhere": self.lost,
            f"{len(self.account.wrongly_parked)} records are parked wrongly": self.account.wrongly_parked,
            f"{len(self.account.wrongly_dead)} records are dead letters wrongly": self.account.wrongly_dead,
            f"{len(self.account.changed)} records arrived changed": self.account.changed,
            f"{len(self.account.vanished)} foreign messages are nowhere": self.account.vanished,
            f"{self.account.strayed.total()} records are in the wrong Kafka": self.account.strayed,
            f"{len(self.let_in)} workers of another installation were let in": self.let_in,
            f"{len(self.opened_wrongly)} circuits opened while Kafka was well": self.opened_wrongly,
            f"{self.not_redriven} records that a redrive calls delivered are not there": self.not_redriven,
            f"{len(self.failed_commands)} commands of operators failed": self.failed_commands,
            f"left in Redis: {_listed(self.left)}": self.left,
            f"{self.account.not_accepted} sends were never accepted": self.account.not_accepted,
            f"{self.idle_workers} workers stopped consuming": self.idle_workers,
        }
        if self.options.seconds >= LONG_S:
            found |= self._proves_too_little()
        return [problem for problem, there in found.items() if there]

    def _proves_too_little(self) -> dict[str, object]:
        kinds, little = self.options.kinds, "it proves too little"
        found: dict[str, object] = {
            f"{self.kills} workers were killed, which is less than {MIN_KILLS}: {little}": (
                plan.KILL in kinds and self.kills < MIN_KILLS
            ),
            f"Kafka was well for {self.well_s:.0f} of {self.took_s:.0f} s: {little}": (
                self.well_s < MIN_WELL * self.took_s
            ),
        }
        return found | {
            f"{kind}: none was caught in the middle: {little}": not self.caught[kind]
            for kind in COMMANDS
            if kind in kinds
        }


class Reporter:
    """Says what happens: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, options: Options) -> None:
        self.console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 144)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[counts]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._options = options
        self._task: TaskID | None = None
        self._said = 0.0
        self.began = time.time()

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._progress:
            self._task = self._progress.add_task("starting", total=self._options.seconds, counts="")
            yield

    def begin(self) -> None:
        """The faults begin: from here on time counts."""
        self.began = time.time()

    def say(self, text: str) -> None:
        self.console.print(f"{time.time() - self.began:7.1f} s  {text}", markup=False)

    def counts(self, phase: str, done: float, counts: Callable[[], str]) -> None:
        """Show how far it is, every now and then."""
        if time.monotonic() - self._said < (BAR_S if self.console.is_terminal else STATUS_S):
            return
        self._said = time.monotonic()
        if self._task is not None and self.console.is_terminal:
            self._progress.update(self._task, description=phase, completed=done, counts=counts())
        else:
            self.say(f"{phase}: {counts()}")


@dataclass
class System:
    """All that runs."""

    options: Options
    reporter: Reporter
    directory: Path
    kafka: RealKafka
    redis: RealRedis
    stack: Stack
    supervisor: Supervisor
    application: ApplicationProcess
    files: Files
    network: Proxy
    operators: Operators
    joiners: Joiners
    elsewhere: MockKafka
    history: History
    zoo: Future[dict[str, bytes]]
    over: threading.Event
    abort: threading.Event
    nested: int = 0
    faults: list[tuple[float, str, str]] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    others: list[Accepted] = field(default_factory=list)

    def settle(self) -> None:
        """Wait until everything works: an account of what never worked would be of no use."""
        wait_until(
            lambda: self.accepted > 0 and self.idle_workers() == 0, START_S, "no sends accepted, or workers that idle"
        )
        self.zoo.result(START_S)

    def park_some(self) -> None:
        """Operators are to have something to do from the beginning; what is sent now is parked in half a minute."""
        self.others += account.park(self.stack.redis, EARLIER)

    def chaos(self) -> None:
        """Let the faults come: for the time of the run, and until each kind has come once."""
        faults = Faults(
            self.kafka, self.redis, self.supervisor, self.application, self.files, self.network, self.operators,
            self.joiners, self.zoo.result(), self._foreign, self.over, self.abort, self._fault,
        )  # fmt: skip
        self.outages = faults.outages
        lanes = [
            threading.Thread(target=faults.run, args=(self._drawn(lane),), name=lane.name)
            for lane in self.options.lanes
        ]
        end = time.monotonic() + self.options.seconds
        for lane in lanes:
            lane.start()
        try:
            while not self._enough(end) and not self.over.wait(0.5):
                self._look()
                self.reporter.counts("chaos", self.options.seconds - end + time.monotonic(), self._counts)
        except BaseException:
            self.abort.set()
            raise
        finally:
            self.over.set()
            for lane in lanes:
                lane.join()
        if faults.failure is not None:
            raise faults.failure
        faults.check_undone()

    def _look(self) -> None:
        with contextlib.suppress(redis.RedisError):  # it is away
            self.nested += account.nested(self.stack.redis, LOOKED_AT)
            self.history.read()

    def _foreign(self, kind: str, sent: Sent) -> None:
        self.others.append(Accepted(sent.id, kind, sent.id, time.time(), 1, sent.due, sent.digest))

    def _drawn(self, lane: plan.Lane) -> Iterator[plan.Fault]:
        return lane.draw(self.options.seed, self.options.workers, self.options.seconds)

    def _enough(self, end: float) -> bool:
        late = time.monotonic() - end
        return late >= LATE_S or (late >= 0 and {kind for _, kind, _ in self.faults} >= self.options.kinds)

    def _fault(self, kind: str, target: str) -> None:
        self.faults.append((time.time(), kind, target))
        self.reporter.say(f"{kind}: {target}")

    def drain(self) -> float | None:
        """Wait until nothing waits any more, and all workers ask for more; how long it took, None if it did not end."""
        began = time.monotonic()
        while (took := time.monotonic() - began) < DRAIN_S:
            self.history.read()
            if self.at_rest():
                return took
            self.reporter.counts("draining", self.options.seconds, self._counts)
            time.sleep(0.2)
        self.supervisor.dump()
        return None

    def at_rest(self) -> bool:
        return not leftovers(self.stack.redis) and self.idle_workers() == 0

    def idle_workers(self) -> int:
        """Workers that take no messages."""
        return max(0, self.options.workers - account.consuming(self.stack.redis))

    @property
    def accepted(self) -> int:
        return self.application.report.read_bytes().count(b"\n")

    def _counts(self) -> str:
        try:
            waiting = sum(leftovers(self.stack.redis).values())
        except redis.RedisError:
            waiting = -1
        return (
            f"accepted {self.accepted}, waiting {'?' if waiting < 0 else waiting}, exits {len(self.supervisor.exits)}, "
            f"openings {len(self.history.openings)}"
        )


@contextmanager
def system(options: Options, reporter: Reporter, directory: Path) -> Iterator[System]:
    """Start everything; end everything."""
    authority = Authority(directory / "authority")
    with (
        SecureKafka(directory / "kafka", authority) as kafka,
        RealRedis(directory / "redis", options=REDIS) as server,
        Proxy(server.port, options.seed) as network,
        contextlib.closing(MockKafka(brokers=1)) as elsewhere,
        ThreadPoolExecutor(1) as beside,
    ):
        zoo_ = beside.submit(zoo, big=True)  # takes seconds, as Kafka's start does
        for topic in (TOPIC, *account.DEAD_LETTER_TOPICS):
            kafka.create_topic(topic)
            elsewhere.create_topic(topic)  # so that it would take what is sent there
        files = Files(directory, authority)
        secured = {"BOOTSTRAP_SERVERS": kafka.tls_servers, "PRODUCER": json.dumps(files.properties)}
        stack = Stack(server.url, kafka, SETTINGS | secured | (STOCK if options.stock else LEASED))
        over, abort = threading.Event(), threading.Event()
        operators = Operators(lambda url: stack.env(REDIS_URL=url), server.port, directory, abort)
        joiners = Joiners(stack, network.redis_url, elsewhere.bootstrap_servers, abort)
        supervisor: Supervisor | None = None
        application: ApplicationProcess | None = None
        try:
            supervisor = Supervisor(
                stack, network.redis_url, options.workers, directory, lambda exit_: _say_exit(reporter, exit_)
            )
            application = ApplicationProcess(stack, options.rate, options.seed, directory)
            yield System(
                options, reporter, directory, kafka, server, stack, supervisor, application, files, network, operators,
                joiners, elsewhere, History(stack.redis), zoo_, over, abort,
            )  # fmt: skip
        finally:
            if supervisor is not None:
                supervisor.close()
            if application is not None:
                application.close()
            stack.close()


def _say_exit(reporter: Reporter, exit_: Exit) -> None:
    why = exit_.why or f"BY ITSELF\n{exit_.log_end}"
    reporter.say(f"worker {exit_.slot} ended, code {exit_.code}, after {exit_.took_s:.1f} s: {why}")


def run(options: Options, reporter: Reporter, directory: Path) -> Outcome:
    """One run, from the start of the servers to the account."""
    with reporter.running(), system(options, reporter, directory) as running:
        running.settle()
        running.park_some()
        reporter.begin()
        running.chaos()
        reporter.say("no more faults")
        running.application.finish()
        drained = running.drain()
        idle = 0 if drained is not None else running.idle_workers()
        if not options.stock:
            running.operators.look(running.redis.url)
        running.supervisor.stop()
        running.history.read()
        left = leftovers(running.stack.redis)
        ran, elsewhere = running.operators.ran, running.elsewhere.bootstrap_servers
        discarded = set().union(*(one.discarded for one in ran))
        found = account.take(running.stack, running.application.report, running.others, discarded, elsewhere)
        took = time.time() - reporter.began
        missed = [*found.lost[:SHOWN], *found.vanished[:SHOWN]]
        shown = {one.task_id for one in missed} | {one.task_id for one in _wrong(found)}
        seen = trails(directory / "redis", shown) if shown else {}
        workers = running.supervisor
        return Outcome(
            options, took, drained, found, running.faults, workers.exits, left, idle, seen, reporter.began,
            workers.wrapped, workers.without_client, running.nested, workers.not_concluded, workers.renewed,
            running.history.openings, running.outages, workers.paused, ran, running.joiners.all,
        )  # fmt: skip


def _wrong(found: Account) -> list[account.Wrong]:
    lists = (found.wrongly_parked, found.wrongly_dead, found.changed, found.astray)
    return [one for each in lists for one in each[:SHOWN]]


# -- the output
def summary(outcome: Outcome) -> Table:
    by_kind = Counter(kind for _, kind, _ in outcome.faults)
    exits = Counter(exit_.why or "BY ITSELF" for exit_ in outcome.exits if exit_.why != "end of the run")
    stops = [exit_.took_s for exit_ in outcome.exits if exit_.why in (plan.TERMINATE, plan.NO_KEY, "end of the run")]
    account_ = outcome.account
    parked = {kind: len(ids) for kind, ids in account_.parked.items()}
    totals = account_.totals
    table = Table("what", "value", title="chaos", show_lines=False)
    values: dict[str, object] = {
        "transport": "Celery's own, threads" if outcome.options.stock else "leased, in flight",
        "seed": outcome.options.seed,
        "duration": f"{outcome.options.seconds:.0f} s of faults, {outcome.took_s:.0f} s in all",
        "Redis": "appendfsync always: what it confirmed survives its SIGKILL",
        "faults": f"{len(outcome.faults)}: {_listed(by_kind)}",
        "worker restarts": f"{exits.total()}: {_listed(exits)}",
        "workers killed": outcome.kills,
        "workers with a wrapped client": _listed(outcome.wrapped),
        "workers without a client for a while": outcome.without_client,
        "clients renewed while records flow": outcome.renewed,
        "messages with nested headers, of those looked at": outcome.nested,
        "sent again, since what follows was refused": outcome.not_concluded,
        "longest stop": f"{max(stops, default=0):.1f} s",
        "accepted": f"{totals['accepted']}; errors before: {_listed(account_.errors)}",
        "never accepted": account_.not_accepted,
        "delivered": totals["delivered"],
        "dead-lettered": totals["dead-lettered"],
        "wrongly dead-lettered": len(account_.wrongly_dead),
        "parked": f"{totals['parked']}: {_listed(parked)}",
        "wrongly parked": len(account_.wrongly_parked),
        "arrived changed": f"{len(account_.changed)} of {account_.compared} that were compared",
        "duplicates": f"{totals['twice']}; of redrives {totals['redriven twice']}",
        "discarded by operators": totals["discarded"],
        "frozen commands, in the middle": _listed(outcome.caught),
        "commands that failed": _listed(Counter(f"{one.kind}: {one.failed}" for one in outcome.failed_commands)),
        "foreign messages that vanished": len(account_.vanished),
        "workers of another installation": f"{len(outcome.joined)}; let in {len(outcome.let_in)}",
        "in the wrong Kafka": account_.strayed.total(),
        "openings of circuits": f"{len(outcome.openings)}; while Kafka was well {len(outcome.opened_wrongly)}",
        "Kafka was well for": f"{outcome.well_s:.0f} s",
        "processes that paused themselves": outcome.paused,
        "lost": outcome.lost,
        "drained after": "NOT" if outcome.drained_s is None else f"{outcome.drained_s:.1f} s",
        "left in Redis": _listed(outcome.left) or "nothing",
        "workers that stopped consuming": outcome.idle_workers,
    }
    for what, value in values.items():
        table.add_row(what, str(value))
    return table


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{what!s} {count}" for what, count in counts.items())


def lines(outcome: Outcome) -> Iterator[str]:
    """The first lost and wrong records, each with its way through Redis and the faults around its last step; then what
    else is wrong, with the faults around it."""
    for one in (*outcome.account.lost[:SHOWN], *outcome.account.vanished[:SHOWN]):
        yield f"lost {one.id} ({one.kind}), accepted at {one.at - outcome.began:.1f} s, attempt {one.tries}"
        yield from _trail(outcome, one.task_id, one.at)
    for wrong in _wrong(outcome.account):
        yield f"{wrong.what}: {wrong.id} ({wrong.kind})"
        yield from _trail(outcome, wrong.task_id, outcome.began)
    for opening in outcome.opened_wrongly[:SHOWN]:
        at = opening.at - outcome.began
        yield f"opened while Kafka was well: {opening.scope} at {at:.1f} s, was {opening.before}, {opening.why!r}"
        yield from _near(outcome, opening.at)
    for joined in outcome.let_in[:SHOWN]:
        yield f"let in: a worker of another installation, code {joined.code} after {joined.took_s:.1f} s"
        yield joined.log_end
    for ran in outcome.failed_commands[:SHOWN]:
        yield f"{ran.kind}: {ran.failed}"
        yield ran.err[-1500:]


def _trail(outcome: Outcome, task_id: str, at: float) -> Iterator[str]:
    steps = outcome.trails.get(task_id, [])
    for when, where in steps[-8:]:
        yield f"    {when - outcome.began:7.0f} s  {where}"
    yield from _near(outcome, steps[-1][0] if steps else at)


def _near(outcome: Outcome, at: float) -> Iterator[str]:
    for when, kind, target in outcome.faults:
        if abs(when - at) <= NEAR_S:
            yield f"    near: {when - outcome.began:.1f} s  {kind}: {target}"


def show(outcome: Outcome, console: Console) -> None:
    console.print(summary(outcome))
    console.print(outcome.account.table())
    for line in lines(outcome):
        console.print(line, markup=False)


def main(argv: list[str]) -> int:
    options, keep = _parse(argv)
    reporter = Reporter(options)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    tempfile.tempdir = str(directory)  # logs of workers too
    failed: bool = True
    try:
        reporter.console.print(f"seed {options.seed}, {options.seconds:.0f} s, {options.workers} workers", markup=False)
        outcome = run(options, reporter, directory)
        show(outcome, reporter.console)
        problems = outcome.problems()
        for problem in problems:
            reporter.console.print(f"FAILED: {problem}", markup=False)
        failed = bool(problems)
    finally:
        if keep or (failed and not options.stock):
            reporter.console.print(f"logs and data: {directory}", markup=False)
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return int(failed)


def _parse(argv: list[str]) -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(prog="chaos.py", description="Kill everything for a while, then count.")
    parser.add_argument("--seconds", type=float, default=1_200, help="how long faults come (1200)")
    parser.add_argument("--seed", type=int, help="of the faults and of the sends; by default a random one")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (2)")
    parser.add_argument("--rate", type=float, default=150, help="sends a second (150)")
    parser.add_argument("--stock", action="store_true", help="Celery's own transport, which has to lose something")
    parser.add_argument("--only", action="append", default=[], choices=plan.ALL, help="a kind of fault; repeatable")
    parser.add_argument("--keep", action="store_true", help="keep logs and data, as after a failure")
    given = parser.parse_args(argv)
    seed = random.randrange(10**6) if given.seed is None else given.seed
    return Options(given.seconds, seed, given.workers, given.rate, given.stock, tuple(given.only)), given.keep
