"""A channel on kombu's event loop, with this process's lease."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from celery.worker import state

from integration.transport.channels import Broker
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker import breaker, transport
from kafka_delivery_worker.breaker import Breaker
from kafka_delivery_worker.breaker.rules import Rules
from kafka_delivery_worker.breaker.store import CircuitStore
from kafka_delivery_worker.lease import Lease


@pytest.fixture
def still(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Breaker:
    """This process's breaker, without its thread: it changes by what a test does, and by nothing else."""
    rules = Rules.of(Settings())
    store = CircuitStore(RedisClient(Settings(redis_url=redis_url), 5), "default", rules, "this process")
    made = Breaker(store, rules, stall_s=60)
    monkeypatch.setattr(breaker, "current", lambda: made)
    return made


@pytest.fixture
def lease(still: Breaker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lease]:
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
