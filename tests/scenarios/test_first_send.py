"""The first call of a process that wants a result has to subscribe before it sends; it fails as soon as any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from fresh import printed
from servers import RealRedis, have_real_redis, missing

WITHIN_S = 20.0
"""Ten times what the call takes with default settings where nothing answers."""


def fails(redis_url: str) -> None:
    name, message_id, took = printed(
        """
        import time
        from kafka_delivery import send
        started = time.monotonic()
        try:
            send.apply_async(("orders", "v"), ignore_result=False, task_id="mine")
        except BaseException as error:
            print(json.dumps([type(error).__name__, error.message_id, time.monotonic() - started]))
        """,
        KAFKA_DELIVERY_REDIS_URL=redis_url,
    )
    assert (name, message_id) == ("EnqueueError", "mine")
    assert took < WITHIN_S


def test_where_nothing_listens() -> None:
    fails("redis://127.0.0.1:1/0")


@pytest.mark.real
def test_where_redis_hangs(tmp_path: Path) -> None:
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path / "redis") as server:
        server.pause()
        try:
            fails(server.url)
        finally:
            server.resume()
