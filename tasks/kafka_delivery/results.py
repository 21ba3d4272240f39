"""What becomes of a send, as its results say it. Plain dictionaries: they cross borders as JSON.

The results themselves are Celery's; `Result` and `TaskResult` say what a type checker may know of them.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, Required, TypedDict, TypeVar, overload

T_co = TypeVar("T_co", covariant=True)


class Delivered(TypedDict):
    """Where a record is. What `send_and_wait` returns, what a wanted result holds and what a `link` callback gets.

    `timestamp` is in milliseconds since the epoch.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    message_id: str


class Fate(TypedDict, total=False):
    """What became of one record of a batch.

    `outcome` is ``"delivered"``, with the keys of `Delivered`; ``"retried"`` or ``"deferred"`` (a send of its own is
    queued) or ``"dead-lettered"``, with the name of the Kafka error in `error`; or ``"parked"`` for what is no valid
    record (`topic` is None then).
    """

    outcome: Required[Literal["delivered", "retried", "deferred", "dead-lettered", "parked"]]
    message_id: Required[str]
    topic: Required[str | None]
    partition: int
    offset: int
    timestamp: int
    error: str | None


class Result(Protocol[T_co]):
    """The result of a call, by its id; a Celery `AsyncResult`, or the like for a batch in several messages.

    Without ``ignore_result=False`` nobody stores what came of the call, and `get` returns None at once.
    """

    @property
    def id(self) -> str:
        """The message id of a record; of a batch, its own."""

    @property
    def state(self) -> str:
        """``"PENDING"`` (or unknown), ``"RETRY"``, ``"SUCCESS"``, ``"FAILURE"`` or ``"REVOKED"``; asks Redis."""

    def ready(self) -> bool:
        """Whether it has ended."""

    def successful(self) -> bool:
        """Whether it has ended well."""

    def failed(self) -> bool:
        """Whether it has ended with an error."""

    @overload
    def get(self, timeout: float | None = None, propagate: Literal[True] = True) -> T_co: ...
    @overload
    def get(self, timeout: float | None, propagate: Literal[False]) -> T_co | BaseException: ...
    @overload
    def get(self, timeout: float | None = None, *, propagate: Literal[False]) -> T_co | BaseException: ...
    def get(self, timeout: float | None = None, propagate: bool = True) -> Any:
        """Wait for it.

        Args:
            timeout: seconds; by default for ever.
            propagate: raise its error; otherwise return that.

        Raises:
            celery.exceptions.TimeoutError: it has not ended in time.
        """

    def forget(self) -> None:
        """Remove it from Redis, where it would stay for `result_expires_s`."""


class TaskResult(Result[T_co], Protocol[T_co]):
    """The result of one message: `send.AsyncResult(message_id)`."""

    @property
    def result(self) -> T_co | BaseException | None:
        """What it has, without waiting: the value, the error, or None; asks Redis."""

    @property
    def traceback(self) -> str | None:
        """Of the error, as text."""

    def revoke(self) -> None:
        """Have it parked instead of sent, if it is not sent yet."""
