"""`.delay()` returns with the message in Redis, or raises in time and says under which id to repeat it.

A web request waits for it: a Redis that is gone, hangs or is full costs it seconds at most, and never the record's id.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.exceptions import TaskRevokedError
from celery.states import REVOKED, SUCCESS
from kombu.exceptions import EncodeError

from kafka_delivery import EnqueueError, InvalidRecordError, Record, app, dead_letter, send, send_many
from kafka_delivery_worker.embedded import Valkey
from servers import OtherKafka, RealRedis, have_real_redis, missing, wait_until
from stack import IMPATIENT, Stack, stack

REFUSED_S = 10.0
HUNG_S = 20.0
"""Far more than a call takes with default settings where nothing listens and where nothing answers: it is bounded."""

NO_KAFKA = OtherKafka("127.0.0.1:1")
CARD = "4111-1111-1111-1111"

Call = Callable[[str], Any]

CALLS: dict[str, Call] = {
    "delay": lambda message_id: send.delay("orders", "v", message_id=message_id),
    "apply_async": lambda message_id: send.apply_async(("orders", "v"), task_id=message_id, countdown=1),
    "dead_letter": lambda message_id: dead_letter.apply_async(("orders", "v"), task_id=message_id),
    "send_many": lambda message_id: send_many.apply_async(([Record("orders", "v")],), task_id=message_id),
}


def error_of(call: Call, message_id: str, within_s: float = REFUSED_S) -> EnqueueError:
    """The error of a call, which has to come in time."""
    started = time.monotonic()
    with pytest.raises(EnqueueError) as caught:
        call(message_id)
    assert time.monotonic() - started < within_s
    return caught.value


@pytest.fixture
def application(redis_client: redis.Redis, redis_url: str) -> Iterator[Stack]:
    """This process as an application, with a Redis and without anything behind it."""
    with stack(redis_url, NO_KAFKA) as system:
        yield system


@pytest.fixture
def without_redis() -> Iterator[Stack]:
    with stack("redis://127.0.0.1:1/0", NO_KAFKA, **IMPATIENT) as system:
        yield system


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RealRedis]:
    """A Redis that belongs to one test, which may stop it."""
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path / "redis") as server:
        yield server


def messages(client: redis.Redis, queue: str = "kafka-delivery") -> list[dict[str, Any]]:
    return [json.loads(message) for message in reversed(client.lrange(queue, 0, -1))]


def ids(client: redis.Redis, queue: str = "kafka-delivery") -> list[str]:
    return [message["headers"]["id"] for message in messages(client, queue)]


class TestRedisRefuses:
    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    def test_the_error_has_the_message_id(self, call: Call, without_redis: Stack) -> None:
        error = error_of(call, "mine")
        assert error.message_id == "mine"
        assert "send it again with message_id='mine'" in str(error)
        assert "Connection refused" in error.reason
        assert error.__cause__ is not None

    def test_an_id_that_was_made_up_is_in_the_error_too(self, without_redis: Stack) -> None:
        error = error_of(lambda _: send.delay("orders", "v"), "")
        assert len(error.message_id) == 36

    def test_an_application_that_starts_meanwhile_is_not_made_to_wait(
        self, without_redis: Stack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept: list[float] = []
        monkeypatch.setattr("kombu.utils.functional.sleep", slept.append)
        for _ in range(2):
            error_of(CALLS["delay"], "mine")
        assert sum(slept) == 0

    def test_the_error_quotes_nothing_of_the_record(self, without_redis: Stack) -> None:
        error = error_of(lambda _: send.delay("orders", CARD, CARD, {"card": CARD}), "")
        assert CARD not in f"{error} {error!r} {error.__cause__!r}"

    def test_a_dead_letter_can_be_repeated_with_the_id_of_the_error(self, without_redis: Stack) -> None:
        error = error_of(lambda _: dead_letter.delay("orders", "v", message_id="mine"), "")
        assert error.message_id == "mine"

    def test_a_batch_can_be_repeated_with_the_id_of_the_error(
        self, without_redis: Stack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[list[str]] = []
        encode = type(send_many).encode

        def spy(self: Any, args: Any, kwargs: Any, task_id: str | None) -> Any:
            wire, *rest = encode(self, args, kwargs, task_id)
            made.append([member[-1] for member in wire[0]])
            return wire, *rest

        monkeypatch.setattr(type(send_many), "encode", spy)
        batch = [{"topic": "orders", "value": "a"}, {"topic": "orders", "value": "b"}]
        error = error_of(lambda _: send_many.delay(batch), "")
        error_of(lambda message_id: send_many.apply_async((batch,), task_id=message_id), error.message_id)
        first, second = made
        assert first == second

    def test_a_large_batch_can_be_repeated_with_the_id_of_the_error(self, without_redis: Stack) -> None:
        batch = [{"topic": "orders", "value": "x" * 300_000} for _ in range(3)]
        assert error_of(lambda _: send_many.delay(batch, message_id="mine"), "").message_id == "mine"


@pytest.mark.real
class TestRedisHangs:
    """SIGSTOP: connections are open, nothing answers. Without timeouts `.delay()` would wait for ever."""

    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    @pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
    def test_the_error_comes_in_time_and_repeating_works(self, call: Call, warm: bool, own_redis: RealRedis) -> None:
        with stack(own_redis.url, NO_KAFKA, **IMPATIENT) as system:
            if warm:
                call("before")
            own_redis.pause()
            try:
                assert error_of(call, "mine", HUNG_S).message_id == "mine"
                assert error_of(call, "mine", HUNG_S).message_id == "mine"
            finally:
                own_redis.resume()
            call("mine")
            # What the hung server had taken before the error may be in the queue too: unknown is what the error says.
            wait_until(lambda: self._known(system) >= {"mine"}, 30, "the repeated message to be queued")
            assert self._known(system) == ({"before", "mine"} if warm else {"mine"})

    def _known(self, system: Stack) -> set[str]:
        return {one for queue in ("kafka-delivery", "kafka-delivery-dlq") for one in ids(system.redis, queue)}

    def test_other_threads_are_not_held_up_by_one_that_waits(self, own_redis: RealRedis) -> None:
        errors: list[str] = []
        with stack(own_redis.url, NO_KAFKA, **IMPATIENT):
            send.delay("orders", "v")
            own_redis.pause()
            try:
                started = time.monotonic()
                threads = [
                    threading.Thread(
                        target=lambda n=n: errors.append(error_of(CALLS["delay"], f"id-{n}", HUNG_S).message_id)
                    )
                    for n in range(8)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(60)
                assert time.monotonic() - started < HUNG_S
            finally:
                own_redis.resume()
        assert sorted(errors) == [f"id-{n}" for n in range(8)]


def test_a_connection_that_was_closed_meanwhile_is_replaced(application: Stack) -> None:
    """A load balancer, a restart or Redis's own `timeout` closes what lay idle; the caller must not notice."""
    for call in (CALLS["delay"], CALLS["apply_async"]):
        call("before")
        application.redis.client_kill_filter(_type="normal", skipme=True)
        call("after")
    assert ids(application.redis) == ["before", "after"] * 2


@pytest.mark.parametrize(("failures", "tried", "queued"), [(0, 1, ["mine"]), (1, 2, ["mine"]), (9, 2, [])])
def test_a_connection_that_dies_under_a_send_is_replaced_once(
    failures: int, tried: int, queued: list[str], application: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a firewall has dropped looks alive until something is written."""
    attempts: list[str] = []
    lpush = redis.Redis.lpush

    def unlucky(self: redis.Redis, name: str, *values: Any) -> Any:
        attempts.append(name)
        if len(attempts) <= failures:
            raise redis.exceptions.ConnectionError("reset by peer")
        return lpush(self, name, *values)

    monkeypatch.setattr(redis.Redis, "lpush", unlucky)
    if queued:
        send.delay("orders", "v", message_id="mine")
    else:
        assert error_of(CALLS["delay"], "mine").message_id == "mine"
    assert attempts == ["kafka-delivery"] * tried
    assert ids(application.redis) == queued


def test_a_redis_that_comes_back_is_used_again(tmp_path: Path) -> None:
    with Valkey() as valkey, stack(valkey.url, NO_KAFKA) as system:
        for round_ in range(2):
            for name, call in CALLS.items():
                call(f"{name}-{round_}")
            valkey.stop()
            for call in CALLS.values():
                error_of(call, "lost")
            valkey.start()
        send.delay("orders", "v", message_id="last")
        assert ids(system.redis) == ["last"]


def test_a_full_redis_refuses_and_takes_again_when_there_is_room() -> None:
    with Valkey() as valkey, stack(valkey.url, NO_KAFKA) as system:
        system.redis.config_set("maxmemory", "1")
        for call in CALLS.values():
            assert "maxmemory" in error_of(call, "mine").reason
        system.redis.config_set("maxmemory", "0")
        for call in CALLS.values():
            call("mine")
        assert ids(system.redis) == ["mine"] * 3


def test_a_refused_record_never_reaches_redis(application: Stack) -> None:
    bad: dict[str, Any] = {"topic": "orders", "value": "v"}  # a record, not an iterable of records
    calls: list[Callable[[], Any]] = [
        lambda: send.delay("no topic!", "v"),
        lambda: send.apply_async(("orders", object())),
        lambda: send.apply_async(("orders", "v"), {"nonsense": 1}),
        lambda: send.apply_async((Record("orders", "v", message_id="mine"),), task_id="other"),
        lambda: send_many.delay([Record("orders", "v"), {"topic": "no topic!", "value": "v"}]),
        lambda: send_many.delay(bad),  # type: ignore[arg-type]
        lambda: dead_letter.delay("no topic!", "v"),
        lambda: dead_letter.delay("orders", "v", error_message=b"bytes"),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(InvalidRecordError):
            call()
    assert application.redis.dbsize() == 0


def test_an_option_that_cannot_be_written_is_not_blamed_on_redis(application: Stack) -> None:
    """Who sends again upon an EnqueueError would do so for ever."""
    with pytest.raises(EncodeError):
        send.apply_async(("orders", "v"), link=object())
    assert application.redis.dbsize() == 0


class TestMessage:
    """What Flower, events, logs and `redis-cli` show of a message that waits."""

    FIELDS: dict[str, Any] = {"value": CARD, "key": CARD, "headers": {"card": CARD}}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("call", "queue"),
        [
            (lambda f: send.delay("orders", **f, message_id="mine"), "kafka-delivery"),
            (lambda f: send.apply_async(("orders",), f, task_id="mine"), "kafka-delivery"),
            (lambda f: send.apply_async(("orders",), f, task_id="mine", countdown=5), "kafka-delivery"),
            (lambda f: send_many.apply_async(([Record("orders", **f)],), task_id="mine"), "kafka-delivery"),
            (lambda f: send_many.apply_async(([{"topic": "t", **f}],), task_id="mine", expires=9), "kafka-delivery"),
            (lambda f: dead_letter.delay("orders", **f, message_id="mine"), "kafka-delivery-dlq"),
            (lambda f: dead_letter.apply_async(("orders",), f, task_id="mine-dlq", countdown=5), "kafka-delivery-dlq"),
        ],
    )  # fmt: skip
    def test_shows_nothing_of_the_record(self, call: Any, queue: str, application: Stack) -> None:
        call(self.FIELDS)
        (message,) = messages(application.redis, queue)
        body = message.pop("body")
        assert CARD not in json.dumps(message)
        assert CARD not in body  # encoded, and not by chance
        assert message["headers"]["id"].removesuffix("-dlq") == "mine"
        assert message["headers"]["kwargsrepr"] == "{}"
        assert " bytes" in message["headers"]["argsrepr"]

    def test_says_topic_size_and_id(self, application: Stack) -> None:
        record = Record("orders", CARD, message_id="mine")
        send.apply_async((record,))
        dead_letter.apply_async((record,))
        send_many.apply_async(([record, record],))
        (one, many), (letter,) = messages(application.redis), messages(application.redis, "kafka-delivery-dlq")
        assert one["headers"]["argsrepr"] == f"('orders', {record.size} bytes, 'mine')"
        assert many["headers"]["argsrepr"] == f"(2 records, {2 * record.size} bytes)"
        assert letter["headers"]["argsrepr"] == f"('orders', {record.size} bytes, 'mine', 'Application', None)"

    def test_keeps_the_order_of_the_calls(self, application: Stack) -> None:
        sent = [send.delay("orders", str(number)).id for number in range(20)]
        assert ids(application.redis) == sent


LARGE = [Record("orders", "x" * 300_000) for _ in range(5)]
"""A batch that goes in three messages."""


class TestResult:
    def test_has_the_message_id(self, application: Stack) -> None:
        assert send.delay("orders", "v", message_id="mine").id == "mine"
        assert send.apply_async(("orders", "v"), task_id="mine").id == "mine"

    def test_of_a_send_that_wants_none_is_none_at_once(self, application: Stack) -> None:
        results: list[Any] = [send.apply_async(("orders", "v"), countdown=1), send.delay("orders", "v")]
        for result in results:
            assert result.ignored
            assert result.get(timeout=30) is None

    @pytest.mark.parametrize("options", [{}, {"countdown": 1}], ids=["plain", "through Celery"])
    def test_of_a_large_batch_too(self, options: dict[str, Any], application: Stack) -> None:
        result = send_many.apply_async((LARGE,), **options)
        assert len(messages(application.redis)) == 3
        assert result.get(timeout=30) is None

    def test_of_a_large_batch_is_the_error_of_a_part(self, application: Stack) -> None:
        result: Any = send_many.apply_async((LARGE,), ignore_result=False)
        first, second, third = result.results
        for part in (first, third):
            app.backend.store_result(part.id, [{"outcome": "delivered"}], SUCCESS)
        app.backend.store_result(second.id, TaskRevokedError("revoked"), REVOKED)
        assert isinstance(result.get(timeout=30, propagate=False), TaskRevokedError)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=30)
