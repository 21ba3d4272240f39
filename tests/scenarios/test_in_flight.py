"""Sends in flight look like any other Celery task: events, states, counts, signals and results come, in the same order.
How many there are is bounded, in number and in bytes, and a stop, of whatever kind, loses none.
"""

from __future__ import annotations

import base64
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from confluent_kafka import KafkaError

from kafka_delivery import app, dead_letter, send, send_many
from kafka_delivery.errors import RejectedError
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka, Valkey
from servers import wait_until
from stack import Stack, Worker, message_id, stack
from watching import ALONE, emptied, other_worker, watched_events

TOPIC = "in-flight"
PAYLOAD = "secret-payload"


@pytest.fixture(scope="module")
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC, 1)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield kafka


@pytest.fixture(scope="module")
def system(redis_url: str, mock: MockKafka) -> Iterator[Stack]:
    """One worker for many tests; it sends events."""
    with stack(emptied(redis_url), mock, SUCCESS_EVENTS_PER_S=-1) as system:
        system.worker("-E", *ALONE)
        yield system


@pytest.fixture
def idle(system: Stack) -> Stack:
    """The same, with nothing to do."""
    system.wait_empty()
    return system


@pytest.fixture
def own() -> Iterator[Stack]:
    """Without a worker yet; Kafka and Redis are this test's own."""
    with Valkey() as valkey, MockKafka() as kafka, stack(valkey.url, kafka, LEASE_S=30, LINGER_MS=0) as system:
        kafka.create_topic(TOPIC, 1)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield system


def kafka_of(system: Stack) -> MockKafka:
    assert isinstance(system.kafka, MockKafka)
    return system.kafka


def inspected(what: str) -> Any:
    """What the one worker says when it is asked."""
    for _ in range(5):
        try:
            replies = getattr(app.control.inspect(timeout=5, limit=1), what)()
        except redis.ConnectionError:  # a test has broken all connections
            continue
        if replies:
            (reply,) = replies.values()
            return reply
    raise AssertionError(f"no answer to inspect {what}")


def in_flight() -> int:
    count: int = inspected("stats")["pool"]["in-flight"]
    return count


def held(system: Stack) -> dict[bytes, bytes]:
    """Delivery tag -> message of all that workers hold."""
    keys = system.redis.scan_iter("kafka-delivery:held:1:*")
    return {tag: item for key in keys for tag, item in system.redis.hgetall(key).items()}


def queued(system: Stack) -> list[str]:
    """Ids of what waits, the next one first."""
    return [json.loads(item)["headers"]["id"] for item in reversed(system.redis.lrange("kafka-delivery", 0, -1))]


def break_connections(system: Stack) -> None:
    """End all connections to Redis but the one that asks for it."""
    for kind in ("pubsub", "normal"):
        system.redis.client_kill_filter(_type=kind, skipme=True)


def down_for_long(system: Stack) -> None:
    """Take Kafka down without that workers stop claiming after a few seconds of it."""
    kafka_of(system).down()
    system.command("breaker", "force-closed", "--reason", "a test")


def delivered(system: Stack) -> int:
    return counts.read(system.redis).get(TOPIC, {}).get("delivered", 0)


class TestEvents:
    def test_of_a_send_come_in_order(self, idle: Stack) -> None:
        with watched_events() as events:
            sent = send.delay(TOPIC, PAYLOAD)
            seen = events.wait_for(sent.id, "task-succeeded")
        assert [event["type"] for event in seen] == ["task-received", "task-started", "task-succeeded"]
        received, started, succeeded = seen
        assert received["clock"] < started["clock"] < succeeded["clock"]
        assert received["name"] == "kafka_delivery.send"
        assert TOPIC in received["args"]
        assert "'offset'" in succeeded["result"]
        assert 0 < succeeded["runtime"] < 30
        assert PAYLOAD not in str(seen)

    def test_of_one_that_is_retried_come_once_for_each_attempt(self, idle: Stack, mock: MockKafka) -> None:
        with watched_events() as events:
            mock.fail_next(KafkaError.FENCED_LEADER_EPOCH)
            sent = send.delay(TOPIC, PAYLOAD)
            events.wait_for(sent.id, "task-succeeded")
        # A retry is published before Celery says so: its own "received" may come before the "retried" of the last one.
        ended = [kind for kind in events.types(sent.id) if kind != "task-received"]
        assert ended == ["task-started", "task-retried", "task-started", "task-succeeded"]
        assert [event["retries"] for event in events.of(sent.id) if event["type"] == "task-received"] == [0, 1]

    def test_of_one_that_is_refused_come_once(self, idle: Stack, mock: MockKafka) -> None:
        with watched_events() as events:
            mock.fail_next(KafkaError.POLICY_VIOLATION)
            sent = send.delay(TOPIC, PAYLOAD)
            events.wait_for(sent.id, "task-failed")
            events.wait_for(f"{sent.id}-dlq", "task-succeeded")
        assert events.types(sent.id) == ["task-received", "task-started", "task-failed"]
        assert PAYLOAD not in str(events.all)

    def test_of_many_none_is_missing(self, idle: Stack) -> None:
        with watched_events() as events:
            ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(1500)])
            idle.wait_empty()
            for task_id in ids:
                events.wait_for(task_id, "task-succeeded")
        assert {tuple(events.types(task_id)) for task_id in ids} == {
            ("task-received", "task-started", "task-succeeded")
        }


class TestInspect:
    def test_counts_are_those_of_attempts(self, idle: Stack, mock: MockKafka) -> None:
        before = inspected("stats")["total"].get("kafka_delivery.send", 0)
        for _ in range(3):
            send.delay(TOPIC, PAYLOAD)
        idle.wait_empty()
        mock.fail_next(KafkaError.FENCED_LEADER_EPOCH)
        send.delay(TOPIC, PAYLOAD)
        idle.wait_empty()
        mock.fail_next(KafkaError.POLICY_VIOLATION)
        send.delay(TOPIC, PAYLOAD)
        idle.wait_empty()
        assert inspected("stats")["total"]["kafka_delivery.send"] - before == 3 + 2 + 1

    def test_what_is_in_flight_is_active_and_shown_without_payload(self, idle: Stack, mock: MockKafka) -> None:
        mock.down()
        try:
            sent = send.delay(TOPIC, PAYLOAD, key=PAYLOAD, headers={"h": PAYLOAD})
            batch = send_many.delay([{"topic": TOPIC, "value": PAYLOAD}])
            wait_until(lambda: in_flight() == 2, 20, "both to be in flight")
            wait_until(lambda: len(inspected("active")) == 2, 20, "both to be active")
            active = {request["id"]: request for request in inspected("active")}
            assert active.keys() == {sent.id, batch.id}
            assert TOPIC in active[sent.id]["args"]
            assert active[sent.id]["delivery_info"]["routing_key"] == "kafka-delivery"
            assert inspected("reserved") == []
            stats = inspected("stats")
            assert stats["pool"]["in-flight"] == 2
            assert 0 < stats["pool"]["in-flight-bytes"] < 3000
            assert stats["pool"]["max-in-flight"] == stats["prefetch_count"] == 1000
            asked = inspected("stats"), inspected("active"), app.control.inspect(timeout=5, limit=1).query_task(sent.id)
            assert PAYLOAD not in json.dumps([list(active.values()), *asked])
        finally:
            mock.up()
        idle.wait_empty()
        wait_until(lambda: in_flight() == 0, 5, "nothing in flight")
        assert inspected("active") == []

    def test_a_revoke_of_what_is_in_flight_takes_nothing_back(self, idle: Stack, mock: MockKafka) -> None:
        mock.down()
        try:
            sent = send.delay(TOPIC, PAYLOAD)
            wait_until(lambda: in_flight() == 1, 20, "the send to be in flight")
            app.control.revoke(sent.id, terminate=True, reply=True, timeout=5, limit=1)
        finally:
            mock.up()
        idle.wait_for(TOPIC, {sent.id})
        idle.wait_empty()
        assert [item for item in idle.parked() if item.id == sent.id] == []


class TestCelerysWay:
    """Whatever is asked of Celery is done by Celery."""

    def taken_by_celery(self, system: Stack, task_id: str) -> bool:
        return f"{send.name}[{task_id}] received" in system.workers[0].log

    def test_nothing_is_asked(self, idle: Stack) -> None:
        sent = send.delay(TOPIC, PAYLOAD)
        idle.wait_for(TOPIC, {sent.id})
        assert not self.taken_by_celery(idle, sent.id)

    def test_a_result(self, idle: Stack, mock: MockKafka) -> None:
        sent = send.apply_async((TOPIC, PAYLOAD), ignore_result=False)
        assert sent.get(timeout=20)["message_id"] == sent.id
        mock.fail_next(KafkaError.POLICY_VIOLATION)
        refused = send.apply_async((TOPIC, PAYLOAD), ignore_result=False)
        with pytest.raises(RejectedError):
            refused.get(timeout=20)
        assert self.taken_by_celery(idle, sent.id)

    def test_a_countdown(self, idle: Stack) -> None:
        """It waits in Redis; when it is due it is a plain send."""
        started = time.time()
        sent = send.apply_async((TOPIC, PAYLOAD), countdown=4)
        wait_until(lambda: idle.redis.zcard("kafka-delivery:delayed:1:kafka-delivery") == 1, 5, "it to be put aside")
        assert inspected("scheduled") == []
        idle.wait_for(TOPIC, {sent.id})
        assert time.time() - started >= 4
        idle.wait_empty()
        assert idle.ids(TOPIC).count(sent.id) == 1

    def test_an_expiry(self, idle: Stack) -> None:
        in_time = send.apply_async((TOPIC, PAYLOAD), expires=60)
        late = send.apply_async((TOPIC, PAYLOAD), expires=-1)
        idle.wait_for(TOPIC, {in_time.id})
        wait_until(lambda: late.id in {item.id for item in idle.parked()}, 20, "the late one to be parked")
        assert self.taken_by_celery(idle, in_time.id)
        assert late.id not in idle.ids(TOPIC)

    def test_a_link(self, idle: Stack) -> None:
        callback = send.si(TOPIC, "callback").set(task_id="of-a-link", queue="kafka-delivery")
        sent = send.apply_async((TOPIC, PAYLOAD), link=callback)
        idle.wait_for(TOPIC, {sent.id, "of-a-link"})
        assert self.taken_by_celery(idle, sent.id)

    def test_a_rate_limit_that_is_set_by_remote_control(self, idle: Stack) -> None:
        app.control.rate_limit(send.name, "2/s", reply=True, timeout=5, limit=1)
        try:
            started = time.monotonic()
            ids = {send.delay(TOPIC, PAYLOAD).id for _ in range(4)}
            idle.wait_for(TOPIC, ids)
            assert time.monotonic() - started > 1
        finally:
            app.control.rate_limit(send.name, 0, reply=True, timeout=5, limit=1)
        plain = send.delay(TOPIC, PAYLOAD)
        idle.wait_for(TOPIC, {plain.id})
        assert not self.taken_by_celery(idle, plain.id)

    def test_other_tasks_run_in_threads(self, idle: Stack, mock: MockKafka) -> None:
        mock.down()
        try:
            letters = {dead_letter.delay(TOPIC, str(n)).id for n in range(3)}
            wait_until(lambda: len(inspected("active")) == 3, 20, "three dead letters to be active")
            pool = inspected("stats")["pool"]
            assert pool["in-flight"] == 0
            assert pool["threads"] >= 3
        finally:
            mock.up()
        idle.wait_for(f"{TOPIC}-dlq", {letter.removesuffix("-dlq") for letter in letters})


LISTENING = """
    import os
    from celery import signals
    from kafka_delivery_worker import app

    def told(name):
        def listener(sender=None, task_id=None, request=None, **_):
            os.write(2, f"TOLD {name} {task_id or (request or sender.request).id}\\n".encode())
        return listener

    listeners = []
    for name in NAMES:
        listeners.append(told(name))
        getattr(signals, f"task_{name}").connect(listeners[-1])
"""


@pytest.mark.parametrize("names", [("prerun", "postrun", "success", "failure", "retry", "received"), ("success",)])
def test_whoever_listens_to_signals_is_told(own: Stack, tmp_path: Path, names: tuple[str, ...]) -> None:
    """In a module of the user's that is named with -A."""
    code = LISTENING.replace("NAMES", repr(names))
    worker = other_worker(own, tmp_path, code, *ALONE)

    def told(task_id: str) -> list[str]:
        lines = [line.split() for line in worker.log.splitlines() if line.startswith("TOLD ")]
        return [line[1] for line in lines if line[2] == task_id and line[1] in names]

    def expect(task_id: str, *expected: str) -> None:
        wanted = [name for name in expected if name in names]
        wait_until(lambda: len(told(task_id)) >= len(wanted), 20, f"{wanted} of {task_id}, not {told(task_id)}")
        own.wait_empty()
        assert sorted(told(task_id)) == sorted(wanted)

    plain = send.delay(TOPIC, PAYLOAD)
    expect(plain.id, "received", "prerun", "success", "postrun")
    kafka_of(own).fail_next(KafkaError.FENCED_LEADER_EPOCH)
    retried = send.delay(TOPIC, PAYLOAD)
    own.wait_for(TOPIC, {retried.id})
    expect(retried.id, "received", "prerun", "retry", "postrun", "received", "prerun", "success", "postrun")
    kafka_of(own).fail_next(KafkaError.POLICY_VIOLATION)
    refused = send.delay(TOPIC, PAYLOAD)
    own.wait_for(f"{TOPIC}-dlq", {refused.id})
    expect(refused.id, "received", "prerun", "failure", "postrun")


def test_the_number_in_flight_is_bounded_also_after_a_broken_connection(own: Stack) -> None:
    """Kafka is down, so what is in flight stays there; Redis's connections break again and again."""
    down_for_long(own)
    ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(300)])
    worker = own.worker(*ALONE, MAX_IN_FLIGHT=50)
    wait_until(lambda: len(held(own)) == 50, 20, "fifty in flight")
    for connection in range(1, 4):
        break_connections(own)
        wait_until(lambda n=connection: worker.log.count("Connected to") > n, 20, "the worker to connect again")  # type: ignore[misc]
        time.sleep(0.7)
        assert len(held(own)) == 50
    assert queued(own) == ids[50:]
    stats = inspected("stats")
    assert stats["pool"]["in-flight"] == 50
    assert stats["prefetch_count"] == 50
    kafka_of(own).up()
    own.wait_for(TOPIC, set(ids))
    own.wait_empty()
    assert Counter(own.ids(TOPIC)).most_common(1)[0][1] == 1


def test_after_a_broken_connection_it_is_as_fast_as_before(own: Stack) -> None:
    """Celery would leave room for a handful of messages, and raise it only for what goes its own way."""
    worker = own.worker(*ALONE)
    down_for_long(own)
    ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(400)])
    wait_until(lambda: in_flight() == 400, 20, "all to be in flight")
    break_connections(own)
    wait_until(lambda: worker.log.count("Connected to") >= 2, 20, "the worker to connect again")
    ids += send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(400)])
    wait_until(lambda: in_flight() == 800, 20, "all to be in flight")
    kafka_of(own).up()
    own.wait_for(TOPIC, set(ids))


def test_bytes_in_flight_are_bounded(own: Stack) -> None:
    """A hundred records of 900 kB: neither Redis's hands nor the worker's memory are full of them."""
    bound = 5_000_000
    kafka_of(own).down()
    for n in range(100):
        send.delay(TOPIC, b"\xff" * 900_000, key=str(n))
    worker = own.worker(*ALONE, MAX_IN_FLIGHT_BYTES=bound)
    wait_until(lambda: in_flight() > 0, 20, "something in flight")
    time.sleep(1.5)

    sizes = [len(item) for item in held(own).values()]
    assert sum(sizes) - max(sizes) < bound
    assert len(sizes) + len(queued(own)) == 100
    status = Path(f"/proc/{worker.pid}/status").read_text()
    (rss_kb,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    assert rss_kb < 220_000

    kafka_of(own).up()
    wait_until(lambda: delivered(own) == 100, 40, "all to be delivered")  # the mock keeps only the newest
    own.wait_empty()


def test_bytes_that_wait_for_threads_are_bounded_too(own: Stack) -> None:
    bound = 2_000_000
    kafka_of(own).down()
    for _ in range(40):
        send_many.delay([{"topic": TOPIC, "value": b"\xff" * 90_000} for _ in range(3)])
    own.worker(*ALONE, "-c", "2", MAX_IN_FLIGHT_BYTES=bound)
    wait_until(lambda: len(held(own)) > 2, 20, "some to be claimed")
    time.sleep(1)
    sizes = [len(item) for item in held(own).values()]
    assert sum(sizes) - max(sizes) < bound
    kafka_of(own).up()
    wait_until(lambda: delivered(own) == 120, 40, "all to be delivered")


def test_what_waits_for_a_thread_is_not_repeated_after_a_broken_connection(own: Stack) -> None:
    """The pool starts it all the same; what it was given is the worker's."""
    kafka_of(own).down()
    ids = [dead_letter.delay(TOPIC, "x").id.removesuffix("-dlq") for _ in range(20)]
    worker = own.worker(*ALONE, "-c", "2")
    wait_until(lambda: len(held(own)) == 20, 20, "all to be claimed")
    break_connections(own)
    wait_until(lambda: worker.log.count("Connected to") >= 2, 20, "the worker to connect again")
    time.sleep(1)
    kafka_of(own).up()
    own.wait_for(f"{TOPIC}-dlq", set(ids))
    own.wait_empty()
    assert set(Counter(own.ids(f"{TOPIC}-dlq")).values()) == {1}


class TestBatches:
    """Plain batches are in flight as sends are; those for which there is no room wait in the worker."""

    def batches(self, count: int, size: int) -> list[str]:
        """Queue `count` batches of so many records; return the ids of the records."""
        ids = [[f"{number}.{place}" for place in range(size)] for number in range(count)]
        for batch in ids:
            send_many.delay([{"topic": TOPIC, "value": "x", "message_id": each} for each in batch])
        return [each for batch in ids for each in batch]

    def test_their_events_come_in_order(self, idle: Stack) -> None:
        before = inspected("stats")["total"].get("kafka_delivery.send_many", 0)
        with watched_events() as events:
            sent = send_many.delay([{"topic": TOPIC, "value": PAYLOAD}] * 3)
            seen = events.wait_for(sent.id, "task-succeeded")
        assert [event["type"] for event in seen] == ["task-received", "task-started", "task-succeeded"]
        assert seen[-1]["result"] == "3 records delivered"
        assert PAYLOAD not in str(seen)
        idle.wait_empty()
        assert inspected("stats")["total"]["kafka_delivery.send_many"] == before + 1
        assert inspected("active") == []

    def test_a_record_that_fails_has_its_own_fate_and_the_others_are_sent_once(self, idle: Stack) -> None:
        names = [f"own-fate-{n}" for n in range(4)]
        topics = [TOPIC, "no-such-topic", TOPIC, TOPIC]
        before = inspected("stats")["total"].get("kafka_delivery.send_many", 0)
        with watched_events() as events:
            sent = send_many.delay(
                [{"topic": topic, "value": "x", "message_id": name} for topic, name in zip(topics, names, strict=True)]
            )
            events.wait_for(sent.id, "task-succeeded")
        idle.wait_empty()
        assert events.types(sent.id) == ["task-received", "task-started", "task-succeeded"]
        ids = [each for each in idle.ids(TOPIC) if each in names]
        assert sorted(ids) == [names[0], names[2], names[3]]
        assert [item.topic for item in idle.parked() if item.id == names[1]] == ["no-such-topic"]
        assert inspected("stats")["total"]["kafka_delivery.send_many"] == before + 1

    def test_what_is_in_flight_is_bounded_and_the_rest_waits_its_turn(self, own: Stack) -> None:
        kafka_of(own).down()
        ids = self.batches(12, 1_000)
        own.worker(*ALONE)
        wait_until(lambda: len(held(own)) == 12, 20, "all to be claimed")
        wait_until(lambda: in_flight() >= 4_000, 20, "some to be in flight")
        assert in_flight() < 6_000
        assert len(inspected("active")) + len(inspected("reserved")) == 12
        kafka_of(own).up()
        own.wait_for(TOPIC, set(ids))
        own.wait_empty()
        assert len(own.ids(TOPIC)) == len(ids)
        wait_until(lambda: in_flight() == 0, 5, "nothing in flight")

    def test_what_waits_is_not_repeated_after_a_broken_connection(self, own: Stack) -> None:
        down_for_long(own)
        ids = self.batches(12, 1_000)
        worker = own.worker(*ALONE)
        wait_until(lambda: in_flight() >= 4_000, 20, "some to be in flight")
        break_connections(own)
        wait_until(lambda: worker.log.count("Connected to") >= 2, 20, "the worker to connect again")
        wait_until(lambda: len(held(own)) == 12, 20, "all to be held")
        kafka_of(own).up()
        own.wait_for(TOPIC, set(ids))
        own.wait_empty()
        assert len(own.ids(TOPIC)) == len(ids)

    def test_a_stop_gives_back_what_waits_in_order(self, own: Stack) -> None:
        kafka_of(own).down()
        ids = self.batches(12, 1_000)
        before = queued(own)
        worker = own.worker(*ALONE, SHUTDOWN_TIMEOUT_S=1)
        wait_until(lambda: in_flight() >= 4_000, 20, "some to be in flight")
        assert worker.stop(30) < 15
        assert (queued(own), held(own)) == (before, {})
        assert not own.redis.exists("kafka-delivery:deaths:1")
        kafka_of(own).up()
        own.worker(*ALONE)
        own.wait_for(TOPIC, set(ids))
        own.wait_empty()

    def test_one_that_is_revoked_while_it_waits_is_parked(self, own: Stack) -> None:
        kafka_of(own).down()
        self.batches(8, 1_000)
        last = send_many.delay([{"topic": TOPIC, "value": "x", "message_id": "last"}])
        own.worker(*ALONE)
        wait_until(lambda: last.id in [each["id"] for each in inspected("reserved")], 20, "the last to wait")
        app.control.revoke(last.id, reply=True, timeout=5, limit=1)
        kafka_of(own).up()
        own.wait_empty()
        assert [(item.id, item.kind) for item in own.parked()] == [(last.id, "revoked")]
        assert "last" not in own.ids(TOPIC)


def test_numbers_that_librdkafka_cannot_take_are_parked(own: Stack) -> None:
    """By a caller in another language, say. They must not count as in flight for ever."""
    send.delay(TOPIC, "x")
    (raw,) = own.redis.lpop("kafka-delivery", 1)
    good = json.loads(raw)
    for place, value in ((7, 10**30), (7, 0), (6, 2**40), (6, -1), (5, [[1, "x"]])):
        args, kwargs, embed = json.loads(base64.b64decode(good["body"]))
        args[0][place] = value
        args[0][8] = task_id = f"{place}-{value}"[:20]
        body = base64.b64encode(json.dumps([args, kwargs, embed]).encode()).decode()
        message = good | {"body": body, "headers": good["headers"] | {"id": task_id}}
        own.redis.lpush("kafka-delivery", json.dumps(message))
    worker = own.worker(*ALONE)
    own.wait_parked(5)
    own.wait_empty()
    assert {item.kind for item in own.parked()} == {"invalid"}
    assert in_flight() == 0
    assert worker.stop() < 10


SOFTLY = """
    from kafka_delivery_worker import app

    app.conf.worker_soft_shutdown_timeout = 1
"""


def start(own: Stack, how: str, directory: Path) -> Worker:
    if how == "soft":
        return other_worker(own, directory, SOFTLY, *ALONE, MAX_IN_FLIGHT=20, SHUTDOWN_TIMEOUT_S=5)
    return own.worker(*ALONE, MAX_IN_FLIGHT=20, SHUTDOWN_TIMEOUT_S=5)


@pytest.mark.parametrize("how", ["warm", "soft", "cold"])
def test_a_stop_under_a_backlog_loses_and_repeats_nothing_and_keeps_the_order(
    own: Stack, tmp_path: Path, how: str
) -> None:
    kafka_of(own).delay(-1, 100)
    ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(2_000)])  # ten seconds' worth
    worker = start(own, how, tmp_path)
    wait_until(lambda: delivered(own) >= 20, 30, "the first deliveries")

    worker.signal(signal.SIGTERM if how == "warm" else signal.SIGQUIT)
    worker.process.wait(20)

    assert held(own) == {}
    arrived, waiting = own.ids(TOPIC), queued(own)
    assert waiting, "there was no backlog"
    if how == "warm":
        assert arrived + waiting == ids
    assert waiting == [task_id for task_id in ids if task_id in set(waiting)]
    assert set(arrived) | set(waiting) == set(ids)
    assert len(arrived) == len(set(arrived))
    assert not own.redis.exists("kafka-delivery:deaths:1")
    kafka_of(own).delay(-1, 0)
    own.worker(*ALONE)
    own.wait_for(TOPIC, set(ids))
    own.wait_empty()
    records = own.read(TOPIC)
    assert [record.value for record in records][: len(arrived)] == [str(n).encode() for n in range(len(arrived))]
    assert len(records) - len({message_id(record) for record in records}) <= (0 if how == "warm" else 100)


def test_a_cold_stop_does_not_wait_for_kafka(own: Stack) -> None:
    kafka_of(own).down()
    ids = send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(50)])
    letters = [dead_letter.delay(TOPIC, str(n)) for n in range(3)]
    worker = own.worker(*ALONE)
    wait_until(lambda: in_flight() == 50 and len(inspected("active")) == 53, 20, "all to be in flight")
    started = time.monotonic()
    worker.signal(signal.SIGQUIT)
    worker.process.wait(30)
    assert time.monotonic() - started < 8
    assert queued(own) == ids
    assert own.redis.llen("kafka-delivery-dlq") == len(letters)
    assert not own.redis.exists("kafka-delivery:deaths:1")


LATE = """
    import time
    from celery.worker import state
    from kafka_delivery_worker import app, engine

    deliver_many = engine.Engine.deliver_many

    def late(self, *args):
        while state.should_stop is None:
            time.sleep(0.02)
        time.sleep(1)  # so that the pool waits already, which nothing tells of
        return deliver_many(self, *args)

    engine.Engine.deliver_many = late
"""


def test_a_thread_that_hands_over_a_record_while_the_worker_stops_is_waited_for(own: Stack, tmp_path: Path) -> None:
    """Its report is collected; else the stop would take as long as a report may take, two minutes."""
    records = [{"topic": TOPIC, "value": str(n)} for n in range(30)]
    batch = send_many.apply_async((records,), ignore_result=False)  # which a thread works on
    worker = other_worker(own, tmp_path, LATE, *ALONE)
    wait_until(lambda: [request["id"] for request in inspected("active")] == [batch.id], 20, "the batch to be active")
    assert worker.stop(60) < 8
    assert (queued(own), held(own)) == ([], {})
    assert len(own.read(TOPIC)) == 30
