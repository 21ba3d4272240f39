"""`kafka-delivery` in this process: what a process of its own would print and return, a second of a core sooner.

That the program itself starts, and what it does with signals, is tried with processes in the scenarios.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest

from kafka_delivery import settings
from kafka_delivery.celery_app import reload
from kafka_delivery.errors import SettingsError
from kafka_delivery_worker.cli import main


def run(arguments: Sequence[str], env: Mapping[str, str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `kafka-delivery` with these arguments, in this environment.

    Standard input is empty or `stdin`, standard output is no terminal; PYTHONIOENCODING names their encoding. What the
    command raises as a fault of its own comes out as the exception that it is, not as a traceback on standard error. To
    be called by one thread at a time.
    """
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    streams = [io.TextIOWrapper(io.BytesIO(text.encode(encoding)), encoding) for text in (stdin or "", "", "")]
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        before = dict(os.environ)
        _take(env)
        try:
            main(arguments)
            code: int | str | None = 0
        except SystemExit as exit:
            code = exit.code
        finally:
            _take(before)
    if isinstance(code, str):  # as the interpreter does
        streams[2].write(f"{code}\n")
        code = 1
    out, err = (_written(stream) for stream in streams[1:])
    return subprocess.CompletedProcess(["kafka-delivery", *arguments], code or 0, out, err)


def _take(env: Mapping[str, str]) -> None:
    """Make this the environment; settings are read from it when they are first needed, as in a new process."""
    if os.environ == env:
        return
    os.environ.clear()
    os.environ.update(env)
    with contextlib.suppress(SettingsError):  # the command's own affair: a process of its own has no app to reload
        reload()
    settings.current.cache_clear()


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()
