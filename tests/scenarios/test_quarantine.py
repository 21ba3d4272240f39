"""A message that cannot become a send is parked as it lay in the queue, without its payload reaching a log, and the
worker goes on with the next one.
"""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kafka_delivery import send
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import Parked, ParkingStore
from servers import wait_until
from stack import Stack, stack
from watching import ALONE, emptied, looks, other_worker

QUEUE = "kafka-delivery"
TOPIC = "quarantine"
PAYLOAD = "secret-payload"

Envelope = dict[str, Any]


@pytest.fixture(scope="module")
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC)
        yield kafka


@pytest.fixture(scope="module")
def system(redis_url: str, mock: MockKafka) -> Iterator[Stack]:
    with stack(emptied(redis_url), mock, SHUTDOWN_TIMEOUT_S=150) as system:
        yield system


@pytest.fixture(scope="module")
def envelope(system: Stack) -> Envelope:
    """A good message as it lies in the queue; taken before there is a worker."""
    send.delay(TOPIC, PAYLOAD, message_id="good")
    raw = system.redis.rpop(QUEUE)
    assert isinstance(raw, bytes)
    good: Envelope = json.loads(raw)
    assert body_of(good)[0][0][3] == PAYLOAD  # what the cases below spoil is what a send is made of
    return good


@pytest.fixture
def working(system: Stack, envelope: Envelope) -> Stack:
    """One worker for all cases; another one after a case that ended it."""
    if not system.workers or system.workers[-1].process.poll() is not None:
        left = [*system.redis.scan_iter("kafka-delivery:held:*"), *system.redis.scan_iter("kafka-delivery:delayed:*")]
        system.redis.delete(QUEUE, "unacked", "unacked_index", *left)
        system.worker(*ALONE)
    return system


def body_of(envelope: Envelope) -> Any:
    return json.loads(base64.b64decode(envelope["body"]))


def with_body(envelope: Envelope, body: bytes) -> None:
    envelope["body"] = base64.b64encode(body).decode()


def with_args(envelope: Envelope, *args: Any) -> None:
    with_body(envelope, json.dumps([args, {}, {}]).encode())


def wire(envelope: Envelope, place: int, value: Any) -> None:
    record = body_of(envelope)[0][0]
    record[place] = value
    with_args(envelope, record)


def header(envelope: Envelope, name: str, value: Any) -> None:
    envelope["headers"][name] = value


NEVER_A_TASK: dict[str, tuple[str, Callable[[Envelope], None]]] = {
    "not JSON": ("undecodable", lambda e: with_body(e, b"{" + PAYLOAD.encode())),
    "no text": ("undecodable", lambda e: with_body(e, b"\xff\xfe" + PAYLOAD.encode())),
    "type hook": ("undecodable", lambda e: with_args(e, {"__type__": "foo", "__value__": PAYLOAD})),
    "bare type hook": ("undecodable", lambda e: with_body(e, b'{"__type__": "foo", "__value__": "secret-payload"}')),
    "object": ("invalid", lambda e: with_body(e, json.dumps({"a": PAYLOAD}).encode())),
    "text": ("invalid", lambda e: with_body(e, json.dumps(PAYLOAD).encode())),
    "null": ("invalid", lambda e: with_body(e, b"null")),
    "empty": ("invalid", lambda e: with_body(e, b"")),
    "pair": ("invalid", lambda e: with_body(e, json.dumps([[PAYLOAD], {}]).encode())),
    "msgpack": ("undecodable", lambda e: e.update({"content-type": "application/x-msgpack"})),
    "pickle": ("undecodable", lambda e: e.update({"content-type": "application/x-python-serialize"})),
    "unknown content type": ("undecodable", lambda e: e.update({"content-type": "application/x-unheard-of"})),
    "no content type": ("undecodable", lambda e: e.pop("content-type")),
    "unknown compression": ("undecodable", lambda e: header(e, "compression", "unheard-of")),
    "no headers": ("invalid", lambda e: e.pop("headers")),
    "empty headers": ("invalid", lambda e: e.update(headers={})),
    "null headers": ("invalid", lambda e: e.update(headers=None)),
    "no task": ("invalid", lambda e: e["headers"].pop("task")),
    "task is a list": ("invalid", lambda e: header(e, "task", [PAYLOAD])),
    "eta": ("invalid", lambda e: header(e, "eta", "never")),
    "eta out of range": ("invalid", lambda e: header(e, "eta", "9999-12-31T23:59:59-14:00")),
    "expires": ("invalid", lambda e: header(e, "expires", "never")),
    "no id": ("invalid", lambda e: e["headers"].pop("id")),
    "unknown task": ("unknown-task", lambda e: header(e, "task", "kafka_delivery.unknown")),
    "no such task": ("unknown-task", lambda e: header(e, "task", "")),
}
"""Spoilt so that no task can be made of it; parked as a message, of that kind."""

NEVER_A_RECORD: dict[str, Callable[[Envelope], None]] = {
    "no base64": lambda e: wire(e, 3, ["secret-payload!"]),
    "two values": lambda e: wire(e, 3, [PAYLOAD, PAYLOAD]),
    "no bytes": lambda e: wire(e, 3, 1),
    "newer version": lambda e: wire(e, 0, 2),
    "other cluster": lambda e: wire(e, 1, "other"),
    "no topic": lambda e: wire(e, 2, None),
    "headers as text": lambda e: wire(e, 5, PAYLOAD),
    "headers as numbers": lambda e: wire(e, 5, [1, 2]),
    "header of half a character": lambda e: wire(e, 5, [["\ud800", PAYLOAD]]),
    "header with a NUL": lambda e: wire(e, 5, [["a\0b", PAYLOAD]]),
    "header without a name": lambda e: wire(e, 5, [["", PAYLOAD]]),
    "topic without room": lambda e: wire(e, 2, "t" * 249),
    "too large": lambda e: wire(e, 3, PAYLOAD * 100_000),
    "partition": lambda e: wire(e, 6, True),
    "timestamp": lambda e: wire(e, 7, 2**62),
    "short": lambda e: with_args(e, [1, "default", TOPIC, PAYLOAD]),
    "long": lambda e: with_args(e, [*body_of(e)[0][0], PAYLOAD]),
    "empty": lambda e: with_args(e, []),
    "no arguments": lambda e: with_args(e),
    "too many arguments": lambda e: with_args(e, *[PAYLOAD] * 20),
    "wrong types": lambda e: with_args(e, {"a": PAYLOAD}),
    "kwargs as text": lambda e: with_body(e, json.dumps([[PAYLOAD], PAYLOAD, {}]).encode()),
    "kwargs null": lambda e: with_body(e, json.dumps([[PAYLOAD], None, {}]).encode()),
    "args null": lambda e: with_body(e, json.dumps([None, {}, {}]).encode()),
    "args a number": lambda e: with_body(e, json.dumps([1, {}, {}]).encode()),
}
"""A call of `send` whose record is none."""

NO_ENVELOPE: dict[str, Callable[[Envelope], bytes]] = {
    "not JSON": lambda e: f"{PAYLOAD}, and no JSON".encode(),  # the same bytes twice are one item
    "no object": lambda e: json.dumps([PAYLOAD]).encode(),
    "no properties": lambda e: json.dumps({"body": e["body"], "headers": e["headers"]}).encode(),
    "body without base64": lambda e: json.dumps(e | {"body": "secret-payload!"}).encode(),
    "headers as text": lambda e: json.dumps(e | {"headers": PAYLOAD}).encode(),
}
"""What lies in the Redis list and is no envelope that kombu can open; Celery's own transport loses it and dies."""


def spoilt(envelope: Envelope, spoil: Callable[[Envelope], Any], item_id: str) -> bytes:
    message = copy.deepcopy(envelope)
    message["headers"]["id"] = item_id
    message["properties"]["correlation_id"] = item_id
    message["properties"]["delivery_tag"] = item_id  # as unique as the message
    wire(message, 8, item_id)
    spoil(message)
    return json.dumps(message).encode()


def wait_stored(system: Stack, item_id: str) -> Parked:
    store = ParkingStore(system.redis)
    worker = system.workers[-1]

    def there() -> bool:
        assert worker.process.poll() is None, f"the worker ended:\n{worker.log[-3000:]}"
        return store.get(item_id) is not None

    try:
        wait_until(there, 60, f"{item_id} to be parked")
    except BaseException:
        worker.kill()  # the next case gets another one
        raise
    item = store.get(item_id)
    assert item is not None
    return item


def wait_empty(system: Stack) -> None:
    try:
        system.wait_empty(60)
    except BaseException:
        system.workers[-1].kill()  # the next case gets another one
        raise


@pytest.mark.smoke
@pytest.mark.parametrize("case", NEVER_A_TASK)
def test_a_message_that_is_no_task(working: Stack, envelope: Envelope, case: str) -> None:
    kind, spoil = NEVER_A_TASK[case]
    item_id = f"message {case}"
    raw = spoilt(envelope, spoil, item_id)
    working.redis.lpush(QUEUE, raw)

    item = wait_stored(working, item_id)

    assert (item.kind, item.content) == (kind, "message")
    assert item.data["queue"] == QUEUE
    assert item.data["envelope"]["body"] == json.loads(raw)["body"]
    assert PAYLOAD not in item.error_message
    wait_empty(working)


@pytest.mark.parametrize("case", NEVER_A_RECORD)
def test_a_call_without_a_record(working: Stack, envelope: Envelope, case: str) -> None:
    item_id = f"call {case}"
    working.redis.lpush(QUEUE, spoilt(envelope, NEVER_A_RECORD[case], item_id))

    item = wait_stored(working, item_id)

    assert item.kind in ("invalid", "undecodable")  # the latter if it was not taken for a call at all
    assert PAYLOAD not in item.error_message
    wait_empty(working)


def test_a_record_under_a_strange_task_id_is_parked_under_its_own(working: Stack, envelope: Envelope) -> None:
    working.redis.lpush(QUEUE, spoilt(envelope, lambda e: wire(e, 8, "its own"), "a strange one"))
    item = wait_stored(working, "its own")
    assert (item.kind, item.content, item.topic) == ("invalid", "record", TOPIC)
    assert "a strange one" in item.error_message


def test_the_worker_goes_on_and_has_logged_no_payload(working: Stack) -> None:
    """After all of the above, in one and the same process, unless a case has failed and ended it."""
    sent = send.delay(TOPIC, PAYLOAD)
    working.wait_for(TOPIC, {sent.id})
    assert [worker.log_path for worker in working.workers if PAYLOAD in worker.log] == []


def test_an_id_that_is_none_is_parked_and_the_worker_stops_at_once(working: Stack, envelope: Envelope) -> None:
    """Nothing that failed on its way to librdkafka is waited for."""
    worker = working.workers[-1]
    half = "x\ud800"
    working.redis.lpush(QUEUE, spoilt(envelope, lambda e: None, half))
    working.wait_empty(60)
    assert any(item.kind in ("invalid", "undecodable") and item.id.startswith("x\\ud800") for item in working.parked())
    assert worker.process.poll() is None
    worker.stop(60)
    working.worker(*ALONE)


def test_what_cannot_be_parked_now_is_not_looked_at_all_the_time(working: Stack) -> None:
    """A full Redis lets claims pass, for they make room; parking needs some."""
    used = int(working.redis.info("memory")["used_memory"])
    before = len(working.parked())
    with working.redis.pipeline() as pipe:  # at once: a worker that is quick would find room for it
        pipe.lpush(QUEUE, PAYLOAD)
        pipe.config_set("maxmemory", used // 2)
        pipe.execute()
    try:
        with looks(working.redis) as looked:
            # An idle worker claims five times a second; one that looks at it all the time, a thousand times.
            assert looked.claims(15) > 0.5
        assert working.waiting == 1
    finally:
        working.redis.config_set("maxmemory", 0)
    wait_until(lambda: len(working.parked()) == before + 1, 60, "it to be parked")
    wait_empty(working)


def test_a_message_of_an_unknown_task_returns_to_its_queue(working: Stack, envelope: Envelope, tmp_path: Path) -> None:
    """A newer caller met an older worker: once the workers know the task, `parked retry` is all it takes."""
    raw = spoilt(envelope, lambda e: header(e, "task", "kafka_delivery.later"), "good")
    working.redis.lpush(QUEUE, raw)
    parked = wait_stored(working, "good")
    assert (parked.kind, parked.error_class) == ("unknown-task", "KeyError")
    assert "kafka_delivery.later" in parked.error_message
    working.workers[-1].stop()

    working.command("parked", "retry", "good", "--yes")

    (returned,) = working.redis.lrange(QUEUE, 0, -1)
    message, original = json.loads(returned), json.loads(raw)
    assert message["body"] == original["body"]
    assert message["headers"] == original["headers"]
    assert message["content-type"] == original["content-type"]
    newer = """
        from kafka_delivery.delivery import Send
        from kafka_delivery_worker import app

        class Later(Send):
            name = "kafka_delivery.later"

        app.register_task(Later())
    """
    other_worker(working, tmp_path, newer)
    working.wait_for(TOPIC, {"good"})


@pytest.mark.parametrize("case", NO_ENVELOPE)
def test_what_is_no_envelope_at_all(working: Stack, envelope: Envelope, case: str) -> None:
    before = len(working.parked())
    worker = working.workers[-1]
    starts = worker.log.count("Connected to ")
    working.redis.lpush(QUEUE, NO_ENVELOPE[case](envelope))

    def settled() -> bool:
        failed = worker.process.poll() is not None or worker.log.count("Connected to ") > starts
        return failed or len(working.parked()) > before

    try:
        wait_until(settled, 60, "the message to be parked")
        assert len(working.parked()) == before + 1
        assert worker.process.poll() is None
    except BaseException:
        worker.kill()
        raise
    wait_empty(working)
