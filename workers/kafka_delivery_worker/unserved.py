"""Messages that nobody takes: they wait in the queues of a cluster's name of which no worker runs.

A caller may have another `KAFKA_DELIVERY_CLUSTER` than all workers, or the name of an installation was changed while
messages waited. Nothing of this is lost, and nobody would notice.
"""

from __future__ import annotations

from typing import NamedTuple

from kombu.transport.redis import Channel

from kafka_delivery.names import (
    CLUSTERS,
    DEAD_LETTER_QUEUE,
    DEFAULT_CLUSTER,
    QUEUE,
    dead_letter_queue,
    is_cluster_name,
    queue,
)
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings

from . import backlog
from .breaker.store import alive

KEYS_AT_ONCE, LOOKS = 1_000, 200
"""Keys of Redis that are looked at in one step, and steps at most, to find names that no worker has ever had."""


class Unserved(NamedTuple):
    """Messages that wait for workers of a name of which none runs.

    Attributes:
        cluster: the name, `KAFKA_DELIVERY_CLUSTER`.
        messages: how many.
        served: names of which workers run.
    """

    cluster: str
    messages: int
    served: list[str]

    @property
    def what(self) -> str:
        """It in a sentence."""
        where = f"{queue(self.cluster)} and {dead_letter_queue(self.cluster)}"
        nobody = f"no worker of KAFKA_DELIVERY_CLUSTER={self.cluster} runs"
        others = f"; workers run for {', '.join(self.served)}" if self.served else ""
        return f"{self.messages:,} messages wait in {where}, and {nobody}{others}"


def read(redis: RedisClient, settings: Settings, search: bool = False) -> list[Unserved]:
    """Return what waits for nobody, by name of a cluster.

    The own name is left out while no worker of any name runs: then all workers are stopped.

    Args:
        redis: where messages wait, and workers say that they run.
        settings: with the own name.
        search: look for queues of names that no worker has ever had, too.

    Raises:
        redis.exceptions.RedisError: Redis cannot be reached or refuses.
        BrokerError: the same of another broker.
    """
    known = {one.decode() for one in redis.client.hkeys(redis.prefix + CLUSTERS)} | {DEFAULT_CLUSTER, settings.cluster}
    if search and settings.queue_on_redis:
        known |= _named_by_a_queue(redis)
    served = sorted(name for name in known if alive(redis, name))
    found = []
    for name in sorted(known - {*served}):
        messages = backlog.count(redis, (queue(name), dead_letter_queue(name)))
        if messages and (served or name != settings.cluster):
            found.append(Unserved(name, messages, served))
    return found


def _named_by_a_queue(redis: RedisClient) -> set[str]:
    """Names of clusters that have a queue, as far as the bound on what is looked at lets them be found."""
    found, at = set(), 0
    for _ in range(LOOKS):
        at, keys = redis.client.scan(at, match=f"{redis.prefix}{QUEUE}*", count=KEYS_AT_ONCE, _type="list")
        for key in keys:
            name = key.decode(errors="replace").removeprefix(redis.prefix).partition(Channel.sep)[0]
            for start in (f"{QUEUE}.", f"{DEAD_LETTER_QUEUE}."):
                cluster = name.removeprefix(start)
                if cluster != name and is_cluster_name(cluster):
                    found.add(cluster)
        if at == 0:
            break
    return found
