"""The application: a process that sends records of all kinds, and writes down what was accepted.

A send whose `.delay()` failed is sent again with the same message id until it is accepted. It reads commands on its
standard input (`burst <count>`); the end of the input ends it, once everything is accepted or `LAST_CHANCE_S` is over.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery.result import AsyncResult

from kafka_delivery import EnqueueError, Record, send, send_many

TOPIC, MISSING, NOWHERE = "orders", "missing", "nowhere"
"""A topic; one that does not exist but its dead-letter topic does; one of which neither does."""

PLAIN, COUNTDOWN, BATCH, RESULT, DEAD, PARKED = "plain", "countdown", "batch", "result", "no topic", "no topic, no dlq"
WEIGHTS = {PLAIN: 72, COUNTDOWN: 10, BATCH: 2, RESULT: 10, DEAD: 4, PARKED: 2}

REPEAT_AFTER_S = 0.2
LAST_CHANCE_S = 60
RESULTS_KEPT = 50


@dataclass
class Call:
    """One call of a task, repeated until it is accepted."""

    kind: str
    ids: list[str]
    task_id: str
    make: Callable[[], AsyncResult]
    tries: int = 0
    due: float = 0.0


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
                self._attempt(self._call(PLAIN))
            time.sleep(max(0.0, next_at - time.monotonic()))
        deadline = time.monotonic() + LAST_CHANCE_S
        while self.repeats and time.monotonic() < deadline:
            self._repeat()
            time.sleep(0.01)
        self._write({"errors": dict(self.errors), "not accepted": sum(len(call.ids) for call in self.repeats)})

    def _call(self, kind: str | None = None) -> Call:
        kind = kind or self.dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if kind == BATCH:
            return self._batch()
        message_id = self._id()
        topic = {DEAD: MISSING, PARKED: NOWHERE}.get(kind, TOPIC)
        fields: dict[str, Any] = {"key": f"k{self.number % 97}", "message_id": message_id}
        value = "x" * self.dice.choice((0, 20, 200, 200, 2_000))
        options: dict[str, Any] = {}
        if kind == COUNTDOWN:
            options["countdown"] = self.dice.uniform(1, 6)
        elif kind == RESULT:
            options["ignore_result"] = False
        if options:
            return Call(kind, [message_id], message_id, lambda: send.apply_async((topic, value), fields, **options))
        return Call(kind, [message_id], message_id, lambda: send.delay(topic, value, **fields))

    def _batch(self) -> Call:
        batch = self._id()
        records = [Record(TOPIC, "y" * 100, message_id=f"{batch}-{n}") for n in range(self.dice.randrange(2, 40))]
        make = lambda: send_many.apply_async((records,), task_id=batch)  # noqa: E731
        return Call(BATCH, [record.id for record in records], batch, make)

    def _id(self) -> str:
        self.number += 1
        return f"m{self.number:07}"

    def _attempt(self, call: Call) -> None:
        call.tries += 1
        try:
            result = call.make()
        except EnqueueError as error:
            self._again(call, error.reason.partition(":")[0][:60].strip())
        except Exception as error:  # not promised; counted, and shown in the account
            traceback.print_exc()
            self._again(call, f"UNEXPECTED {type(error).__name__}: {error}")
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
        for message_id in call.ids:
            self._write({"id": message_id, "kind": call.kind, "task_id": call.task_id, "at": at, "tries": call.tries})

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
    with given.report.open("w") as report:
        application = Application(given.rate, random.Random(given.seed), report)
        threading.Thread(target=application.obey, daemon=True).start()
        application.run()


if __name__ == "__main__":
    main()
