"""A message that is given back takes one line of the log; any other failure keeps its traceback."""

from __future__ import annotations

import logging
import sys

import pytest
from celery.exceptions import Reject

from kafka_delivery.base import GiveBack
from kafka_delivery_worker.logs import Terse


@pytest.mark.parametrize(("error", "kept"), [(GiveBack("Redis is full", 2.0), False), (Reject("x", True), True)])
def test_only_its_own_traceback_is_dropped(error: Exception, kept: bool) -> None:
    try:
        raise error
    except Exception:
        record = logging.LogRecord("celery.app.trace", logging.WARNING, "", 1, "rejected", (), sys.exc_info())
    assert Terse().filter(record)
    assert (record.exc_info is not None) is kept


def test_a_line_without_a_failure_passes() -> None:
    record = logging.LogRecord("celery.app.trace", logging.INFO, "", 1, "succeeded", (), None)
    assert Terse().filter(record)
