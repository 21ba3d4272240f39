"""A signal that one process gives once and that all of its forked children receive: the end of a pipe.

Celery tells only the main process of a worker that it shall stop. The children that hold records must hear it too,
also when they sit in a wait, and a signal handler may do little more than one system call: closing a file does it.
"""

from __future__ import annotations

import os
import select


class Broadcast:
    """Sent once; stays sent. A child that is spawned instead of forked has one of its own that nobody sends."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        self._write: int | None = write
        os.register_at_fork(after_in_child=self._close_write)

    def send(self) -> None:
        """Tell this process, which made it, and its children. Safe in a signal handler, and to repeat."""
        self._close_write()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is sent, or for `seconds` at most; True if it was sent."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(None if seconds is None else max(0.0, seconds) * 1000))

    @property
    def sent(self) -> bool:
        return self.wait(0)

    def _close_write(self) -> None:
        write, self._write = self._write, None
        if write is not None:
            os.close(write)
