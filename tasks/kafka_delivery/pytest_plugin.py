"""A pytest fixture over `kafka_delivery.testing`. In the conftest.py at the root of your tests::

    pytest_plugins = ["kafka_delivery.pytest_plugin"]

It is not found by itself: with an entry point, every run of pytest on the machine would load Celery.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .testing import Captured, capture


@pytest.fixture
def kafka_sent() -> Iterator[Captured]:
    """What the test's code sends, captured; nothing reaches Redis."""
    with capture() as sent:
        yield sent
