"""Celery as our users meet it, with types. It has none of its own, so a type checker takes its classes for anything.

What is declared here is what is documented of Celery; more of it works, unchecked.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:

    class Task:
        """A Celery task."""

        name: str
        app: Any
        request: Any
        backend: Any
        ignore_result: bool

        def _get_app(self) -> Any: ...

        def apply_async(
            self, args: Any = None, kwargs: Any = None, task_id: str | None = None, **options: Any
        ) -> Any: ...

        def run(self, *args: Any, **kwargs: Any) -> Any: ...

        def retry(self, args: Any = None, kwargs: Any = None, exc: Any = None, **options: Any) -> Any: ...

        def AsyncResult(self, task_id: str, **kwargs: Any) -> Any: ...  # noqa: N802

        def signature_from_request(self, request: Any, args: Any, kwargs: Any, **options: Any) -> Any: ...

        def signature(self, args: Any = None, *starargs: Any, **starkwargs: Any) -> Any:
            """A call that is not made yet, with Celery's options; for chains, groups and beat."""

        def s(self, *args: Any, **kwargs: Any) -> Any:
            """A call that is not made yet; in a chain it gets the result of the step before as its first argument."""

        def si(self, *args: Any, **kwargs: Any) -> Any:
            """A call that is not made yet, and is made with these arguments only."""

        def apply(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            """Run it here and now, as Celery's eager mode does; needs what a worker needs."""

else:
    from celery import Task

__all__ = ["Options", "Task"]


class Options(TypedDict, total=False):
    """Celery's options of one call; see its "Calling Tasks"."""

    countdown: float
    """Seconds from now until it may be sent."""
    eta: datetime
    """When it may be sent."""
    expires: float | datetime | None
    """From when on it is parked instead of sent: seconds from now, or a time."""
    priority: int
    """0 to 9; in Redis 0 is the highest."""
    link: Any
    """A signature, or several, to call with the result."""
    link_error: Any
    """A signature, or several, to call when it failed for good."""
    queue: str
    routing_key: str
    exchange: str
    headers: Mapping[str, Any]
    shadow: str
    retry: bool
    retry_policy: Mapping[str, Any]
    time_limit: float
    soft_time_limit: float
    add_to_parent: bool
    connection: Any
    producer: Any
