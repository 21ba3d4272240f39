"""The short way of a plain send writes what Celery would have written, and is taken only where nobody can tell: whoever
listens, or asks for anything more, gets Celery's own.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import celery
import pytest
import redis
from celery import signals
from celery.result import EagerResult

from kafka_delivery import BulkEnqueueError, Record, app, base, dead_letter, publisher, send, send_many
from servers import OtherKafka
from stack import Stack, stack
from watching import watched_events

QUEUE, DEAD_LETTERS = "kafka-delivery", "kafka-delivery-dlq"
NO_KAFKA = OtherKafka("127.0.0.1:1")


@pytest.fixture
def application(redis_client: redis.Redis, redis_url: str) -> Iterator[Stack]:
    """This process as an application, with a Redis and without anything behind it."""
    with stack(redis_url, NO_KAFKA) as system:
        yield system


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Task ids of messages that took the short way."""
    taken: list[str] = []
    original = publisher.publish

    def publish(app: Any, task: Any, queue: str, task_id: str, *rest: Any, **more: Any) -> None:
        taken.append(task_id)
        original(app, task, queue, task_id, *rest, **more)

    monkeypatch.setattr(base, "publish", publish)
    return taken


@pytest.fixture(params=["before_task_publish", "after_task_publish"])
def listener(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Somebody who listens to one of Celery's signals: the task ids that it was told."""
    told: list[str] = []

    def receiver(headers: dict[str, Any], **_: Any) -> None:
        told.append(headers["id"])

    signal = getattr(signals, request.param)
    signal.connect(receiver)
    yield told
    signal.disconnect(receiver)


def messages(client: redis.Redis, queue: str = QUEUE) -> list[dict[str, Any]]:
    """What waits, the next one first, its body decoded too."""
    found = []
    for raw in reversed(client.lrange(queue, 0, -1)):
        message = json.loads(raw)
        message["body"] = json.loads(base64.b64decode(message["body"]))
        found.append(message)
    return found


RECORD = Record(
    "orders", {"id": 42}, "key", [("a", "text"), ("b", b"\xff"), ("c", None)], 3, 1_700_000_000_000, message_id="mine"
)
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "send": (lambda: send.apply_async((RECORD,)), QUEUE),
    "send_many": (lambda: send_many.apply_async(([RECORD, RECORD],), task_id="mine"), QUEUE),
    "dead_letter": (lambda: dead_letter.apply_async((RECORD, {"failed_at": "2026-01-02T03:04:05Z"})), DEAD_LETTERS),
}


class TestEnvelope:
    @pytest.mark.parametrize(("call", "queue"), CALLS.values(), ids=CALLS)
    def test_is_the_one_that_celery_writes(
        self, call: Callable[[], Any], queue: str, application: Stack, short: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call()
        assert len(short) == 1
        monkeypatch.setattr(base, "is_plain", lambda *_: False)
        call()
        assert len(short) == 1
        ours, celerys = messages(application.redis, queue)
        tags = [message["properties"].pop("delivery_tag") for message in (ours, celerys)]
        # Celery repeats in the properties what a call gives it to say about itself; only headers are read.
        for name in ("argsrepr", "kwargsrepr"):
            assert celerys["properties"].pop(name) == celerys["headers"][name]
        assert ours == celerys
        assert {type(tag) for tag in tags} == {str}
        assert len(tags[0]) == len(tags[1]) == 36

    def test_of_a_bulk_is_that_of_a_send(self, application: Stack) -> None:
        send.apply_async((RECORD,))
        send.bulk([RECORD])
        single, of_many = messages(application.redis)
        assert single["properties"].pop("delivery_tag") != of_many["properties"].pop("delivery_tag")
        assert single == of_many

    @pytest.mark.parametrize("name", ["delivery_tag", "correlation_id"])
    def test_is_text_in_which_scripts_find_what_they_look_for(self, application: Stack, name: str) -> None:
        """Written as kombu writes it, with a space after the colon."""
        send.apply_async((RECORD,))
        (raw,) = application.redis.lrange(QUEUE, 0, -1)
        value = json.loads(raw)["properties"][name]
        assert raw.decode().count(f'"{name}": "{value}"') == 1


ASKS: list[tuple[dict[str, Any], Callable[[Any], Any]]] = [
    ({"countdown": 60}, lambda m: m["headers"]["eta"]),
    ({"expires": 60}, lambda m: m["headers"]["expires"]),
    ({"link": celery.signature("users.confirmed", app=app)}, lambda m: m["body"][2]["callbacks"]),
    ({"link_error": celery.signature("users.refused", app=app)}, lambda m: m["body"][2]["errbacks"]),
    ({"ignore_result": False}, lambda m: not m["headers"]["ignore_result"]),
    ({"headers": {"mine": 1}}, lambda m: m["headers"]["mine"] == 1),
    ({"shadow": "another name"}, lambda m: m["headers"]["shadow"] == "another name"),
]
"""Options of a call, and whether a message has what was asked for."""


class TestCelerysWay:
    def test_is_taken_where_somebody_listens_to_publishing(
        self, application: Stack, short: list[str], listener: list[str]
    ) -> None:
        sent = [send.delay("orders", "v").id, dead_letter.delay("orders", "v").id]
        assert (listener, short) == (sent, [])
        assert [message["headers"]["id"] for message in messages(application.redis)] == sent[:1]

    def test_is_taken_where_a_sent_event_is_wanted(
        self, application: Stack, short: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(app.conf, "task_send_sent_event", True)
        with watched_events() as events:
            sent = send.delay("orders", "v")
            events.wait_for(sent.id, "task-sent", 30)
        assert short == []

    def test_is_taken_where_tasks_run_at_once(
        self, application: Stack, short: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran: list[Any] = []
        app.finalize()
        monkeypatch.setitem(app.conf, "task_always_eager", True)
        monkeypatch.setattr(send, "run", lambda *args: ran.append(args))
        result = send.delay("orders", "v", message_id="mine")
        assert isinstance(result, EagerResult)
        assert [wire[-1] for (wire,) in ran] == ["mine"]
        assert (application.redis.llen(QUEUE), short) == (0, [])

    @pytest.mark.parametrize(("options", "found"), ASKS, ids=[next(iter(options)) for options, _ in ASKS])
    def test_is_taken_by_a_call_that_asks_for_more(
        self, options: dict[str, Any], found: Callable[[Any], Any], application: Stack, short: list[str]
    ) -> None:
        send.apply_async(("orders", "v"), **options)
        (message,) = messages(application.redis)
        assert found(message)
        assert short == []

    def test_is_taken_within_a_task_of_anybodys(self, application: Stack, short: list[str]) -> None:
        """It knows which task it came from, and of which chain of tasks it is a part."""
        users = celery.Celery("users", broker="memory://", set_as_current=False)

        @users.task(name="users.task")  # type: ignore[untyped-decorator]  # Celery has no types
        def task() -> str:
            return send.delay("orders", "v").id

        task.apply(task_id="theirs")
        (message,) = messages(application.redis)
        assert (message["headers"]["parent_id"], message["headers"]["root_id"]) == ("theirs", "theirs")
        assert short == []

    def test_is_taken_to_another_broker(self, redis_client: redis.Redis, redis_url: str, short: list[str]) -> None:
        with stack(redis_url, NO_KAFKA, BROKER_URL="memory://"):
            send.delay("orders", "v", message_id="mine")
            (bulk,) = send.bulk([Record("orders", "v")])
            with app.connection_for_read() as connection, connection.SimpleQueue(QUEUE) as queue:
                got = [queue.get(block=False).headers["id"] for _ in range(2)]
        assert got == ["mine", bulk]
        assert (redis_client.dbsize(), short) == (0, [])


class TestBulk:
    def test_goes_one_by_one_where_somebody_listens(
        self, application: Stack, short: list[str], listener: list[str]
    ) -> None:
        sent = send.bulk([Record("orders", str(n)) for n in range(3)])
        assert (listener, short) == (sent, [])
        assert [message["headers"]["id"] for message in messages(application.redis)] == sent

    def test_that_fails_on_its_way_then_says_what_is_queued(
        self, application: Stack, listener: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = celery.Task.apply_async

        def apply_async(self: Any, *args: Any, task_id: str, **options: Any) -> Any:
            if task_id == "m1":
                raise redis.TimeoutError("hung")
            return original(self, *args, task_id=task_id, **options)

        monkeypatch.setattr(celery.Task, "apply_async", apply_async)
        with pytest.raises(BulkEnqueueError) as caught:
            send.bulk([Record("orders", "v", message_id=f"m{n}") for n in range(4)])
        error = caught.value
        assert (error.accepted, error.unknown, error.unsent) == (["m0"], ["m1"], ["m2", "m3"])
        assert error.reason == "TimeoutError: hung"
        assert listener == ["m0"]
        assert [message["headers"]["id"] for message in messages(application.redis)] == ["m0"]
