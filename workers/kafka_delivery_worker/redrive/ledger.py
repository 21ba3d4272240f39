"""What a run writes down, in which order, so that being killed anywhere costs a repeat at most, never a dead letter."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

from confluent_kafka import KafkaException

from ..dead_letter import DeadLetter
from ..parking import ParkingStore
from ..run_lock import NotAloneError, RunLock
from .backlog import KAFKA_S, Backlog, Span

log = logging.getLogger("kafka_delivery.redrive")

BRIEF_S = 2.0
"""For Kafka to move them while records are under way; at the end it may take longer."""

COMMIT_S = 0.5
"""Between two moves of the group's offsets; what is done is remembered in Redis at once."""

REFUSED_S = 20.0
"""The same after Kafka has not moved them: a coordinator that is away must not hold the records up."""


class Floors:
    """Below which offset all is done, for each partition, while letters are taken in order and end in any order."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._reached = {span.partition: span.start for span in spans}
        self._left: dict[int, int] = {}
        self._open: dict[int, set[int]] = {span.partition: set() for span in spans}

    def take(self, letter: DeadLetter) -> None:
        """It is being worked on."""
        self._reached[letter.partition] = letter.offset + 1
        self._open[letter.partition].add(letter.offset)

    def leave(self, letter: DeadLetter) -> None:
        """It goes on waiting."""
        self._reached[letter.partition] = letter.offset + 1
        self._left.setdefault(letter.partition, letter.offset)

    def end(self, partition: int, offset: int) -> None:
        """Nothing more is there before `offset`."""
        self._reached[partition] = offset

    def done(self, letter: DeadLetter) -> None:
        """It waits no more."""
        self._open[letter.partition].discard(letter.offset)

    def now(self) -> dict[int, int]:
        """The floors."""
        return {
            partition: min([reached, *self._open[partition], *self._left_of(partition)])
            for partition, reached in self._reached.items()
        }

    def _left_of(self, partition: int) -> list[int]:
        return [self._left[partition]] if partition in self._left else []


class Ledger:
    """What a run writes down: marks in Redis at once, the group's offsets in Kafka now and then.

    Marks come first, and segments are dropped last: a run that is killed in between has written too much, never too
    little.

    Redis compares the lock with each write. Kafka cannot: a run that stands still between that and the move of the
    group's offsets may put them back behind a newer run's. It takes that back, and until then `Backlog.spans` tells
    such an offset from one that a person has reset.

    Args:
        backlog: where the dead letters are.
        lock: on that topic.
        spans: what there is.
        store: where the whole ones lie.
        store_lock: on that store; without it, no whole ones are among the letters.

    Raises:
        NotAloneError: another run has the lock.
    """

    def __init__(
        self,
        backlog: Backlog,
        lock: RunLock,
        spans: Sequence[Span],
        store: ParkingStore,
        store_lock: RunLock | None = None,
    ) -> None:
        self._backlog, self._lock, self._store, self._store_lock = backlog, lock, store, store_lock
        self._floors = Floors(spans)
        self._committed = {span.partition: span.start for span in spans}
        self._commit_at = monotonic() + COMMIT_S
        forgotten = [span.partition for span in spans if span.forgotten]
        backlog.done.begin(lock, backlog.topic_id, self._committed, forgotten)
        self._move(self._committed, KAFKA_S)  # from here on Kafka's own tools show the lag

    def lock_of(self, letter: DeadLetter) -> RunLock:
        """What guards `letter` from other commands: where it lies says which."""
        return self._lock if not letter.parked_id or self._store_lock is None else self._store_lock

    def take(self, letter: DeadLetter) -> None:
        """It is being worked on."""
        if not letter.parked_id:
            self._floors.take(letter)

    def leave(self, letter: DeadLetter) -> None:
        """It goes on waiting."""
        if not letter.parked_id:
            self._floors.leave(letter)

    def done(self, letters: Sequence[DeadLetter], audit: Mapping[str, Any] | None = None) -> None:
        """These wait no more.

        Raises:
            NotAloneError: another run has the lock.
        """
        places = [(letter.partition, letter.offset) for letter in letters if not letter.parked_id]
        self._backlog.done.mark(self._lock, places, audit)
        for letter in letters:
            if letter.parked_id:
                # Unless it was parked anew meanwhile; no mark has checked the lock, so this does.
                self._store.remove(letter.parked_id, letter.parked_at_ms, self.lock_of(letter))
            else:
                self._floors.done(letter)
        if monotonic() > self._commit_at:
            try:
                self.commit(BRIEF_S)
            except (KafkaException, TimeoutError) as error:  # later, or at the end; Redis knows what is done
                self._commit_at = monotonic() + REFUSED_S
                log.warning("redrive.not_committed group=%s error=%s", self._backlog.group, error)

    def end(self) -> str:
        """Nothing more is there where the backlog was read to its end; write all down.

        Returns:
            Why Kafka's own tools do not know all of it, or "": Redis knows what is done.

        Raises:
            NotAloneError: another run has the lock.
        """
        for partition, offset in self._backlog.reached.items():
            self._floors.end(partition, offset)
        try:
            self.commit()
        except (KafkaException, TimeoutError) as error:
            why = error.args[0].name() if isinstance(error, KafkaException) else "no answer"
            return f"Kafka did not move the offsets of {self._backlog.group}: {why}"
        return ""

    def commit(self, patience_s: float = KAFKA_S) -> None:
        """Move the group's offsets as far as all is done.

        Raises:
            NotAloneError: another run has the lock.
            KafkaException, TimeoutError: Kafka refuses, or does not answer in time.
        """
        floors = self._floors.now()
        moved = {partition: floor for partition, floor in floors.items() if floor > self._committed[partition]}
        self._commit_at = monotonic() + COMMIT_S
        if not moved:
            return
        self._move(moved, patience_s)
        self._backlog.done.settle(self._lock, self._committed, moved)
        self._committed |= moved

    def _move(self, floors: Mapping[int, int], patience_s: float) -> None:
        done = self._backlog.done
        done.check(self._lock)  # only who has the lock may move them
        self._backlog.commit(floors, patience_s)
        try:
            done.check(self._lock)
        except NotAloneError:
            _, newer = done.floors()
            if ahead := {partition: newer[partition] for partition in floors if newer[partition] > floors[partition]}:
                self._backlog.commit(ahead, patience_s)
            raise
