"""A time limit that is shorter than Kafka's confirmation sends nothing twice: it is raised, or refused at start."""

from __future__ import annotations

import pytest

from kafka_delivery import names, send
from kafka_delivery_worker.embedded import MockKafka
from stack import stack
from watching import ALONE, emptied

SLOW_MS = 4_000
"""What the broker takes for each answer: longer than the limits, whatever the machine does meanwhile."""


def test_what_takes_longer_than_its_limit_is_sent_once(redis_url: str) -> None:
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        kafka.create_topic("t")
        worker = system.worker(*ALONE, "-P", "prefork", "-c", "2")
        kafka.delay(-1, SLOW_MS)
        sent = {
            send.apply_async(("t", "v"), {"message_id": "hard"}, time_limit=1).id,
            send.apply_async(("t", "v"), {"message_id": "soft"}, soft_time_limit=1).id,
        }
        system.wait_empty(120)
        kafka.delay(-1, 0)
        assert sorted(system.ids("t")) == sorted(sent)
        assert system.parked() == []
        assert worker.log.count("time_limit.raised limit_s=1 ") == 1
        assert "TimeLimitExceeded" not in worker.log


@pytest.mark.parametrize("option", ["--time-limit", "--soft-time-limit"])
def test_a_worker_whose_limit_is_too_short_says_so_and_does_not_start(redis_url: str, option: str) -> None:
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        worker = system.worker(*ALONE, "-P", "prefork", "-c", "1", option, "5", ready=False)
        assert worker.process.wait(120) != 0
        assert f"kafka-delivery: {option}=5 (or task" in worker.log
        assert "Traceback" not in worker.log
        assert system.redis.zcard(names.LEASES) == 0
