"""Delete or turn one rule at a time, and show which mutants no test notices.

The rules are those of `guards.TARGETS`. Exit code 1: a mutant survived that `accepted.toml` does not explain.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import results
from .guards import ROOT, TARGETS, Target, missing
from .mutant import Mutant
from .results import Account
from .runs import Result, UsageError, run, valid_lua

Work = list[tuple[Target, list[Mutant]]]


def main(arguments: Sequence[str], root: Path = ROOT, targets: tuple[Target, ...] = TARGETS) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        wrong = missing(targets, root)
        if wrong:
            raise UsageError("\n".join([*wrong, "correct the table in tests/mutation/guards.py"]))
        account = Account.load(root, targets)
        work = _chosen(options, root, targets, account)
        if options.list:
            for target, mutants in work:
                for mutant in mutants:
                    console.print(_shown(mutant, (root / target.path).read_text("utf-8")))
            return 0
        if not options.report:
            _run(work, options.jobs, account, console, root)
        return _report(options, arguments, work, account, console, root, targets)
    except UsageError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="PATH", help="change files whose path ends so (default all)")
    add("--line", type=int, metavar="N", help="change line N (default all)")
    add("--sample", type=int, metavar="N", help="run N mutants, chosen at random (default all)")
    add("--seed", type=int, default=1, metavar="S", help="choose the sample by this number (default 1)")
    add(
        "--survivors",
        action="store_true",
        help="run the unexplained survivors of last time, and what has not been run yet",
    )
    add("--jobs", type=int, default=2, metavar="N", help="run N mutants at a time (default 2)")
    add("--list", action="store_true", help="show the mutants and run none")
    add("--report", action="store_true", help="show the last results and run none")
    add("--write", action="store_true", help=f"write {results.PAGE}, from the last results of all mutants")
    return parser


def _chosen(options: argparse.Namespace, root: Path, targets: Sequence[Target], account: Account) -> Work:
    """The mutants that the options ask for, by target."""
    work: Work = []
    for target in targets:
        if options.only and not target.path.endswith(tuple(options.only)):
            continue
        mutants = [mutant for mutant in target.mutants(root) if options.line in (None, mutant.line)]
        if options.survivors:
            unexplained = {*account.not_run(mutants), *account.unexplained(mutants)}
            mutants = [mutant for mutant in mutants if mutant in unexplained]
        work.append((target, mutants))
    valid = set(valid_lua(targets, [mutant for _, mutants in work for mutant in mutants], root))
    if options.sample is not None:
        valid = set(random.Random(options.seed).sample(sorted(valid, key=repr), min(options.sample, len(valid))))
    work = [(target, [mutant for mutant in mutants if mutant in valid]) for target, mutants in work]
    work = [(target, mutants) for target, mutants in work if mutants]
    if not work:
        raise UsageError("there is no such mutant: see --list")
    return work


def _run(work: Work, jobs: int, account: Account, console: Console, root: Path) -> None:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[alive]} survived"),
    )  # fmt: skip
    alive = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("mutants", total=sum(len(mutants) for _, mutants in work), alive=0)

        def done(result: Result) -> None:
            nonlocal alive
            account.add(result)
            if result.outcome == "passed":
                alive += 1
                shown = _shown(result.mutant, (root / result.mutant.path).read_text("utf-8"))
                console.print(f"survived: {shown}")
            progress.update(bar, advance=1, alive=alive)

        run(work, jobs, done, lambda path: progress.update(bar, description=f"tests of {Path(path).name}"), root)


def _report(
    options: argparse.Namespace,
    arguments: Sequence[str],
    work: Work,
    account: Account,
    console: Console,
    root: Path,
    targets: Sequence[Target],
) -> int:
    chosen = [mutant for _, mutants in work for mutant in mutants]
    tally = account.tally(chosen)
    console.print(results.summary(tally))
    if options.write:
        if options.only or options.line or options.sample or options.survivors:
            work = _chosen(_parser().parse_args([]), root, targets, account)  # the page is of all mutants
            chosen = [mutant for _, mutants in work for mutant in mutants]
        command = "make mutants" + (f' ARGS="{shlex.join(arguments)}"' if arguments else "")
        account.write(chosen, command, date.today())
    unexplained = account.unexplained(chosen)
    for mutant in unexplained:
        console.print(f"unexplained: {_shown(mutant, account.source(mutant.path))}")
    return 1 if unexplained else 0


def _shown(mutant: Mutant, source: str) -> str:
    return f"{mutant.path}:{mutant.line}\n    - {mutant.before(source)}\n    + {mutant.after(source)}"
