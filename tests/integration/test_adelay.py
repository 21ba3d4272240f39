"""`await send.adelay()` never blocks the event loop, and each call ends in bounded time, however many there are.

An application on asyncio serves all its requests in one thread: a Redis that hangs must hold up those that send, a few
seconds, and no others.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import redis

from kafka_delivery import BulkEnqueueError, EnqueueError, InvalidRecordError, Record, send, send_many, threads
from kafka_delivery.names import QUEUE
from servers import OtherKafka, RealRedis, have_real_redis, missing, wait_until
from stack import IMPATIENT, Stack, stack

NO_KAFKA = OtherKafka("127.0.0.1:1")

HUNG_S = 10 * (2.0 + 1.0)
"""Ten times what a call waits with default settings: for a thread, and for a Redis that hangs."""

REQUEST: ContextVar[str] = ContextVar("REQUEST")


@pytest.fixture
def application(redis_client: redis.Redis, redis_url: str) -> Iterator[Stack]:
    with stack(redis_url, NO_KAFKA) as system:
        yield system


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[RealRedis]:
    """An application that has sent before, with a Redis that then stopped answering."""
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path / "redis") as server, stack(server.url, NO_KAFKA, **IMPATIENT):
        send.delay("orders", "before")
        server.pause()
        yield server
        server.resume()


def queued(system: Stack) -> list[str]:
    return [json.loads(message)["headers"]["id"] for message in reversed(system.redis.lrange(QUEUE, 0, -1))]


def test_queues_a_record(application: Stack) -> None:
    async def request() -> str:
        return str((await send.adelay("orders", {"id": 42}, key="42", message_id="mine")).id)

    assert asyncio.run(request()) == "mine"
    (message,) = application.redis.lrange(QUEUE, 0, -1)
    send.delay("orders", {"id": 42}, key="42", message_id="mine")
    _, same = application.redis.lrange(QUEUE, 0, -1)

    def comparable(raw: bytes) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(raw)
        found["properties"].pop("delivery_tag")
        found.pop("body")  # has the time of the call
        return found

    found, wanted = comparable(message), comparable(same)
    assert len(found["properties"].pop("reply_to")) == len(wanted["properties"].pop("reply_to")), "the thread's"
    assert found == wanted


def test_queues_a_batch_and_many(application: Stack) -> None:
    async def request() -> list[str]:
        batch = await send_many.adelay([Record("orders", "a"), {"topic": "orders", "value": "b"}], message_id="batch")
        return [str(batch.id), *await send.abulk(Record("orders", "v", message_id=f"id-{n}") for n in range(3))]

    assert asyncio.run(request()) == ["batch", "id-0", "id-1", "id-2"] == queued(application)


def test_what_is_wrong_with_a_record_is_said_in_the_caller(application: Stack) -> None:
    async def request() -> list[str]:
        said = []
        for call in (
            lambda: send.adelay("no topic!", "v"),
            lambda: send_many.adelay([{"topic": "no topic!", "value": "v"}]),
            lambda: send_many.adelay({"topic": "orders", "value": "v"}),  # type: ignore[dict-item]  # what is wrong with it
            lambda: send.abulk([Record("orders", "v"), {"topic": "no topic!", "value": "v"}]),
        ):
            with pytest.raises(InvalidRecordError) as caught:
                await call()
            said.append(caught.value.field)
        return said

    assert asyncio.run(request()) == ["topic", "records[0].topic", "records", "records[1].topic"]
    assert application.redis.dbsize() == 0


def test_the_loops_own_threads_are_left_to_the_application(application: Stack) -> None:
    class Taken(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            raise AssertionError("the default executor was used")

    async def request() -> None:
        asyncio.get_running_loop().set_default_executor(Taken())
        await send.adelay("orders", "v")

    asyncio.run(request())
    assert len(queued(application)) == 1


def test_context_variables_are_carried_over(application: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    enqueue = type(send).enqueue

    def spy(self: Any, *args: Any) -> Any:
        seen.append(REQUEST.get())
        return enqueue(self, *args)

    monkeypatch.setattr(type(send), "enqueue", spy)

    async def request(name: str) -> None:
        REQUEST.set(name)
        await send.adelay("orders", "v")

    async def requests() -> None:
        await asyncio.gather(*(request(f"request-{n}") for n in range(20)))

    asyncio.run(requests())
    assert sorted(seen) == sorted(f"request-{n}" for n in range(20))


def test_a_call_for_which_the_system_has_no_thread_was_not_tried(
    application: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def request() -> EnqueueError:
        with pytest.raises(EnqueueError) as caught:
            await send.adelay("orders", "v", message_id="mine")
        return caught.value

    threads._executor.cache_clear()
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refused)
        error = asyncio.run(request())
    assert (error.message_id, error.reason) == ("mine", "can't start new thread")


@pytest.mark.real
class TestRedisHangs:
    """SIGSTOP: connections are open, nothing answers."""

    def test_other_coroutines_go_on_and_each_of_hundreds_of_calls_ends(
        self, hung: RealRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = 500
        took: list[float] = []
        turns = 0

        enqueue = type(send).enqueue

        def held_up(self: Any, *args: Any) -> Any:
            """Each call is held up by Redis, and ends after another turn of the loop, which goes on if it is free."""
            try:
                return enqueue(self, *args)
            finally:
                before = turns
                wait_until(lambda: turns > before, 30, "the loop is blocked by a call")

        monkeypatch.setattr(type(send), "enqueue", held_up)

        async def other() -> None:
            nonlocal turns
            while len(took) < calls:
                await asyncio.sleep(0.01)
                turns += 1

        async def request(number: int) -> str:
            started = time.monotonic()
            with pytest.raises(EnqueueError) as caught:
                await send.adelay("orders", "v", message_id=f"id-{number}")
            took.append(time.monotonic() - started)
            assert f"message_id='id-{number}'" in str(caught.value)
            return caught.value.message_id

        async def requests() -> list[str]:
            ids, _ = await asyncio.gather(asyncio.gather(*map(request, range(calls))), other())
            return list(ids)

        assert asyncio.run(requests()) == [f"id-{number}" for number in range(calls)]
        assert max(took) < HUNG_S

    def test_a_batch_and_many_end_too(self, hung: RealRedis) -> None:
        async def requests() -> list[Any]:
            batch = [Record("orders", "v", message_id="mine")]
            return await asyncio.gather(
                *(send.adelay("orders", "v") for _ in range(10 * threads.THREADS)),
                send_many.adelay(batch, message_id="batch"),
                send.abulk(batch),
                return_exceptions=True,
            )

        started = time.monotonic()
        *_, batch, many = asyncio.run(requests())
        assert time.monotonic() - started < HUNG_S
        assert isinstance(batch, EnqueueError)
        assert batch.message_id == "batch"
        assert "not tried" in batch.reason
        assert isinstance(many, BulkEnqueueError)
        assert (many.accepted, many.unknown, many.unsent) == ([], [], ["mine"])

    def test_it_goes_on_when_redis_does(self, hung: RealRedis) -> None:
        async def request(message_id: str) -> None:
            await send.adelay("orders", "v", message_id=message_id)

        with pytest.raises(EnqueueError):
            asyncio.run(request("lost"))
        hung.resume()
        asyncio.run(request("found"))
        with redis.Redis.from_url(hung.url) as client:
            wait_until(lambda: b"found" in b"".join(client.lrange(QUEUE, 0, -1)), 30, "the record to be queued")


def test_a_task_that_is_cancelled_is_let_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it began goes on: nothing stops a thread."""
    begun, over, ended = threading.Event(), threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        begun.set()
        over.wait(60)
        ended.set()

    monkeypatch.setattr(type(send), "enqueue", hang)

    async def request() -> None:
        task = asyncio.create_task(send.adelay("orders", "v"))
        assert await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert not ended.is_set()

    try:
        asyncio.run(request())
    finally:
        over.set()
    assert ended.wait(30)


def test_many_at_once_are_no_fault_while_redis_answers(application: Stack) -> None:
    async def requests() -> None:
        await asyncio.gather(*(send.adelay("orders", "v") for _ in range(40 * threads.THREADS)))

    asyncio.run(requests())
    assert len(queued(application)) == 40 * threads.THREADS
