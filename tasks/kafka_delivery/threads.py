"""Calls that would block an event loop, in threads of our own: few, and no call waits long for one.

Not in the loop's default executor. While Redis hangs our calls would fill that, and the application's files and DNS
lookups would wait behind them.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from . import settings

T = TypeVar("T")

THREADS = 8
"""Of one process. A call is mostly Python, which runs in one thread at a time; more only help where Redis is far."""

PATIENCE = 4
"""How long a call waits for a thread at most, in `enqueue_timeout_s`.

While Redis hangs each thread is held up by each call, and the five hundredth would wait for minutes. With this, those
that were not tried in time fail one after the other as soon as a thread is free.
"""


async def in_thread(call: Callable[[], T], not_tried: Callable[[str], Exception]) -> T:
    """Run `call` in a thread, with the context variables of the task that awaits it.

    A cancelled call that has begun goes on.

    Args:
        call: what to run; it has to end in bounded time by itself.
        not_tried: makes the error of a call for which no thread could be had in time, from the reason.
    """
    patience_s = PATIENCE * settings.current().enqueue_timeout_s
    deadline = time.monotonic() + patience_s
    context = contextvars.copy_context()

    def in_turn() -> T:
        if time.monotonic() > deadline:
            raise not_tried(f"not tried: no thread was free for {patience_s:g} s")
        return context.run(call)

    try:
        running = asyncio.get_running_loop().run_in_executor(_executor(os.getpid()), in_turn)
    except RuntimeError as error:  # the system allows no more threads, or the interpreter is about to end
        raise not_tried(str(error)) from error
    return await running


@functools.lru_cache(maxsize=1)
def _executor(pid: int) -> ThreadPoolExecutor:
    """The threads of this process: those of its parent did not survive the fork."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="kafka-delivery-call")
