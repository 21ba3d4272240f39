"""The Redis of a lease: of the wheel and the real one, full, or for reading only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError


@pytest.fixture
def client(either_redis: redis.Redis) -> redis.Redis:
    return either_redis


@pytest.fixture
def full(client: redis.Redis) -> Iterator[Callable[[], None]]:
    """Call it to fill Redis up; it is emptied of its limit at the end."""

    def fill() -> None:
        client.config_set("maxmemory", "1mb")
        with pytest.raises(OutOfMemoryError):
            client.set("one more", 1)

    yield fill
    client.config_set("maxmemory", "0")


@pytest.fixture
def read_only(client: redis.Redis) -> Iterator[Callable[[], None]]:
    """Call it to make a replica of Redis, as a failover does; it is a master again at the end."""

    def degrade() -> None:
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(ReadOnlyError):
            client.set("one more", 1)

    yield degrade
    client.replicaof("NO", "ONE")
