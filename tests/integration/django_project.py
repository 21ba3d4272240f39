"""Django, set up once in this process, with two databases in memory."""

from __future__ import annotations

import django
from django.conf import settings

APP = "kafka_delivery.contrib.django"


def set_up() -> None:
    """Make this process a Django project with our app, unless it is one."""
    if settings.configured:
        return
    memory = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    settings.configure(INSTALLED_APPS=[APP], DATABASES={"default": memory, "archive": memory}, USE_TZ=True)
    django.setup()
