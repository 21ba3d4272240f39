"""Where an answer of Redis takes 50 ms, 150 ms, 500 ms or 2 s, with jitter, everything goes on, only slower.

Leases of five seconds are renewed in time, each record is delivered once, a wanted result comes. A caller with little
patience is told that its record could not be confirmed, and repeating with the same id is safe.
"""

from __future__ import annotations

from collections import Counter

import pytest

from kafka_delivery import EnqueueError, Record, send, send_and_wait, send_many
from kafka_delivery_worker.embedded import MockKafka, Valkey
from proxy import Proxy
from stack import stack
from watching import ALONE

TOPIC = "slow-redis"

STEPS = ((0.05, 0.02), (0.15, 0.1), (0.5, 0.3), (2.0, 0.5))
"""Delay and jitter (seconds)."""


@pytest.mark.long
def test_everything_goes_on_slower() -> None:
    with MockKafka() as kafka, Valkey() as valkey, Proxy(valkey.port) as network:
        kafka.create_topic(TOPIC)
        with stack(valkey.url, kafka, LEASE_S=5) as system:
            worker = system.worker(*ALONE, REDIS_URL=network.redis_url)
            expected: set[str] = set()
            for delay_s, jitter_s in STEPS:
                network.slow(delay_s, jitter_s)
                expected |= {send.delay(TOPIC, f"{delay_s}-{n}").id for n in range(10)}
                batch = [Record(TOPIC, str(n)) for n in range(5)]
                send_many.delay(batch)
                expected |= {record.id for record in batch}
                expected.add(send.apply_async((TOPIC, "later"), countdown=1).id)
                expected.add(send_and_wait(TOPIC, "wanted", timeout=90)["message_id"])
            system.wait_for(TOPIC, expected, timeout=90)
            system.wait_empty(120)
            assert Counter(system.ids(TOPIC)) == dict.fromkeys(expected, 1)
            assert "lease.reaped" not in worker.log
            assert "lease.not_renewed" not in worker.log
            network.slow(0)
            worker.stop()
            assert worker.process.returncode == 0


def test_an_impatient_caller_is_told_and_may_repeat() -> None:
    with MockKafka() as kafka, Valkey() as valkey, Proxy(valkey.port) as network:
        kafka.create_topic(TOPIC)
        with stack(valkey.url, kafka, REDIS_URL=network.redis_url, ENQUEUE_TIMEOUT_S=0.5) as system:
            send.delay(TOPIC, "fast")  # from here on there is a connection
            network.slow(2)
            with pytest.raises(EnqueueError, match="repeating is safe") as caught:
                send.delay(TOPIC, "slow", message_id="the-same")
            assert caught.value.message_id == "the-same"
            network.slow(0)
            assert send.delay(TOPIC, "slow", message_id="the-same").id == "the-same"
            system.worker(*ALONE)
            system.wait_for(TOPIC, {"the-same"})
