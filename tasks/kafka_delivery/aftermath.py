"""What Celery does after the body of a task, done at the end of the body.

After the body Celery publishes callbacks and the next step of a chain, stores a wanted result and counts the part of a
chord. Where Redis refuses one of these there, Celery calls the task failed, tells its errbacks so, and acknowledges the
message: what was to follow is lost (celery/app/trace.py, `build_tracer`). In the body the message can still go back to
its queue, and all of it is done once more.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from celery import group
from celery.app.task import get_actual_ignore_result
from celery.canvas import maybe_signature

if TYPE_CHECKING:
    from .celery_types import Task


def succeeded(task: Task, value: Any) -> None:
    """Publish what follows a success, then store the result: as Celery does, and in its order."""
    request = task.request
    _call_back(task, value)
    if request.chord or _is_wanted(task):
        task.backend.mark_as_done(request.id, value, request, _is_wanted(task))
    leave_nothing(task)


def failed(task: Task, error: BaseException) -> None:
    """Store a final error, and tell errbacks, the rest of a chain and a chord."""
    request = task.request
    if request.chord or request.chain or request.errbacks or _is_wanted(task):
        task.backend.mark_as_failure(
            request.id, error, _traceback(error), request=request, store_result=_is_wanted(task)
        )
    leave_nothing(task)


def retried(task: Task, error: BaseException) -> None:
    """Store that a wanted result has to wait for another attempt."""
    request = task.request
    if _is_wanted(task):
        task.backend.mark_as_retry(request.id, error, _traceback(error), request=request)
    request.ignore_result = True


def leave_nothing(task: Task) -> None:
    """Leave nothing of it for Celery to do."""
    request = task.request
    request.callbacks = request.errbacks = request.chain = request.chord = None
    request.ignore_result = True


def _is_wanted(task: Task) -> bool:
    return not get_actual_ignore_result(task, task.request)


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _call_back(task: Task, value: Any) -> None:
    """As `_dispatch_callbacks_and_chain` in celery/app/trace.py, which nobody else can call."""
    app, request = task.app, task.request
    above = {"parent_id": request.id, "root_id": request.root_id or request.id, "priority": None}
    linked = [maybe_signature(one, app=app) for one in request.callbacks or ()]
    single = [one for one in linked if not isinstance(one, group)]
    following = [one for one in linked if isinstance(one, group)]
    if len(single) > 1:
        following.append(group(single, app=app))
    else:
        following += single
    for one in following:
        app.amqp._retry_publish(one.apply_async, (value,), **above)
    if request.chain:
        step = maybe_signature(request.chain[-1], app=app)
        app.amqp._retry_publish(step.apply_async, (value,), chain=request.chain[:-1], **above)
