"""What a worker process runs: ``celery -A kafka_delivery_worker worker``.

The worker's Celery app is `kafka_delivery_worker.app`. It is made when it is asked for, not at import: it is the
callers' app with a worker's settings, and a process that only borrows a helper from here must not get those.
"""

from __future__ import annotations

from typing import Any

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    if name == "app":
        from kafka_delivery.errors import SettingsError

        from .application import worker_app

        try:
            return worker_app()
        except SettingsError as error:
            # Only `celery -A` asks for this name; it would bury the sentence in a traceback.
            raise SystemExit(f"kafka-delivery: {error}") from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
