"""Measure this project beside its peers, on a real Kafka and a real Redis that are started for it.

    .venv/bin/python benchmarks/bench.py            # one pass, less than five minutes
    .venv/bin/python benchmarks/bench.py --short    # a look
    .venv/bin/python benchmarks/bench.py --repeat 3 # medians of three passes

The numbers go to benchmarks/latest.json; `make bench-results` writes benchmarks/results.json, which is committed, and
from it docs/scaling.md.

Needs Linux, java and Maven (or the jars: TEST_KAFKA_LIB), and redis-server. Absolute numbers are this machine's at this
moment; peers run in the same run, in turn with us, so that ratios mean something. Exit code 1: something did not work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from load import start_servers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from rows import FULL, SHORT, Bench, Row, Rows, Sizes, median

from servers import KAFKA_VERSION, have_real_kafka, have_real_redis

LATEST = Path(__file__).parent / "latest.json"

WIDTH = 120
"""Of the table in a file; in a terminal it is the terminal's."""

QUIET = 0.5
"""Load average of a core, before the run, above which its numbers mean little."""

CAVEATS = (
    "Kafka, Redis, workers and what measures them share the cores: more cores would help all, not equally.",
    "One broker on the loopback interface confirms alone; acks from replicas and a network cost what they cost.",
    "Celery's empty task is acknowledged before it runs and delivers nothing; a send is confirmed before.",
    "Records of ours have a header with their id and a timestamp; confluent-kafka alone is given the same ones.",
    "Kafka gets a request for each partition: many topics cost it, and anybody who sends to them, a lot.",
    "With task events nobody listens to them; a Flower on the same machine would take its share.",
    "Rates are of the steady part of working off a filled queue by started workers; the AOF is rewritten in between.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure this project beside its peers.")
    parser.add_argument("--short", action="store_true", help="fewer messages, and not what grows with what")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="passes; medians are shown")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measurements: " + ", ".join(map(_name, FULL)))
    parser.add_argument("--scale", type=float, default=1.0, help="a part of the messages, to see whether it works")
    parser.add_argument("--output", type=Path, default=LATEST, help="where the numbers are written as JSON")
    given = parser.parse_args(arguments)
    if not (sys.platform == "linux" and have_real_kafka() and have_real_redis()):
        parser.error("this needs Linux, java with Maven or TEST_KAFKA_LIB, and redis-server")
    if unknown := set(given.only or ()) - set(map(_name, FULL)):
        parser.error(f"no such measurement: {', '.join(sorted(unknown))}")
    sizes = (Sizes.short() if given.short else Sizes()).scaled(given.scale)
    measures = [measure for measure in FULL if measure in SHORT or not given.short or given.only]
    chosen = [measure for measure in measures if not given.only or _name(measure) in given.only]

    began, load = time.time(), os.getloadavg()[0]
    passes, faults, took = _measure(chosen, sizes, given.repeat)
    rows = [median([row for row in passes if row.name == name]) for name in dict.fromkeys(row.name for row in passes)]
    caveats = [*CAVEATS]
    if load > QUIET * (os.cpu_count() or 1):
        caveats.insert(0, f"The machine was busy with something else (load {load:.1f}): do not believe these numbers.")
    if given.scale != 1 or given.short or given.only:
        caveats.insert(0, "Not all messages, or not all measurements: it works, but do not believe these numbers.")
    setup = _setup(load) | {"passes": given.repeat, "scale": given.scale, "seconds": round(time.time() - began)}
    _show(rows, setup, caveats, faults)
    found = {
        "setup": setup,
        "rows": [_as_json(row, [one for one in passes if one.name == row.name]) for row in rows],
        "faults": faults,
        "caveats": caveats,
        "seconds": took,
    }
    given.output.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if faults else 0


def _measure(chosen: list[Rows], sizes: Sizes, repeat: int) -> tuple[list[Row], list[str], dict[str, float]]:
    """All rows of all passes, what did not work, and the seconds that each measurement took, set-up included."""
    found: list[Row] = []
    faults: list[str] = []
    took: dict[str, float] = dict.fromkeys(map(_name, chosen), 0.0)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("starting the servers", total=len(chosen) * repeat)
        with start_servers(sizes.warm) as servers:
            for _ in range(repeat):
                for measure in chosen:
                    progress.update(bar, description=_name(measure))
                    began = time.monotonic()
                    try:
                        found += measure(Bench(servers, sizes))
                    except (RuntimeError, TimeoutError, OSError) as error:  # the others are still worth their time
                        faults.append(f"{_name(measure)}: {error}")
                    took[_name(measure)] = round(took[_name(measure)] + time.monotonic() - began, 1)
                    progress.advance(bar)
            progress.update(bar, description="stopping the servers")
    return found, faults, took


def _name(measure: Rows) -> str:
    return measure.__name__.replace("_", "-")


# -- what is shown
def _show(rows: list[Row], setup: dict[str, Any], caveats: list[str], faults: list[str]) -> None:
    table = Table("what", "peer")
    for name in ("ours", "ratio", "wanted"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        peer = "" if row.peers is None else f"{row.peer}: {_number(row.peers, row.unit)}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3g}x"
        table.add_row(row.what, peer, _number(row.ours, row.unit), ratio, _wanted(row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in setup.items()), highlight=False)
    for caveat in caveats:
        console.print(f"- {caveat}", highlight=False)
    for fault in faults:
        console.print(Text(f"did not work: {fault}", style="red"))


def _number(value: float, unit: str) -> str:
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
    return shown + unit if unit in ("/s", "%") else f"{shown} {unit}"


def _wanted(row: Row) -> Text:
    if row.wanted is None:
        return Text("")
    limit = _number(row.wanted, row.unit) if row.peers is None else f"{row.wanted:g}x"
    aim = "" if row.aim is None else f" (aim {row.aim:g}x)"
    shown = f"{'<=' if row.at_most else '>='} {limit}{aim} {'yes' if row.met else 'NO'}"
    return Text(shown, style="green" if row.met else "red")


def _as_json(row: Row, passes: list[Row]) -> dict[str, Any]:
    return {
        "name": row.name,
        "what": row.what,
        "unit": row.unit,
        "ours": row.ours,
        "peer": row.peer or None,
        "peers": row.peers,
        "ratio": row.ratio,
        "wanted": row.wanted,
        "aim": row.aim,
        "at_most": row.at_most,
        "met": row.met,
        "more": row.more,
        "passes": [
            {"ours": one.ours, "peer": one.peer or None, "peers": one.peers, "more": one.more} for one in passes
        ],
    }


def _setup(load: float) -> dict[str, Any]:
    redis = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True)  # noqa: S607
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "load before": round(load, 2),
        "Python": platform.python_version(),
        "Kafka": KAFKA_VERSION,
        "Redis": redis.stdout.partition("v=")[2].partition(" ")[0],
        **{name: version(name) for name in ("celery", "kombu", "redis", "confluent-kafka")},
        **{name: _version_or_none(name) for name in ("orjson", "pybase64", "hiredis")},
    }


def _version_or_none(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
