"""A worker is told once that it shall stop, and every process forked from it knows, also one that sits in a wait."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from kafka_delivery_worker.broadcast import Broadcast

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

LONG = 30.0
"""Seconds; a wait of this length that is not ended by the broadcast fails the test."""


def fork(body: Callable[[], bool]) -> int:
    """A child that exits with 0 if `body` is true."""
    child = os.fork()
    if child == 0:
        code = 2
        with suppress(BaseException):
            code = 0 if body() else 1
        os._exit(code)
    return child


def codes(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_nothing_is_sent_at_first() -> None:
    broadcast = Broadcast()
    assert not broadcast.sent
    assert not broadcast.wait(0)


def test_this_process_knows_what_it_sent() -> None:
    broadcast = Broadcast()
    broadcast.send()
    assert broadcast.sent
    assert broadcast.wait()
    assert broadcast.wait(LONG)


def test_a_wait_ends_when_its_time_is_up() -> None:
    started = time.monotonic()
    assert not Broadcast().wait(0.05)
    assert time.monotonic() - started >= 0.05


def test_every_wait_ends_when_it_is_sent() -> None:
    broadcast = Broadcast()
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(broadcast.wait(LONG))) for _ in range(4)]
    for thread in threads:
        thread.start()
    broadcast.send()
    for thread in threads:
        thread.join(LONG)
    assert answers == [True] * 4


def test_children_that_wait_hear_it() -> None:
    broadcast = Broadcast()
    waiting, tell = os.pipe()

    def child() -> bool:
        before = broadcast.sent
        os.write(tell, b"x")
        return not before and broadcast.wait(LONG)

    children = [fork(child) for _ in range(4)]
    for _ in children:
        os.read(waiting, 1)
    broadcast.send()
    assert codes(children) == [0] * 4
    os.close(waiting)
    os.close(tell)


def test_children_born_after_it_know_it() -> None:
    broadcast = Broadcast()
    broadcast.send()
    assert codes([fork(lambda: broadcast.sent) for _ in range(2)]) == [0, 0]


def test_grandchildren_hear_it() -> None:
    broadcast = Broadcast()
    children = [fork(lambda: codes([fork(lambda: broadcast.wait(LONG)) for _ in range(2)]) == [0, 0]) for _ in range(2)]
    broadcast.send()
    assert codes(children) == [0, 0]


def test_a_child_cannot_stop_its_parent_or_its_siblings() -> None:
    broadcast = Broadcast()

    def child() -> bool:
        broadcast.send()
        return True

    assert codes([fork(child)]) == [0]
    assert not broadcast.sent
    assert codes([fork(lambda: not broadcast.sent)]) == [0]


def test_the_end_of_a_child_is_no_message() -> None:
    broadcast = Broadcast()
    assert codes([fork(lambda: True) for _ in range(3)]) == [0] * 3
    assert not broadcast.sent


def test_sending_twice_closes_nothing_else() -> None:
    broadcast = Broadcast()
    broadcast.send()
    # The next files get the number that was closed just now.
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        broadcast.send()
        broadcast.send()
        for file in (one, other):
            os.fstat(file.fileno())
    assert broadcast.sent


def test_a_signal_handler_may_send_while_the_process_waits() -> None:
    broadcast = Broadcast()
    before = signal.signal(signal.SIGALRM, lambda *_: broadcast.send())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert broadcast.wait(LONG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_two_broadcasts_are_two() -> None:
    stopping, hurrying = Broadcast(), Broadcast()
    stopping.send()
    assert (stopping.sent, hurrying.sent) == (True, False)


def test_a_time_that_is_over_already_is_no_wait() -> None:
    broadcast = Broadcast()
    waiting = threading.Thread(target=lambda: broadcast.wait(-0.001), daemon=True)
    waiting.start()
    waiting.join(LONG)
    ended = not waiting.is_alive()
    broadcast.send()
    waiting.join(LONG)
    assert ended
