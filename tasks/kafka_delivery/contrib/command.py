"""A framework's command line becomes a worker, or ours.

A worker takes its settings from the environment and loads nothing of an application: neither its code nor its
connections are of any use there. So the application's settings are put into the environment, and the process replaced.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

CELERYS = ("worker", "flower")
"""Commands that are Celery's; all others are those of ``kafka-delivery``."""


def become(arguments: Sequence[str], given: Mapping[str, Any]) -> NoReturn:
    """Replace this process.

    Args:
        arguments: a command and what belongs to it.
        given: an application's settings, by the names of the variables; those that are set come first.
    """
    celery = ["celery", "-A", "kafka_delivery_worker"]
    module = celery if arguments[0] in CELERYS else ["kafka_delivery_worker.cli"]
    environ = {name: as_text(value) for name, value in given.items()} | os.environ
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", *module, *arguments], environ)  # noqa: S606  # that is the point


def as_text(value: Any) -> str:
    """A setting as an environment variable has it."""
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    return str(value)
