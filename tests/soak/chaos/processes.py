"""The processes around the servers: workers, kept alive by a supervisor, and the application."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kafka_delivery_worker.embedded import OrphanGuard
from soak.chaos import application, tracers
from stack import Stack, Worker

JOIN_S = 60
"""A worker of another installation has this long to find out and to end. Redis may be away meanwhile."""

GRACE_S = 30
"""What a supervisor gives a worker to stop before it kills it."""


@dataclass(frozen=True, slots=True)
class Exit:
    """A worker process that ended; `why` is the fault that ended it, "" if it did so by itself."""

    slot: int
    code: int
    why: str
    took_s: float
    log_end: str


class Slot:
    """A place for one worker process, refilled when it becomes empty."""

    def __init__(self, number: int, start: Callable[[int], Worker]) -> None:
        self.number = number
        self._start = start
        self.fill()

    def fill(self) -> None:
        self.why = ""
        self.told_at = 0.0
        self.worker = self._start(self.number)
        self._guard = OrphanGuard(self.worker.pid)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a process that has ended already gets none."""
        self.worker.signal(number)

    def end(self, number: signal.Signals, why: str) -> None:
        """End the process by a signal."""
        self.why, self.told_at = why, time.monotonic()
        self.send(number)

    def close(self) -> None:
        """End it at once, if it still runs."""
        if self.worker.process.poll() is None:
            self._guard.release()
            self.worker.kill()

    def ended(self) -> Exit | None:
        """How the process ended, None while it runs. One that takes too long to stop is killed."""
        code = self.worker.process.poll()
        took = time.monotonic() - self.told_at if self.told_at else 0.0
        if code is None:
            if took > GRACE_S:
                self.end(signal.SIGKILL, f"{self.why}, killed after {GRACE_S} s")
            return None
        self._guard.release()
        return Exit(self.number, code, self.why, took, _last_words(self.worker.log))


def _last_words(log: str) -> str:
    """What a worker says that ends by itself: the error that Celery calls unrecoverable, else the end of its log."""
    _, found, error = log.rpartition("Unrecoverable error")
    return found + error.partition("\n[")[0][-1500:] if found else log[-1000:]


TESTS = Path(__file__).parents[2]


class Supervisor:
    """Keeps worker processes alive, as systemd or Kubernetes would. By turns their clients are wrapped by tracers.

    Args:
        redis_url: where the workers find Redis.
        directory: where it puts the modules that the workers load.
    """

    def __init__(
        self, stack: Stack, redis_url: str, workers: int, directory: Path, on_exit: Callable[[Exit], None]
    ) -> None:
        self._stack, self._redis_url = stack, redis_url
        self._directory = directory
        for number, code in enumerate(tracers.MODULES.values()):
            (directory / f"worker_{number}.py").write_text(code)
        self._turns = itertools.cycle(tracers.ORDER)
        self._kinds: dict[Worker, str] = {}
        self._on_exit = on_exit
        self.exits: list[Exit] = []
        self.slots = [Slot(number, self._start) for number in range(workers)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def _start(self, number: int) -> Worker:
        kind = next(self._turns)
        module = f"worker_{list(tracers.MODULES).index(kind)}"
        env = self._stack.env(REDIS_URL=self._redis_url) | tracers.QUIET
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self._directory), str(TESTS), env.get("PYTHONPATH"))))
        worker = Worker(env, ("-n", f"chaos{number}@%h", "--loglevel=WARNING"), module)
        self._stack.workers.append(worker)
        self._kinds[worker] = kind
        return worker

    @property
    def wrapped(self) -> Counter[str]:
        """Worker processes whose client was wrapped, by the tracer."""
        return Counter(kind for worker, kind in self._kinds.items() if tracers.is_wrapped(kind, worker.log))

    @property
    def without_client(self) -> int:
        """Worker processes that could make no client for a while."""
        return sum("producer.no_client" in worker.log for worker in self._kinds)

    @property
    def renewed(self) -> int:
        """Clients that were renewed in a process that went on."""
        return sum(worker.log.count("producer.renewed") for worker in self._kinds)

    @property
    def paused(self) -> int:
        """How often a process opened a circuit of its own."""
        return sum(worker.log.count("circuit.paused scope=") for worker in self._kinds)

    @property
    def not_concluded(self) -> int:
        """Sends that went back because Redis refused what was to follow them."""
        return sum(worker.log.count("task.not_concluded") for worker in self._kinds)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            for slot in self.slots:
                if exit_ := slot.ended():
                    self._record(exit_)
                    slot.fill()

    def _record(self, exit_: Exit) -> None:
        self.exits.append(exit_)
        self._on_exit(exit_)

    def stop(self) -> None:
        """Restart nobody any more, and stop all workers."""
        self._abandon()
        for slot in self.slots:
            slot.end(signal.SIGTERM, "end of the run")
        for slot in self.slots:
            while not (exit_ := slot.ended()):
                time.sleep(0.05)
            self._record(exit_)

    def dump(self) -> None:
        """Have each worker write the stacks of its threads into its log."""
        for slot in self.slots:
            slot.send(signal.SIGUSR1)  # Celery's "cry"

    def close(self) -> None:
        """Restart nobody any more, and end at once what still runs."""
        self._abandon()
        for slot in self.slots:
            slot.close()

    def _abandon(self) -> None:
        self._stop.set()
        self._thread.join()


STANDS_STILL = re.compile(r"producer\.no_client reason='the Kafka at .* stands for the Kafka ")


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker of another installation; `code` is None if it did not end by itself.

    One that could not ask Redis when it started finds out later, and stands still.
    """

    code: int | None
    took_s: float
    log_end: str
    stood_still: bool = False

    @property
    def refused(self) -> bool:
        """Whether it ended by itself, as a failure, or says that it stands still."""
        return self.stood_still if self.code is None else self.code > 0


class Joiners:
    """Starts workers that have our Redis and our names, and another Kafka.

    Args:
        redis_url: where they find Redis.
        bootstrap_servers: of the other Kafka.
        abort: cut short what is under way.
    """

    def __init__(self, stack: Stack, redis_url: str, bootstrap_servers: str, abort: threading.Event) -> None:
        self._stack, self._abort = stack, abort
        self._env = stack.env(REDIS_URL=redis_url, BOOTSTRAP_SERVERS=bootstrap_servers, PRODUCER="{}")
        self.all: list[Joined] = []

    def join(self) -> None:
        """Start one, and wait until it ends, or has had the time to. One that was cut short counts for nothing."""
        began = time.monotonic()
        worker = Worker(self._env, ("-n", f"joiner{len(self.all)}@%h", "--loglevel=WARNING"))
        guard = OrphanGuard(worker.pid)
        while worker.process.poll() is None and time.monotonic() - began < JOIN_S and not self._abort.wait(0.05):
            if STANDS_STILL.search(worker.log):
                break
        code = worker.process.poll()
        guard.release()
        worker.kill()
        stands_still = STANDS_STILL.search(worker.log) is not None
        if code is not None or stands_still or not self._abort.is_set():
            self.all.append(Joined(code, time.monotonic() - began, _last_words(worker.log), stands_still))


class ApplicationProcess:
    """The application, see `chaos.application`."""

    def __init__(self, stack: Stack, rate: float, seed: int, directory: Path) -> None:
        self.report = directory / "accepted.jsonl"
        self.report.touch()
        self._log = (directory / "application.log").open("wb")
        options = ["--rate", str(rate), "--seed", str(seed), "--report", str(self.report)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", application.__file__, *options],
            env=stack.env() | {"PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))},
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._guard = OrphanGuard(self._process.pid)

    def burst(self, count: int) -> None:
        """Send so many records as fast as it goes."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"burst {count}\n".encode())
        self._process.stdin.flush()

    def finish(self) -> None:
        """Send no more; wait until what was sent is accepted."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(application.LAST_CHANCE_S + 30)
        self._guard.release()
        if self._process.returncode:
            raise RuntimeError(f"the application ended with {self._process.returncode}; see {self._log.name}")

    def close(self) -> None:
        """End it at once, if it still runs."""
        if self._process.poll() is None:
            self._guard.release()
            self._process.kill()
            self._process.wait()
