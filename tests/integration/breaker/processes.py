"""One process's part of the breaker, without its thread; its clock is moved, not waited for."""

from __future__ import annotations

import redis
from confluent_kafka import KafkaError
from redis.exceptions import ConnectionError as RedisConnectionError

from integration.circuits.fleet import passes, stays
from kafka_delivery.settings import Settings
from kafka_delivery_worker.breaker import Breaker
from kafka_delivery_worker.breaker.rules import Rules
from kafka_delivery_worker.breaker.store import CircuitStore, View

RULES = Rules.of(Settings())


STALL_S = 10.0
DOWN = KafkaError._TRANSPORT
TIMED_OUT = KafkaError._MSG_TIMED_OUT
TOPICS_OWN = KafkaError.NOT_ENOUGH_REPLICAS
RECORDS_OWN = KafkaError.MSG_SIZE_TOO_LARGE
FORBIDDEN = KafkaError.TOPIC_AUTHORIZATION_FAILED


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Direct:
    """What `CircuitStore` needs of a `RedisClient`; away when told."""

    prefix = ""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.away = False
        self.looks = 0

    @property
    def client(self) -> redis.Redis:
        self.looks += 1
        if self.away:
            raise RedisConnectionError("away")
        return self._client


class Process:
    """A breaker without its thread, and what it needs."""

    def __init__(self, client: redis.Redis, name: str = "one", *, claims: bool = True) -> None:
        self.name = name
        self.clock = Clock()
        self.redis = Direct(client)
        store = CircuitStore(self.redis, "default", RULES, name)  # type: ignore[arg-type]
        self.breaker = Breaker(store, RULES, STALL_S, clock=self.clock)
        self.woken = 0
        if claims:
            self.breaker.claim_by(self._wake)
        self.breaker.tick()

    def _wake(self) -> None:
        self.woken += 1

    def fails(self, code: int = DOWN, times: int = 1, topic: str = "orders") -> None:
        for _ in range(times):
            admission = self.breaker.admission(topic)
            self.breaker.failed(0 if admission is None else admission, topic, code)
            self.breaker.tick()

    def succeeds(self, topic: str = "orders") -> None:
        admission = self.breaker.admission(topic)
        assert admission is not None
        self.breaker.delivered(admission, topic)
        self.breaker.tick()

    def passes(self, seconds: float) -> None:
        """So much time goes by, for this process and for the fleet; somebody collects reports all the time."""
        passes(self.redis._client, int(seconds) * 1000)
        for _ in range(int(seconds)):
            self.clock.now += 1
            self.breaker.attendance.collected()
        self.breaker.tick()

    def stands_still(self, seconds: int) -> None:
        """So much time goes by, in which nothing of this process runs."""
        passes(self.redis._client, seconds * 1000)
        self.clock.now += seconds

    def recovers(self) -> None:
        """As many probes arrive as close the circuit."""
        for _ in range(RULES.successes):
            probe = self.breaker.take_probe()
            assert probe is not None
            self.breaker.delivered(probe, "orders")
            self.breaker.tick()

    def stays(self) -> None:
        """It counts as alive for most of a minute, which five seconds without a look would end."""
        stays(self.redis._client, self.name)

    def asked(self, *, answer: bool) -> list[tuple[float, str]]:
        """When a broker is asked from now on, and of which topic; it answers, or it does not."""
        asked: list[tuple[float, str]] = []

        def answers(topic: str, timeout_s: float) -> bool:
            asked.append((self.clock.now, topic))
            return answer

        self.breaker.answers = answers
        return asked

    def state(self, scope: str = "cluster") -> str:
        return self.breaker._views.get(scope, View(scope)).state


def ended(process: Process) -> None:
    """Its thread does end; the breaker waits a second for it."""
    assert process.breaker._thread is not None
    process.breaker._thread.join(60)
    assert not process.breaker._thread.is_alive()
