"""The Redis of the circuits: of the wheel and the real one."""

from __future__ import annotations

import pytest
import redis


@pytest.fixture
def client(either_redis: redis.Redis) -> redis.Redis:
    return either_redis
