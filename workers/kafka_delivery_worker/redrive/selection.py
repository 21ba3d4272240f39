"""Which dead letters a command means, and what a redrive would do with each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kafka_delivery.errors import InvalidRecordError
from kafka_delivery.record import Record
from kafka_delivery.settings import Settings

from ..dead_letter import DeadLetter

SEND, PARK, LEFT = "send", "park", "left"
"""What is to become of a dead letter: the last stays where it is, and waits."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What is to become of a dead letter.

    Attributes:
        what: SEND, PARK or LEFT.
        topic: where it is sent.
        why: of what is left, unless it was not asked for.
        record: the record as it was, for that topic, of what is not left.
    """

    what: str
    topic: str = ""
    why: str = ""
    record: Record | None = field(default=None, compare=False)


@dataclass(slots=True)
class Plan:
    """What a run would do; counts by target, by error, and by the reason why something stays; `whole` of those that are
    sent, and `stored` of all, lie in the parking store."""

    waiting: int = 0
    send: Counter[str] = field(default_factory=Counter)
    errors: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    whole: int = 0
    stored: int = 0
    park: int = 0
    not_chosen: int = 0
    left: Counter[str] = field(default_factory=Counter)

    def add(self, letter: DeadLetter, fate: Fate) -> None:
        """Count one."""
        self.waiting += 1
        if fate.what == LEFT:
            if fate.why:
                self.left[fate.why] += 1
            else:
                self.not_chosen += 1
            return
        self.errors[letter.error_class, letter.error_code] += 1
        self.stored += bool(letter.parked_id)
        if fate.what == PARK:
            self.park += 1
        else:
            self.send[fate.topic] += 1
            self.whole += bool(letter.parked_id)

    @property
    def total(self) -> int:
        """Dead letters that would not wait any more."""
        return self.send.total() + self.park


class Selection:
    """Which dead letters a command means, and what is to become of each.

    Args:
        settings: the limit of redrives, and which topic has which dead-letter topic.
        topic: the original topic; letters of others that share its dead-letter topic are not meant.
        chosen: a filter.
        to: a topic that takes them instead of their own.
    """

    def __init__(
        self, settings: Settings, topic: str, chosen: Callable[[DeadLetter], bool], to: str | None = None
    ) -> None:
        self._settings, self._topic, self._chosen, self._to = settings, topic, chosen, to
        self._letters = settings.dead_letter_topic(topic)

    def __call__(self, letter: DeadLetter) -> bool:
        """Whether it is meant."""
        elsewhere = letter.topic not in (None, self._topic) and self._is_of_another_command(letter.topic)
        return not elsewhere and self._chosen(letter)

    def _is_of_another_command(self, topic: str | None) -> bool:
        return topic is not None and self._settings.dead_letter_topic(topic) == self._letters

    def fate(self, letter: DeadLetter) -> Fate:
        """What a redrive does with it."""
        target = self._to or letter.topic
        if not self(letter):
            return Fate(LEFT)
        if letter.problem:
            return Fate(LEFT, why=letter.problem)
        if target is None:
            return Fate(LEFT, why="nothing says which topic it was for: give --to")
        if target == self._letters:
            return Fate(LEFT, why=f"{target} is where it lies: give another --to")
        try:
            record = letter.record(target)
        except InvalidRecordError as error:
            return Fate(LEFT, why=f"it is no valid record, {error}")
        if letter.redrive_count >= self._settings.max_redrives:
            return Fate(PARK, target, record=record)
        return Fate(SEND, target, record=record)


def plan(letters: Iterable[DeadLetter], selection: Selection, limit: int | None) -> Plan:
    """What a redrive of `letters` would do."""
    found = Plan()
    for letter in letters:
        fate = selection.fate(letter)
        found.add(letter, fate if limit is None or found.total < limit else Fate(LEFT))
    return found
