"""One change to one file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """A file with `text` in place of what lies from `start` to `end`.

    Attributes:
        path: the file, below the root of the repository.
        line: where the change begins, from 1.
        start, end: offsets in the file, in characters.
        text: the replacement.
        loaded: the change is in code that runs only while the module is loaded, so a module in memory cannot take it.
    """

    path: str
    line: int
    start: int
    end: int
    text: str
    loaded: bool = False

    def apply(self, source: str) -> str:
        """Return the file with the change in it."""
        return source[: self.start] + self.text + source[self.end :]

    def before(self, source: str) -> str:
        """Return the line as it is; a change of several lines shows the first."""
        shown = source.splitlines()[self.line - 1].strip()
        return shown + " ..." if "\n" in source[self.start : self.end] else shown

    def after(self, source: str) -> str:
        """Return the line with the change in it."""
        return self.apply(source).splitlines()[self.line - 1].strip()


def line_of(source: str, offset: int) -> int:
    """Return the line, from 1, of an offset."""
    return source.count("\n", 0, offset) + 1


def another(number: float) -> float:
    """Return one more, or twice as much from ten on: a limit of 1000 and one of 1001 are the same rule."""
    return number + 1 if abs(number) < 10 else number * 2
