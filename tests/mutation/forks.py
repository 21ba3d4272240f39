"""A server of test runs: it collects the tests once, and forks for each mutant.

It reads a request, a line of JSON, from its standard input, and answers with a line of JSON where it was told to. A
child runs the tests in its own memory, with servers of its own. It ends with the first test that fails.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import IO, Any, NoReturn

import pytest

SHORTEST_S = 15.0
"""A test has at least this long: the machine may be busy."""

TIMES = 10
"""A test may take so many times as long as it took without a mutant. Then the mutant counts as killed by time."""


class Forks:
    """As pytest's plugin it takes the place of the loop over tests.

    Args:
        requests: where requests come from.
        answers: where answers go to.
        seconds: how long each test takes without a mutant; empty if that is not known yet.
    """

    def __init__(self, requests: IO[str], answers: int, seconds: dict[str, float]) -> None:
        self._requests = requests
        self._answers = answers
        self._seconds = seconds
        self._functions: dict[str, list[FunctionType]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Serve until the input ends."""
        # Errors while tests are collected are what some mutants cause, and what a wrong table of tests causes, too.
        fault = "tests cannot be collected" if session.testsfailed else "" if session.items else "there are no tests"
        self._functions = functions_in_memory()
        gc.freeze()  # else each child would copy what its collector looks at
        self._answer({"ready": len(session.items), "fault": fault})
        for line in self._requests:
            request: dict[str, Any] = json.loads(line)
            self._answer(self._run(session.items, request))
        return True

    def _answer(self, answer: dict[str, Any]) -> None:
        os.write(self._answers, json.dumps(answer).encode() + b"\n")

    def _run(self, items: list[pytest.Item], request: dict[str, Any]) -> dict[str, Any]:
        first = {name: place for place, name in enumerate(request.get("first", []))}
        # Then the quick ones before the slow: most mutants fall to any of them.
        ordered = sorted(
            items, key=lambda item: (first.get(item.nodeid, len(first)), self._seconds.get(item.nodeid, 0.0))
        )
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _Child(writing).run(ordered, self._functions, request.get("swap"))
        os.close(writing)
        try:
            return self._watch(reading)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.close(reading)
            os.waitpid(pid, 0)

    def _watch(self, reading: int) -> dict[str, Any]:
        """Follow a child from test to test."""
        test, since, took = "", time.monotonic(), dict[str, float]()
        with os.fdopen(os.dup(reading), buffering=1) as lines:
            while True:
                left = self._limit(test) - (time.monotonic() - since)
                if not select.select([reading], [], [], max(0.0, left))[0]:
                    return {"outcome": "time", "test": test}
                word, _, rest = lines.readline().rstrip("\n").partition(" ")
                now = time.monotonic()
                if test:
                    took[test] = now - since
                if word != "test":  # none is left of a child that ended without a word
                    return {"outcome": word or "failed", "test": test, "took": took}
                test, since = rest, now

    def _limit(self, test: str) -> float:
        return max(SHORTEST_S, TIMES * self._seconds.get(test, 0.0)) if self._seconds else 600.0


class _Child:
    """A run of all tests, up to the first that fails."""

    def __init__(self, writing: int) -> None:
        self._writing = writing
        self._failed = False

    def run(
        self, items: list[pytest.Item], functions: dict[str, list[FunctionType]], swap: list[str] | None
    ) -> NoReturn:
        outcome = "failed"
        try:
            os.setpgid(0, 0)
            random.seed()  # else each child would look for free ports in the same places
            if swap:
                path, original = swap
                swap_code(functions.get(path, []), path, original)
            items[0].config.pluginmanager.register(self)
            for item, following in zip(items, [*items[1:], None], strict=True):
                self._tell("test " + item.nodeid)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self._failed:
                    break
            outcome = "failed" if self._failed else "passed"
        finally:
            self._tell(outcome)
            os._exit(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed = self._failed or report.failed

    def _tell(self, line: str) -> None:
        os.write(self._writing, line.encode() + b"\n")


def functions_in_memory() -> dict[str, list[FunctionType]]:
    """Return all functions that were loaded, by file."""
    found: dict[str, list[FunctionType]] = {}
    for one in gc.get_objects():
        if isinstance(one, FunctionType):
            found.setdefault(one.__code__.co_filename, []).append(one)
    return found


def swap_code(functions: list[FunctionType], path: str, original: str) -> None:
    """Give the functions of a module the code that its file has now.

    Args:
        functions: those of the module.
        path: the module's file.
        original: the file that it was loaded from.
    """
    old = _functions(Path(original).read_text("utf-8"), path)
    new = _functions(Path(path).read_text("utf-8"), path)
    places = {
        (name, code.co_firstlineno): (name, place) for name, codes in old.items() for place, code in enumerate(codes)
    }
    for found in functions:
        name, place = places.get((found.__code__.co_qualname, found.__code__.co_firstlineno), ("", 0))
        if place < len(new.get(name, ())):
            found.__code__ = new[name][place]


def _functions(source: str, path: str) -> dict[str, list[CodeType]]:
    """The code of each function of a module, in order, by qualified name."""
    found: dict[str, list[CodeType]] = {}
    todo = [compile(source, path, "exec")]
    while todo:
        code = todo.pop(0)
        found.setdefault(code.co_qualname, []).append(code)
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for codes in found.values():
        codes.sort(key=lambda code: code.co_firstlineno)
    return found


def main() -> None:
    """Serve. Arguments: the descriptor for answers, seconds by test (a file with JSON), then pytest's."""
    from hypothesis import settings

    settings.register_profile("mutants", derandomize=True, database=None)
    settings.load_profile("mutants")
    seconds = json.loads(Path(sys.argv[2]).read_text())
    requests = os.fdopen(os.dup(sys.stdin.fileno()))  # pytest takes the other one away
    pytest.main(sys.argv[3:], plugins=[Forks(requests, int(sys.argv[1]), seconds)])


if __name__ == "__main__":
    main()
