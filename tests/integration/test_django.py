"""In Django: nothing is sent that was rolled back, what fails after the commit is told, and settings are Django's.

Django is set up once in this process, with two databases in memory.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
from base64 import b64decode
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import django
import pytest
import redis
from django.conf import settings as django_settings
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.core.management import CommandError, call_command
from django.db import transaction
from django.test import TestCase, modify_settings, override_settings

from kafka_delivery import EnqueueError, InvalidRecordError, Record, SettingsError, base, send, send_many, settings
from kafka_delivery.publisher import publish
from kafka_delivery.settings import ENV_PREFIX
from kafka_delivery_worker.embedded import Valkey, free_port
from servers import OtherKafka
from stack import IMPATIENT, Stack, stack

APP = "kafka_delivery.contrib.django"
NO_KAFKA = OtherKafka("127.0.0.1:1")
PASSWORD = "hunter2"  # noqa: S105  # looked for where it must not be


@pytest.fixture(autouse=True, scope="module")
def _django() -> None:
    memory = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    django_settings.configure(INSTALLED_APPS=[APP], DATABASES={"default": memory, "archive": memory}, USE_TZ=True)
    django.setup()

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
    with stack(f"redis://127.0.0.1:{free_port()}/0", NO_KAFKA, **IMPATIENT) as system:
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

    def test_django_it_says_so(self) -> None:
        done = python("""
            import sys
            sys.modules["django"] = None
            from kafka_delivery import send, send_many
            said = []
            for call in (lambda: send.delay_on_commit("o", "v"), lambda: send_many.delay_on_commit([])):
                try:
                    call()
                except ImportError as error:
                    said.append(str(error))
            print(*said, sep="\\n")
        """)
        assert done.stdout.splitlines() == ["delay_on_commit() needs Django, which is not installed; call delay()"] * 2


class TestSettings:
    def test_are_djangos(self) -> None:
        given = {"REDIS_URL": "redis://r:1/2", "MAX_RETRIES": 3, "LINGER_MS": 1, "PRODUCER": {"a": 1}, "CLUSTER": "c"}
        with override_settings(KAFKA_DELIVERY=given):
            s = settings.current()
            assert (s.redis_url, s.max_retries, s.linger_ms, s.producer, s.cluster) == (
                "redis://r:1/2", 3, 1.0, {"a": 1}, "c",
            )  # fmt: skip
        assert settings.current() == settings.Settings()

    def test_may_be_text_as_from_the_environment(self) -> None:
        with override_settings(KAFKA_DELIVERY={"MAX_RETRIES": "3", "RETRY_JITTER": "no", "PRODUCER": '{"a": 1}'}):
            s = settings.current()
            assert (s.max_retries, s.retry_jitter, s.producer) == (3, False, {"a": 1})

    def test_come_after_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAFKA_DELIVERY_MAX_RETRIES", "4")
        with override_settings(KAFKA_DELIVERY={"MAX_RETRIES": 3, "CLUSTER": "c"}):
            assert (settings.current().max_retries, settings.current().cluster) == (4, "c")

    def test_of_a_test_are_used_by_an_application_that_has_sent_already(
        self, redis_url: str, redis_client: redis.Redis
    ) -> None:
        for number in (1, 2):
            with override_settings(KAFKA_DELIVERY={"REDIS_URL": f"{redis_url.rpartition('/')[0]}/{number}"}):
                send.delay("orders", "v")
                send.apply_async(("orders", "v"), priority=0)
        for number in (0, 1, 2):
            with redis.Redis.from_url(f"{redis_url.rpartition('/')[0]}/{number}") as client:
                assert len(queued(client)) == (2 if number else 0)

    def test_that_are_wrong_are_an_error_of_who_sends(self) -> None:
        with (
            pytest.raises(SettingsError, match="did you mean KAFKA_DELIVERY_REDIS_URL"),
            override_settings(KAFKA_DELIVERY={"REDIS_URI": "redis://r:1/2"}),
        ):
            pass

    @pytest.mark.parametrize("given", [{"REDIS_URI": "redis://r:1/2"}, "redis://r:1/2", None])
    def test_that_are_wrong_from_the_start_are_too(self, given: Any, manage: Any) -> None:
        code = """
            from kafka_delivery import SettingsError, send
            try:
                send.delay("orders", "v")
            except SettingsError as error:
                print(error)
        """
        done = manage(given, "shell", "-c", textwrap.dedent(code))
        assert done.returncode == 0, done.stderr
        assert " is not a setting; " in done.stdout


def found(deploy: bool = False, **changes: Any) -> list[tuple[str, str]]:
    """What the checks say: id and text."""
    before = {name: getattr(django_settings, name, {}) for name in changes}
    for name, value in changes.items():
        setattr(django_settings, name, value)  # not override_settings: that would already raise
    try:
        messages = checks.run_checks(include_deployment_checks=deploy)
    finally:
        for name, value in before.items():
            setattr(django_settings, name, value)
    return [(one.id, one.msg) for one in messages if str(one.id).startswith("kafka_delivery")]


def cache(location: Any, **options: Any) -> dict[str, Any]:
    return {
        "default": {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": location, "OPTIONS": options}
    }


class TestChecks:
    def test_find_nothing_wrong_with_nothing(self) -> None:
        assert found() == []

    def test_find_nothing_wrong_with_what_is_right(self) -> None:
        given = {"REDIS_URL": "rediss://u:p@h:1/2", "ENQUEUE_TIMEOUT_S": 1, "PRODUCER": {"compression.type": "zstd"}}
        assert found(deploy=True, KAFKA_DELIVERY=given, CACHES=cache("redis://other:1/2")) == []

    def test_name_each_setting_that_is_wrong(self) -> None:
        given = {"REDIS_URI": f"redis://u:{PASSWORD}@h", "MAX_RETRIES": "many", "redis_url": "x", "RETRY_JITTER": 1}
        assert found(KAFKA_DELIVERY=given | {"PRODUCER": {"a": PASSWORD.encode()}, 7: 1}) == [
            (
                "kafka_delivery.E002",
                "KAFKA_DELIVERY_REDIS_URI is not a setting; did you mean KAFKA_DELIVERY_REDIS_URL?",
            ),
            ("kafka_delivery.E002", "KAFKA_DELIVERY_MAX_RETRIES='many' must be a whole number (count)"),
            (
                "kafka_delivery.E002",
                "KAFKA_DELIVERY_redis_url is not a setting; did you mean KAFKA_DELIVERY_REDIS_URL?",
            ),
            ("kafka_delivery.E002", "KAFKA_DELIVERY_RETRY_JITTER=1 must be true or false (boolean)"),
            ("kafka_delivery.E002", "KAFKA_DELIVERY_PRODUCER=(not shown) must be a JSON object (JSON object)"),
            ("kafka_delivery.E002", "KAFKA_DELIVERY_7 is not a setting; the settings page lists them all"),
        ]

    def test_name_a_variable_that_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAFKA_DELIVERY_MAX_RETRIES", "lots")
        assert found(KAFKA_DELIVERY={"MAX_RETRIES": 3}) == [
            ("kafka_delivery.E002", "KAFKA_DELIVERY_MAX_RETRIES='lots' must be a whole number (count)")
        ]

    def test_name_settings_that_contradict_each_other(self) -> None:
        ((number, text),) = found(KAFKA_DELIVERY={"REQUEST_TIMEOUT_MS": 120_000})
        assert number == "kafka_delivery.E003"
        assert len(found(deploy=True, KAFKA_DELIVERY={"REQUEST_TIMEOUT_MS": 120_000})) == 1, "once is enough"
        assert text.startswith("KAFKA_DELIVERY_REQUEST_TIMEOUT_MS=120000 must be less than")

    @pytest.mark.parametrize("given", [None, "redis://r", ["REDIS_URL"]])
    def test_want_a_dict(self, given: Any) -> None:
        kind = type({} if given is None else given).__name__
        expected = [] if given is None else [("kafka_delivery.E001", f"KAFKA_DELIVERY must be a dict, not {kind}")]
        assert found(KAFKA_DELIVERY={} if given is None else given) == expected

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ("redis://localhost:6379/0", cache("redis://127.0.0.1:6379")),
            ("redis://localhost:6379/0", cache("redis://localhost/")),
            ("redis://r:1/3", cache("redis://x:secret@r:1/3")),
            ("redis://r:1/3", cache("redis://r:1?db=3")),
            ("redis://r:1/3", cache("redis://r:1", db=3)),
            ("redis://r:1/3", cache("redis://a:1/3,redis://r:1/3")),
            ("redis://r:1/3", cache(["redis://a:1/3", "redis://r:1/3"])),
            ("rediss://r:1/3", cache("rediss://r:1/3")),
            ("redis+socket:///run/redis.sock?virtual_host=3", cache("unix:///run/redis.sock?db=3")),
        ],
    )
    def test_say_that_clearing_a_cache_would_delete_records(self, ours: str, theirs: Any) -> None:
        ((number, text),) = found(KAFKA_DELIVERY={"REDIS_URL": ours}, CACHES=theirs)
        assert number == "kafka_delivery.E004"
        assert text.startswith('CACHES["default"] is in the same Redis database')

    def test_say_that_a_cache_and_a_queue_want_different_servers(self) -> None:
        given = {"REDIS_URL": "redis://r:1/0"}
        ((number, text),) = found(deploy=True, KAFKA_DELIVERY=given, CACHES=cache("redis://r:1/1"))
        assert number == "kafka_delivery.W001"
        assert text.startswith('CACHES["default"] is on the same Redis server')
        assert found(KAFKA_DELIVERY=given, CACHES=cache("redis://r:1/1")) == [], "does for a laptop"

    @pytest.mark.parametrize("location", ["", "10.0.0.1:11211", "/var/cache", "redis://r:nan/0", "redis://r:1/x"])
    def test_do_not_stumble_over_other_caches(self, location: str) -> None:
        assert found(deploy=True, KAFKA_DELIVERY={"REDIS_URL": "redis://r:1/0"}, CACHES=cache(location)) == []

    def test_say_that_a_request_would_wait_too_long(self) -> None:
        ((number, text),) = found(KAFKA_DELIVERY={"ENQUEUE_TIMEOUT_S": 10})
        assert number == "kafka_delivery.W002"
        assert text.startswith("KAFKA_DELIVERY_ENQUEUE_TIMEOUT_S=10: ")

    def test_of_a_deployment_want_to_know_where_redis_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert [number for number, _ in found(deploy=True)] == ["kafka_delivery.W003"]
        monkeypatch.setenv("KAFKA_DELIVERY_REDIS_URL", "redis://r:1/0")
        assert found(deploy=True) == []


PROJECT = """
import os, sys
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["kafka_delivery.contrib.django"],
    KAFKA_DELIVERY=%s,
)
from django.core.management import execute_from_command_line
execute_from_command_line(sys.argv)
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own."""
    return run("-c", textwrap.dedent(code), **env)


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith((ENV_PREFIX, "CELERY_"))}
    return subprocess.run([sys.executable, *arguments], env=clean | env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def manage(tmp_path: Path) -> Any:
    """A project's manage.py, with these settings."""

    def manage(given: dict[str, Any], *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "manage.py"
        script.write_text(PROJECT % repr(given))
        return run(str(script), *arguments, **env)

    return manage


class TestManage:
    WRONG = {"REDIS_URI": "redis://r:1/2"}  # noqa: RUF012

    def test_check_names_a_wrong_setting(self, manage: Any) -> None:
        done = manage(self.WRONG, "check")
        assert done.returncode == 1
        assert "KAFKA_DELIVERY_REDIS_URI is not a setting; did you mean KAFKA_DELIVERY_REDIS_URL?" in done.stderr
        assert 'KAFKA_DELIVERY["X"]' in done.stderr

    def test_works_with_a_wrong_setting(self, manage: Any) -> None:
        done = manage(self.WRONG, "shell", "-c", "print('all the same')")
        assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["all the same"])
        assert manage(self.WRONG, "help").returncode == 0

    def test_runs_commands_of_kafka_delivery_with_djangos_settings(self, manage: Any) -> None:
        given = {
            "REDIS_URL": f"redis://u:{PASSWORD}@r:1/2",
            "PRODUCER": {"a": 1},
            "RETRY_JITTER": False,
            "CLUSTER": "c",
        }
        done = manage(given, "kafka_delivery", "settings", "--json", KAFKA_DELIVERY_CLUSTER="of the environment")
        assert done.returncode == 0, done.stderr
        rows = {row["variable"]: row["value"] for row in map(json.loads, done.stdout.splitlines())}
        assert rows["KAFKA_DELIVERY_REDIS_URL"] == "(changed; not shown)"
        assert rows["KAFKA_DELIVERY_PRODUCER"] == "(changed; not shown)"
        assert rows["KAFKA_DELIVERY_RETRY_JITTER"] is False
        assert rows["KAFKA_DELIVERY_CLUSTER"] == "of the environment"

    def test_passes_options_on(self, manage: Any) -> None:
        assert "--loglevel" in manage({}, "kafka_delivery", "worker", "--help").stdout
        assert "--create" in manage({}, "kafka_delivery", "doctor", "--help").stdout

    def test_starts_no_worker_with_a_wrong_setting(self, manage: Any) -> None:
        done = manage(self.WRONG, "kafka_delivery", "worker")
        assert done.returncode == 1
        assert "did you mean KAFKA_DELIVERY_REDIS_URL?" in done.stderr

    def test_does_not_replace_a_process_that_only_calls_the_command(self) -> None:
        with pytest.raises(CommandError, match="for the command line"):
            call_command("kafka_delivery", "status")


OWN_CELERY = """
import json, os
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["kafka_delivery.contrib.django"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    CELERY_BROKER_URL=os.environ["THEIRS"],
    CELERY_TASK_DEFAULT_QUEUE="theirs",
    KAFKA_DELIVERY={"REDIS_URL": os.environ["OURS"]},
)
import django
from celery import Celery, current_app, shared_task
theirs = Celery("shop")
theirs.config_from_object("django.conf:settings", namespace="CELERY")
theirs.autodiscover_tasks()
django.setup()

@shared_task(name="shop.bill")
def bill(order):
    pass

import kafka_delivery
from kafka_delivery import send
sent = [send.delay("orders", "v").id, bill.delay(1).id, send.delay_on_commit("orders", "v")]
print(json.dumps({
    "sent": sent,
    "current": current_app.main,
    "bill": bill.app.main,
    "theirs": sorted(name for name in theirs.tasks if not name.startswith("celery.")),
    "ours": sorted(name for name in kafka_delivery.app.tasks if not name.startswith("celery.")),
}))
"""


def test_the_projects_own_celery_is_untouched(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    with Valkey() as other, redis.Redis.from_url(other.url) as their_client:
        done = python(OWN_CELERY, OURS=redis_url, THEIRS=other.url, CELERY_BROKER_URL=other.url)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        first, theirs, second = said["sent"]
        assert queued(redis_client) == [first, second]
        (message,) = their_client.lrange("theirs", 0, -1)
        assert json.loads(message)["headers"]["id"] == theirs
    assert said["current"] == said["bill"] == "shop"
    assert said["theirs"] == ["shop.bill"]
    assert said["ours"] == ["kafka_delivery.dead_letter", "kafka_delivery.send", "kafka_delivery.send_many"]


def test_nothing_of_ours_is_logged_at_start(manage: Any) -> None:
    done = manage(
        {"CLUSTER": "c"}, "shell", "-c", "import logging; print(logging.getLogger('kafka_delivery').handlers)"
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert logging.getLogger("kafka_delivery.django").level == logging.NOTSET
