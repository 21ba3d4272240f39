"""`send_and_wait()` says where the record is, or why not, or that it is on its way; always in bounded time.

The worker's part, a result in Redis, is played by the test: with real workers see scenarios/test_callbacks.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import signals
from celery.exceptions import TaskRevokedError
from celery.states import FAILURE, RETRY, REVOKED, SUCCESS
from click.testing import CliRunner

from kafka_delivery import (
    Circuit,
    CircuitBreakerOpen,
    DeliveryTimeoutError,
    EnqueueError,
    InvalidRecordError,
    KafkaDeliveryError,
    RejectedError,
    RetriableError,
    app,
    asend_and_wait,
    circuit,
    confirmation,
    outcomes,
    send,
    send_and_wait,
)
from kafka_delivery.names import QUEUE
from kafka_delivery.outcomes import Awaited, Listener
from kafka_delivery_worker.cli import cli
from servers import OtherKafka, RealRedis, have_real_redis, missing, wait_until
from stack import IMPATIENT, Stack, stack

NO_KAFKA = OtherKafka("127.0.0.1:1")
HUNG_S = 20.0
"""Ten times what a call takes with default settings, where Redis hangs."""

Wait = Callable[..., Any]


def awaited(*args: Any, **kwargs: Any) -> Any:
    return asyncio.run(asend_and_wait(*args, **kwargs))


both = pytest.mark.parametrize("wait", [send_and_wait, awaited], ids=["sync", "async"])


@pytest.fixture
def application(redis_client: redis.Redis, redis_url: str) -> Iterator[Stack]:
    with stack(redis_url, NO_KAFKA) as system:
        wait_until(lambda: subscriptions(system) == 0, 30, "the listener of the test before to be done")
        yield system


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RealRedis]:
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def calls() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as threads:
        yield threads


def place(message_id: str, offset: int = 7) -> dict[str, Any]:
    return {"topic": "orders", "partition": 3, "offset": offset, "timestamp": 1767323045678, "message_id": message_id}


def store(message_id: str, result: Any, state: str = SUCCESS) -> None:
    """What a worker does with the result of a task."""
    app.backend.store_result(message_id, result, state)


def queued(system: Stack) -> list[str]:
    return [json.loads(message)["headers"]["id"] for message in reversed(system.redis.lrange(QUEUE, 0, -1))]


def wait_queued(system: Stack, *ids: str) -> None:
    wait_until(lambda: set(queued(system)) >= set(ids), 30, f"{ids} to be queued")


def subscriptions(system: Stack, *ids: str) -> int:
    """How many listen for the results of these; by default, of the one that most tests send."""
    channels = [f"celery-task-meta-{one}" for one in ids or ("mine",)]
    return sum(count for _, count in system.redis.pubsub_numsub(*channels))


def listening(system: Stack) -> set[str]:
    """Connections that have subscribed to something."""
    return {one["id"] for one in system.redis.client_list(_type="pubsub")}


@both
class TestOutcome:
    def test_is_where_the_record_is(self, wait: Wait, application: Stack, calls: ThreadPoolExecutor) -> None:
        call = calls.submit(wait, "orders", "v", message_id="mine", timeout=60)
        wait_queued(application, "mine")
        assert not call.done()
        store("mine", place("mine"))
        assert call.result(30) == place("mine")

    def test_is_the_error_that_the_worker_raised(
        self, wait: Wait, application: Stack, calls: ThreadPoolExecutor
    ) -> None:
        call = calls.submit(wait, "orders", "v", message_id="mine", timeout=60)
        wait_queued(application, "mine")
        store("mine", RejectedError("too large", "orders", "mine", 10, "MSG_SIZE_TOO_LARGE"), FAILURE)
        error = call.exception(30)
        assert isinstance(error, RejectedError)
        assert (error.code, error.name, error.topic, error.message_id) == (10, "MSG_SIZE_TOO_LARGE", "orders", "mine")

    def test_is_not_that_of_an_attempt(self, wait: Wait, application: Stack, calls: ThreadPoolExecutor) -> None:
        call = calls.submit(wait, "orders", "v", message_id="mine", timeout=60)
        wait_queued(application, "mine")
        store("mine", RetriableError("not now", "orders", "mine", 5), RETRY)
        store("mine", place("mine"))
        assert call.result(30) == place("mine")

    def test_of_a_revoked_record_is_an_error_of_ours(
        self, wait: Wait, application: Stack, calls: ThreadPoolExecutor
    ) -> None:
        call = calls.submit(wait, "orders", "v", message_id="mine", timeout=60)
        wait_queued(application, "mine")
        store("mine", TaskRevokedError("revoked"), REVOKED)
        error = call.exception(30)
        assert isinstance(error, KafkaDeliveryError)
        assert "message mine is parked" in str(error)

    def test_comes_also_when_celery_publishes_and_over_the_same_connection(
        self, wait: Wait, application: Stack, calls: ThreadPoolExecutor
    ) -> None:
        """Where somebody listens to signals of publishing, as tracing does."""

        def listen(**_: Any) -> None:
            pass

        signals.before_task_publish.connect(listen)
        try:
            call = calls.submit(wait, "orders", "v", message_id="mine", timeout=60)
            wait_queued(application, "mine")
            wait_until(lambda: subscriptions(application) > 0, 30, "a subscription")
            assert subscriptions(application) == 1, "Celery has not made one too"
            store("mine", place("mine"))
            assert call.result(30) == place("mine")
        finally:
            signals.before_task_publish.disconnect(listen)

    def test_is_forgotten_once_it_was_read(self, wait: Wait, application: Stack, calls: ThreadPoolExecutor) -> None:
        call = calls.submit(wait, "orders", "v", message_id="mine", timeout=60)
        wait_queued(application, "mine")
        store("mine", place("mine"))
        call.result(30)
        wait_until(lambda: not application.redis.keys("celery-task-meta-*"), 30, "the result to be forgotten")
        wait_until(lambda: subscriptions(application) == 0, 30, "no subscription to be left")

    def test_of_an_earlier_send_with_the_same_id_is_not_taken_for_it(
        self, wait: Wait, application: Stack, calls: ThreadPoolExecutor
    ) -> None:
        store("mine", RejectedError("no such topic", "orders", "mine", 3), FAILURE)
        call = calls.submit(wait, "orders", "v", message_id="mine", timeout=60)
        wait_queued(application, "mine")
        store("mine", place("mine"))
        assert call.result(30) == place("mine")

    def test_is_heard_by_all_who_wait_for_it(self, wait: Wait, application: Stack, calls: ThreadPoolExecutor) -> None:
        both = [calls.submit(wait, "orders", "v", message_id="mine", timeout=60) for _ in range(2)]
        wait_until(lambda: len(queued(application)) == 2, 30, "both to be queued")
        store("mine", place("mine"))
        assert [call.result(30) for call in both] == [place("mine")] * 2


@both
class TestNoOutcome:
    def test_in_time_means_that_it_is_on_its_way(self, wait: Wait, application: Stack) -> None:
        with pytest.raises(DeliveryTimeoutError) as caught:
            wait("orders", "v", message_id="mine", timeout=0.1)
        error = caught.value
        assert (error.message_id, error.topic, error.timeout_s, error.retry_after) == ("mine", "orders", 0.1, None)
        assert "message mine for topic orders is on its way" in str(error)
        assert queued(application) == ["mine"]
        wait_until(lambda: subscriptions(application) == 0, 30, "no subscription to be left")

    def test_leaves_a_result_that_comes_a_moment_later_to_who_asks_for_it(
        self, wait: Wait, application: Stack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The caller still asks Redis for the circuit, to say why it takes so long."""
        heard = threading.Event()
        tell = Awaited.tell

        def told(awaited: Awaited, meta: dict[str, Any]) -> bool:
            try:
                return tell(awaited, meta)
            finally:
                heard.set()

        def slow(topic: str) -> Circuit:
            if queued(application):
                store("mine", place("mine"))
                assert heard.wait(30)
            return circuit(topic)

        monkeypatch.setattr(Awaited, "tell", told)
        monkeypatch.setattr(confirmation, "circuit", slow)
        with pytest.raises(DeliveryTimeoutError):
            wait("orders", "v", message_id="mine", timeout=0.1)
        assert send.AsyncResult("mine").result == place("mine")

    def test_names_the_attempt_that_failed(
        self, wait: Wait, application: Stack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gives_up = Awaited.gives_up

        def after_an_attempt(awaited: Awaited) -> bool:
            """The time is over, and not before the attempt was heard of."""
            store("mine", RetriableError("not now", "orders", "mine", 5, "LEADER_NOT_AVAILABLE"), RETRY)
            wait_until(lambda: awaited.attempt is not None, 30, "the attempt to be heard of")
            return gives_up(awaited)

        monkeypatch.setattr(Awaited, "gives_up", after_an_attempt)
        with pytest.raises(DeliveryTimeoutError) as caught:
            wait("orders", "v", message_id="mine", timeout=0.1)
        assert isinstance(caught.value.__cause__, RetriableError)
        assert caught.value.__cause__.name == "LEADER_NOT_AVAILABLE"
        assert "an attempt failed" in caught.value.reason

    def test_while_the_circuit_is_open_nothing_is_queued(self, wait: Wait, application: Stack) -> None:
        application.command("breaker", "force-open", "--reason", "test")
        with pytest.raises(CircuitBreakerOpen) as caught:
            wait("orders", "v", message_id="mine", timeout=60)
        assert caught.value.message_id == "mine"
        assert caught.value.retry_after > 0
        assert queued(application) == []

    def test_of_a_circuit_that_opens_meanwhile_the_record_waits(
        self, wait: Wait, application: Stack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def opens_meanwhile(topic: str) -> Circuit:
            """The caller asks before it queues the record, and when the time is over."""
            if queued(application):
                # In this thread, and no `command`: that one takes the environment of the whole process.
                assert CliRunner().invoke(cli, ["breaker", "force-open", "--reason", "test"]).exit_code == 0
            return circuit(topic)

        monkeypatch.setattr(confirmation, "circuit", opens_meanwhile)
        with pytest.raises(DeliveryTimeoutError) as caught:
            wait("orders", "v", message_id="mine", timeout=0.1)
        assert "circuit of the cluster is open" in caught.value.reason
        assert caught.value.retry_after is not None
        assert queued(application) == ["mine"]

    def test_of_an_invalid_record_nothing_is_queued(self, wait: Wait, application: Stack) -> None:
        with pytest.raises(InvalidRecordError):
            wait("no topic!", "v")
        assert application.redis.dbsize() == 0


class TestConnection:
    def test_one_serves_all_who_wait(self, application: Stack, calls: ThreadPoolExecutor) -> None:
        ids = [f"id-{number}" for number in range(60)]
        outcomes.listener()  # threads that ask for the first one in the same moment may make two
        before = listening(application)  # of earlier tests; they end when nobody has waited for a while
        waiting = {one: calls.submit(send_and_wait, "orders", "v", message_id=one, timeout=60) for one in ids}
        wait_queued(application, *ids)
        wait_until(lambda: subscriptions(application, *ids) == len(ids), 30, "all to be subscribed")
        assert len(listening(application) - before) == 1
        for one in ids:
            store(one, place(one))
        assert {one: call.result(30)["message_id"] for one, call in waiting.items()} == {one: one for one in ids}

    def test_no_thread_is_held_by_an_event_loop(self, application: Stack) -> None:
        async def requests() -> int:
            waiting = [
                asyncio.create_task(asend_and_wait("orders", "v", message_id=f"id-{n}", timeout=60)) for n in range(200)
            ]
            while len(await asyncio.to_thread(queued, application)) < 200:
                await asyncio.sleep(0.02)
            threads = threading.active_count()
            for number in range(200):
                await asyncio.to_thread(store, f"id-{number}", place(f"id-{number}"))
            places = await asyncio.gather(*waiting)
            assert [found["message_id"] for found in places] == [f"id-{n}" for n in range(200)]
            return threads

        before = threading.active_count()
        assert asyncio.run(requests()) < before + 30

    def test_a_new_one_hears_what_the_old_one_missed(
        self, application: Stack, calls: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
    ) -> None:
        call = calls.submit(send_and_wait, "orders", "v", message_id="mine", timeout=60)
        wait_queued(application, "mine")
        wait_until(lambda: subscriptions(application) == 1, 30, "a subscription")
        with application.redis.pipeline(transaction=True) as at_once:
            at_once.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            meta = app.backend.encode({"status": SUCCESS, "result": place("mine"), "traceback": None, "children": []})
            at_once.set("celery-task-meta-mine", meta)  # and nobody to publish it to
            at_once.execute()
        assert call.result(30) == place("mine")

    def test_that_is_deaf_is_replaced(
        self, application: Stack, calls: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A firewall drops it, and says nothing."""
        monkeypatch.setattr(outcomes, "LOOK_S", 0.2)
        confirmed, ask = threading.Event(), Listener._ask

        def asked(self: Listener, keys: Collection[str]) -> bool:
            try:
                return ask(self, keys)
            finally:
                if isinstance(keys, list):  # of subscriptions that were confirmed; a look asks for all that are wanted
                    confirmed.set()

        monkeypatch.setattr(Listener, "_ask", asked)
        call = calls.submit(send_and_wait, "orders", "v", message_id="mine", timeout=60)
        wait_queued(application, "mine")
        assert confirmed.wait(30), "the result is asked for once more when it is subscribed to"
        meta = app.backend.encode({"status": SUCCESS, "result": place("mine"), "traceback": None, "children": []})
        (before,) = [one for one in application.redis.client_list() if one["sub"] == "1"]
        application.redis.set("celery-task-meta-mine", meta)
        assert call.result(30) == place("mine")
        wait_until(
            lambda: before["id"] not in [one["id"] for one in application.redis.client_list()], 30, "another connection"
        )

    def test_and_its_thread_end_when_nobody_waits(
        self, application: Stack, calls: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def listeners() -> int:
            return sum(thread.name == "kafka-delivery-outcomes" for thread in threading.enumerate())

        others = listeners()  # of earlier tests
        monkeypatch.setattr(outcomes, "IDLE_S", 0.1)
        for message_id in ("first", "second"):
            call = calls.submit(send_and_wait, "orders", "v", message_id=message_id, timeout=60)
            wait_queued(application, message_id)
            store(message_id, place(message_id))
            assert call.result(30) == place(message_id)
            wait_until(lambda: listeners() <= others, 30, "the thread to end")

    def test_has_a_thread_again_when_the_system_allows_one(
        self, application: Stack, calls: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A container's limit of processes is reached: the record is queued, and says so."""
        start = threading.Thread.start

        def refused(thread: threading.Thread) -> None:
            if thread.name == "kafka-delivery-outcomes":
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as full:
            full.setattr(threading.Thread, "start", refused)
            with pytest.raises(DeliveryTimeoutError) as caught:
                send_and_wait("orders", "v", message_id="first", timeout=0.1)
            assert caught.value.message_id == "first"
        call = calls.submit(send_and_wait, "orders", "v", message_id="second", timeout=60)
        wait_queued(application, "first", "second")
        store("second", place("second"))
        assert call.result(30) == place("second")


@pytest.mark.real
@both
class TestRedisHangs:
    def test_before_the_call(self, wait: Wait, own_redis: RealRedis) -> None:
        with stack(own_redis.url, NO_KAFKA, **IMPATIENT):
            send.delay("orders", "before")
            own_redis.pause()
            try:
                started = time.monotonic()
                with pytest.raises(EnqueueError) as caught:
                    wait("orders", "v", message_id="mine", timeout=60)
                assert time.monotonic() - started < HUNG_S
                assert caught.value.message_id == "mine"
            finally:
                own_redis.resume()

    def test_while_it_waits(self, wait: Wait, own_redis: RealRedis, calls: ThreadPoolExecutor) -> None:
        with stack(own_redis.url, NO_KAFKA, **IMPATIENT) as system:
            call = calls.submit(wait, "orders", "v", message_id="mine", timeout=1)
            wait_queued(system, "mine")
            own_redis.pause()
            try:
                error = call.exception(HUNG_S)
                assert isinstance(error, DeliveryTimeoutError)
                assert error.message_id == "mine"
            finally:
                own_redis.resume()

    def test_and_comes_back(
        self,
        wait: Wait,
        own_redis: RealRedis,
        calls: ThreadPoolExecutor,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(outcomes, "LOOK_S", 0.2)
        with (
            stack(own_redis.url, NO_KAFKA, **IMPATIENT) as system,
            caplog.at_level(logging.WARNING, "kafka_delivery.outcomes"),
        ):
            call: Future[Any] = calls.submit(wait, "orders", "v", message_id="mine", timeout=60)
            wait_queued(system, "mine")
            own_redis.pause()
            try:
                wait_until(lambda: "outcomes.not_heard" in caplog.text, 30, "the listener to notice")
            finally:
                own_redis.resume()
            store("mine", place("mine"))
            assert call.result(30) == place("mine")
