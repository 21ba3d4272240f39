"""A Redis master, its replica and three Sentinels on the loopback address, of which any can be frozen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import redis

from servers import AnyRedis, RealRedis, have_real_redis, missing, wait_until

MASTER = "mymaster"


class Sentinel(RealRedis):
    """One Sentinel.

    Args:
        directory: its own.
        master: port of the master that it watches.
        down_after_ms: how long a server may be silent before it counts as down.
    """

    name = "Sentinel"

    def __init__(self, directory: Path, master: int, *, quorum: int, down_after_ms: int) -> None:
        super().__init__(directory)
        self._text = (
            f"port {self.port}\nbind 127.0.0.1\ndir {directory}\n"
            f"sentinel monitor {MASTER} 127.0.0.1 {master} {quorum}\n"
            f"sentinel down-after-milliseconds {MASTER} {down_after_ms}\n"
            f"sentinel failover-timeout {MASTER} 10000\n"
        )

    def _command(self, log: IO[bytes]) -> list[str]:
        configuration = self.directory / "sentinel.conf"  # a Sentinel writes into it
        if not configuration.exists():
            configuration.write_text(self._text)
        return ["redis-server", str(configuration), "--sentinel"]

    def _ready(self) -> bool:
        with suppress(redis.RedisError), redis.Redis(port=self.port, socket_timeout=1) as client:
            return bool(client.ping())
        return False

    def knows(self, replicas: int, sentinels: int) -> bool:
        """Whether it has found the master's replicas and the other Sentinels."""
        with suppress(redis.RedisError), redis.Redis(port=self.port, socket_timeout=1) as client:
            state = client.sentinel_master(MASTER)
            return (state["num-slaves"], state["num-other-sentinels"]) == (replicas, sentinels - 1)
        return False


class Guarded:
    """What `guarded` has started.

    Attributes:
        first: the master at the beginning.
        second: its replica.
        sentinels: those that watch them.
    """

    def __init__(self, first: RealRedis, second: RealRedis, sentinels: list[Sentinel]) -> None:
        self.first, self.second, self.sentinels = first, second, sentinels

    @property
    def settings(self) -> dict[str, str]:
        """Of a worker or a caller."""
        return {
            "REDIS_URL": ";".join(f"sentinel://127.0.0.1:{one.port}/0" for one in self.sentinels),
            "REDIS_OPTIONS": json.dumps({"master_name": MASTER}),
        }

    def role(self, server: RealRedis) -> str:
        """``master`` or ``slave``; "" while it does not answer."""
        with suppress(redis.RedisError), self.client(server) as client:
            return str(client.info("replication")["role"])
        return ""

    def client(self, server: RealRedis) -> AnyRedis:
        return redis.Redis(port=server.port, socket_timeout=1)


@contextmanager
def guarded(directory: Path, *, down_after_ms: int = 2000) -> Iterator[Guarded]:
    """Start them, and wait until the replica is in sync and the Sentinels know of one another."""
    if not have_real_redis():
        missing("redis-server")
    with ExitStack() as started:
        first = started.enter_context(RealRedis(directory / "first"))
        second = started.enter_context(
            RealRedis(directory / "second", options={"replicaof": f"127.0.0.1 {first.port}"})
        )
        replica = started.enter_context(redis.Redis(port=second.port, socket_timeout=1))
        # Before there are Sentinels, which look for replicas every ten seconds only.
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up", 60, "a replica")
        sentinels = [
            started.enter_context(Sentinel(directory / f"s{n}", first.port, quorum=2, down_after_ms=down_after_ms))
            for n in range(3)
        ]
        wait_until(lambda: all(one.knows(1, 3) for one in sentinels), 60, "Sentinels to know one another")
        yield Guarded(first, second, sentinels)
