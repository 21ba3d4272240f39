"""Integration tests have the code under test in their own process."""

from __future__ import annotations

from typing import NoReturn

import pytest

import stack


@pytest.fixture(autouse=True)
def without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse worker processes, which belong to the scenarios."""

    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.fail("a test with worker processes is a scenario; see the tiers in CONTRIBUTING.md")

    monkeypatch.setattr(stack, "Worker", refuse)
