"""The application: a process that sends records of all kinds, and writes down what was accepted.

A send whose `.delay()` failed is sent again with the same message id until it is accepted. It reads commands on its
standard input (`burst <count>`); the end of the input ends it, once everything is accepted or `LAST_CHANCE_S` is over.

Of a chain, a link or a chord each step has a message id of its own, and is written down with the first: from then on
all of it is due. Sentry is set up, which nests the headers of what is sent within a transaction.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import sentry_sdk
from celery import chain, chord, group
from celery.result import AsyncResult
from sentry_sdk.integrations.celery import CeleryIntegration

from kafka_delivery import EnqueueError, Record, send, send_many
from soak.chaos.tracers import Nowhere

TOPIC, MISSING, NOWHERE, UNWANTED = "orders", "missing", "nowhere", "unwanted"
"""A topic; one that does not exist but its dead-letter topic does; one of which neither does; another such, of which
operators discard what is parked."""

PLAIN, COUNTDOWN, BATCH, RESULT, DEAD, PARKED = "plain", "countdown", "batch", "result", "no topic", "no topic, no dlq"
DISCARDABLE = "discarded"
LINK, LINK_ERROR, CHAIN, GROUP, CHORD = "link", "link_error", "chain", "group in a chain", "chord"
WEIGHTS = {
    PLAIN: 60, COUNTDOWN: 8, BATCH: 2, RESULT: 8, DEAD: 4, PARKED: 2, DISCARDABLE: 2,
    LINK: 4, LINK_ERROR: 2, CHAIN: 5, GROUP: 2, CHORD: 3,
}  # fmt: skip
FOLLOWED = (LINK, LINK_ERROR, CHAIN, GROUP, CHORD)
"""Kinds of which one send queues the next."""

DELIVERED, DEAD_LETTERED, IS_PARKED = "delivered", "dead-lettered", "parked"
DUE = {TOPIC: DELIVERED, MISSING: DEAD_LETTERED, NOWHERE: IS_PARKED, UNWANTED: IS_PARKED}
"""What has to become of a record of each topic, whatever happens around it."""

HEADERS: tuple[list[tuple[str, str | bytes | None]], ...] = (
    [],
    [],
    [("source", "shop"), ("traceparent", "own")],
    [("a", "1"), ("a", b"\xff2"), ("b", None), ("a", "3")],
)
"""Some records have none. Tracers turn such into a dictionary, or drop what has no value."""

BURST_OF_ALL = 10
"""In a burst each of so many is a call of any kind."""

REPEAT_AFTER_S = 0.2
LAST_CHANCE_S = 60
RESULTS_KEPT = 50


def digest(key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]) -> str:
    """Tells apart records that differ in their key, value or headers."""
    return hashlib.sha256(repr((key, value, list(headers))).encode()).hexdigest()[:16]


def _bytes(text: str | bytes | None) -> bytes | None:
    return text.encode() if isinstance(text, str) else text


@dataclass(frozen=True, slots=True)
class Sent:
    """A record of a call: its id, what has to become of it, and what it has to be like when it is read."""

    id: str
    due: str
    digest: str

    @classmethod
    def of(cls, message_id: str, topic: str, value: str, key: str | None = None, headers: Any = ()) -> Sent:
        expected = digest(_bytes(key), _bytes(value), [(name, _bytes(header)) for name, header in headers])
        return cls(message_id, DUE[topic], expected)


@dataclass
class Call:
    """One call of a task, repeated until it is accepted."""

    kind: str
    sent: list[Sent]
    task_id: str
    make: Callable[[], AsyncResult]
    tries: int = 0
    due: float = 0.0


def _step(message_id: str, topic: str, value: str, fields: dict[str, Any]) -> Any:
    return send.si(topic, value, **fields).set(task_id=message_id)


def _canvas(kind: str, steps: list[Any]) -> AsyncResult:
    first, *others = steps
    if kind == LINK:
        return first.apply_async(link=others[0])
    if kind == LINK_ERROR:
        return first.apply_async(link_error=others[0])
    if kind == CHAIN:
        return chain(*steps).apply_async()
    if kind == GROUP:
        return chain(first, group(*others[:-1]), others[-1]).apply_async()
    return chord(steps[:-1], steps[-1]).apply_async()


@dataclass
class Application:
    rate: float
    dice: random.Random
    report: Any
    bursts: int = 0
    ended: bool = False
    number: int = 0
    repeats: deque[Call] = field(default_factory=deque)
    errors: Counter[str] = field(default_factory=Counter)
    results: deque[AsyncResult] = field(default_factory=deque)

    def run(self) -> None:
        next_at = time.monotonic()
        while not self.ended:
            next_at = max(next_at + 1 / self.rate, time.monotonic() - 1)
            self._repeat()
            self._attempt(self._call())
            while self.bursts:
                self.bursts -= 1
                self._attempt(self._call(None if self.bursts % BURST_OF_ALL == 0 else PLAIN))
            time.sleep(max(0.0, next_at - time.monotonic()))
        deadline = time.monotonic() + LAST_CHANCE_S
        while self.repeats and time.monotonic() < deadline:
            self._repeat()
            time.sleep(0.01)
        self._write({"errors": dict(self.errors), "not accepted": sum(len(call.sent) for call in self.repeats)})

    def _call(self, kind: str | None = None) -> Call:
        kind = kind or self.dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if kind == BATCH:
            return self._batch()
        if kind in FOLLOWED:
            return self._followed(kind)
        message_id = self._id()
        topic = {DEAD: MISSING, PARKED: NOWHERE, DISCARDABLE: UNWANTED}.get(kind, TOPIC)
        value, fields = self._content()
        sent = Sent.of(message_id, topic, value, **fields)
        fields["message_id"] = message_id
        options: dict[str, Any] = {}
        if kind == COUNTDOWN:
            options["countdown"] = self.dice.uniform(1, 6)
        elif kind == RESULT:
            options["ignore_result"] = False
        if options:
            return Call(kind, [sent], message_id, lambda: send.apply_async((topic, value), fields, **options))
        return Call(kind, [sent], message_id, lambda: send.delay(topic, value, **fields))

    def _content(self) -> tuple[str, dict[str, Any]]:
        """A value, key and headers."""
        fields: dict[str, Any] = {"key": f"k{self.number % 97}"}
        if headers := self.dice.choice(HEADERS):
            fields["headers"] = headers
        return "x" * self.dice.choice((0, 20, 200, 200, 2_000)), fields

    def _batch(self) -> Call:
        batch = self._id()
        ids = [f"{batch}-{number}" for number in range(self.dice.randrange(2, 40))]
        headers = self.dice.choice(HEADERS)
        records = [Record(TOPIC, "y" * 100, headers=headers, message_id=message_id) for message_id in ids]
        sent = [Sent.of(message_id, TOPIC, "y" * 100, headers=headers) for message_id in ids]
        make = lambda: send_many.apply_async((records,), task_id=batch)  # noqa: E731
        return Call(BATCH, sent, batch, make)

    def _followed(self, kind: str) -> Call:
        """A send that queues others. Each attempt makes it anew: Celery's canvases keep ids of one that failed."""
        tag = self._id()
        sent: list[Sent] = []
        steps: list[Callable[[], Any]] = []  # signatures
        topics = {LINK: (TOPIC,) * 2, LINK_ERROR: (MISSING, TOPIC), GROUP: (TOPIC,) * 4}.get(kind, (TOPIC,) * 3)
        for number, topic in enumerate(topics, 1):
            value, fields = self._content()
            message_id = f"{tag}-{number}"
            sent.append(Sent.of(message_id, topic, value, **fields))
            steps.append(partial(_step, message_id, topic, value, fields))
        return Call(kind, sent, sent[0].id, lambda: _canvas(kind, [step() for step in steps]))

    def _id(self) -> str:
        self.number += 1
        return f"m{self.number:07}"

    def _attempt(self, call: Call) -> None:
        call.tries += 1
        try:
            with sentry_sdk.start_transaction(name="request"):
                result = call.make()
        except EnqueueError as error:
            self._again(call, error.reason.partition(":")[0][:60].strip())
        except Exception as error:  # not promised; counted, and shown in the account
            traceback.print_exc()
            own = "Celery's result store" if call.kind in (CHORD, GROUP) else "UNEXPECTED"  # where it counts the parts
            self._again(call, f"{own}: {type(error).__name__} {' '.join(str(error).split())}"[:100])
        else:
            self._accepted(call)
            if call.kind == RESULT:
                self._keep(result)

    def _again(self, call: Call, error: str) -> None:
        self.errors[error] += 1
        call.due = time.monotonic() + REPEAT_AFTER_S
        self.repeats.append(call)

    def _accepted(self, call: Call) -> None:
        at = time.time()
        for one in call.sent:
            line = {"id": one.id, "kind": call.kind, "task_id": call.task_id, "at": at, "tries": call.tries}
            self._write(line | {"due": one.due, "digest": one.digest})

    def _repeat(self) -> None:
        for _ in range(len(self.repeats)):
            if self.repeats[0].due > time.monotonic():
                return
            self._attempt(self.repeats.popleft())

    def _keep(self, result: AsyncResult) -> None:
        """Nobody waits for results here; forget those that an application would have read by now."""
        self.results.append(result)
        if len(self.results) > RESULTS_KEPT:
            try:
                self.results.popleft().forget()
            except Exception as error:  # Redis is away
                self.errors[f"forget: {type(error).__name__}"] += 1

    def _write(self, line: dict[str, Any]) -> None:
        self.report.write(json.dumps(line) + "\n")
        self.report.flush()

    def obey(self) -> None:
        """Follow the commands on standard input until its end."""
        for line in sys.stdin:
            _, _, count = line.partition(" ")
            self.bursts += int(count)
        self.ended = True


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rate", type=float, required=True)
    arguments.add_argument("--seed", type=int, required=True)
    arguments.add_argument("--report", type=Path, required=True)
    given = arguments.parse_args()
    sentry_sdk.init(
        "http://key@127.0.0.1:9/1", transport=Nowhere, traces_sample_rate=1.0, integrations=[CeleryIntegration()]
    )
    with given.report.open("w") as report:
        application = Application(given.rate, random.Random(given.seed), report)
        threading.Thread(target=application.obey, daemon=True).start()
        application.run()


if __name__ == "__main__":
    main()
