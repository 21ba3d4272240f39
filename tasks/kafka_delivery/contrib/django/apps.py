"""The app as Django sees it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from django.apps import AppConfig
from django.core import checks
from django.core.signals import setting_changed

from kafka_delivery import settings
from kafka_delivery.celery_app import reload
from kafka_delivery.errors import SettingsError

from .checks import check_deployment, check_settings
from .configuration import SETTING, variables


class KafkaDeliveryConfig(AppConfig):
    """Hands Django's settings on. What is wrong with them is said by the checks, and by whoever sends: not here."""

    name = "kafka_delivery.contrib.django"
    label = "kafka_delivery"
    verbose_name = "Kafka delivery"

    def ready(self) -> None:
        checks.register(check_settings)
        checks.register(check_deployment, deploy=True)
        setting_changed.connect(_changed, dispatch_uid=self.name)
        with suppress(SettingsError):
            _take()


def _changed(*, setting: str, **_: Any) -> None:
    if setting == SETTING:  # by `override_settings`, in a test
        _take()


def _take() -> None:
    settings.give(variables())
    reload()
