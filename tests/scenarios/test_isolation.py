"""Beside an application's own Celery: our sends go to our Redis and theirs to theirs, from any process and thread.

Each test is a fresh process. What needs no server: test_isolation_of_imports.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from fresh import printed
from kafka_delivery_worker.embedded import Valkey

DEAD = "redis://127.0.0.1:1/0"

USERS_APP = """
from celery import Celery, current_app, shared_task

user = Celery("user", set_as_current=True)
user.conf.broker_transport_options = {"socket_timeout": 5}

@shared_task(name="users.shared")
def shared(*args):
    pass
"""


@pytest.fixture(scope="module")
def theirs() -> Iterator[str]:
    """The application's own Redis."""
    with Valkey() as valkey:
        yield valkey.url


@pytest.fixture
def their_client(theirs: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(theirs, socket_timeout=5) as client:
        client.flushall()
        yield client


def run(code: str, redis_url: str, **env: str) -> Any:
    """Run an application's code in a process of its own; return what it prints as JSON."""
    return printed(code, KAFKA_DELIVERY_REDIS_URL=redis_url, KAFKA_DELIVERY_ENQUEUE_TIMEOUT_S="10", **env)


def queued(client: redis.Redis, queue: str = "kafka-delivery") -> list[str]:
    """Ids of the messages in a queue, oldest first."""
    return [json.loads(message)["headers"]["id"] for message in reversed(client.lrange(queue, 0, -1))]


@pytest.mark.parametrize("order", [pytest.param("ours first", marks=pytest.mark.smoke), pytest.param("theirs first")])
def test_each_app_sends_to_its_own_redis(
    order: str, redis_url: str, redis_client: redis.Redis, theirs: str, their_client: redis.Redis
) -> None:
    """Also from a task of theirs.

    Celery lets a message inherit from the task that sends it; the app and its queue must not be among that.
    """
    ours = "from kafka_delivery import send\n"
    found = run(
        (ours + USERS_APP if order == "ours first" else USERS_APP + ours)
        + """
first, second = shared.delay("theirs"), send.delay("orders", "ours")
third, fourth = send.apply_async(("orders", "ours"), countdown=60), shared.delay("theirs")

@user.task(name="users.sends", bind=True)
def sends(self):
    return [self.request.id, send.delay("orders", "v").id]

parent, fifth = sends.apply().get()
print(json.dumps({
    "theirs": [first.id, fourth.id], "ours": [second.id, third.id, fifth], "from another": parent != fifth
}))
""",
        redis_url,
        CELERY_BROKER_URL=theirs,
        CELERY_RESULT_BACKEND=theirs,
    )
    assert queued(redis_client) == found["ours"]
    assert queued(their_client, "celery") == found["theirs"]
    assert found["from another"]
    assert not redis_client.exists("celery")
    assert not their_client.exists("kafka-delivery")


def test_a_dead_redis_of_the_users_does_not_concern_us_and_a_send_leaves_logging_as_it_is(
    redis_url: str, redis_client: redis.Redis
) -> None:
    names = ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND")
    found = run(
        """
        import io, logging, sys
        written = io.StringIO()
        import celery, kombu.transport.redis
        from kafka_delivery import send, send_many

        def state():
            root = logging.getLogger()
            every = [("", root), *root.manager.loggerDict.items()]
            return {
                name: [logger.level, logger.disabled, [type(h).__name__ for h in logger.handlers]]
                for name, logger in every
                if isinstance(logger, logging.Logger)
            }

        before = state()
        real, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), written, written
        sent = [
            send.delay("orders", "v").id,
            send.apply_async(("orders", "v"), countdown=1).id,
            send_many.delay([{"topic": "orders", "value": "v"}]).id,
            send.apply_async(("orders", "v"), ignore_result=False).id,
        ]
        sys.stdout, sys.stderr = real
        after = state()
        changed = {name: [before[name], after[name]] for name in before if after[name] != before[name]}
        print(json.dumps({"sent": sent, "changed": changed, "written": written.getvalue()}))
        """,
        redis_url,
        **{f"CELERY_{name}": DEAD for name in names},
    )
    assert queued(redis_client) == found["sent"]
    assert (found["changed"], found["written"]) == ({}, "")


@pytest.mark.parametrize("used", [True, False], ids=["in use", "idle"])
@pytest.mark.parametrize(
    "call",
    ["send.delay('orders', 'v')", "send.apply_async(('orders', 'v'), countdown=1)"],
    ids=["plain", "through Celery"],
)
def test_a_send_leaves_the_users_connection_pool_as_it_is(call: str, used: bool, redis_url: str, theirs: str) -> None:
    """Kombu has one limit for the pools of all apps, and Celery sets it to that of the app which connects."""
    held = "user.pool.acquire(block=True)" if used else "None"
    limits = run(
        USERS_APP
        + f"""
from kafka_delivery import send
user.conf.broker_pool_limit = 50
held = {held}
before = user.pool.limit
{call}
print(json.dumps([before, user.pool.limit]))
""",
        redis_url,
        CELERY_BROKER_URL=theirs,
    )
    assert limits == [50, 50]


def test_a_send_of_ours_does_not_keep_the_users_app_from_connecting(redis_url: str, theirs: str) -> None:
    """One thread sends a message of ours, another the user's first: kombu does not shrink a pool that is in use."""
    limit = run(
        USERS_APP
        + """
from kafka_delivery import app
user.conf.broker_pool_limit = 3
with app.producer_pool.acquire(block=True) as producer:
    producer.connection.ensure_connection()
    print(json.dumps(user.pool.limit))
""",
        redis_url,
        CELERY_BROKER_URL=theirs,
    )
    assert limit == 3


@pytest.mark.parametrize(
    "call",
    ["send.delay('orders', 'v')", "send.apply_async(('orders', 'v'), countdown=1)"],
    ids=["plain", "through Celery"],
)
def test_eight_threads_may_send_the_first_message_together(
    call: str, redis_url: str, redis_client: redis.Redis
) -> None:
    sent, faults = run(
        f"""
        import threading
        from kafka_delivery import send
        start, sent, faults = threading.Barrier(8), [], []

        def sends():
            start.wait()
            try:
                sent.extend([{call}.id for _ in range(25)])
            except Exception as fault:
                faults.append(repr(fault))

        threads = [threading.Thread(target=sends) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(json.dumps([sent, faults]))
        """,
        redis_url,
    )
    assert faults == []
    assert len(set(sent)) == 200
    assert sorted(queued(redis_client)) == sorted(sent)
