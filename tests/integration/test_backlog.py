"""A backlog may grow up to a limit: then applications are refused, by an error of its own, and workers are not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery._state import _task_stack

from kafka_delivery import (
    BacklogFullError,
    BulkEnqueueError,
    EnqueueError,
    Record,
    backlog,
    dead_letter,
    send,
    send_and_wait,
    send_many,
)
from kafka_delivery.names import QUEUE
from kafka_delivery_worker.embedded import Valkey
from servers import OtherKafka, RealRedis, have_real_redis, missing, wait_until
from stack import IMPATIENT, Stack, stack

NO_KAFKA = OtherKafka("127.0.0.1:1")
PATIENT = {"ENQUEUE_TIMEOUT_S": "60"}
"""A machine that stands still makes no refusal a doubt."""

ROOM = 2_000_000
"""Bytes that may wait in these tests."""

CALLS: dict[str, Callable[[], Any]] = {
    "delay": lambda: send.delay("orders", "v", message_id="mine"),
    "adelay": lambda: asyncio.run(send.adelay("orders", "v", message_id="mine")),
    "apply_async": lambda: send.apply_async(("orders", "v"), task_id="mine", countdown=1),
    "send_many": lambda: send_many.delay([Record("orders", "v")], message_id="mine"),
    "dead_letter": lambda: dead_letter.delay("orders", "v", message_id="mine"),
    "send_and_wait": lambda: send_and_wait("orders", "v", message_id="mine"),
}


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """An application with little room in a Redis of its own: what others leave in one goes when it likes."""
    monkeypatch.setattr(backlog, "LOOK_S", 0.0)
    with Valkey() as valkey:
        with redis.Redis.from_url(valkey.url) as client:
            used = int(client.info("memory")["used_memory"])
        with stack(valkey.url, NO_KAFKA, BACKLOG_MAX_BYTES=used + ROOM, **PATIENT) as system:
            yield system


def fill(system: Stack) -> None:
    system.redis.setrange("other", 2 * ROOM, "x")  # a small command, whose buffer takes no room itself


def drain(system: Stack) -> None:
    system.redis.delete("other")
    room = int(system.settings["BACKLOG_MAX_BYTES"])
    wait_until(lambda: int(system.redis.info("memory")["used_memory"]) < room, 60, "the memory to be free")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_send_is_refused_while_it_is_full(call: Callable[[], Any], limited: Stack) -> None:
    fill(limited)
    keys = set(limited.redis.keys())
    with pytest.raises(BacklogFullError) as caught:
        call()
    assert caught.value.message_id == "mine"
    assert "message mine was not queued" in str(caught.value)
    assert "KAFKA_DELIVERY_BACKLOG_MAX_BYTES" in caught.value.reason
    assert set(limited.redis.keys()) == keys
    drain(limited)
    send.delay("orders", "v")


def test_of_many_those_are_queued_that_had_room(limited: Stack) -> None:
    value = "x" * 100_000
    with pytest.raises(BulkEnqueueError) as caught:
        send.bulk([Record("orders", value, message_id=str(n)) for n in range(100)])
    error = caught.value
    assert error.accepted == [str(n) for n in range(len(error.accepted))]
    assert 0 < len(error.accepted) < 30
    assert error.unknown == []
    assert error.unsent == [str(n) for n in range(len(error.accepted), 100)]
    assert limited.redis.llen(QUEUE) == len(error.accepted)


def test_of_a_large_batch_it_is_not_said_that_nothing_is_queued_when_a_part_is(limited: Stack) -> None:
    with pytest.raises(EnqueueError) as caught:
        send_many.delay([Record("orders", "x" * 100_000) for _ in range(100)], message_id="mine")
    queued = limited.redis.llen(QUEUE)
    assert 0 < queued < 5
    assert not isinstance(caught.value, BacklogFullError)
    assert (caught.value.message_id, caught.value.reason[:1]) == ("mine", str(queued))
    assert "KAFKA_DELIVERY_BACKLOG_MAX_BYTES" in caught.value.reason


def test_what_a_worker_puts_back_or_hands_over_has_room(limited: Stack) -> None:
    fill(limited)
    task: Any = send
    _task_stack.push(task)
    task.push_request(called_directly=False)
    try:
        dead_letter.apply_async((Record("orders", "v"),))
    finally:
        task.pop_request()
        _task_stack.pop()
    assert limited.redis.llen("kafka-delivery-dlq") == 1


def test_redis_is_not_asked_with_each_send(
    redis_client: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = redis.Redis.info

    def info(self: Any, *args: Any) -> Any:
        asked.append(args[0])
        return original(self, *args)

    monkeypatch.setattr(redis.Redis, "info", info)
    monkeypatch.setattr(backlog, "LOOK_S", 3600.0)
    with stack(redis_url, NO_KAFKA, BACKLOG_MAX_BYTES=10**12, **PATIENT):
        for _ in range(50):
            send.delay("orders", "v")
        send.bulk([Record("orders", "v")])
    assert len(asked) == 1


def test_without_a_limit_redis_is_never_asked(
    redis_client: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis.Redis, "info", None)
    with stack(redis_url, NO_KAFKA):
        send.delay("orders", "v")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_redis_that_is_full_itself_is_the_same_error(call: Callable[[], Any]) -> None:
    with Valkey() as valkey, stack(valkey.url, NO_KAFKA, **PATIENT) as system:
        system.redis.config_set("maxmemory", "1")
        with pytest.raises(BacklogFullError) as caught:
            call()
        assert caught.value.message_id == "mine"
        assert "maxmemory" in caught.value.reason
        with pytest.raises(BulkEnqueueError) as bulk:
            send.bulk([Record("orders", "v", message_id="mine")])
        assert (bulk.value.unknown, bulk.value.unsent) == ([], ["mine"])


@pytest.mark.real
def test_a_redis_that_hangs_is_the_same_as_without_a_limit(tmp_path: Path) -> None:
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path / "redis") as server, stack(server.url, NO_KAFKA, BACKLOG_MAX_BYTES=10**12, **IMPATIENT):
        server.pause()
        started = time.monotonic()
        try:
            with pytest.raises(Exception, match="could not confirm that message mine was queued"):
                CALLS["delay"]()
            assert time.monotonic() - started < 15  # once a second or two
        finally:
            server.resume()
