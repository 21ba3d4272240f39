"""How many processes failed at a message, and which of them pause themselves, is kept in Redis."""

from __future__ import annotations

import pytest
import redis

from kafka_delivery import settings
from kafka_delivery.names import FAILED, PAUSED
from kafka_delivery.redis_client import RedisClient
from kafka_delivery_worker import failures, paused
from kafka_delivery_worker.failures import Failed, Failures


@pytest.fixture
def client(redis_client: redis.Redis, redis_url: str) -> RedisClient:
    return RedisClient(settings.Settings.from_env({"KAFKA_DELIVERY_REDIS_URL": redis_url}))


class TestFailures:
    def test_processes_are_counted_and_the_pause_grows_with_each_failure(self, client: RedisClient) -> None:
        one, another = Failures(client, "one"), Failures(client, "another")
        assert [one.count("m"), one.count("m"), another.count("m"), one.count("m")] == [
            Failed(1, 2), Failed(1, 4), Failed(2, 8), Failed(2, 16),
        ]  # fmt: skip
        assert one.count("other") == Failed(1, 2)

    def test_the_pause_has_an_end(self, client: RedisClient) -> None:
        one = Failures(client, "one")
        for _ in range(20):
            found = one.count("m")
        assert found == Failed(1, failures.LONGEST_PAUSE_S)

    def test_it_is_forgotten_in_a_day_or_when_the_message_is_parked(
        self, client: RedisClient, redis_client: redis.Redis
    ) -> None:
        one = Failures(client, "one")
        one.count("m")
        assert 0 < redis_client.ttl(FAILED + "m") <= failures.REMEMBERED_S
        one.forget("m")
        assert not redis_client.exists(FAILED + "m")

    def test_without_redis_nothing_is_counted_and_nothing_raised(self) -> None:
        nowhere = settings.Settings.from_env({"KAFKA_DELIVERY_REDIS_URL": "redis://127.0.0.1:1/0"})
        away = Failures(RedisClient(nowhere, 0.2), "one")
        assert away.count("m") == Failed()
        away.forget("m")


class TestPaused:
    def test_a_process_says_so_until_it_goes_on(self, client: RedisClient) -> None:
        paused.say(client, "w1", "no client", 5)
        paused.say(client, "w2", "TypeError", 6)
        assert paused.read(client) == [paused.Paused("w1", "no client", 5), paused.Paused("w2", "TypeError", 6)]
        paused.say(client, "w1", "", 0)
        assert [one.worker for one in paused.read(client)] == ["w2"]

    def test_one_that_died_is_left_out(
        self, client: RedisClient, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paused.say(client, "dead", "no client", 5)
        monkeypatch.setattr(paused, "FRESH_S", -1.0)
        assert paused.read(client) == []

    def test_nothing_of_it_stays_for_ever(self, client: RedisClient, redis_client: redis.Redis) -> None:
        paused.say(client, "w1", "no client", 5)
        assert redis_client.ttl(PAUSED) > 0
