"""Processes of a fleet, in an empty Redis."""

from __future__ import annotations

import pytest
import redis

from integration.breaker.processes import Process


@pytest.fixture
def one(redis_client: redis.Redis) -> Process:
    return Process(redis_client)


@pytest.fixture
def two(one: Process, redis_client: redis.Redis) -> Process:
    process = Process(redis_client, "two")
    process.stays()
    return process
