"""The Redis of the circuits: of the wheel and the real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis


@pytest.fixture(params=["wheel", pytest.param("redis-server", marks=pytest.mark.real)])
def client(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    """An empty Valkey, and an empty Redis."""
    if request.param == "wheel":
        yield request.getfixturevalue("redis_client")
        return
    with redis.Redis.from_url(request.getfixturevalue("real_redis").url, socket_timeout=5) as client:
        client.flushall()
        yield client
