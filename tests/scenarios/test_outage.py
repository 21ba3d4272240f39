"""A Kafka outage is quiet: nothing accepted before or during it is lost, dead-lettered or parked, no attempt is used,
and the rest comes by itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kafka_delivery_worker import counts
from servers import RealKafka, have_real_kafka, missing, wait_until
from stack import Worker, stack
from watching import ALONE, emptied, load

pytestmark = pytest.mark.long

TOPIC = "outage"


def goes_on(worker: Worker) -> bool:
    """Whether it has delivered something since it last met the outage."""
    return "succeeded" in worker.log.rpartition("UnavailableError")[2]


@pytest.mark.real
def test_kafka_is_killed_under_load(redis_url: str, tmp_path: Path) -> None:
    """All pools at once: three workers share the load."""
    if not have_real_kafka():
        missing("java, and Maven or TEST_KAFKA_LIB")
    changes = {"MESSAGE_TIMEOUT_MS": 4000, "REQUEST_TIMEOUT_MS": 2000}
    with RealKafka(tmp_path) as kafka, stack(emptied(redis_url), kafka, **changes) as system:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        workers = {
            "in-flight": system.worker(*ALONE, ready=False),
            "threads": system.worker(*ALONE, "-P", "threads", ready=False),
            "prefork": system.worker(*ALONE, "-P", "prefork", "-c", "2", ready=False),
        }
        for worker in workers.values():
            worker.wait_ready()
        with load(TOPIC) as accepted:
            wait_until(lambda: len(accepted) > 50, 60, "some load")
            kafka.kill()
            killed = len(accepted)
            # Until each has met it: with the settings below records time out in librdkafka after four seconds.
            met = "UnavailableError"
            wait_until(lambda: all(met in worker.log for worker in workers.values()), 90, "all to meet the outage")
            wait_until(lambda: len(accepted) > killed + 200, 60, "the application to send on as if nothing were")
            restarted = len(accepted)
            kafka.start()
            wait_until(lambda: len(accepted) > restarted + 50, 60, "some load after the outage")
            # The in-flight pool takes most of what waits; of what comes later each gets its share. It logs no success.
            wait_until(lambda: all(map(goes_on, (workers["threads"], workers["prefork"]))), 60, "all pools to go on")

        system.wait_for(TOPIC, set(accepted), timeout=60)
        system.wait_empty()
        for worker in workers.values():
            worker.stop()

        assert system.read(f"{TOPIC}-dlq") == []
        assert system.parked() == []
        counted = counts.read(system.redis)[TOPIC]
        assert set(counted) == {"delivered", "deferred"}
        assert counted["delivered"] == len(accepted)
        for pool, worker in workers.items():
            assert "RetriableError" not in worker.log, pool
