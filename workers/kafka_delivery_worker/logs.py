"""A worker's log: one line for each event, whatever a stranger's message is called, and as JSON where a setting asks.

Ids and names come from messages, and may hold what ends a line or moves a terminal's cursor. All that our loggers,
Celery's and kombu's are given passes `be_plain`.

Our own lines are made of an event and fields, as in ``record.parked kind=%s topic=%s``; in JSON each field is one. Only
the handlers that Celery made get another form: who sets logging up by the signal ``setup_logging`` keeps what was made.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from numbers import Number
from typing import Any

import celery.apps.worker
from celery import signals
from celery.utils.log import ColorFormatter
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from kafka_delivery.base import GiveBack

OURS = "kafka_delivery"

_EVENT = re.compile(r"[a-z_]+\.[a-z_]+(?=[ :]|$)")
_VALUE = re.compile(r"(?:(\w+)=)?%[-.\d]*[sdrf]")


STRANGERS = (OURS, "celery", "kombu")
"""Loggers that tell of messages, with all below them."""

LONGEST = 4_000
"""Characters of one thing in a line."""

_ACTED_ON = re.compile(r"[^\t\n -~]")


def plain(text: str) -> str:
    """`text` in one line, with what a terminal or a reader of lines would act on made visible, and not too long."""
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"
    return shown if shown.isprintable() else "".join(one if one.isprintable() else escaped(one) for one in shown)


def escaped(one: str) -> str:
    """A character as JSON escapes it."""
    return json.dumps(one)[1:-1]


class _Plain:
    """Something else that is logged: an error, say, whose text may quote a message."""

    __slots__ = ("_what",)

    def __init__(self, what: Any) -> None:
        self._what = what

    def __str__(self) -> str:
        return plain(str(self._what))

    def __repr__(self) -> str:
        return plain(repr(self._what))


def _plain_argument(value: Any) -> Any:
    if isinstance(value, str):
        return plain(value)
    return value if value is None or isinstance(value, Number) else _Plain(value)


def be_plain() -> None:
    """Let whatever is logged in this process of messages show their ids and names in one line; safe to repeat."""
    make = logging.getLogRecordFactory()
    if getattr(make, "is_plain", False):
        return

    def made(name: str, level: int, path: str, line: int, text: Any, args: Any, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in STRANGERS:
            if isinstance(text, str):  # our own text, and Celery's, which may have several lines
                text = text if text.isascii() and text.isprintable() else _ACTED_ON.sub(_visible, text)
            if isinstance(args, tuple):
                args = tuple(map(_plain_argument, args))
                if len(args) == 1 and isinstance(rest_of := args[0], _Plain) and isinstance(rest_of._what, Mapping):
                    args = ({key: _plain_argument(value) for key, value in rest_of._what.items()},)
        return make(name, level, path, line, text, args, *rest, **more)

    made.is_plain = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(made)


def _visible(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else escaped(found[0])


class JsonLines(JsonFormatter):
    """One object a line: ``time``, ``level``, ``logger``, ``message``, and of our own ``event`` and its fields."""

    def __init__(self) -> None:
        super().__init__(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp="time",
            reserved_attrs=[*RESERVED_ATTRS, "taskName", "data"],  # data: Celery's, with arguments and results
        )

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        super().add_fields(log_data, record, message_dict)
        if record.name.startswith(OURS):
            log_data |= fields(record)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """The event and the fields of a line of ours."""
    event = _EVENT.match(record.msg)
    found: dict[str, Any] = {"event": event[0]} if event else {}
    values = record.args if isinstance(record.args, tuple) else ()
    for name, value in zip(_VALUE.findall(record.msg), values, strict=False):
        if name:
            found[name] = value if isinstance(value, int | float | None) else str(value)
    return found


class Terse(logging.Filter):
    """Drops the traceback of a message that is given back: it says nothing that the reason does not say.

    Celery logs a dozen lines for each (celery/app/trace.py, `log_policy_reject`), and an outage gives back thousands.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every line pass."""
        if record.exc_info and isinstance(record.exc_info[1], GiveBack):
            record.exc_info = record.exc_text = None
        return True


def be_terse() -> None:
    """Let Celery log a message that is given back in one line."""
    logging.getLogger("celery.app.trace").addFilter(Terse())


def use_json() -> None:
    """Let the worker of this process log JSON, from its first line on, and nothing else."""
    if signals.setup_logging.receivers:
        return
    celery.apps.worker.safe_say = _say  # "worker: Warm shutdown", written past all logging
    signals.celeryd_init.connect(_begins)
    signals.after_setup_logger.connect(_formats)
    signals.after_setup_task_logger.connect(_formats)


def _say(text: str, *_: Any) -> None:
    # Runs in a signal handler, where a lock of logging's may be held: an object of our own, in one write.
    line = {"time": datetime.now(UTC).isoformat(), "level": "WARNING", "logger": "celery.apps.worker", "message": text}
    with suppress(OSError):
        os.write(2, f"{json.dumps(line)}\n".encode())


def _begins(instance: Any = None, **_: Any) -> None:
    # Until Celery sets logging up, which replaces this. It warns of being run by root before that.
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler])
    logging.captureWarnings(True)
    instance.quiet = True  # the banner


def _formats(logger: Any = None, **_: Any) -> None:
    for handler in logger.handlers:
        if isinstance(handler.formatter, ColorFormatter):  # Celery's
            handler.setFormatter(JsonLines())
