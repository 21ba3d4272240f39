"""What a queue's server that is away looks like: the one list of it.

Redis or RabbitMQ may be down, full, read-only, or slower than a timeout. None of it is a record's fault.
"""

from __future__ import annotations

from amqp.exceptions import AMQPError
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

QUEUE_FAULTS = (KombuError, RedisError, AMQPError, OSError)
"""What an operation on the queue raises when its server is away, refuses or is too slow."""
