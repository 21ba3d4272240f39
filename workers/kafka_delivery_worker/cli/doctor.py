"""``kafka-delivery doctor``: what is wrong with the settings, Redis and Kafka, and what to do about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import click

from ..doctor import Creation, Finding, Level, examine
from .output import console, json_option, print_json, table

MARKS: dict[Level, str] = {"ok": "✓", "warning": "!", "error": "✗"}


@click.command()
@click.option("--topic", "topics", multiple=True, metavar="NAME", help="Look at this topic; may be given many times.")
@click.option("--create", is_flag=True, help="Create what is missing of the topics named, and of dead-letter topics.")
@click.option("--partitions", type=click.IntRange(1), default=4, show_default=True, help="Of a topic that is created.")
@click.option("--replication", type=click.IntRange(1), help="Of what is created; by default as the cluster likes.")
@json_option
def command(topics: tuple[str, ...], create: bool, partitions: int, replication: int | None, as_json: bool) -> None:
    """Check the settings, Redis, Kafka and topics, and say what to do. Ends with 1 if anything is an error.

    Without --topic it looks at all topics that records were sent to so far.
    """
    findings = []
    for finding in examine(topics, Creation(partitions, replication) if create else None):
        findings.append(finding)
        if as_json:
            print_json(asdict(finding))
    if not as_json:
        _show(findings)
    if any(finding.level == "error" for finding in findings):
        raise SystemExit(1)


def _show(findings: list[Finding]) -> None:
    out = console()
    marks = {level: level for level in MARKS} if out.options.ascii_only else MARKS
    rows = [(marks[f.level], f.check, f.what + (f"\nTo do: {f.do}" if f.do else "")) for f in findings]
    out.print(table("Findings", ("", "check", "what"), rows))
    levels = Counter(finding.level for finding in findings)
    out.print(f"{levels['error']} error(s), {levels['warning']} warning(s), {levels['ok']} ok")
