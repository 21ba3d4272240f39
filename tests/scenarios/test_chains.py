"""A send is a step of other people's chains: of an app with the same Redis, and of one with a broker of its own.

Two of the user's apps, each with real workers: `shop`, whose broker is our Redis, and `far`, whose broker is another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import redis
from confluent_kafka import KafkaError

from kafka_delivery_worker.embedded import MockKafka, Valkey
from servers import wait_until
from stack import Stack, message_id, stack
from watching import ALONE, emptied, other_worker

TOPIC = "chained"

USERS_APP = """
    import json
    import os

    import redis
    from celery import Celery, chain

    from kafka_delivery import EnqueueError, send

    OURS = os.environ["KAFKA_DELIVERY_REDIS_URL"]
    BROKER = os.environ.get("FAR_REDIS_URL", OURS)
    app = Celery("NAME", broker=BROKER, backend=BROKER)
    said = redis.Redis.from_url(OURS)

    @app.task(name="NAME.charge")
    def charge(number):
        return {"id": number, "paid": True}

    @app.task(name="NAME.publish", bind=True, autoretry_for=(EnqueueError,), retry_backoff=True, max_retries=None)
    def publish(self, order):
        return send.delay("chained", order, key=str(order["id"]), message_id=self.request.id).id

    @app.task(name="NAME.confirmed")
    def confirmed(place, *args):
        said.rpush("said", json.dumps(["NAME.confirmed", place, *args]))

    @app.task(name="NAME.refused")
    def refused(message_id, *args):
        said.rpush("said", json.dumps(["NAME.refused", send.AsyncResult(message_id).result.name, *args]))
"""


@pytest.fixture(scope="module")
def far() -> Iterator[str]:
    with Valkey() as valkey:
        yield valkey.url


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def system(redis_url: str, far: str, folder: Path) -> Iterator[Stack]:
    for name in ("shop", "far"):
        (folder / f"{name}_app.py").write_text(_module(name))
    with MockKafka() as kafka, stack(emptied(redis_url), kafka) as system:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        system.worker(*ALONE, ready=False)
        other_worker(system, folder, _module("shop"), "-P", "solo")
        with pytest.MonkeyPatch.context() as env:
            env.setenv("FAR_REDIS_URL", far)
            other_worker(system, folder, _module("far"), "-P", "solo")
            # For what our workers call back: the same app, listening on our Redis. `celery -b` sets this variable.
            env.setenv("CELERY_BROKER_URL", redis_url)
            other_worker(system, folder, _module("far"), "-P", "solo", "-Q", "far-callbacks")
        system.workers[0].wait_ready()
        yield system


def _module(name: str) -> str:
    return textwrap.dedent(USERS_APP).replace("NAME", name)


class App:
    """One of the user's apps, as the code that calls it sees it: in a process of its own; a context manager."""

    def __init__(self, name: str, system: Stack, folder: Path, **env: str) -> None:
        code = f"import sys\nfrom {name}_app import *\nfor line in sys.stdin: print(eval(line), flush=True)"
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=system.env() | {"PYTHONPATH": path} | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def prints(self, expression: str) -> str:
        """What an expression is there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{expression}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "it failed, and said why on standard error"
        return line.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def shop(system: Stack, folder: Path) -> Iterator[App]:
    with App("shop", system, folder) as app:
        yield app


@pytest.fixture(scope="module")
def theirs(system: Stack, folder: Path, far: str) -> Iterator[App]:
    with App("far", system, folder, FAR_REDIS_URL=far) as app:
        yield app


def wait_said(system: Stack) -> list[Any]:
    wait_until(lambda: system.redis.llen("said") > 0, 60, "a callback; " + system.workers[-1].log[-500:])
    (said,) = system.redis.lrange("said", 0, -1)
    system.redis.delete("said")
    found: list[Any] = json.loads(said)
    return found


class TestOnTheSameRedis:
    def test_a_send_in_the_middle_of_a_chain(self, system: Stack, shop: App) -> None:
        step = 'send.si("chained", {"id": 1}, key="1").set(task_id="first")'
        shop.prints(f'chain(charge.si(1), {step}, confirmed.s("done")).delay()')
        name, place, extra = wait_said(system)
        (record,) = system.wait_for(TOPIC, {"first"})
        assert (name, extra) == ("shop.confirmed", "done")
        assert place["message_id"] == message_id(record) == "first"
        assert (record.partition, record.offset) == (place["partition"], place["offset"])
        assert (record.key, record.value) == (b"1", b'{"id":1}')

    def test_a_chain_that_begins_with_a_send(self, system: Stack, shop: App) -> None:
        shop.prints('chain(send.si("chained", "v").set(task_id="second"), confirmed.s()).delay()')
        assert wait_said(system)[1]["message_id"] == "second"

    def test_a_step_that_is_refused(self, system: Stack, shop: App) -> None:
        refuse_next(system)
        step = 'send.si("chained", "v").set(link_error=refused.s())'
        shop.prints(f"chain(charge.si(2), {step}, confirmed.s()).delay()")
        assert wait_said(system)[:2] == ["shop.refused", "POLICY_VIOLATION"]

    def test_the_result_of_a_chain(self, system: Stack, shop: App) -> None:
        step = 'send.si("chained", "v").set(ignore_result=False)'
        assert shop.prints(f'chain(charge.si(3), {step}).delay().get(timeout=60)["topic"]') == TOPIC


class TestOnAnotherBroker:
    def test_a_task_of_theirs_sends(self, system: Stack, theirs: App) -> None:
        sent = theirs.prints("chain(charge.si(4), publish.s()).delay().id")
        (record,) = [record for record in system.wait_for(TOPIC, {sent}) if message_id(record) == sent]
        assert record.value == b'{"id":4,"paid":true}'

    def test_link_reaches_a_worker_of_theirs_on_our_redis(self, system: Stack, theirs: App) -> None:
        theirs.prints('send.apply_async(("chained", "v"), link=confirmed.s().set(queue="far-callbacks"))')
        name, place = wait_said(system)
        assert (name, place["topic"]) == ("far.confirmed", TOPIC)

    def test_link_error_reaches_it_too(self, system: Stack, theirs: App) -> None:
        refuse_next(system)
        theirs.prints('send.apply_async(("chained", "v"), link_error=refused.s().set(queue="far-callbacks"))')
        assert wait_said(system)[:2] == ["far.refused", "POLICY_VIOLATION"]

    def test_a_send_in_their_chain_waits_on_their_broker_and_is_not_dropped(self, far: str, theirs: App) -> None:
        theirs.prints('chain(charge.si(5), send.si("chained", "v")).delay()')
        with redis.Redis.from_url(far) as client:
            wait_until(lambda: client.llen("kafka-delivery") == 1, 60, "the send, on the wrong broker")


def refuse_next(system: Stack) -> None:
    assert isinstance(system.kafka, MockKafka)
    system.kafka.fail_next(KafkaError.POLICY_VIOLATION)
