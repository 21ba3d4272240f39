"""Write the pages that are made from the code: settings and errors. A test says when they are out of date."""

from __future__ import annotations

import csv
import importlib.resources
import sys
from pathlib import Path

from kafka_delivery.settings import Settings
from kafka_delivery_worker.cli.settings import described

HERE = Path(__file__).parent


def settings_page() -> str:
    rows = [
        "# Settings",
        "",
        "Environment variables, read once when a process first needs them. `kafka-delivery settings` shows the same",
        "with the values of this machine. An unknown or contradictory setting stops the process with a sentence that",
        "says what to change.",
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


PAGES = {"settings.md": settings_page, "errors.md": errors_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page())
        sys.stdout.write(f"docs/{name}\n")
