"""How dead letters are shown: to people, and to programs."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from ..classify import Retry, verdict
from ..dead_letter import DeadLetter, Origin
from ..redrive import Plan, Result
from .filters import BASE64
from .output import moment, table, visible

BAR = 30
"""Characters of the longest bar of a histogram."""

SHOWN_BYTES = 4_096
"""Of a value that is shown to people; `--json` and `export` have all of it."""

DO: Mapping[Retry, str] = {
    Retry.FULL: "it was retried and did not pass; when the cause is gone, redrive",
    Retry.FEW: "correct what it says, then redrive",
    Retry.ALONE: "correct the record or the topic's limits, then redrive; discard what nobody needs",
    Retry.NONE: "correct what it says, then redrive",
    Retry.HOLD: "it passes by itself: redrive",
    Retry.RESEND: "it was the client's: redrive",
}
"""By what the one table of errors says about retries."""


def described(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter without its key, headers and value."""
    return {
        "place": letter.place,
        "partition": letter.partition,
        "offset": letter.offset,
        "failed_at": moment(letter.at_ms),
        "topic": letter.topic,
        "origin": str(letter.origin),
        "message_id": letter.message_id,
        "error_class": letter.error_class,
        "error_code": letter.error_code,
        "error": code_name(letter.error_code),
        "retry_count": letter.retry_count,
        "redrive_count": letter.redrive_count,
        "bytes": letter.size,
    }


def whole(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter with all that it has."""
    return described(letter) | {
        "error_message": letter.error_message,
        "timestamp": letter.timestamp_ms,
        "key": data(letter.key),
        "headers": [[name, data(value)] for name, value in letter.headers],
        "value": data(letter.value),
    }


def data(value: bytes | None) -> str | None:
    """Bytes as text, or as base64 behind "base64:" where they are none; the filters take both."""
    if value is None:
        return None
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = None
    if text is None or text.startswith(BASE64) or "\0" in text:
        return BASE64 + b64encode(value).decode()
    return text


def for_people(text: str | None) -> str:
    """`data` on a terminal: what it would act on is made visible, what is binary or long is cut."""
    if text is None:
        return "(none)"
    cut = text[:SHOWN_BYTES]
    return visible(cut) + (f"... ({len(text):,} characters; `export` has all)" if len(text) > len(cut) else "")


def advice(letter: DeadLetter) -> str:
    """What to do about the error of a dead letter."""
    if letter.error_code:
        found = verdict(letter.error_code)
        return f"{found.name}: {found.reason}. Then: {DO[found.retry]}"
    if letter.origin is Origin.UNKNOWN:
        return "nothing says why it is here, or what topic it was for: ask its writer; redrive with --to, or discard it"
    if letter.origin is not Origin.OURS:
        return (
            f"a consumer of {letter.topic} failed with it after it had arrived: mend that first. A redrive puts "
            "it into the topic again, for all of its consumers; they know it by its message-id, if it was ours"
        )
    return "an application gave it up for a reason of its own: ask its owner; then redrive or discard it"


def code_name(code: int | None) -> str:
    """The name of an error code; "" where there is none."""
    return verdict(code).name if code else ""


def hour(ms: int) -> str:
    """The hour of a moment, in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:00Z")


def bar(count: int, counts: Counter[Any]) -> str:
    """A bar as long as `count` is large among `counts`."""
    return "█" * max(1, round(BAR * count / max(counts.values())))


def plan_as_json(topic: str, plan: Plan) -> dict[str, Any]:
    """A plan, for programs."""
    return {
        "topic": topic,
        "waiting": plan.waiting,
        "send": dict(plan.send),
        "whole": plan.whole,
        "park": plan.park,
        "left": dict(plan.left),
        "not_chosen": plan.not_chosen,
        "errors": [
            {"error_class": name, "error_code": code, "error": code_name(code), "count": count}
            for (name, code), count in plan.errors.most_common()
        ],
    }


def plan_tables(topic: str, plan: Plan) -> list[Table]:
    """A plan, for people."""
    rows: list[tuple[str, int]] = [(f"send to {target}", count) for target, count in plan.send.most_common()]
    if plan.whole:
        rows.append(("- of these from the parking store, whole", plan.whole))
    if plan.park:
        rows.append(("park: redriven too often", plan.park))
    rows += [(f"leave: {why}", count) for why, count in plan.left.most_common()]
    if plan.not_chosen:
        rows.append(("leave: not asked for", plan.not_chosen))
    errors = [(name or "(not said)", code_name(code), count) for (name, code), count in plan.errors.most_common()]
    tables = [table(f"Of {plan.waiting:,} dead letters of {topic}", ("what", "how many"), rows)]
    return [*tables, table("Why they died", ("error", "code", "count"), errors)] if errors else tables


def result_text(target: str, result: Result) -> str:
    """What a run did, in sentences; `target` is the topic that refused what it refused."""
    ended = f"{result.delivered:,} delivered, {result.refused:,} dead letters again, {result.parked:,} parked"
    lines = [f"{ended}, {result.left:,} left."]
    if result.stopped:
        lines.append(f"Stopped: {result.stopped}. Run it again to go on.")
    if result.in_flight:
        lines.append(
            f"Of {result.in_flight} the outcome is not known yet: they are in the queue, and a new run sends them "
            "again, under the same message ids."
        )
    if result.refused:
        lines.append(f"`kafka-delivery dead-letters summary {target}` says why.")
    return "\n".join(lines)
