"""In Django: nothing is sent that was rolled back, and what fails after the commit is told and harms nothing else."""

from __future__ import annotations

import json
import socket
from base64 import b64decode
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import redis
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction
from django.test import TestCase, modify_settings

from integration.django_project import APP, set_up
from kafka_delivery import EnqueueError, InvalidRecordError, Record, base, send, send_many
from kafka_delivery.publisher import publish
from servers import OtherKafka
from stack import IMPATIENT, Stack, stack

NO_KAFKA = OtherKafka("127.0.0.1:1")
PASSWORD = "hunter2"  # noqa: S105  # looked for where it must not be


@pytest.fixture(autouse=True, scope="module")
def _django() -> None:
    set_up()

    from kafka_delivery.contrib.django import signals

    global record_not_queued
    record_not_queued = signals.record_not_queued


record_not_queued: Any = None


@pytest.fixture
def application(redis_client: redis.Redis, redis_url: str) -> Iterator[Stack]:
    """This process as a Django application, with a Redis and without anything behind it."""
    with stack(redis_url, NO_KAFKA) as system:
        yield system


@pytest.fixture
def without_redis() -> Iterator[Stack]:
    with stack("redis://127.0.0.1:1/0", NO_KAFKA, **IMPATIENT) as system:
        yield system


@pytest.fixture
def with_hung_redis() -> Iterator[Stack]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        with stack(url, NO_KAFKA, ENQUEUE_TIMEOUT_S="0.05") as system:
            yield system


class Clock:
    """Seconds, as the test says, in place of the module `time`."""

    now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What a commit measures its waits with: each attempt to queue takes 50 ms."""
    from kafka_delivery.contrib.django import on_commit

    clock = Clock()

    def timed(*args: Any, **kwargs: Any) -> None:
        clock.now += 0.05
        publish(*args, **kwargs)

    monkeypatch.setattr(on_commit, "time", clock)
    monkeypatch.setattr(on_commit, "_waited", on_commit._Waited())  # what was waited before was by another clock
    monkeypatch.setattr(base, "publish", timed)
    return clock


class Failures:
    """What `record_not_queued` told."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def __call__(self, **what: Any) -> None:
        self.heard.append(what)

    @property
    def ids(self) -> list[str]:
        return [record.id for failure in self.heard for record in failure["records"]]


@pytest.fixture
def failures() -> Iterator[Failures]:
    receiver = Failures()
    record_not_queued.connect(receiver)
    yield receiver
    record_not_queued.disconnect(receiver)


def queued(client: redis.Redis) -> list[str]:
    """Ids of the messages that wait, oldest first."""
    return [json.loads(message)["headers"]["id"] for message in reversed(client.lrange("kafka-delivery", 0, -1))]


class RollBackError(Exception):
    pass


def roll_back(using: str = "default") -> None:
    """Send in a transaction that does not come to its end."""
    with suppress(RollBackError), transaction.atomic(using):
        send.delay_on_commit("orders", {"id": 1}, using=using)
        send_many.delay_on_commit([{"topic": "orders", "value": "v"}], using=using)
        raise RollBackError


class TestATransaction:
    def test_that_is_committed_sends(self, application: Stack) -> None:
        with transaction.atomic():
            message_id = send.delay_on_commit("orders", {"id": 1}, "1", {"a": "b"}, message_id="mine")
            assert queued(application.redis) == []
        assert message_id == "mine"
        assert queued(application.redis) == ["mine"]

    def test_that_is_rolled_back_sends_nothing(self, application: Stack) -> None:
        roll_back()
        assert queued(application.redis) == []
        with transaction.atomic():
            pass
        assert queued(application.redis) == []

    def test_sends_nothing_of_a_savepoint_that_is_rolled_back(self, application: Stack) -> None:
        with transaction.atomic():
            kept = [send.delay_on_commit("orders", "v")]
            roll_back()
            with transaction.atomic():
                kept.append(send.delay_on_commit("orders", "v"))
        assert queued(application.redis) == kept

    def test_of_another_database_decides_for_its_own_sends(self, application: Stack) -> None:
        with transaction.atomic():
            kept = send.delay_on_commit("orders", "v")
            roll_back(using="archive")
            with transaction.atomic(using="archive"):
                first = send.delay_on_commit("orders", "v", using="archive")
            assert queued(application.redis) == [first]
        assert queued(application.redis) == [first, kept]

    def test_that_is_none_sends_at_once(self, application: Stack) -> None:
        message_id = send.delay_on_commit("orders", "v")
        assert queued(application.redis) == [message_id]

    def test_sends_a_batch_under_the_id_that_was_returned(self, application: Stack) -> None:
        with transaction.atomic():
            batch_id = send_many.delay_on_commit(
                [Record("orders", "a", message_id="one"), {"topic": "t", "value": "b"}]
            )
        assert queued(application.redis) == [batch_id]

    def test_sends_what_a_value_was_when_the_call_was_made(self, application: Stack) -> None:
        order = {"total": 1}
        with transaction.atomic():
            send.delay_on_commit("orders", order)
            order["total"] = 2
        (message,) = application.redis.lrange("kafka-delivery", 0, -1)
        (record,), _, _ = json.loads(b64decode(json.loads(message)["body"]))
        assert Record.from_wire(record, "default").value_bytes == b'{"total":1}'

    @pytest.mark.parametrize("bad", ["no topic!", ""])
    def test_refuses_a_bad_record_where_the_call_is(self, bad: str, application: Stack) -> None:
        with transaction.atomic():
            with pytest.raises(InvalidRecordError) as caught:
                send.delay_on_commit(bad, "v")
            assert caught.value.field == "topic"
            with pytest.raises(InvalidRecordError) as caught:
                send_many.delay_on_commit([{"topic": "orders", "value": "v"}, {"topic": bad, "value": "v"}])
            assert caught.value.field == "records[1].topic"
        assert queued(application.redis) == []

    def test_in_djangos_test_case_can_be_captured(self, application: Stack) -> None:
        with transaction.atomic():
            with TestCase.captureOnCommitCallbacks(execute=True) as callbacks:
                ids = [send.delay_on_commit("orders", "v"), send.delay_on_commit("orders", "v")]
                assert queued(application.redis) == []
            assert len(callbacks) == 2
            assert queued(application.redis) == ids


class TestAFailureAfterTheCommit:
    def test_is_logged_and_signalled_and_keeps_nothing_from_running(
        self, without_redis: Stack, failures: Failures, caplog: pytest.LogCaptureFixture
    ) -> None:
        ran: list[str] = []
        with transaction.atomic():
            message_id = send.delay_on_commit("orders", {"card": PASSWORD})
            transaction.on_commit(lambda: ran.append("another hook"))
        assert ran == ["another hook"]
        assert failures.ids == [message_id]
        (failure,) = failures.heard
        assert failure["sender"] is type(send)
        assert failure["using"] == "default"
        assert isinstance(failure["error"], EnqueueError)
        assert failure["error"].message_id == message_id
        (line,) = [one for one in caplog.records if one.name == "kafka_delivery.django"]
        assert line.levelname == "ERROR"
        assert line.getMessage().startswith(
            f"record.not_queued message_id={message_id} records=1 database=default error=EnqueueError reason='"
        )
        assert PASSWORD not in caplog.text

    def test_is_told_and_not_raised_where_there_was_no_transaction(
        self, without_redis: Stack, failures: Failures
    ) -> None:
        message_id = send.delay_on_commit("orders", "v")
        assert failures.ids == [message_id]

    def test_of_a_batch_hands_over_all_its_records(self, without_redis: Stack, failures: Failures) -> None:
        with transaction.atomic(using="archive"):
            batch_id = send_many.delay_on_commit(
                [Record("orders", "v", message_id="one"), Record("orders", "v", message_id="two")], using="archive"
            )
        assert failures.ids == ["one", "two"]
        assert failures.heard[0]["error"].message_id == batch_id
        assert failures.heard[0]["using"] == "archive"

    def test_can_be_made_good_from_the_signal(
        self, redis_url: str, redis_client: redis.Redis, without_redis: Stack, failures: Failures
    ) -> None:
        with transaction.atomic():
            message_id = send.delay_on_commit("orders", "v")
        with stack(redis_url, NO_KAFKA):
            assert send.bulk(failures.heard[0]["records"]) == [message_id]
        assert queued(redis_client) == [message_id]

    def test_of_a_receiver_is_not_the_requests_nor_the_next_receivers(self, without_redis: Stack) -> None:
        def broken(**_: Any) -> None:
            raise RollBackError

        second = Failures()
        record_not_queued.connect(broken)
        record_not_queued.connect(second)
        try:
            with transaction.atomic():
                message_id = send.delay_on_commit("orders", "v")
        finally:
            record_not_queued.disconnect(broken)
            record_not_queued.disconnect(second)
        assert second.ids == [message_id]

    def test_that_nobody_planned_is_logged_by_django_with_its_traceback(
        self,
        application: Stack,
        failures: Failures,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def fault(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        ran: list[str] = []
        monkeypatch.setattr("kafka_delivery.base.publish", fault)
        with transaction.atomic():
            message_id = send.delay_on_commit("orders", "v")
            transaction.on_commit(lambda: ran.append("another hook"))
        assert ran == ["another hook"]
        assert failures.ids == [message_id]
        lines = [line for line in caplog.records if line.name.startswith(("kafka_delivery", "django"))]
        assert [line.name for line in lines] == ["kafka_delivery.django", "django.db.backends.base"]
        assert lines[1].exc_info is not None

    def test_of_many_in_one_commit_does_not_add_up(self, with_hung_redis: Stack, failures: Failures) -> None:
        """A hundred sends to a Redis that hangs would otherwise take until the web server kills the request."""
        with transaction.atomic():
            ids = [send.delay_on_commit("orders", "v") for _ in range(100)]
        assert failures.ids == ids
        tried = [failure for failure in failures.heard if "not tried" not in failure["error"].reason]
        assert 1 <= len(tried) <= 5  # each waits at least the time of which the commit has four
        assert failures.heard[: len(tried)] == tried

        failures.heard.clear()
        with transaction.atomic():
            send.delay_on_commit("orders", "v")
        assert "not tried" not in failures.heard[0]["error"].reason, "the next request begins anew"

    def test_of_many_without_a_transaction_does_not_add_up_either(
        self, with_hung_redis: Stack, failures: Failures, clock: Clock
    ) -> None:
        def untried() -> bool:
            clock.now += 0.001
            failures.heard.clear()
            send.delay_on_commit("orders", "v")
            return "not tried" in failures.heard[0]["error"].reason

        assert [untried() for _ in range(100)].count(False) <= 5
        assert untried()
        assert not all(untried() for _ in range(200)), "one is tried again, however many come"

    def test_that_is_quick_keeps_no_other_from_being_tried(
        self, without_redis: Stack, failures: Failures, clock: Clock
    ) -> None:
        with transaction.atomic():
            for _ in range(20):
                send.delay_on_commit("orders", "v")
        assert [failure for failure in failures.heard if "not tried" in failure["error"].reason] == []
        assert len(failures.heard) == 20


class TestWithout:
    def test_the_app_delay_on_commit_says_so(self, application: Stack) -> None:
        with (
            modify_settings(INSTALLED_APPS={"remove": APP}),
            pytest.raises(ImproperlyConfigured, match=f'needs "{APP}" in INSTALLED_APPS'),
        ):
            send.delay_on_commit("orders", "v")
        assert queued(application.redis) == []
