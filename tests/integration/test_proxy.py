"""The network of the tests does what it says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis

from kafka_delivery_worker.embedded import Valkey
from proxy import Proxy


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


def test_what_is_sent_arrives_later_and_in_order(valkey: Valkey) -> None:
    with Proxy(valkey.port) as proxy:
        client = redis.Redis.from_url(proxy.redis_url)
        client.ping()
        proxy.slow(0.1, jitter_s=0.05)
        began = time.monotonic()
        for n in range(5):
            client.rpush("list", n)
        assert time.monotonic() - began >= 0.5
        proxy.slow(0)
        assert client.lrange("list", 0, -1) == [b"0", b"1", b"2", b"3", b"4"]


def test_a_partition_tells_nobody_and_loses_nothing(valkey: Valkey) -> None:
    with Proxy(valkey.port) as proxy:
        client = redis.Redis.from_url(proxy.redis_url, socket_timeout=0.3, retry=None)
        client.ping()
        proxy.partition()
        with pytest.raises(redis.TimeoutError):
            client.set("name", "value")
        with pytest.raises(redis.TimeoutError):
            redis.Redis.from_url(proxy.redis_url, socket_timeout=0.3, retry=None).ping()
        proxy.heal()
        assert client.get("name") in (None, b"value")  # of a connection that its client has given up
        client.set("name", "other")
        assert client.get("name") == b"other"


def test_connections_can_be_cut_and_servers_be_away(valkey: Valkey) -> None:
    with Proxy(valkey.port) as proxy:
        client = redis.Redis.from_url(proxy.redis_url, retry=None)
        before = client.client_id()
        proxy.cut()
        assert client.client_id() != before  # the client has noticed, and made another connection
        valkey.stop()
        with pytest.raises(redis.ConnectionError):
            client.ping()
