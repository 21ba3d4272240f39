"""In Flask: the application's config is ours too, a second application cannot change it, and its Celery is its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from flask import Flask

from kafka_delivery import SettingsError, send, settings
from kafka_delivery.celery_app import reload
from kafka_delivery.contrib.flask import KafkaDelivery
from kafka_delivery.settings import ENV_PREFIX

PASSWORD = "hunter2"  # noqa: S105  # looked for where it must not be


@pytest.fixture(autouse=True)
def _a_process_that_has_no_settings_yet() -> Iterator[None]:
    def forget() -> None:
        settings.give({})
        reload()
        settings.current.cache_clear()

    forget()
    yield
    forget()


def application(name: str = "shop", **config: Any) -> Flask:
    app = Flask(name)
    app.config.update({f"{ENV_PREFIX}{name}": value for name, value in config.items()})
    return app


def queued(client: redis.Redis) -> list[str]:
    return [json.loads(message)["headers"]["id"] for message in reversed(client.lrange("kafka-delivery", 0, -1))]


class TestSettings:
    def test_are_the_applications(self, redis_url: str, redis_client: redis.Redis) -> None:
        url = f"{redis_url.rpartition('/')[0]}/5"
        app = application(REDIS_URL=url, MAX_RETRIES=3, PRODUCER={"a": 1})
        extension = KafkaDelivery(app)
        assert app.extensions["kafka-delivery"] is extension
        assert (settings.current().max_retries, settings.current().producer) == (3, {"a": 1})
        message_id = send.delay("orders", "v").id
        with redis.Redis.from_url(url) as client:
            assert queued(client) == [message_id]

    def test_can_be_taken_later(self) -> None:
        extension = KafkaDelivery()
        extension.init_app(application(CLUSTER="blue"))
        assert settings.current().cluster == "blue"

    def test_come_after_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAFKA_DELIVERY_CLUSTER", "green")
        KafkaDelivery(application(CLUSTER="blue", MAX_RETRIES=7))
        assert (settings.current().cluster, settings.current().max_retries) == ("green", 7)

    def test_of_others_are_left_alone(self) -> None:
        app = application(CLUSTER="blue")
        app.config.update(KAFKA_URL="x", CELERY={"broker_url": "x"}, DEBUG=True)
        KafkaDelivery(app)
        assert settings.current() == settings.Settings(cluster="blue")

    @pytest.mark.parametrize(
        ("config", "text"),
        [
            ({"REDIS_URI": "x"}, "KAFKA_DELIVERY_REDIS_URI is not a setting; did you mean KAFKA_DELIVERY_REDIS_URL?"),
            ({"MAX_RETRIES": "many"}, "KAFKA_DELIVERY_MAX_RETRIES='many' must be a whole number (count)"),
            ({"REQUEST_TIMEOUT_MS": 120_000}, "KAFKA_DELIVERY_REQUEST_TIMEOUT_MS=120000 must be less than"),
        ],
    )
    def test_that_are_wrong_are_refused_and_not_taken(self, config: dict[str, Any], text: str) -> None:
        with pytest.raises(SettingsError) as caught:
            KafkaDelivery(application(**config))
        assert str(caught.value).startswith(text)
        assert settings.current() == settings.Settings()


class TestASecondApplication:
    def test_with_the_same_settings_is_welcome(self) -> None:
        extension = KafkaDelivery()
        for name in ("shop", "admin"):
            extension.init_app(application(name, CLUSTER="blue"))

    def test_with_others_is_refused_by_the_name_of_what_differs(self) -> None:
        KafkaDelivery(application("shop", CLUSTER="blue", REDIS_URL=f"redis://u:{PASSWORD}@r:1/1"))
        with pytest.raises(SettingsError) as caught:
            KafkaDelivery(application("admin", CLUSTER="blue", REDIS_URL=f"redis://u:{PASSWORD}@r:1/2", MAX_RETRIES=1))
        text = str(caught.value)
        assert text.startswith("the Flask application 'admin' has another KAFKA_DELIVERY_REDIS_URL, ")
        assert "KAFKA_DELIVERY_MAX_RETRIES than this process uses already" in text
        assert "CLUSTER" not in text
        assert PASSWORD not in text
        assert settings.current().redis_url.endswith("/1")

    def test_is_what_one_is_too_after_something_was_sent(self, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAFKA_DELIVERY_REDIS_URL", redis_url)
        send.delay("orders", "v")
        with pytest.raises(SettingsError, match="KAFKA_DELIVERY_CLUSTER than this process uses already"):
            KafkaDelivery(application(CLUSTER="blue"))
        KafkaDelivery(application(REDIS_URL="redis://of-no-account:1/1"))  # the environment's comes first
