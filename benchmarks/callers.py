"""Applications that send, each a process of its own: ``python callers.py NAME ARGUMENT...`` prints one JSON value.

Where Redis is comes from the environment.
"""

from __future__ import annotations

import functools
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

CHUNK = 1_000
WARM_CALLS = 100


@functools.cache
def _hex() -> str:
    return random.Random(1).randbytes(1_000_000).hex()


def noise(place: int, size: int) -> str:
    """A text of `size` characters that no compressor makes much smaller than half; another one for each `place`."""
    start = place * 1009 % (2_000_000 - size)
    return _hex()[start : start + size]


VALUE = noise(0, 200)


def ours(seconds: float) -> float:
    """Calls per second of our `send.delay()`."""
    from kafka_delivery import send

    return _calls(lambda: send.delay("orders", VALUE), seconds)


def stock(seconds: float) -> float:
    """Calls per second of `.delay()` of stock Celery, of a task that takes the same arguments."""
    from peers import empty

    return _calls(lambda: empty.delay("orders", VALUE), seconds)


def bulk(seconds: float) -> float:
    """Single sends per second that `send.bulk()` queues, the making of their `Record`s included."""
    from kafka_delivery import Record, send

    def one_chunk() -> None:
        send.bulk(Record("orders", VALUE) for _ in range(CHUNK))

    one_chunk()
    return CHUNK * _calls(one_chunk, seconds, warm=1)


def paced(topic: str, count: float, interval: float) -> dict[str, float]:
    """Send `count` records, one each `interval` seconds; return when each call began, by message id."""
    from kafka_delivery import send

    for _ in range(WARM_CALLS // 10):
        send.delay(topic, VALUE)
        time.sleep(interval)
    began: dict[str, float] = {}
    start = time.monotonic()
    for place in range(int(count)):
        time.sleep(max(0.0, start + place * interval - time.monotonic()))
        now = time.time()
        began[send.delay(topic, VALUE).id] = now
    return began


def _calls(call: Callable[[], Any], seconds: float, warm: int = WARM_CALLS) -> float:
    for _ in range(warm):
        call()
    calls, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        call()
        calls += 1
    return calls / spent


PROGRAMS: dict[str, Callable[..., Any]] = {"ours": ours, "stock": stock, "bulk": bulk, "paced": paced}

if __name__ == "__main__":
    name, *given = sys.argv[1:]
    arguments = [float(word) if word.replace(".", "", 1).isdigit() else word for word in given]
    sys.stdout.write(json.dumps(PROGRAMS[name](*arguments)) + "\n")
