"""Run the default tests while the machine is as bad as a shared one: `python tests/stress/stress.py --runs 3 --seed 7`.

Two things happen beside the tests. One process for each core does nothing but burn it. And from time to time the tests
stand still for up to two seconds: all their processes at once, as on a machine that is suspended, or one of pytest's
own, as if it were starved. The seed decides when, and for how long; what is hit then depends on the machine.

Exit code 1: a run had a failure, which is a test that fails by luck, or a bound of the product that is too tight.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]

STILL_S = (0.1, 2.0)
"""The bounds of one standstill."""

APART_S = (0.5, 6.0)
"""The bounds of the time between two standstills."""

TESTS = ("-m", "smoke or not scenario")
"""What `make test` runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests as often as asked for; return 1 as soon as one run fails, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="runs in a row (default %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000), help="repeat a plan")
    parser.add_argument("--jobs", default="4", help="pytest processes side by side (default %(default)s)")
    parser.add_argument("tests", nargs="*", help="arguments of pytest (default: what `make test` runs)")
    options = parser.parse_args(argv)
    for number in range(options.runs):
        seed = options.seed + number
        print(f"\n== stress run {number + 1} of {options.runs}, seed {seed}", flush=True)  # noqa: T201
        began = time.monotonic()
        code, stops = run([*(options.tests or TESTS), "-n", options.jobs], random.Random(seed))
        took = time.monotonic() - began
        print(f"== {stops} standstills in {took:.0f} s, exit code {code}, seed {seed}", flush=True)  # noqa: T201
        if code:
            return 1
    return 0


def run(arguments: Sequence[str], dice: random.Random) -> tuple[int, int]:
    """Run pytest under load; return its exit code and how often it stood still."""
    stops = 0
    with burning(), subprocess.Popen([sys.executable, "-m", "pytest", *arguments], cwd=ROOT) as pytest:
        family = psutil.Process(pytest.pid)
        try:
            while not _ended(pytest, dice.uniform(*APART_S)):
                stand_still(chosen(family, dice), dice.uniform(*STILL_S))
                stops += 1
        except BaseException:  # Ctrl-C: pytest has got it too, and stops what it started
            pytest.wait()
            raise
    return pytest.returncode, stops


@contextmanager
def burning() -> Iterator[None]:
    """Keep every core busy while the block runs."""
    burners = [multiprocessing.Process(target=_burn, args=(os.getpid(),)) for _ in range(os.cpu_count() or 1)]
    for one in burners:
        one.start()
    try:
        yield
    finally:
        for one in burners:
            one.kill()
            one.join()


def chosen(family: psutil.Process, dice: random.Random) -> list[psutil.Process]:
    """Return the processes for the next standstill: all, or one of pytest's own."""
    whole = dice.random() < 0.5
    with suppress(psutil.NoSuchProcess):
        workers = family.children()
        if workers and not whole:
            return [dice.choice(workers)]
        # Pytest's own first: a test that stands still stops no other process meanwhile, for a reason of its own.
        return [family, *workers, *(one for one in family.children(recursive=True) if one not in workers)]
    return []


def stand_still(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Stop these processes for so long."""
    stopped = []
    try:
        for process in processes:
            # A process that a test has stopped is for that test to wake.
            with suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_STOPPED:
                    process.send_signal(signal.SIGSTOP)
                    stopped.append(process)
        time.sleep(seconds)
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _burn(parent: int) -> None:
    while os.getppid() == parent:  # it ends with its parent, however that ends
        sum(range(100_000))


if __name__ == "__main__":
    sys.exit(main())
