"""Whatever Redis refuses, no message is lost and none is in two places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
from redis.exceptions import ReadOnlyError, ResponseError

from integration.leases.workers import OTHER, QUEUE, Worker, long_renewed, message, publish, queued
from kafka_delivery import names


def everything(client: redis.Redis) -> dict[bytes, Any]:
    return {key: client.dump(key) for key in client.scan_iter() if key != b"one more"}


class TestRefusals:
    def test_a_full_redis_can_be_emptied(
        self, client: redis.Redis, full: Callable[[], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        """By a worker that has nothing to acknowledge too: one that was started to help."""
        sent = publish(client, *(message(n, size=1000) for n in range(3000)))
        full()
        worker = Worker(client)
        first = worker.claim()
        got, tags = first.items, first.tags
        assert len(got) == 500
        while tags:
            answer = worker.claim(acks=tags)
            got, tags = got + answer.items, answer.tags
        assert got == sent

    def test_a_full_redis_lets_leases_be_renewed_reaped_and_given_back(
        self, client: redis.Redis, full: Callable[[], None]
    ) -> None:
        sent = publish(client, *(message(n, size=1000) for n in range(3000)))
        dead, living = Worker(client), Worker(client)
        dead.claim()
        living.claim()
        long_renewed(client)
        dead.dies()
        full()
        assert living.lease.renew().over == 1
        living.lease.stop()
        assert sorted(queued(client)) == sorted(sent)

    def test_a_redis_that_may_only_be_read_loses_nothing(
        self, client: redis.Redis, read_only: Callable[[], None]
    ) -> None:
        publish(client, *(message(n) for n in range(10)))
        worker, dead = Worker(client), Worker(client)
        tags = worker.claim(3).tags
        dead.claim(3)
        dead.dies()
        read_only()
        before = everything(client)
        for attempt in (
            worker.claim,
            lambda: worker.claim(acks=tags),
            lambda: worker.claim(returns=tags),
            worker.lease.renew,
            lambda: worker.reaps(dead),
        ):
            with pytest.raises(ReadOnlyError):
                attempt()
        assert everything(client) == before

    @pytest.mark.parametrize("setting", ["min-replicas-to-write"])
    def test_a_redis_without_its_replicas_loses_nothing(self, client: redis.Redis, setting: str) -> None:
        publish(client, *(message(n) for n in range(10)))
        worker = Worker(client)
        tags = worker.claim(3).tags
        client.config_set(setting, 1)
        try:
            before = everything(client)
            ways: list[dict[str, Any]] = [{}, {"acks": tags}, {"returns": tags}]
            for settled in ways:
                with pytest.raises(ResponseError, match="NOREPLICAS"):
                    worker.claim(**settled)
            assert everything(client) == before
        finally:
            client.config_set(setting, 0)

    @pytest.mark.parametrize(
        "key", [names.LEASES, names.DEATHS, "held", OTHER, names.DELAYED + QUEUE, names.DELAYED + OTHER]
    )
    def test_a_key_of_a_wrong_type_loses_nothing(self, client: redis.Redis, key: str) -> None:
        """Two lists with messages; whichever is claimed first, and whatever else is in the way."""
        sent = publish(client, *(message(n) for n in range(10)))
        worker = Worker(client)
        client.set(worker.lease.held_key if key == "held" else key, "of no use")
        for lists in ((QUEUE, OTHER), (OTHER, QUEUE)):
            with pytest.raises(ResponseError, match="WRONGTYPE"):
                worker.claim(5, lists)
            assert queued(client) == sent
        client.delete(worker.lease.held_key if key == "held" else key)
        assert worker.claim(20, (QUEUE, OTHER)).items == sent

    def test_a_flush_of_all_scripts_is_not_noticed(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        worker = Worker(client)
        worker.claim()
        client.script_flush()
        worker.lease.renew()
        client.script_flush()
        worker.lease.flush()
        client.script_flush()
        worker.lease.stop()
        assert queued(client) == sent
