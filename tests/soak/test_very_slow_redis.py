"""Commands that look answer also where Redis takes two to three seconds for each of its answers."""

from __future__ import annotations

import pytest

from integration.test_commands_on_a_slow_redis import CALLERS_S, exporter_answers, status_answers
from kafka_delivery_worker.embedded import MockKafka, Valkey
from proxy import Proxy
from stack import stack


@pytest.mark.timeout(400)
def test_status_and_the_exporter_answer(mock_kafka: MockKafka) -> None:
    with (
        Valkey() as valkey,
        Proxy(valkey.port) as proxy,
        stack(valkey.url, mock_kafka, ENQUEUE_TIMEOUT_S=CALLERS_S) as system,
    ):
        system.settings["REDIS_URL"] = proxy.redis_url
        proxy.slow(2.0, 1.0)
        status_answers(system)
        exporter_answers(system)
