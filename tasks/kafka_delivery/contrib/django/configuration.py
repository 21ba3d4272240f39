"""What ``settings.KAFKA_DELIVERY`` says, by the names of the environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.conf import settings as django_settings

from kafka_delivery.settings import ENV_PREFIX

SETTING = ENV_PREFIX.rstrip("_")


def variables() -> dict[str, Any]:
    """The settings, still to be checked."""
    given = getattr(django_settings, SETTING, {})
    if not isinstance(given, Mapping):
        given = {"": given}  # which is no setting, so that nobody sends to where nobody said
    return {f"{ENV_PREFIX}{name}": value for name, value in given.items()}
