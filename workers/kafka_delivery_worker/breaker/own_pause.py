"""A pause of this process for a fault of its own, as the log and `kafka-delivery status` tell of it."""

from __future__ import annotations

import logging
from contextlib import suppress

from kafka_delivery.faults import QUEUE_FAULTS

from .. import paused
from ..standstill import Standstill
from .store import CircuitStore

log = logging.getLogger("kafka_delivery.breaker")


class OwnPause:
    """That of one process.

    Args:
        standstill: whether it pauses.
        store: where it is told.
    """

    def __init__(self, standstill: Standstill, store: CircuitStore) -> None:
        self._standstill = standstill
        self._store = store
        self.why = ""
        """Why the process pauses, as of the last look; "" if it does not."""
        self._since_ms = 0
        self._told = False

    def look(self) -> None:
        """Say in the log what has changed."""
        before, self.why = self.why, self._standstill.why
        if self.why and before != self.why:
            self._since_ms = self._since_ms or paused.now_ms()
            log.log(logging.INFO if self._standstill.begins else logging.ERROR, "process.paused why=%r", self.why)
        elif before and not self.why:
            self._since_ms = 0
            log.info("process.goes_on")

    def tell(self) -> None:
        """Let `kafka-delivery status` know; repeated while it lasts."""
        why = "" if self._standstill.begins else self.why
        if why or self._told:
            with suppress(*QUEUE_FAULTS):  # it is told with the next look
                self._store.say_paused(why, self._since_ms)
                self._told = bool(why)

    def end(self) -> None:
        """The process ends; raises `redis.exceptions.RedisError` where Redis is away."""
        if self._told:
            self._store.say_paused("", 0)
