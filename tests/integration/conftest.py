"""Integration tests have the code under test in their own process; only servers are others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

import stack


@pytest.fixture(autouse=True)
def without_processes_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse workers, interpreters and console scripts, which belong to the scenarios."""

    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.fail("a test with workers or interpreters of its own is a scenario; see the tiers in CONTRIBUTING.md")

    start = subprocess.Popen.__init__

    def unless_of_ours(self: Any, args: str | Sequence[Any], *more: Any, **options: Any) -> None:
        program = Path(args if isinstance(args, str) else args[0])
        if program == Path(sys.executable) or program.parent == stack.BIN:
            refuse()
        start(self, args, *more, **options)

    monkeypatch.setattr(stack, "Worker", refuse)
    monkeypatch.setattr(subprocess.Popen, "__init__", unless_of_ours)
