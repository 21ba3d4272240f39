"""What a queue's server that is away looks like: the one list of it.

Redis or RabbitMQ may be down, full, read-only, or slower than a timeout. None of it is a record's fault.
"""

from __future__ import annotations

import re

from amqp.exceptions import AMQPError
from kombu.exceptions import EncodeError, KombuError
from redis.exceptions import RedisError

from .errors import EnqueueError

QUEUE_FAULTS = (KombuError, RedisError, AMQPError, OSError)
"""What an operation on the queue raises when its server is away, refuses or is too slow."""

_CLIENTS = ("kombu.", "redis.", "amqp.")

_QUOTED = re.compile(r"(Command # \d+) \(.*\)( of pipeline caused error)", re.DOTALL)
"""How redis-py names a command of a pipeline: with the first hundred characters of it (Pipeline.annotate_exception)."""


def text_of(error: BaseException) -> str:
    """Return the text of such an error without the command that it may quote: that holds a part of a message."""
    return _QUOTED.sub(r"\1\2", str(error))


def said_by(error: BaseException) -> str:
    """Return the name of such an error and its text, see `text_of`."""
    return f"{type(error).__name__}: {text_of(error)}"


def is_publish_fault(error: BaseException) -> bool:
    """Whether a publish failed for its server or its connection, and may succeed when it is repeated."""
    if isinstance(error, EncodeError):  # a fault in the call, which stays one
        return False
    if isinstance(error, AttributeError):  # kombu's, where another thread found the connection broken and took it away
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
        return error.obj is None and where.startswith(_CLIENTS)
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, QUEUE_FAULTS):  # Celery's, of its backend
        return True
    return isinstance(error, (*QUEUE_FAULTS, EnqueueError))
