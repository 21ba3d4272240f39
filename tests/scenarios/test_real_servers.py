"""The real Kafka of the tests keeps what it confirmed."""

from __future__ import annotations

import pytest

from clients import Client
from servers import (
    RealKafka,
    read_all,
)


@pytest.mark.real
def test_kafka_keeps_what_it_confirmed_over_a_kill(real_kafka: RealKafka) -> None:
    real_kafka.create_topic("killed", 2)
    client = Client(real_kafka.bootstrap_servers, message_timeout_ms=90_000)
    assert client.send("killed", b"before", partition=0) == 0
    first = real_kafka.pid

    real_kafka.kill()
    client.produce("killed", b"during", partition=0)
    real_kafka.start()

    assert real_kafka.pid != first
    assert client.producer.flush(90) == 0
    assert client.reports == [0, 0]
    assert [record.value for record in read_all(real_kafka.bootstrap_servers, ["killed"])] == [b"before", b"during"]
