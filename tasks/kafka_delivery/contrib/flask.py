"""A Flask extension: settings from the application's config, and ``flask kafka-delivery``::

    from kafka_delivery.contrib.flask import KafkaDelivery

    app.config["KAFKA_DELIVERY_REDIS_URL"] = "redis://redis:6379/0"
    KafkaDelivery(app)

The names are those of the environment variables. A variable that is set comes first.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import click
from flask import Flask, current_app
from flask.cli import with_appcontext

from kafka_delivery import settings
from kafka_delivery.errors import SettingsError
from kafka_delivery.settings import ENV_PREFIX, Settings

from .command import become


class KafkaDelivery:
    """The extension. Send with `kafka_delivery.send`, as everywhere.

    Args:
        app: the application; or call `init_app` with it later.
    """

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Take the settings of `app`.

        A process has one set of them: another application in it may have the same, and no others.

        Raises:
            SettingsError: a setting is wrong, or another one than that in use.
        """
        given = variables(app)
        wanted = Settings.from_env(given | os.environ)
        if settings.current.cache_info().currsize:
            _refuse_others(app, wanted)
        else:
            settings.give(given)
            settings.current()  # in use from here on
        app.extensions["kafka-delivery"] = self
        app.cli.add_command(command)


def variables(app: Flask) -> dict[str, Any]:
    """The settings of an application."""
    return {name: value for name, value in app.config.items() if name.startswith(ENV_PREFIX)}


def _refuse_others(app: Flask, wanted: Settings) -> None:
    used = settings.current()
    names = [f.name for f in fields(Settings) if getattr(used, f.name) != getattr(wanted, f.name)]
    if names:
        raise SettingsError(
            f"the Flask application {app.name!r} has another {', '.join(ENV_PREFIX + name.upper() for name in names)} "
            "than this process uses already: another application's, or the environment's if something was sent before "
            "init_app(); a process has one set of settings, so give both the same, or a process each"
        )


@click.command(
    "kafka-delivery",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="Start a worker, Flower, or any command of kafka-delivery.",
)
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
@with_appcontext
def command(arguments: tuple[str, ...]) -> None:
    """Start a worker (worker), Flower (flower), or any command of kafka-delivery (doctor, status, ...).

    It has the application's settings in its environment, and nothing else of it. What follows is its own:
    flask kafka-delivery worker --loglevel=INFO
    """
    become(arguments, variables(current_app))
