"""Beside an application's own Celery: our sends go to our Redis and theirs to theirs, from any process and thread.

Each test is a fresh process. What needs no server: tests/unit/test_isolation.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from kafka_delivery.settings import ENV_PREFIX
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
    clean = {name: value for name, value in os.environ.items() if not name.startswith((ENV_PREFIX, "CELERY_"))}
    done = subprocess.run(
        [sys.executable, "-c", "import json\n" + textwrap.dedent(code)],
        env=clean | {"KAFKA_DELIVERY_REDIS_URL": redis_url} | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def queued(client: redis.Redis, queue: str = "kafka-delivery") -> list[str]:
    """Ids of the messages in a queue, oldest first."""
    return [json.loads(message)["headers"]["id"] for message in reversed(client.lrange(queue, 0, -1))]


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_each_app_sends_to_its_own_redis(
    order: str, redis_url: str, redis_client: redis.Redis, theirs: str, their_client: redis.Redis
) -> None:
    ours = "from kafka_delivery import send\n"
    ids = run(
        (ours + USERS_APP if order == "ours first" else USERS_APP + ours)
        + """
first, second = shared.delay("theirs"), send.delay("orders", "ours")
third, fourth = send.apply_async(("orders", "ours"), countdown=60), shared.delay("theirs")
print(json.dumps([task.id for task in (first, second, third, fourth)]))
""",
        redis_url,
        CELERY_BROKER_URL=theirs,
        CELERY_RESULT_BACKEND=theirs,
    )
    assert queued(redis_client) == [ids[1], ids[2]]
    assert queued(their_client, "celery") == [ids[0], ids[3]]
    assert not redis_client.exists("celery")
    assert not their_client.exists("kafka-delivery")


@pytest.mark.parametrize("how", ["delay('orders', 'v')", "apply_async(('orders', 'v'), ignore_result=False)"])
def test_a_dead_redis_of_the_users_does_not_concern_us(how: str, redis_url: str, redis_client: redis.Redis) -> None:
    names = ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND")
    sent = run(
        f"from kafka_delivery import send\nprint(json.dumps(send.{how}.id))",
        redis_url,
        **{f"CELERY_{name}": DEAD for name in names},
    )
    assert queued(redis_client) == [sent]


def test_a_send_from_a_task_of_the_users_goes_to_our_redis(
    redis_url: str, redis_client: redis.Redis, theirs: str, their_client: redis.Redis
) -> None:
    """Celery lets a message inherit from the task that sends it; the app and its queue must not be among that."""
    parent, sent = run(
        USERS_APP
        + """
from kafka_delivery import send

@user.task(name="users.sends", bind=True)
def sends(self):
    return [self.request.id, send.delay("orders", "v").id]

print(json.dumps(sends.apply().get()))
""",
        redis_url,
        CELERY_BROKER_URL=theirs,
        CELERY_RESULT_BACKEND=theirs,
    )
    assert queued(redis_client) == [sent]
    assert sent != parent
    assert their_client.dbsize() == 0


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


def test_sending_changes_nothing_in_logging_and_writes_nothing(redis_url: str, redis_client: redis.Redis) -> None:
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
        send.delay("orders", "v")
        send.apply_async(("orders", "v"), countdown=1)
        send_many.delay([{"topic": "orders", "value": "v"}])
        sys.stdout, sys.stderr = real
        after = state()
        changed = {name: [before[name], after[name]] for name in before if after[name] != before[name]}
        print(json.dumps([changed, written.getvalue()]))
        """,
        redis_url,
    )
    assert found == [{}, ""]
    assert redis_client.llen("kafka-delivery") == 3


@pytest.mark.parametrize(
    "call",
    ["send.delay('orders', name)", "send.apply_async(('orders', name), countdown=1)"],
    ids=["plain", "through Celery"],
)
def test_a_forked_child_sends_over_a_connection_of_its_own(
    call: str, redis_url: str, redis_client: redis.Redis
) -> None:
    """As under a server that forks its workers after the application was loaded, and had sent something."""
    parent, children, connections = run(
        f"""
        import os
        import redis
        from kafka_delivery import send
        watcher = redis.Redis.from_url({redis_url!r})

        def sends(name, count):
            return [{call}.id for _ in range(count)]

        def connections():
            return [c["addr"] for c in watcher.client_list() if c["id"] != str(watcher.client_id())]

        sent = sends("parent", 1)
        before = set(connections())
        ready, tell = os.pipe()
        result, report = os.pipe()
        go, release = os.pipe()
        for number in range(3):
            if os.fork() == 0:
                code = 1
                try:
                    ids = sends(f"child {{number}}", 50)
                    os.write(report, (json.dumps(ids) + "\\n").encode())
                    os.write(tell, b"x")
                    os.close(release)
                    os.read(go, 1)  # until the parent has counted the connections
                    code = 0
                finally:
                    os._exit(code)
        sent += sends("parent", 50)  # meanwhile: on a shared connection the answers would be mixed up
        for _ in range(3):
            os.read(ready, 1)
        new = len(set(connections()) - before)
        os.close(release)
        assert [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)] == [0, 0, 0]
        os.close(report)
        children = [json.loads(line) for line in os.fdopen(result)]
        print(json.dumps([sent, children, new]))
        """,
        redis_url,
    )
    assert sorted(queued(redis_client)) == sorted([*parent, *(one for child in children for one in child)])
    assert [len(parent), *map(len, children)] == [51, 50, 50, 50]
    assert connections >= 3


def test_a_forked_child_hears_results_over_a_connection_of_its_own(redis_url: str) -> None:
    """On a shared one each would read, and lose, what is meant for the other."""
    found = run(
        """
        import os
        from kafka_delivery import app, send

        def hears():
            sent = send.apply_async(("orders", "v"), ignore_result=False)
            app.backend.store_result(sent.id, sent.id, "SUCCESS")  # as a worker does
            return sent.get(timeout=5) == sent.id

        def socket():
            return app.backend.result_consumer._pubsub.connection._sock.getsockname()

        before = hears(), socket()
        result, report = os.pipe()
        if os.fork() == 0:
            try:
                os.write(report, json.dumps([hears(), socket() != before[1]]).encode())
            finally:
                os._exit(0)
        os.close(report)
        child = json.loads(os.fdopen(result).read())
        print(json.dumps([before[0], child, hears(), socket() == before[1]]))
        """,
        redis_url,
    )
    assert found == [True, [True, True], True, True]


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
