"""A worker's log as JSON, an object a line, where a setting asks for it.

Our own lines are made of an event and fields, as in ``record.parked kind=%s topic=%s``; in JSON each field is one. Only
the handlers that Celery made get another form: who sets logging up by the signal ``setup_logging`` keeps what was made.
"""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import suppress
from datetime import UTC, datetime
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
