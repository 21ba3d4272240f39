"""What we are measured against: stock Celery, the way tutorials do it, a loop without Celery, librdkafka alone.

As a Celery app (``celery -A peers worker``) it is Celery as it comes: its Redis transport, its pools, its defaults. As
a program (``python peers.py bare`` or ``raw TOPIC COUNT SIZE``) it is a peer that needs no Celery. Where Redis and
Kafka are comes from the environment, as for a worker of ours.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from celery import Celery, signals
from orjson import loads  # as a worker of ours does
from pybase64 import b64decode

app = Celery("peers", broker=os.environ.get("KAFKA_DELIVERY_REDIS_URL"))
app.conf.broker_connection_retry_on_startup = True


@app.task(name="peers.empty")  # type: ignore[untyped-decorator]
def empty(topic: str, value: str) -> None:
    """Takes what a send takes, and does nothing."""


@app.task(name="peers.tutorial")  # type: ignore[untyped-decorator]
def tutorial(topic: str, value: str) -> None:
    """Sends one record and waits for it, with one producer in each process."""
    producer = _tutorial_producer()
    producer.produce(topic, value)
    producer.flush()


@functools.cache
def _tutorial_producer() -> Any:
    from confluent_kafka import Producer  # after the fork, and not in a caller

    return Producer({"bootstrap.servers": os.environ["KAFKA_DELIVERY_BOOTSTRAP_SERVERS"]})


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _say_so(**_: Any) -> None:
    # Celery says it at INFO, where it also says two lines about each task.
    sys.stderr.write("peer ready.\n")


CLAIM = 500
"""Messages that the bare loop claims at a time. It waits for the answer, so it asks for more than a worker of ours."""


def bare() -> None:
    """Deliver what is in our queue as fast as one process can, without Celery and without any of its duties.

    The same script claims the same messages, librdkafka has the same properties, and a message is acknowledged when
    its record is confirmed. There are no events, no retries, no errors, no limits in bytes, and no end.
    """
    import redis
    from confluent_kafka import Producer

    from kafka_delivery import settings
    from kafka_delivery.names import QUEUE
    from kafka_delivery.record import unpack
    from kafka_delivery_worker.lease import Lease, Settling, script
    from kafka_delivery_worker.producer import librdkafka_properties

    s = settings.current()
    client: Any = redis.Redis.from_url(s.redis_url)
    producer = Producer(librdkafka_properties(s))
    lease = Lease(lambda: client, s.lease_s)
    claim = client.script_load(script("claim"))
    acks: list[str] = []
    in_flight = 0

    def on_delivery(tag: str, error: Any, _: Any) -> None:
        nonlocal in_flight
        if error is not None:
            raise RuntimeError(error.str())
        in_flight -= 1
        acks.append(tag)

    sys.stderr.write("peer ready.\n")
    while True:
        arguments = lease.claim_arguments(CLAIM, [QUEUE], Settling(acks, [], [], [], []))
        acks = []
        _, items, tags, *_ = client.execute_command("EVALSHA", claim, *arguments)
        for item, tag in zip(items, tags, strict=True):
            payload = loads(item)
            (wire,), _, _ = loads(b64decode(payload["body"], validate=True))
            _, _, topic, value, key, headers, partition, timestamp_ms, message_id = wire
            pairs = [("message-id", message_id), *((name, unpack(packed)) for name, packed in headers)]
            producer.produce(
                topic,
                unpack(value),
                unpack(key),
                -1 if partition is None else partition,
                functools.partial(on_delivery, tag.decode()),
                timestamp=timestamp_ms,
                headers=pairs,
            )
            in_flight += 1
        producer.poll(0 if items else 0.005)
        while in_flight > s.max_in_flight - CLAIM:
            producer.poll(0.005)


def raw(topic: str, count: int, size: int, with_ids: int) -> None:
    """Produce `count` records, each with a callback that counts its report, and wait for all reports.

    With ids, each has a `message-id` header and a timestamp, and is the record that a worker would send.

    It is ready when the first is confirmed: what piles up before the connection is there would leave in one burst. The
    rest begins with a line of input: all of it may take less time than whoever measures needs to look.
    """
    from callers import noise
    from confluent_kafka import Producer

    from kafka_delivery import settings
    from kafka_delivery_worker.producer import librdkafka_properties

    # Its buffer is its own; the rest is a worker's, so that both promise the same.
    ours = librdkafka_properties(settings.current())
    own = {name: value for name, value in ours.items() if not name.startswith("queue.buffering.max")}
    producer = Producer(own)
    confirmed = 0

    def on_delivery(error: Any, _: Any) -> None:
        nonlocal confirmed
        if error is not None:
            raise RuntimeError(error.str())
        confirmed += 1

    producer.produce(topic, noise(0, size), on_delivery=on_delivery)
    producer.flush()
    sys.stderr.write("peer ready.\n")
    sys.stdin.readline()
    for place in range(1, count):
        value = noise(place, size)
        own: dict[str, Any] = {}
        if with_ids:
            own = {"timestamp": time.time_ns() // 1_000_000, "headers": [("message-id", f"{place:036}")]}
        while True:
            try:
                producer.produce(topic, value, on_delivery=on_delivery, **own)
                break
            except BufferError:
                producer.poll(0.01)
        producer.poll(0)
    producer.flush()
    if confirmed != count:
        raise RuntimeError(f"{confirmed} of {count} records confirmed")


PROGRAMS: dict[str, Callable[..., None]] = {"bare": bare, "raw": raw}

if __name__ == "__main__":
    name, *given = sys.argv[1:]
    PROGRAMS[name](*(int(word) if word.isdigit() else word for word in given))
