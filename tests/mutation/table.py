"""Mutants of the table of errors: one field of one row each."""

from __future__ import annotations

import csv

from .mutant import Mutant

FIELDS = ("kind", "scope", "retry", "duplicate")
"""What decides a record's fate, and whether a copy may exist."""

SAMPLE = 16
"""Of the rows that are of a class seen before, every sixteenth is changed too."""


def mutants(path: str, source: str) -> list[Mutant]:
    """Return mutants of a table in CSV.

    Rows with the same kind, scope, retry and duplicate are of one class. The first row of each class has each of these
    fields changed in turn. A sample of the others has one field changed.
    """
    lines = source.splitlines(keepends=True)
    header = next(csv.reader(lines[:1]))
    places = [header.index(name) for name in FIELDS]
    rows = [next(csv.reader([line])) for line in lines[1:]]
    values = {place: sorted({row[place] for row in rows}) for place in places}
    found, seen, offset, others = [], set(), len(lines[0]), 0
    for number, (line, row) in enumerate(zip(lines[1:], rows, strict=True), start=2):
        kind = tuple(row[place] for place in places)
        if kind not in seen:
            chosen = places
        else:
            others += 1
            chosen = [places[others // SAMPLE % len(places)]] if others % SAMPLE == 0 else []
        seen.add(kind)
        for place in chosen:
            start = offset + sum(len(field) + 1 for field in row[:place])
            following = values[place][(values[place].index(row[place]) + 1) % len(values[place])]
            found.append(Mutant(path, number, start, start + len(row[place]), following, loaded=True))
        offset += len(line)
    return found
