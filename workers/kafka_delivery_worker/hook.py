"""The application's own function that is told of each dead letter, in a thread beside the work.

It is a notice, not a part of the delivery: what it does, raises or takes its time for changes nothing for any record.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger("kafka_delivery.hook")

MOST_WAITING = 1_000
"""Dead letters of which the function has not been told yet; of what comes meanwhile it is told nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLettered:
    """A dead letter, without key, value and headers.

    Attributes:
        topic: where the record was meant to go.
        dead_letter_topic: where it is, unless it was parked.
        message_id: of the record.
        error_class, error_code, error_message: why; the code is Kafka's, None where there is none.
        retry_count: attempts that were used up.
        redrive_count: how often it had been sent again from its dead-letter topic.
        failed_at: when, ISO 8601.
        partition, offset: where it is in its dead-letter topic; None if it was parked.
        parked_id: under which it is parked, because its dead-letter topic refused it; else None.
    """

    topic: str
    dead_letter_topic: str
    message_id: str
    error_class: str
    error_code: int | None
    error_message: str
    retry_count: int
    failed_at: str
    redrive_count: int = 0
    partition: int | None = None
    offset: int | None = None
    parked_id: str | None = None


class Hook:
    """Calls a function with each dead letter. `tell` may be called from any thread and never waits.

    Args:
        function: what the setting names.
    """

    def __init__(self, function: Callable[[DeadLettered], object]) -> None:
        self._function = function
        self._waiting: queue.Queue[DeadLettered | None] = queue.Queue(MOST_WAITING)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def tell(self, letter: DeadLettered) -> None:
        """Let the function be called with `letter`, soon."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kafka-delivery-hook", daemon=True)
                self._thread.start()
        try:
            self._waiting.put_nowait(letter)
        except queue.Full:
            log.warning("on_dead_letter.skipped message_id=%s waiting=%d", letter.message_id, MOST_WAITING)

    def close(self, timeout_s: float) -> None:
        """Let the function finish what waits, for so long."""
        if self._thread is None:
            return
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            pass
        else:
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("on_dead_letter.not_told waiting=%d", self._waiting.qsize())

    def _run(self) -> None:
        while (letter := self._waiting.get()) is not None:
            try:
                self._function(letter)
            except BaseException as error:  # SystemExit too: it ends nothing but this thread, and the next is told
                log.warning(
                    "on_dead_letter.failed message_id=%s error=%s",
                    letter.message_id, type(error).__name__, exc_info=True,
                )  # fmt: skip
