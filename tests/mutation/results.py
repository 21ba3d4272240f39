"""What became of all mutants: kept from run to run in `.cache`, and written for people in `results.md`."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from .guards import ROOT, Target
from .mutant import Mutant
from .runs import Result

STATE = ".cache/mutants"
"""A file with results for each file with rules, so that two runs over different files do not meet."""

PAGE = "tests/mutation/results.md"
ACCEPTED = "tests/mutation/accepted.toml"


class Tally(NamedTuple):
    """Mutants of one file."""

    path: str
    mutants: int
    killed: int
    by_time: int
    explained: int
    unexplained: int
    not_run: int


class Account:
    """Results by mutant. A file that has changed since loses its results.

    Args:
        root: the repository.
        outcomes: by file, then by mutant.
        reasons: why a survivor is accepted, by file, line as it is, and line with the change.
    """

    def __init__(
        self, root: Path, outcomes: dict[str, dict[str, str]], reasons: dict[tuple[str, str, str], str]
    ) -> None:
        self._root, self._outcomes, self._reasons = root, outcomes, reasons
        self._sources: dict[str, str] = {}
        self._used: set[tuple[str, str, str]] = set()

    @classmethod
    def load(cls, root: Path = ROOT, targets: Sequence[Target] = ()) -> Account:
        """Read the results of the last runs, and the accepted survivors.

        Raises:
            ValueError: `accepted.toml` is no list of files, lines and reasons.
        """
        outcomes = {}
        for target in targets:
            state = _state(root, target.path)
            stored = json.loads(state.read_text("utf-8")) if state.exists() else {}
            outcomes[target.path] = stored.get(_digest((root / target.path).read_text("utf-8")), {})
        accepted = root / ACCEPTED
        entries = tomllib.loads(accepted.read_text("utf-8"))["survivor"] if accepted.exists() else []
        names = {Path(target.path).name: target.path for target in targets}
        reasons = {
            (names.get(entry["file"], entry["file"]), entry["line"], mutated): entry["why"]
            for entry in entries
            for mutated in entry["mutated"]
        }
        return cls(root, outcomes, reasons)

    def source(self, path: str) -> str:
        """Return what is in a file."""
        if path not in self._sources:
            self._sources[path] = (self._root / path).read_text("utf-8")
        return self._sources[path]

    def add(self, result: Result) -> None:
        """Take in one result, and keep it for the next run."""
        path = result.mutant.path
        outcomes = self._outcomes.setdefault(path, {})
        outcomes[_key(result.mutant)] = result.outcome
        state = _state(self._root, path)
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text(json.dumps({_digest(self.source(path)): outcomes}), "utf-8")

    def outcome(self, mutant: Mutant) -> str | None:
        """Return what became of a mutant; None if it has not been run."""
        return self._outcomes.get(mutant.path, {}).get(_key(mutant))

    def not_run(self, mutants: Sequence[Mutant]) -> list[Mutant]:
        """Return the mutants without a result."""
        return [mutant for mutant in mutants if self.outcome(mutant) is None]

    def survivors(self, mutants: Sequence[Mutant]) -> list[Mutant]:
        """Return the mutants that no test noticed."""
        return [mutant for mutant in mutants if self.outcome(mutant) == "passed"]

    def unexplained(self, mutants: Sequence[Mutant]) -> list[Mutant]:
        """Return the survivors that nothing explains."""
        return [mutant for mutant in self.survivors(mutants) if not self.reason(mutant)]

    def reason(self, mutant: Mutant) -> str:
        """Return why a survivor is accepted; "" if nothing says so."""
        source = self.source(mutant.path)
        return self._reasons.get((mutant.path, mutant.before(source), mutant.after(source)), "")

    def tally(self, mutants: Sequence[Mutant]) -> list[Tally]:
        """Return the numbers of each file."""
        made = []
        for path in dict.fromkeys(mutant.path for mutant in mutants):
            of = [mutant for mutant in mutants if mutant.path == path]
            outcomes = [self.outcome(mutant) for mutant in of]
            unexplained = len(self.unexplained(of))
            survived = outcomes.count("passed")
            killed, by_time = outcomes.count("failed"), outcomes.count("time")
            not_run = outcomes.count(None)
            made.append(Tally(path, len(of), killed, by_time, survived - unexplained, unexplained, not_run))
        return made

    def stale(self, mutants: Sequence[Mutant]) -> list[tuple[str, str, str]]:
        """Return the accepted changes that are no survivors any more."""
        alive = {
            (mutant.path, mutant.before(self.source(mutant.path)), mutant.after(self.source(mutant.path)))
            for mutant in self.survivors(mutants)
        }
        return [key for key in self._reasons if key not in alive]

    def write(self, mutants: Sequence[Mutant], command: str, day: date) -> None:
        """Write the page for people."""
        lines = [
            "# Which rules no test would miss", "",
            "Each mutant is a file with one rule deleted or turned. A mutant that no test notices has survived.",
            f"`{command}` wrote this page on {day.isoformat()}, from the last result of each mutant.",
            'Those that were not run since their tests changed are run by `make mutants ARGS="--survivors"`.', "",
            summary(self.tally(mutants)), "",
        ]  # fmt: skip
        for path in dict.fromkeys(mutant.path for mutant in self.survivors(mutants)):
            lines += [f"## {path}", ""]
            for mutant in self.survivors([mutant for mutant in mutants if mutant.path == path]):
                source = self.source(path)
                lines += [
                    f"`{Path(path).name}:{mutant.line}` {self.reason(mutant) or '**Not explained.**'}", "",
                    "```diff", f"- {mutant.before(source)}", f"+ {mutant.after(source)}", "```", "",
                ]  # fmt: skip
        stale = self.stale(mutants)
        if stale:
            lines += [f"## Entries of {ACCEPTED} that are no survivors any more", ""]
            lines += [f"- `{path}`: `{mutated}`" for path, _, mutated in stale] + [""]
        (self._root / PAGE).write_text("\n".join(lines), "utf-8")


def summary(tally: Sequence[Tally]) -> str:
    """Return the numbers as a table."""
    rows = [
        "| file | mutants | killed by a test | by time | survived, accepted | survived, not explained | not run |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    total = Tally("all", *(sum(numbers) for numbers in zip(*(row[1:] for row in tally), strict=True)))
    return "\n".join(rows + [f"| {' | '.join(str(cell) for cell in row)} |" for row in (*tally, total)])


def _state(root: Path, path: str) -> Path:
    return root / STATE / f"{path.replace('/', '.')}.json"


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _key(mutant: Mutant) -> str:
    return f"{mutant.start}-{mutant.end}:{mutant.text}"
