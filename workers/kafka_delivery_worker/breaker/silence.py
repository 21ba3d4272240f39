"""Topics of which nothing is heard while others' records arrive: in trouble for sure, though no record has failed yet.

librdkafka sends again what a broker refuses for now (NOT_ENOUGH_REPLICAS, or there is no leader), and says nothing
until the record times out, two minutes later by default. Until then it would take the room of records that do arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Set
from typing import NamedTuple

OVERTAKEN_S = 2.0
"""A topic may have its last report so much earlier than others when an outage begins, and its first so much later."""

ANSWER_S = 1.0
"""A broker that is well says within milliseconds what it knows of a topic."""


class Silence(NamedTuple):
    """A topic has records in flight, and no report of any.

    Attributes:
        since: when that began, or was seen first.
        overtaken_at: when records of others arrived although it had lasted for a while.
    """

    since: float
    overtaken_at: float | None = None


class Silences:
    """Those of one process. Times are seconds of the caller's clock; nothing here locks, or waits but for an answer.

    Args:
        stall_s: how long nothing is heard of an outage before it is one.
        unknown_s: after which librdkafka says of a topic that it does not exist, which opens nothing.
    """

    def __init__(self, stall_s: float, unknown_s: float) -> None:
        self._stall_s = stall_s
        self._lasts_s = max(stall_s, unknown_s) + OVERTAKEN_S
        self._of: dict[str, Silence] = {}
        self._ask_at = 0.0

    def listen(
        self,
        now: float,
        in_flight: Collection[str],
        heard: Set[str],
        arrived: bool,
        answers: Callable[[str, float], bool] | None,
    ) -> None:
        """Take in what was heard since the last time.

        Args:
            now: the moment.
            in_flight: topics with records in flight.
            heard: topics of which there was a report. Also those whose circuit is open: their silence begins anew once
                it closes, for what was sent before, and is still silent, has opened it already.
            arrived: whether anything has arrived, of any topic.
            answers: whether any broker says within a time (seconds) what it knows of a topic; None if it is not to be
                asked. It is, once in a while, where nothing arrives: of topics that fill all room none overtakes any.
        """
        self._of = {
            topic: Silence(now) if topic in heard or topic not in self._of else self._of[topic] for topic in in_flight
        }
        if arrived or (answers is not None and self._answered(now, answers)):
            for topic, silence in self._of.items():
                if silence.overtaken_at is None and now - silence.since >= OVERTAKEN_S:
                    self._of[topic] = Silence(silence.since, now)

    def _answered(self, now: float, answers: Callable[[str, float], bool]) -> bool:
        silent = [
            topic
            for topic, (since, overtaken_at) in self._of.items()
            if overtaken_at is None and now - since >= self._stall_s
        ]
        if not silent or now < self._ask_at:
            return False
        self._ask_at = now + self._stall_s
        return answers(silent[0], ANSWER_S)

    @property
    def overtaken(self) -> Set[str]:
        """Topics whose silence is their own: what they have in flight says nothing about the cluster."""
        return {topic for topic, silence in self._of.items() if silence.overtaken_at is not None}

    def stalled(self, now: float) -> dict[str, str]:
        """Topics that are in trouble for sure, and why."""
        return {
            topic: f"no report for {self._lasts_s:g} s, while others arrive"
            for topic, (since, overtaken_at) in self._of.items()
            if overtaken_at is not None and now - overtaken_at >= OVERTAKEN_S and now - since >= self._lasts_s
        }
