"""Ten thousand different records, sent by an application on real servers, arrive identical, none missing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from servers import RealKafka, RealRedis
from stack import message_id, stack
from varied import expected, sends

COUNT = 10_000


@pytest.mark.real
@pytest.mark.timeout(300)
def test_ten_thousand_varied_records_arrive_identical(real_kafka: RealKafka, real_redis: RealRedis) -> None:
    topic = "account"
    real_kafka.create_topic(topic)
    with stack(f"{real_redis.url.rpartition('/')[0]}/7", real_kafka) as system:
        workers = [system.worker("--loglevel=WARNING", ready=False) for _ in range(2)]
        system.application(
            f"""
            from kafka_delivery import send
            from varied import sends
            for sent in sends({COUNT}, {topic!r}):
                send.delay(**sent)
            """,
            PYTHONPATH=str(Path(__file__).parent.parent),
        )
        system.wait_empty(timeout=200)
        arrived = system.read(topic)
        assert all(worker.process.poll() is None for worker in workers)

    by_id = {message_id(record): record for record in arrived}
    assert len(by_id) == COUNT
    assert max(Counter(message_id(record) for record in arrived).values()) == 1
    for sent in sends(COUNT, topic):
        record = by_id[sent["message_id"]]
        assert (record.key, record.value, record.headers, record.timestamp) == expected(sent), sent["message_id"]
        assert sent["partition"] in (None, record.partition)
