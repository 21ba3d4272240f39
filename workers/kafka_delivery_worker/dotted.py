"""Functions of the user's that a setting names."""

from __future__ import annotations

import importlib
from typing import Any

from celery.utils.imports import cwd_in_path

from kafka_delivery.errors import SettingsError


def load(variable: str, path: str) -> Any:
    """The function that the setting `variable` names, as ``package.module:function`` or ``package.module.function``.

    It may also be in the directory that the worker was started in, as for ``celery -A``.

    Raises:
        SettingsError: there is none.
    """
    module, separator, name = path.rpartition(":" if ":" in path else ".")
    if not separator or not module or not name:
        raise SettingsError(f"{variable}={path!r} must look like package.module:function")
    try:
        with cwd_in_path():
            found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"{variable}={path!r} cannot be imported: {error}") from error
    if not callable(found):
        raise SettingsError(f"{variable}={path!r} is no function but {type(found).__name__}")
    return found
