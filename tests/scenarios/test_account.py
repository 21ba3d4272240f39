"""Ten thousand different records, sent by an application on real servers, arrive identical, none missing."""

from __future__ import annotations

from collections import Counter

import pytest

from kafka_delivery import send
from servers import RealKafka, RealRedis
from stack import message_id, stack
from varied import expected, sends
from watching import ALONE

COUNT = 10_000
SINGLE = 2_000
"""So many go one by one, the others in bulk."""


@pytest.mark.real
@pytest.mark.timeout(300)
def test_ten_thousand_varied_records_arrive_identical(real_kafka: RealKafka, real_redis: RealRedis) -> None:
    topic = "account"
    real_kafka.create_topic(topic)
    given = sends(COUNT, topic)
    with stack(f"{real_redis.url.rpartition('/')[0]}/7", real_kafka) as system:
        worker = system.worker(*ALONE, "--loglevel=WARNING", ready=False)
        for sent in given[:SINGLE]:
            send.delay(**sent)
        send.bulk(given[SINGLE:])
        system.wait_empty(timeout=200)
        arrived = system.read(topic)
        assert worker.process.poll() is None

    by_id = {message_id(record): record for record in arrived}
    assert len(by_id) == COUNT
    assert max(Counter(message_id(record) for record in arrived).values()) == 1
    for sent in given:
        record = by_id[sent["message_id"]]
        assert (record.key, record.value, record.headers, record.timestamp) == expected(sent), sent["message_id"]
        assert sent["partition"] in (None, record.partition)
