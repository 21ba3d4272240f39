"""Servers and names for the tests of the doctor."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kafka_delivery_worker.embedded import free_port
from servers import RealRedis, have_real_redis, missing


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[Callable[..., RealRedis]]:
    """Starts servers that end with the test; options with `_` for `-`."""
    if not have_real_redis():
        missing("redis-server")
    with ExitStack() as servers:

        def start(**options: str) -> RealRedis:
            given = {name.replace("_", "-"): value for name, value in options.items()}
            if "cluster-enabled" in given:
                given["cluster-port"] = str(free_port())  # else the port and 10,000, which anybody may have
            return servers.enter_context(RealRedis(tmp_path / uuid.uuid4().hex, options=given))

        yield start


@pytest.fixture
def new_topic() -> str:
    return f"doctor-{uuid.uuid4().hex[:12]}"
