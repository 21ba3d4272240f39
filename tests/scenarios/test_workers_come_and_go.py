"""Workers may be added and removed at any time, killed too, and nothing is configured for it: nothing is lost, and the
stream of records never pauses for as long as a lease.

Two minutes of it: `tests/soak/test_workers_come_and_go.py`.
"""

from __future__ import annotations

import pytest

from coming_and_going import come_and_go
from servers import RealKafka, RealRedis

pytestmark = pytest.mark.long

DURATION_S = 20


@pytest.mark.real
def test_twenty_seconds(real_kafka: RealKafka, real_redis: RealRedis) -> None:
    account = come_and_go(real_kafka, real_redis, "coming-and-going", DURATION_S)
    print(account)  # noqa: T201
    account.check()
