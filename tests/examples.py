"""Hypothesis draws few examples by default, and all of them in CI or with `--hypothesis-profile=ci`."""

from __future__ import annotations

from hypothesis import settings

ALL = 100
"""Examples of the profile `ci`; `conftest.py` makes both profiles."""


def examples(full: int, least: int = 10) -> int:
    """Return the number of examples for a test that draws `full` of them in CI, and never fewer than `least`."""
    return max(least, full * settings().max_examples // ALL)
