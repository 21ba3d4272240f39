"""The one way in which a message goes back to where it waits, without a word about its record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kombu.asynchronous import get_event_loop

from kafka_delivery import settings
from kafka_delivery.disposition import Move


def give_back(message: Any, pause_s: float, reject: Callable[[], None]) -> None:
    """Give a message back to its queue, where it waits before it is handed out again.

    A leased message waits in Redis. Another broker would hand it out again at once, so it waits here.

    Args:
        message: kombu's.
        pause_s: how long it waits, in seconds.
        reject: rejects it, with requeue.
    """
    if settings.current().leases:
        message.put_off_s = pause_s
        reject()
        return
    loop = get_event_loop()
    if loop is None:  # a pool without one makes its pauses in its threads
        reject()
    else:
        loop.call_later(pause_s, reject)


def wait_for_circuit(message: Any, move: Move, topic: str) -> None:
    """Let a leased message wait in Redis until a circuit closes: the cluster's, or that of its topic."""
    if move is Move.PUT_ASIDE:
        message.channel.put_aside(message.delivery_tag, topic)
    else:
        message.channel.give_back(message.delivery_tag)
