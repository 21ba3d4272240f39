"""A process that is forked while a thread uses the client is not held up by it."""

from __future__ import annotations

from multiprocessing.util import _afterfork_registry  # type: ignore[attr-defined]

import redis

from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings


def test_a_fork_touches_no_pool_of_the_parents(redis_client: redis.Redis, redis_url: str) -> None:
    """The pool's lock may be held by another thread at that moment, which the child does not have."""
    ours = RedisClient(Settings.from_env({"KAFKA_DELIVERY_REDIS_URL": redis_url}))
    pool = ours.client.connection_pool
    ours.client.ping()
    touched: list[object] = []
    pool.disconnect = touched.append
    with pool._lock:
        for (_, _, clean_up), obj in list(_afterfork_registry.items()):
            if obj is ours._kept.default_channel:
                clean_up(obj)
    assert touched == []
    assert ours.client.ping()
