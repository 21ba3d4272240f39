"""Write the pages that are made from the code or from measurements. A test says when they are out of date."""

from __future__ import annotations

import csv
import importlib.resources
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kafka_delivery.settings import Settings
from kafka_delivery_worker.cli.settings import described
from kafka_delivery_worker.metrics.catalogue import FLEET, WORKER, Metric

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results.json"

PEAKS = (1_000, 5_000, 10_000, 20_000, 50_000, 100_000)
"""Sends a second."""

FULL = 0.7
"""Of a Redis's one core: above that, latencies grow and nothing is left for a burst."""

PART = f"{FULL * 100:.0f} %"

OUTAGE_S, OUTAGE_RATE = 3600, 1_000
"""The example of what waits while Kafka is down."""

WIDTH = 120


def settings_page() -> str:
    rows = [
        "# Settings",
        "",
        "Environment variables, read once when a process first needs them. `kafka-delivery settings` shows the same",
        "with the values of this machine. An unknown or contradictory setting stops the process with a sentence that",
        "says what to change.",
        "",
        "[Django](django.md) may have them in `settings.KAFKA_DELIVERY`, [Flask](flask.md) in `app.config`; a variable",
        "comes first.",
        "",
        "| variable | default | unit | why |",
        "|---|---|---|---|",
    ]
    for row in described(Settings()):
        default = f"`{row['default']}`" if row["default"] != "" else ""
        rows.append(f"| `{row['variable']}` | {default} | {row['unit']} | {row['why']} |")
    return "\n".join(rows) + "\n"


def errors_page() -> str:
    rows = [
        "# Kafka errors, and what is done about each",
        "",
        "One table decides; it is `kafka_delivery_worker/errors.csv`. `retry` says what happens to the record:",
        "",
        "- `full`: tried again with exponential backoff up to the retry limit, attempts counted; then a dead letter;",
        "- `few`: two more attempts with a long pause; then a dead letter;",
        "- `alone`: sent once more in a batch of its own, since a batch fails as a whole; then a dead letter;",
        "- `none`: a dead letter at once;",
        "- `hold`: waits until the cluster is back, uses no attempt, is never dead-lettered;",
        "- `resend`: the client's fault, not the record's: sent again, no attempt used.",
        "",
        "A code that is not in the table is treated as `few`.",
        "",
        "| code | name | kind | scope | retry | may duplicate | what it means |",
        "|---|---|---|---|---|---|---|",
    ]
    with importlib.resources.files("kafka_delivery_worker").joinpath("errors.csv").open(newline="") as table:
        for row in csv.DictReader(table):
            rows.append("| " + " | ".join(row.values()) + " |")
    return "\n".join(rows) + "\n"


# -- monitoring: prose by hand, and between markers all metrics
def monitoring_page() -> str:
    return _filled(
        "monitoring.md", {"metrics": [*_metrics("Of a worker process", WORKER), "", *_metrics("Of the fleet", FLEET)]}
    )


def _metrics(title: str, metrics: Iterable[Metric]) -> Iterable[str]:
    yield f"### {title}"
    yield ""
    yield "| metric | in Java | kind | labels | what it means |"
    yield "|---|---|---|---|---|"
    for one in metrics:
        java = f"`{one.java}`" if one.java else ""
        yield _line(f"`{one.name}`", java, one.kind, ", ".join(f"`{label}`" for label in one.labels), one.help)


# -- scaling: prose by hand, and between markers what was measured
def scaling_page() -> str:
    found = json.loads(RESULTS.read_text())
    return _filled("scaling.md", {name: block(found) for name, block in BLOCKS.items()})


def _filled(name: str, blocks: dict[str, Iterable[str]]) -> str:
    """A page, with these lines between its markers of these names."""
    page = (HERE / name).read_text()
    for block, lines in blocks.items():
        begin, end = f"<!-- begin: {block} -->", f"<!-- end: {block} -->"
        between = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = "\n".join([begin, "", *lines, "", end])
        page, replaced = between.subn(lambda _, text=text: text, page)
        if replaced != 1:
            raise ValueError(f"{name} has {replaced} places for {block}")
    return page


def measured(found: dict[str, Any]) -> Iterable[str]:
    """The rows of which something is wanted."""
    yield "| what | ours | peer | peer's | ratio | wanted | aim | met |"
    yield "|---|---:|---|---:|---:|---:|---:|---|"
    for row in found["rows"]:
        if row["wanted"] is None:
            continue
        sign = "at most" if row["at_most"] else "at least"
        alone = row["ratio"] is None
        yield _line(
            row["what"],
            _with_unit(row["ours"], row["unit"]),
            row["peer"] or "",
            "" if alone else _with_unit(row["peers"], row["unit"]),
            "" if alone else f"{_number(row['ratio'])}x",
            f"{sign} {_with_unit(row['wanted'], row['unit']) if alone else format(row['wanted'], 'g') + 'x'}",
            "" if row["aim"] is None else f"{row['aim']:g}x",
            "yes" if row["met"] else "**no**",
        )


def setup(found: dict[str, Any]) -> Iterable[str]:
    known = ", ".join(f"{name} {value}" for name, value in found["setup"].items() if value is not None)
    yield from textwrap.wrap(f"{known}.", WIDTH, break_on_hyphens=False)
    yield ""
    for caveat in found["caveats"]:
        yield from _item(caveat)


def growth(found: dict[str, Any]) -> Iterable[str]:
    """The rows that compare us with ourselves."""
    yield "| what | sends a second | beside the first | worker CPU each | Redis CPU each | Redis memory each |"
    yield "|---|---:|---:|---:|---:|---:|"
    first = None
    for row in found["rows"]:
        if row["wanted"] is not None:
            continue
        more = row["more"]
        if row["peer"] != first:
            first = row["peer"]
            least = statistics.median(one["peers"] for one in row["passes"])  # of all rows that are compared with it
            yield _grown(f"**{first}**", least, 1, more, "peers")
        yield _grown(row["what"], row["ours"], row["ratio"], more, "our")
    yield ""
    yield from textwrap.wrap(
        "Each number is the median of the passes, ratios too. Redis memory is what a send takes there while it waits: "
        "its value, and the envelope that makes it a task. More workers carry more as long as there are cores for "
        f"them: here {found['setup']['cores']}, for Kafka, Redis, the workers and what measures them.",
        WIDTH,
    )


def _grown(what: str, per_second: float, ratio: float, costs: dict[str, float], whose: str) -> str:
    return _line(
        what,
        _number(per_second),
        f"{_number(ratio)}x",
        f"{_number(costs[f'{whose}_worker_us'])} us",
        f"{_number(costs[f'{whose}_redis_us'])} us",
        f"{_number(costs[f'{whose}_redis_bytes'])} bytes",
    )


def arithmetic(found: dict[str, Any]) -> Iterable[str]:
    """From what one send costs to what a peak needs."""
    rows = {row["name"]: row for row in found["rows"]}
    rate = rows["single"]["ours"]
    worker_us, each = rows["single"]["more"]["our_worker_us"], rows["single"]["more"]["our_redis_bytes"]
    claim_us = rows["redis-cpu"]["ours"]
    write_us = {name: rows[row]["more"]["our_redis_us"] for name, row in (("delay", "delay"), ("bulk", "bulk"))}
    redis_us = {name: write + claim_us for name, write in write_us.items()}
    most = {name: FULL * 1e6 / us for name, us in redis_us.items()}

    yield "| one send of 200 bytes costs | |"
    yield "|---|---:|"
    yield _line("a worker, CPU", f"{_number(worker_us)} us")
    yield _line("Redis, CPU, written by `.delay()`", f"{_number(write_us['delay'])} us")
    yield _line("Redis, CPU, written by `send.bulk`", f"{_number(write_us['bulk'])} us")
    yield _line("Redis, CPU, claimed and settled by a worker", f"{_number(claim_us)} us")
    yield _line("Redis, memory, while it waits", f"{_number(each)} bytes")
    yield ""
    yield from _item(
        f"**One worker** carried {_number(rate)} sends a second here. With a core for itself it could carry one core "
        f"/ {_number(worker_us)} us = {_number(1e6 / worker_us)}."
    )
    yield from _item(
        f"**One Redis** executes commands on one core. Each send costs it twice, {_number(write_us['delay'])} us to "
        f"write and {_number(claim_us)} us to claim, so a whole core is {_number(1e6 / redis_us['delay'])} sends a "
        f"second and {PART} of it {_number(most['delay'])}. Written by `send.bulk`, {PART} is {_number(most['bulk'])}."
    )
    yield from _item(
        f"**A second Redis** is needed above {_number(most['delay'])} sends a second, or above {_number(most['bulk'])} "
        "when they are written by `send.bulk`."
    )
    yield from _item(
        f"**Redis's memory** has to hold what waits while Kafka is down: an outage of an hour at {OUTAGE_RATE:,} sends "
        f"a second is {_number(each * OUTAGE_RATE * OUTAGE_S / 1e9)} GB."
    )
    yield ""
    yield "| peak, sends a second | workers | cores they use | Redis cores | Redis servers | with `send.bulk` |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for peak in PEAKS:
        yield _line(
            f"{peak:,}",
            str(workers(peak, rate)),
            _number(peak * worker_us / 1e6),
            _number(peak * redis_us["delay"] / 1e6),
            str(servers(peak, redis_us["delay"])),
            str(servers(peak, redis_us["bulk"])),
        )
    yield ""
    yield from textwrap.wrap(
        "Workers: the peak / what one carried here, and one more for the one that restarts. Redis servers: the peak x "
        f"what a send costs Redis / {PART} of a core. Where little waits, a claim brings few messages, and each costs "
        "Redis more than here, where many wait; but then it has time.",
        WIDTH,
    )


def workers(peak: float, rate: float) -> int:
    """Workers for a peak, of which each carries `rate`, and one that may be restarting."""
    return math.ceil(peak / rate) + 1


def servers(peak: float, redis_us: float) -> int:
    """Redis servers for a peak, where each send costs them so many microseconds."""
    return math.ceil(peak * redis_us / 1e6 / FULL)


def _item(text: str) -> list[str]:
    return textwrap.wrap(f"- {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float) -> str:
    """Three digits mean something."""
    if value == 0:
        return "0"
    rounded = round(value, 2 - math.floor(math.log10(abs(value))))
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"


def _with_unit(value: float, unit: str) -> str:
    return _number(value) + ("" if unit in ("/s", "%") else " ") + unit


BLOCKS = {"measured": measured, "setup": setup, "growth": growth, "arithmetic": arithmetic}

PAGES = {
    "settings.md": settings_page,
    "errors.md": errors_page,
    "scaling.md": scaling_page,
    "monitoring.md": monitoring_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page())
        sys.stdout.write(f"docs/{name}\n")
