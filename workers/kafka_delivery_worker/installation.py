"""Which Kafka a cluster's name stands for in this Redis, so that no record reaches the Kafka of another installation.

Two installations may share a Redis by mistake: staging and production, or two teams. With the same name of a cluster
they would share their queues, and each would deliver the other's records. But a Kafka gives itself an id that no other
has. The first worker of a name writes that id into Redis. Every client is compared with it before it takes a record.
"""

from __future__ import annotations

import logging
import re

from kafka_delivery.errors import KafkaDeliveryError
from kafka_delivery.faults import QUEUE_FAULTS
from kafka_delivery.names import CLUSTERS
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings

from .client import NotMadeError
from .lease import script

log = logging.getLogger("kafka_delivery.installation")

SHOWN = 100
"""Characters of an id that are shown; Kafka's own have 22."""


DO = (
    "correct KAFKA_DELIVERY_BOOTSTRAP_SERVERS, or give this installation a KAFKA_DELIVERY_CLUSTER of its own, a key "
    "prefix (global_keyprefix in KAFKA_DELIVERY_REDIS_OPTIONS) or another database; if this Kafka has replaced that "
    "one on purpose, run `kafka-delivery doctor --adopt-kafka`"
)
"""What to do about another Kafka."""


class AnotherKafkaError(KafkaDeliveryError):
    """Raised when the Kafka at hand is not the one that the cluster's name stands for. The text says what to change.

    Attributes:
        what: what is wrong, without what to do.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"{what}; {DO}")


class Installation:
    """What this Redis remembers of the Kafka of one installation. Safe to use from many threads.

    Args:
        redis: where it is remembered.
        settings: the cluster's name, and the servers that an error names.
    """

    def __init__(self, redis: RedisClient, settings: Settings) -> None:
        self._redis = redis
        self._settings = settings
        self._key = redis.prefix + CLUSTERS
        self._known = ""
        """What Redis said last. It counts while Redis is away."""
        self._told = False

    def admit(self, here: str) -> None:
        """Let a client take records, or not. A Kafka is remembered if none was.

        Args:
            here: the id of the Kafka that the client is connected to; "" if that has none.

        Raises:
            NotMadeError: it is another Kafka, or Redis does not say which one is meant.
        """
        try:
            self.remember(here)
        except AnotherKafkaError as error:
            raise NotMadeError(str(error)) from None
        except QUEUE_FAULTS as error:
            if here != self._known:
                why = f"Redis does not say which Kafka {self._settings.cluster} stands for: {type(error).__name__}"
                raise NotMadeError(why) from None

    def remember(self, here: str) -> None:
        """Compare the Kafka at hand with the one that is remembered; remember it if none is.

        Args:
            here: its id; "" if it has none. Then nothing can be compared, which the log says once.

        Raises:
            AnotherKafkaError: it is another one.
            redis.exceptions.RedisError: Redis does not answer, or refuses.
        """
        if not here:
            if not self._told:
                self._told = True
                log.warning("installation.not_compared cluster=%s: this Kafka has no id", self._settings.cluster)
            return
        found = self._redis.client.eval(script("remember"), 1, self._key, self._settings.cluster, here)
        self._known = found.decode()
        self._refuse(here, self._known)

    def compare(self, here: str) -> None:
        """As `remember`, but nothing is written: for commands.

        Raises:
            AnotherKafkaError: it is another one.
            redis.exceptions.RedisError: Redis does not answer.
        """
        self._refuse(here, self.remembered())

    def remembered(self) -> str:
        """Return the id of the Kafka that the cluster's name stands for; "" if no worker has told it yet.

        Raises:
            redis.exceptions.RedisError: Redis does not answer.
        """
        found: bytes | None = self._redis.client.hget(self._key, self._settings.cluster)
        return "" if found is None else found.decode()

    def adopt(self, here: str) -> None:
        """Let the cluster's name stand for the Kafka at hand from now on.

        Raises:
            redis.exceptions.RedisError: Redis does not answer, or refuses.
        """
        self._redis.client.hset(self._key, self._settings.cluster, here)

    def _refuse(self, here: str, remembered: str) -> None:
        what = fault(self._settings, here, remembered)
        if what:
            raise AnotherKafkaError(what)


def fault(settings: Settings, here: str, remembered: str) -> str:
    """Return what is wrong with the Kafka at hand; "" if nothing is.

    Args:
        settings: the cluster's name, and the servers.
        here: the id of the Kafka at hand; "" if it has none.
        remembered: the id that the cluster's name stands for; "" if there is none yet.
    """
    if not here or not remembered or here == remembered:
        return ""
    return (
        f"the Kafka at {servers(settings)} is {shown(here)}, but in this Redis KAFKA_DELIVERY_CLUSTER="
        f"{settings.cluster} stands for the Kafka {shown(remembered)}, of another installation"
    )


def servers(settings: Settings) -> str:
    """Return the bootstrap servers without what somebody put before an @, which may be a password."""
    return re.sub(r"[^,/\s]*@", "", settings.bootstrap_servers)


def shown(kafka_id: str) -> str:
    """Return an id as a line of a log or of a terminal can carry it."""
    return "".join(one if one.isprintable() else "?" for one in kafka_id[:SHOWN])
