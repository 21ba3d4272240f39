"""A process that has sent may fork, as under a server that preloads the application: each child has connections of its
own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from fresh import printed
from kafka_delivery import app
from kafka_delivery.names import QUEUE
from servers import OtherKafka, wait_until
from stack import Stack, stack


@pytest.fixture
def application(redis_client: redis.Redis, redis_url: str) -> Iterator[Stack]:
    with stack(redis_url, OtherKafka("127.0.0.1:1"), ENQUEUE_TIMEOUT_S=10) as system:
        yield system


def queued(client: redis.Redis) -> list[str]:
    """Ids of the messages that wait, oldest first."""
    return [json.loads(message)["headers"]["id"] for message in reversed(client.lrange(QUEUE, 0, -1))]


def run(code: str, redis_url: str) -> Any:
    return printed(code, KAFKA_DELIVERY_REDIS_URL=redis_url, KAFKA_DELIVERY_ENQUEUE_TIMEOUT_S="10")


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


def test_each_event_loop_and_each_process_can_send(application: Stack) -> None:
    told = application.application("""
        import asyncio, os
        from kafka_delivery import send

        def request(message_id):
            asyncio.run(send.adelay("orders", "v", message_id=message_id))

        request("first")
        request("second")
        child = os.fork()
        if not child:
            request("child")
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        request("parent")
    """)
    assert told.strip() == "0"
    assert queued(application.redis) == ["first", "second", "child", "parent"]


def test_the_connection_for_outcomes_is_the_childs_own(application: Stack) -> None:
    """As gunicorn with a preloaded application."""
    code = """
        import os
        from kafka_delivery import send_and_wait

        print(send_and_wait("orders", "v", message_id="parent", timeout=60)["message_id"], flush=True)
        child = os.fork()
        if not child:
            print(send_and_wait("orders", "v", message_id="child", timeout=60)["message_id"], flush=True)
            os._exit(0)
        print(os.waitpid(child, 0)[1], send_and_wait("orders", "v", message_id="after", timeout=60)["message_id"])
        """
    with ThreadPoolExecutor(1) as thread:
        told = thread.submit(application.application, code)
        for message_id in ("parent", "child", "after"):
            wait_until(lambda one=message_id: one in queued(application.redis), 60, f"{message_id} to be queued")  # type: ignore[misc]
            app.backend.store_result(message_id, {"message_id": message_id}, "SUCCESS")  # as a worker does
        assert told.result(60).split() == ["parent", "child", "0", "after"]
