"""What a process does when it ends."""

from __future__ import annotations

import pytest

from kafka_delivery import settings
from kafka_delivery_worker import application
from kafka_delivery_worker.broadcast import Broadcast


@pytest.mark.parametrize("ends", [application._process_ends, application._worker_ends])
def test_it_stops_before_its_client_is_emptied(ends: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that the emptied client drops is given back with its message, and not queued a second time."""
    monkeypatch.setenv("KAFKA_DELIVERY_TRANSPORT", "celery")  # no lease to end
    settings.current.cache_clear()
    seen: list[bool] = []
    stopping = Broadcast()
    monkeypatch.setattr("kafka_delivery_worker.engine.stopping", stopping)
    monkeypatch.setattr("kafka_delivery_worker.engine.close", lambda: seen.append(stopping.sent))
    assert callable(ends)
    ends()
    settings.current.cache_clear()
    assert seen == [True]
