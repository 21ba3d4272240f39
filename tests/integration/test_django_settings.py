"""In Django: settings are Django's, and the checks name what is wrong with them."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import redis
from django.conf import settings as django_settings
from django.core import checks
from django.core.management import CommandError, call_command
from django.test import override_settings

from integration.django_project import set_up
from kafka_delivery import SettingsError, send, settings

PASSWORD = "hunter2"  # noqa: S105  # looked for where it must not be


@pytest.fixture(autouse=True, scope="module")
def _django() -> None:
    set_up()


def queued(client: redis.Redis) -> list[str]:
    """Ids of the messages that wait, oldest first."""
    return [json.loads(message)["headers"]["id"] for message in reversed(client.lrange("kafka-delivery", 0, -1))]


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


class TestTheCommand:
    def test_does_not_replace_a_process_that_only_calls_it(self) -> None:
        with pytest.raises(CommandError, match="for the command line"):
            call_command("kafka_delivery", "status")


def test_its_logger_has_no_level_of_its_own() -> None:
    assert logging.getLogger("kafka_delivery.django").level == logging.NOTSET
