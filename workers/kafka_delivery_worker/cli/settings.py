"""``kafka-delivery settings``: every setting with its unit, its default, the reason for it, and its value here."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import click

from kafka_delivery.settings import ENV_PREFIX, Settings, current

from .output import console, json_option, print_json, table


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Show all settings. Values that may hold a secret are not shown, only whether they were changed."""
    rows = described(current())
    if as_json:
        for row in rows:
            print_json(row)
        return
    names = ("variable", "value", "unit", "why")
    console().print(table("Settings", names, [[row[name] for name in names] for row in rows]))


def described(settings: Settings) -> list[dict[str, Any]]:
    """Each setting as variable, unit, default, why, and value (secrets replaced by a word)."""
    rows = []
    for f in fields(settings):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = getattr(settings, f.name)
        rows.append(
            {
                "variable": ENV_PREFIX + f.name.upper(),
                "value": "(changed; not shown)" if f.metadata["secret"] and value != default else value,
                "default": default,
                "unit": f.metadata["unit"],
                "why": f.metadata["why"],
            }
        )
    return rows
