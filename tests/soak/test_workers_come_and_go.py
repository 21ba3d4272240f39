"""Two minutes under load, in which a worker is added or removed every few seconds, by SIGTERM and SIGKILL in turn."""

from __future__ import annotations

import pytest

from coming_and_going import come_and_go
from servers import RealKafka, RealRedis

DURATION_S = 120


@pytest.mark.real
@pytest.mark.timeout(600)
def test_two_minutes(real_kafka: RealKafka, real_redis: RealRedis) -> None:
    account = come_and_go(real_kafka, real_redis, "coming-and-going-long", DURATION_S)
    print(account)  # noqa: T201  # what the run is for
    account.check()
