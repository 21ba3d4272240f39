"""An operator's command that stands still in the middle, past its lock, while another one does the same."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kafka_delivery_worker.embedded import OrphanGuard
from proxy import Proxy
from stack import BIN

from . import plan
from .application import MISSING, NOWHERE, TOPIC, UNWANTED

FAR_S = 0.03
"""From these commands to Redis: an item takes as long, so that one can be caught in the middle."""

IN_THE_MIDDLE_S = 15
"""Longest wait for a command to have begun. Redis or Kafka may be away meanwhile."""
TRIES = 5
"""So often a command is started that ends before it has done anything: Redis refuses it, say."""
SENDS_S = 1.0
ENDS_S = 60
"""Longest wait for one to end after the freeze."""
SOME = 20

REDRIVE = ("parked", "redrive", "--topic", NOWHERE, "--limit", str(SOME), "--yes", "--json")
DISCARD = ("parked", "discard", "--topic", UNWANTED, "--limit", str(SOME), "--reason", "chaos", "--yes", "--json")
DEAD_LETTERS = (
    "dead-letters", "redrive", MISSING, "--to", TOPIC, "--rate", "8/s", "--limit", str(SOME), "--yes",
)  # fmt: skip

COMMANDS = {plan.FROZEN_REDRIVE: REDRIVE, plan.FROZEN_DISCARD: DISCARD, plan.FROZEN_DEAD_LETTERS: DEAD_LETTERS}

TOOLS = (("status",), ("parked", "list", "--json"), ("parked", "summary"), ("dead-letters", "summary", MISSING))
"""What an operator looks with. Nothing that strangers have written may blind them."""

_DISCARDED = re.compile(r"parked\.discarded parked_id=(\S+)")
_BEGUN = re.compile(r"parked\.(?:discarded|redriven) ")
_DELIVERED = re.compile(r"([\d,]+) delivered,")


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has run.

    Attributes:
        kind: the fault, or the tool's name.
        code: that it ended with; None if it did not end.
        caught: whether it stood still in the middle of its work.
    """

    kind: str
    code: int | None
    out: str
    err: str
    caught: bool = False

    @property
    def failed(self) -> str:
        """What is wrong with how it ended, "" if nothing is."""
        if self.code is None:
            return "did not end"
        return "a traceback" if "Traceback (most recent call last)" in self.err else ""

    @property
    def discarded(self) -> set[str]:
        """Ids of the items of which its audit says so."""
        return {one.partition("~")[0] for one in _DISCARDED.findall(self.err)}

    @property
    def delivered(self) -> int:
        """How many it calls delivered. One that did not get to say so has delivered some all the same."""
        found = _DELIVERED.search(self.out)
        return int(found[1].replace(",", "")) if found else 0


class Command:
    """A command that runs."""

    def __init__(self, arguments: tuple[str, ...], env: dict[str, str], directory: Path, number: int) -> None:
        self._paths = [directory / f"command-{number}.{name}" for name in ("out", "err")]
        self._files: list[IO[bytes]] = [path.open("wb") for path in self._paths]
        self.process = subprocess.Popen(
            [BIN / "kafka-delivery", *arguments],
            env=env | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
        )
        self._guard = OrphanGuard(self.process.pid)

    @property
    def texts(self) -> tuple[str, str]:
        """What it has written so far, to standard output and to standard error."""
        out, err = (path.read_text(errors="replace") for path in self._paths)
        return out, err

    def end(self, timeout: float) -> int | None:
        """Wait for its end; its exit code, None if it had to be killed."""
        code: int | None = None
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._guard.release()
        for file in self._files:
            file.close()
        return code


class Operators:
    """Runs commands.

    Args:
        env: of a command, for a port where Redis is.
        redis_port: where it is.
        directory: where their output goes.
        abort: cut short what is under way.
    """

    def __init__(
        self,
        env: Callable[[str], dict[str, str]],
        redis_port: int,
        directory: Path,
        abort: threading.Event,
    ) -> None:
        self._env, self._port, self._directory, self._abort = env, redis_port, directory, abort
        self._started = 0
        self._lock = threading.Lock()
        self.ran: list[Ran] = []

    def freeze(self, kind: str, hold_s: float) -> None:
        """Stop a command in the middle, let another one do the same, and let the first one go on.

        One that ends before, since there is nothing to do, or no Redis, is started again.
        """
        with Proxy(self._port) as far:
            far.slow(FAR_S)
            for _ in range(TRIES):
                if self._freeze(kind, hold_s, far) or self._abort.is_set():
                    return

    def _freeze(self, kind: str, hold_s: float, far: Proxy) -> bool:
        """Do that once; False if the command ended before it could be stopped."""
        first = self._start(COMMANDS[kind], far.redis_url)
        caught = False
        try:
            begun = self._in_the_middle(first, kind)
            first.process.send_signal(signal.SIGSTOP)
            if first.process.poll() is not None:
                return False
            caught = begun
            self._abort.wait(hold_s)
            second = self._start(COMMANDS[kind], far.redis_url)
            self._note(kind, second, second.end(ENDS_S), caught=False)
            return True
        finally:
            first.process.send_signal(signal.SIGCONT)
            self._note(kind, first, first.end(ENDS_S), caught)

    def look(self, redis_url: str) -> None:
        """Run what an operator looks with."""
        commands = [self._start(arguments, redis_url) for arguments in TOOLS]
        for arguments, command in zip(TOOLS, commands, strict=True):
            self._note(" ".join(arguments), command, command.end(ENDS_S), caught=False)

    def _start(self, arguments: tuple[str, ...], redis_url: str) -> Command:
        with self._lock:
            self._started += 1
            number = self._started
        return Command(arguments, self._env(redis_url), self._directory, number)

    def _in_the_middle(self, command: Command, kind: str) -> bool:
        """Wait until it has done something and goes on; False if it ended before, or did not begin."""
        deadline = time.monotonic() + IN_THE_MIDDLE_S
        while not self._abort.is_set() and time.monotonic() < deadline and command.process.poll() is None:
            out, err = command.texts
            if _BEGUN.search(err):
                return True
            if out and kind == plan.FROZEN_DEAD_LETTERS:  # that is its plan; then it sends, as slowly as it was told
                self._abort.wait(SENDS_S)
                return command.process.poll() is None
            time.sleep(0.01)
        return False

    def _note(self, kind: str, command: Command, code: int | None, caught: bool) -> None:
        self.ran.append(Ran(kind, code, *command.texts, caught))

    @property
    def caught(self) -> Counter[str]:
        """How many commands stood still in the middle, by their fault."""
        return Counter(one.kind for one in self.ran if one.caught)
