"""``kafka-delivery doctor``: what is wrong with the settings, Redis and Kafka, and what to do about it."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict

import click

from kafka_delivery import settings
from kafka_delivery.redis_client import RedisClient

from ..backlog import count
from ..doctor import Creation, Finding, Level, ask_for_id, examine
from ..installation import Installation, servers, shown
from ..run_lock import Runner
from .acting import AuditHandler
from .output import console, json_option, print_json, table

audit = logging.getLogger("kafka_delivery.audit")

MARKS: dict[Level, str] = {"ok": "✓", "warning": "!", "error": "✗"}


@click.command()
@click.option("--topic", "topics", multiple=True, metavar="NAME", help="Look at this topic; may be given many times.")
@click.option("--create", is_flag=True, help="Create what is missing of the topics named, and of dead-letter topics.")
@click.option("--partitions", type=click.IntRange(1), default=4, show_default=True, help="Of a topic that is created.")
@click.option("--replication", type=click.IntRange(1), help="Of what is created; by default as the cluster likes.")
@click.option("--adopt-kafka", is_flag=True, help="Take this Kafka for the one that it has replaced. Asks first.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def command(
    topics: tuple[str, ...],
    create: bool,
    partitions: int,
    replication: int | None,
    adopt_kafka: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Check the settings, Redis, Kafka and topics, and say what to do. Ends with 1 if anything is an error.

    Without --topic it looks at all topics that records were sent to so far.

    A Kafka that was made anew has another id than the one that workers remember in Redis, and they refuse it. After
    --adopt-kafka they deliver to it all that waits.
    """
    if adopt_kafka:
        logging.basicConfig(handlers=[AuditHandler()])
        _adopt(yes, as_json)
    findings = []
    for finding in examine(topics, Creation(partitions, replication) if create else None):
        findings.append(finding)
        if as_json:
            print_json(asdict(finding))
    if not as_json:
        _show(findings)
    if any(finding.level == "error" for finding in findings):
        raise SystemExit(1)


def _adopt(yes: bool, as_json: bool) -> None:
    """Let the cluster's name stand for the Kafka at hand from now on, if a person agrees."""
    s = settings.current()
    redis = RedisClient(s)
    installation, here = Installation(redis, s), ask_for_id(s)
    known = installation.remembered()
    if not here or here == known:
        why = "it is the one that is remembered" if here else "it has no id, so nothing is compared"
        click.echo(f"The Kafka at {servers(s)} needs no adoption: {why}.", err=as_json)
        return
    waiting = count(redis, s.queues)
    click.echo(
        f"KAFKA_DELIVERY_CLUSTER={s.cluster} stands for the Kafka {shown(known) or '(none yet)'}. It is to stand for "
        f"{shown(here)} at {servers(s)}, which gets the {waiting:,} messages that wait, and all that are sent.",
        err=as_json,
    )
    if not yes:
        click.confirm("Adopt this Kafka?", abort=True, err=as_json)
    installation.adopt(here)
    by = Runner.here()
    audit.warning(
        "kafka.adopted cluster=%s before=%s now=%s by=%s@%s", s.cluster, shown(known), shown(here), by.user, by.host
    )


def _show(findings: list[Finding]) -> None:
    out = console()
    marks = {level: level for level in MARKS} if out.options.ascii_only else MARKS
    rows = [(marks[f.level], f.check, f.what + (f"\nTo do: {f.do}" if f.do else "")) for f in findings]
    out.print(table("Findings", ("", "check", "what"), rows))
    levels = Counter(finding.level for finding in findings)
    out.print(f"{levels['error']} error(s), {levels['warning']} warning(s), {levels['ok']} ok")
