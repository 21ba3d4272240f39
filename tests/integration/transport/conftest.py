"""A channel on kombu's event loop, with this process's lease."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from celery.worker import state

from integration.transport.channels import Broker
from kafka_delivery_worker import transport
from kafka_delivery_worker.lease import Lease


@pytest.fixture
def lease(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lease]:
    """This process's, in an empty Redis."""
    lease = Lease(lambda: redis_client, 30)
    monkeypatch.setattr(transport, "process_lease", lambda: lease)
    yield lease
    lease.stop()
    state.reset_state()


@pytest.fixture
def broker(lease: Lease, redis_url: str) -> Iterator[Broker]:
    broker = Broker(redis_url)
    yield broker
    broker.close()
