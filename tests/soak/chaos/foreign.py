"""Messages that nobody of ours has written, put into the list of sends: what became of each is known by its mark."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kafka_delivery import send
from kafka_delivery.names import QUEUE
from kafka_delivery_worker.envelopes import written_by

from .application import IS_PARKED, TOPIC, Sent

COMPACT, STRANGER, LARGE_STRANGER = "foreign: compact send", "foreign: no send", "foreign: 1 MB"
KINDS = (COMPACT, STRANGER, LARGE_STRANGER)

MARK = re.compile(rb"stranger-\d{6}")
"""In each of them, as plain text. The parking store keeps such a message as it lay, or under the id that has it."""

COMPACTS, SMALL, LARGE = 5, 12, 2
"""So many are written at a time."""

LARGE_BYTES = 900_000
"""What is larger is one of the large ones."""


class Foreign:
    """Makes them.

    Args:
        zoo: what can be no record, by its name; see `strangers.zoo`.
        write: puts so many items into a list of Redis; raises if it is not done.
        accepted: told the kind, what is due and the moment, of each that lies there.
    """

    def __init__(
        self,
        zoo: Mapping[str, bytes],
        write: Callable[[str, list[bytes]], Any],
        accepted: Callable[[str, Sent], None],
    ) -> None:
        self._write, self._accepted = write, accepted
        self._numbers = itertools.count(1)
        self._small = itertools.cycle([item for item in zoo.values() if len(item) < LARGE_BYTES])
        self._large = itertools.cycle([item for item in zoo.values() if len(item) >= LARGE_BYTES])

    def some(self) -> int:
        """Write small ones: sends in compact JSON, and what is no send. Return how many."""
        compact = [self._compact() for _ in range(COMPACTS)]
        return self._put(COMPACT, compact) + self._put(STRANGER, list(self._marked(self._small, SMALL)))

    def large(self) -> int:
        """Write some of about 1 MB. Return how many."""
        return self._put(LARGE_STRANGER, list(self._marked(self._large, LARGE)))

    def _put(self, kind: str, items: list[tuple[Sent, bytes]]) -> int:
        self._write(QUEUE, [item for _, item in items])
        for sent, _ in items:
            self._accepted(kind, sent)
        return len(items)

    def _mark(self) -> str:
        return f"stranger-{next(self._numbers):06}"

    def _marked(self, kinds: Iterator[bytes], count: int) -> Iterator[tuple[Sent, bytes]]:
        for item in itertools.islice(kinds, count):
            mark = self._mark()
            yield Sent(mark, IS_PARKED, ""), marked(item, mark)

    def _compact(self) -> tuple[Sent, bytes]:
        """A send as another client writes it: valid, and without a space."""
        mark = self._mark()
        fields = {"key": "k", "message_id": mark}
        ((_, envelope),) = written_by(lambda made: send.apply_async((TOPIC, "z" * 50), fields, producer=made))
        return Sent.of(mark, TOPIC, "z" * 50, "k"), json.dumps(json.loads(envelope), separators=(",", ":")).encode()


def marked(item: bytes, mark: str) -> bytes:
    """The item with a mark in it, and else as it was: as a field of an object, in its ids, or behind it."""
    named = item.replace(b'"stranger ', f'"{mark} '.encode())
    if named.startswith(b'{"'):
        return f'{{"mark":"{mark}",'.encode() + named[1:]
    return named + mark.encode()


def mark_in(item: bytes) -> str:
    """The mark of one of these, "" if it is none."""
    found = MARK.search(item)
    return found[0].decode() if found else ""
