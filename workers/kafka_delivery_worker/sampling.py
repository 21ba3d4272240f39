"""Of much that is alike, some: at most so many a second, spread evenly, and all of it where there is less."""

from __future__ import annotations

ALL = -1
"""In place of a number a second: no limit."""


class Sample:
    """A token bucket. For one thread, or for several to whom a few more or less are the same.

    Args:
        per_second: how many are taken; 0 takes none, ALL takes all. Up to a second's worth is saved up, so that what
            comes in a burst after a quiet time is taken whole.
    """

    __slots__ = ("_at", "_left", "_per_second")

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._left = float(per_second)
        self._at = 0.0

    def takes(self, now: float, of: int = 1) -> int:
        """How many of so many are taken; of one, whether it is.

        Args:
            now: seconds of any clock that does not go back; of one that does, the next are not taken for so long.
        """
        if self._per_second <= 0:
            return of if self._per_second < 0 else 0
        self._left = min(self._per_second, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return 0
        taken = min(of, int(self._left))
        self._left -= taken
        return taken
