"""Celery's result backend on Redis, but a chord whose end cannot be written now is no failed chord.

The worker that returns a chord's last part publishes its body. Celery takes a refusal of Redis there for an error of
the chord: it tells the errbacks, or tries to, and forgets the chord (celery/backends/redis.py, `on_chord_part_return`).
Here the refusal goes to the caller, `aftermath`, with the chord as it was: the part is returned once more, later.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any, NoReturn

from celery.backends import redis
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from .faults import is_publish_fault
from .sentinel import GuardedConnection, GuardedSSLConnection

log = logging.getLogger("kafka_delivery.task")

_LET_GO = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class ChordHeldError(OperationalError):
    """Raised when all parts of a chord are there and its body is another worker's to publish, or of one that died."""


class _Interrupted(BaseException):
    """Passes through Celery's handlers of errors, which all take `Exception`."""


class _Ending:
    """A part of a chord that is returned now.

    Attributes:
        fault: what Redis or the queue refused; from then on nothing more is written.
        answer: of Celery's script: parts there, how many more are awaited, how many were, whether the body is ours.
        claim: if it is, under which key that is noted, and how.
    """

    fault: Exception | None = None
    answer: tuple[Any, ...] = ()
    claim: tuple[Any, Any] | None = None

    def interrupt(self, fault: Exception) -> NoReturn:
        self.fault = self.fault or fault
        raise _Interrupted


class _Client:
    """Redis's client, until the chord's ending is interrupted: Celery cleans up all the same."""

    def __init__(self, client: Any, ending: _Ending) -> None:
        self._client = client
        self._ending = ending

    def __getattr__(self, name: str) -> Any:
        if self._ending.fault is not None:
            raise _Interrupted
        return getattr(self._client, name)


class _Chords:
    """What both backends have in common. An instance is of one thread, as Celery makes them.

    It is mixed into Celery's backends below. mypy does not see that, which is why its calls of theirs are not checked.
    """

    _ending: _Ending | None = None

    @functools.cached_property
    def _own_client(self) -> Any:
        return self._create_client(**self.connparams)  # type: ignore[attr-defined]

    @property
    def client(self) -> Any:
        """Redis's client."""
        return self._own_client if self._ending is None else _Client(self._own_client, self._ending)

    @functools.cached_property
    def _chord_part_return_script(self) -> Any:
        run = self._own_client.register_script(redis.CHORD_PART_RETURN_LUA)

        def noted(*args: Any, **kwargs: Any) -> Any:
            answer = run(*args, **kwargs)
            if self._ending is not None:
                self._ending.answer = answer
                if len(answer) == 4 and answer[3]:
                    self._ending.claim = kwargs["keys"][5], kwargs["args"][7]
            return answer

        return noted

    def on_chord_part_return(self, request: Any, state: Any, result: Any, propagate: Any = None, **kwargs: Any) -> Any:
        """As Celery's.

        Raises:
            ChordHeldError: the chord is complete, and nobody has published its body yet.
            redis.exceptions.RedisError, kombu.exceptions.KombuError, OSError: it could not be published.
        """
        if self._ending is not None:  # a part of the chord around it
            return super().on_chord_part_return(request, state, result, propagate, **kwargs)  # type: ignore[misc]
        ending = self._ending = _Ending()
        try:
            returned = super().on_chord_part_return(request, state, result, propagate, **kwargs)  # type: ignore[misc]
        except _Interrupted:
            self._let_go(ending)
            raise ending.fault or RuntimeError("a chord's end was interrupted for nothing") from None
        finally:
            self._ending = None
        if len(ending.answer) == 4:
            there, more, size, ours = ending.answer
            if size and not ours and there == int(size) + int(more or 0):
                raise ChordHeldError(f"the body of the chord {request.group} is published by another worker")
        return returned

    def _let_go(self, ending: _Ending) -> None:
        """Leave the body to whoever returns a part next. What Redis does not hear of now runs out in half a minute."""
        if ending.claim is not None:
            key, token = ending.claim
            try:
                self._own_client.eval(_LET_GO, 1, key, token)
            except RedisError as error:
                log.warning("chord.claim_kept error=%s", type(error).__name__)

    def chord_error_from_stack(self, callback: Any, exc: Any = None) -> Any:
        """As Celery's, which calls it for whatever it has caught; a refusal of Redis is no error of the chord."""
        ending, caught = self._ending, sys.exc_info()[1]
        if ending is None:
            return super().chord_error_from_stack(callback, exc)  # type: ignore[misc]
        if isinstance(caught, Exception) and is_publish_fault(caught):
            ending.interrupt(caught)
        try:
            return super().chord_error_from_stack(callback, exc)  # type: ignore[misc]
        except Exception as fault:
            if not is_publish_fault(fault):
                raise
            ending.interrupt(fault)

    def _call_task_errbacks(self, request: Any, exc: Any, traceback: Any) -> None:
        try:
            super()._call_task_errbacks(request, exc, traceback)  # type: ignore[misc]
        except Exception as fault:
            if self._ending is None or not is_publish_fault(fault):
                raise
            self._ending.interrupt(fault)


class RedisBackend(_Chords, redis.RedisBackend):
    """For redis:// and rediss://. Named by `celery_app.Loader`."""


class SentinelBackend(_Chords, redis.SentinelBackend):
    """For sentinel://; its connections end when the Sentinels name another master."""

    connection_class_ssl = GuardedSSLConnection

    def _get_pool(self, **params: Any) -> Any:
        return super()._get_pool(**{"connection_class": GuardedConnection} | params)
