"""With another Celery broker a record still ends in its topic, in its dead-letter topic or in the parking store: what
RabbitMQ has confirmed is delivered, and what Celery would drop is kept. What workers take is not leased to them.
"""

from __future__ import annotations

import json
import signal
import time
import zlib
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import amqp
import pytest
from confluent_kafka import KafkaError

from kafka_delivery import app, names, send
from kafka_delivery.errors import EnqueueError
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka, Valkey
from kafka_delivery_worker.parking import Parked, ParkingStore
from scraping import exporter, scrape
from servers import RealRabbit, wait_until
from stack import Stack, Worker, stack
from watching import ALONE, emptied, other_worker, revoke

pytestmark = pytest.mark.long

QUEUE, DEAD_LETTER_QUEUE = "kafka-delivery", "kafka-delivery-dlq"
TOPIC = "elsewhere"
PAYLOAD = "secret-payload"

PASSING = KafkaError.FENCED_LEADER_EPOCH
REFUSED = KafkaError.POLICY_VIOLATION

WEAKER = "worker.celery_transport"


@pytest.fixture(scope="module")
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield kafka


@pytest.fixture(scope="module")
def system(redis_url: str, mock: MockKafka, real_rabbit: RealRabbit) -> Iterator[Stack]:
    changes = {"BROKER_URL": real_rabbit.url, "TOPIC_PROPAGATION_MS": 300}
    with stack(emptied(redis_url), mock, **changes) as system:
        yield system


@pytest.fixture
def working(system: Stack) -> Worker:
    """The one worker of most tests; another one after a test that ended it."""
    if not system.workers or system.workers[-1].process.poll() is not None:
        system.worker(*ALONE)
    return system.workers[-1]


@pytest.fixture
def nobody(system: Stack) -> Stack:
    """No worker, as long as the test starts none."""
    for worker in system.workers:
        worker.stop()
    return system


@pytest.fixture
def queue(real_rabbit: RealRabbit) -> Iterator[amqp.Channel]:
    """A channel of somebody who knows nothing of us; there is a queue."""
    send.app.amqp.queues[QUEUE].bind(send.app.connection_for_write().default_channel).declare()
    with real_rabbit.connection() as connection:
        yield connection.channel()


def wait_stored(system: Stack, item_id: str) -> Parked:
    store = ParkingStore(system.redis)
    wait_until(lambda: store.get(item_id) is not None, 60, f"{item_id} to be parked")
    item = store.get(item_id)
    assert item is not None
    return item


def outcome(system: Stack, name: str) -> int:
    return counts.read(system.redis).get(TOPIC, {}).get(name, 0)


class TestDelivery:
    def test_sends_are_delivered(self, system: Stack, working: Worker) -> None:
        ids = {send.delay(TOPIC, str(n)).id for n in range(50)}
        ids |= set(send.bulk({"topic": TOPIC, "value": str(n)} for n in range(50)))
        system.wait_for(TOPIC, ids)
        assert sorted(system.ids(TOPIC)) == sorted(ids)

    def test_the_worker_says_once_that_its_guarantees_are_weaker_and_takes_threads(self, working: Worker) -> None:
        assert working.log.count(WEAKER) == 1
        assert "concurrency: 32 (thread)" in working.log

    def test_a_passing_error_is_retried_later_and_delivered(
        self, system: Stack, mock: MockKafka, working: Worker
    ) -> None:
        before = outcome(system, "retried")
        mock.fail_next(PASSING, 2)
        sent = send.delay(TOPIC, "x")
        system.wait_for(TOPIC, {sent.id})
        wait_until(lambda: outcome(system, "retried") == before + 2, 60, "two retries")
        assert system.ids(TOPIC).count(sent.id) == 1

    def test_a_refused_record_becomes_a_dead_letter(self, system: Stack, mock: MockKafka, working: Worker) -> None:
        mock.fail_next(REFUSED)
        sent = send.delay(TOPIC, "x", key="k")
        (letter,) = [
            one for one in system.wait_for(f"{TOPIC}-dlq", {sent.id}) if ("message-id", sent.id.encode()) in one.headers
        ]
        assert (letter.key, letter.value) == (b"k", b"x")
        assert sent.id not in system.ids(TOPIC)

    def test_what_follows_a_send_whose_result_redis_does_not_keep(self, system: Stack, working: Worker) -> None:
        """RabbitMQ has the message of the `link`, Redis is full: all of it is done once more."""
        before = working.log.count("task.not_concluded")
        system.redis.config_set("maxmemory", 1)
        try:
            result = send.apply_async(
                (TOPIC, "x"), task_id="wanted", ignore_result=False, link=send.si(TOPIC, "y").set(task_id="follows")
            )
            wait_until(lambda: working.log.count("task.not_concluded") > before, 60, "the refusal")
        finally:
            system.redis.config_set("maxmemory", 0)
        system.wait_for(TOPIC, {"wanted", "follows"})
        assert result.get(timeout=60)["message_id"] == "wanted"

    def test_what_follows_a_send_when_rabbitmq_is_killed(
        self, system: Stack, mock: MockKafka, working: Worker, real_rabbit: RealRabbit
    ) -> None:
        mock.delay(-1, 2_000)
        try:
            send.apply_async((TOPIC, "x"), task_id="first", link=send.si(TOPIC, "y").set(task_id="second"))
            wait_until(lambda: "kafka_delivery.send[first] received" in working.log, 60, "the message to be taken")
            real_rabbit.kill()
        finally:
            mock.delay(-1, 0)
        try:
            wait_until(lambda: "it goes back" in working.log.rpartition("send[first] received")[2], 60, "the refusal")
        finally:
            real_rabbit.start()
        system.wait_for(TOPIC, {"first", "second"})

    def test_an_outage_of_kafka_uses_no_attempt(self, system: Stack, mock: MockKafka, nobody: Stack) -> None:
        """What waits for the cluster is published again with a countdown, which the worker then sits out."""
        worker = system.worker(*ALONE, MESSAGE_TIMEOUT_MS=1500, REQUEST_TIMEOUT_MS=1000)
        before, deferred = outcome(system, "retried"), outcome(system, "deferred")
        mock.down()
        try:
            sent = send.delay(TOPIC, "x")
            wait_until(lambda: outcome(system, "deferred") > deferred, 60, "the record deferred")
        finally:
            mock.up()
        system.wait_for(TOPIC, {sent.id})
        assert outcome(system, "retried") == before
        worker.stop()

    def test_a_countdown(self, system: Stack, working: Worker) -> None:
        started = time.monotonic()
        sent = send.apply_async((TOPIC, "x"), countdown=2)
        system.wait_for(TOPIC, {sent.id})
        assert time.monotonic() - started >= 2

    def test_a_result(self, working: Worker) -> None:
        sent = send.apply_async((TOPIC, "x"), ignore_result=False)
        assert sent.get(timeout=20)["message_id"] == sent.id

    def test_in_processes(self, system: Stack, nobody: Stack, mock: MockKafka) -> None:
        worker = system.worker(*ALONE, "-P", "prefork", "-c", "2")
        ids = {send.delay(TOPIC, str(n)).id for n in range(30)}
        mock.fail_next(PASSING)
        system.wait_for(TOPIC, ids)
        worker.stop()
        assert worker.log.count(WEAKER) == 1
        assert nothing_left(system)

    def test_a_pool_may_be_asked_for(self, system: Stack, nobody: Stack) -> None:
        """Records in flight on the event loop need leases, which there are none of."""
        worker = system.worker(*ALONE, POOL="in-flight")
        assert "(thread)" in worker.log
        worker.stop()


class TestKept:
    """What Celery would acknowledge or drop."""

    def test_expired(self, system: Stack, working: Worker) -> None:
        sent = send.apply_async((TOPIC, PAYLOAD), countdown=2, expires=1)
        assert wait_stored(system, sent.id).kind == "expired"

    def test_revoked(self, system: Stack, working: Worker) -> None:
        revoke("revoked-first")
        send.apply_async((TOPIC, PAYLOAD), {"message_id": "revoked-first"}, countdown=1)
        assert wait_stored(system, "revoked-first").kind == "revoked"

    def test_a_time_that_no_clock_has(self, system: Stack, working: Worker, queue: amqp.Channel) -> None:
        """Celery rejects it, which on RabbitMQ is to throw it away."""
        message_id = "no such time"
        wire = send.encode((TOPIC, PAYLOAD), {}, message_id)[0]
        task = app.amqp.create_task_message(message_id, send.name, wire, {}, argsrepr="()")
        body = json.dumps(task.body).encode()
        headers = task.headers | {"eta": "9999-12-31T23:59:59-14:00"}
        queue.basic_publish(a_message(body, application_headers=headers), routing_key=QUEUE)
        item = wait_stored(system, message_id)
        assert (item.kind, item.content, item.topic) == ("invalid", "message", TOPIC)

    @pytest.mark.parametrize(
        ("kind", "task", "body"),
        [
            ("undecodable", send.name, b"{" + PAYLOAD.encode()),
            ("undecodable", send.name, b"\xff\xfe" + PAYLOAD.encode()),
            ("invalid", send.name, b""),
            ("invalid", None, PAYLOAD.encode()),
            ("unknown-task", "kafka_delivery.later", b'[["secret-payload"], {}, {}]'),
        ],
    )
    def test_what_is_no_task_is_parked_and_returns_as_it_was(
        self, system: Stack, working: Worker, queue: amqp.Channel, kind: str, task: str | None, body: bytes
    ) -> None:
        item_id = f"message-{kind}-{zlib.crc32(body)}"
        moment = datetime(2026, 1, 2, 3, 4, 5)  # of UTC, as py-amqp hands it out
        headers = {"id": item_id, "number": 7, "nothing": None, "list": [1, "x"], "when": moment, "yes": True}
        if task is not None:
            headers["task"] = task
        sent = a_message(
            body,
            application_headers=headers,
            correlation_id=item_id,
            reply_to="somebody",
            priority=3,
            delivery_mode=2,
            timestamp=1767323045,
            type="a type",
        )
        queue.basic_publish(sent, routing_key=QUEUE)

        item = wait_stored(system, item_id)
        assert (item.kind, item.content, item.data["queue"]) == (kind, "message", QUEUE)
        assert item.data["envelope"]["body"] == b64encode(body).decode()
        assert PAYLOAD not in item.error_message

        working.stop()
        assert PAYLOAD not in working.log
        system.command("parked", "retry", item_id, "--yes")
        queue.auto_decode = False
        returned = queue.basic_get(QUEUE, no_ack=True)
        assert (returned.body or b"") == body
        assert returned.properties == sent.properties
        assert ParkingStore(system.redis).get(item_id) is None

    def test_a_compressed_message_returns_readable(
        self, system: Stack, working: Worker, queue: amqp.Channel, tmp_path: Path
    ) -> None:
        """Kombu decompresses what it receives; the header that said so must not come back."""
        body = json.dumps([[TOPIC, PAYLOAD], {}, {}]).encode()
        headers = {"id": "packed", "task": "kafka_delivery.later", "compression": "application/x-gzip"}
        queue.basic_publish(a_message(zlib.compress(body), application_headers=headers), routing_key=QUEUE)
        wait_stored(system, "packed")
        working.stop()
        system.command("parked", "retry", "packed", "--yes")
        newer = """
            from kafka_delivery.delivery import Send
            from kafka_delivery_worker import app

            class Later(Send):
                name = "kafka_delivery.later"

            app.register_task(Later())
        """
        worker = other_worker(system, tmp_path, newer)
        system.wait_for(TOPIC, {"packed"})
        worker.stop()

    def test_it_returns_to_its_queue_whatever_way_it_took(
        self, system: Stack, working: Worker, queue: amqp.Channel
    ) -> None:
        queue.exchange_declare("theirs", "direct", auto_delete=False)
        queue.queue_bind(QUEUE, "theirs", "their key")
        queue.basic_publish(a_message(b"", application_headers={"id": "by way"}), "theirs", "their key")
        assert wait_stored(system, "by way").data["queue"] == QUEUE
        working.stop()
        system.command("parked", "retry", "by way", "--yes")
        assert queue.basic_get(QUEUE, no_ack=True) is not None

    def test_a_parked_record_is_sent_again(self, system: Stack, working: Worker) -> None:
        late = "late-elsewhere"
        sent = send.delay(late, PAYLOAD)
        assert wait_stored(system, sent.id).kind == "dead-letter"
        system.kafka.create_topic(late)
        system.command("parked", "retry", sent.id, "--yes")
        system.wait_for(late, {sent.id})

    def test_what_cannot_be_parked_stays_in_its_queue_and_is_not_asked_for_all_the_time(
        self, mock: MockKafka, real_rabbit: RealRabbit, nobody: Stack, queue: amqp.Channel
    ) -> None:
        with Valkey() as valkey, stack(valkey.url, mock, BROKER_URL=real_rabbit.url) as system:
            worker = system.worker(*ALONE)
            valkey.stop()
            queue.basic_publish(a_message(b"", application_headers={"id": "kept"}), routing_key=QUEUE)
            started = time.monotonic()
            wait_until(lambda: worker.log.count("message.not_parked id=kept") >= 2, 60, "a second try")
            assert worker.log.count("message.not_parked id=kept") <= 2 + time.monotonic() - started  # every two seconds
            valkey.start()
            wait_stored(system, "kept")
            worker.stop()
            assert real_rabbit.waiting(QUEUE) == 0

    def test_what_finds_no_room_in_the_parking_store_waits_too(
        self, redis_url: str, mock: MockKafka, real_rabbit: RealRabbit, nobody: Stack, queue: amqp.Channel
    ) -> None:
        """Undecodable, revoked, no record: each is put back through another hand."""
        room = {"MAX_RECORD_BYTES": 10_000, "PARKED_MAX_BYTES": 40_000}
        with Valkey() as valkey, stack(valkey.url, mock, BROKER_URL=real_rabbit.url, **room) as system:
            system.redis.hset(names.PARKED, "large", json.dumps({"data": "null"}) + " " * 40_000)
            worker = system.worker(*ALONE)
            queue.basic_publish(a_message(b"", application_headers={"id": "undecodable"}), routing_key=QUEUE)
            revoke("revoked")
            send.delay(TOPIC, PAYLOAD, message_id="revoked")
            app.send_task(send.name, ("no topic!", PAYLOAD), task_id="invalid", queue=QUEUE, argsrepr="()")
            started = time.monotonic()
            wait_until(lambda: worker.log.count("not_parked message_id=revoked") >= 2, 60, "a second try")
            for text in ("not_parked message_id=revoked", "not_parked id=undecodable", "send[invalid] received"):
                assert worker.log.count(text) <= 2 + time.monotonic() - started  # every two seconds at most
            sent = send.apply_async((TOPIC, "others flow"), ignore_result=False)
            assert sent.get(timeout=20)["message_id"] == sent.id
            system.redis.hdel(names.PARKED, "large")
            wait_until(lambda: system.redis.hlen(names.PARKED) == 3, 60, "all to be parked")
            assert {item.id for item in system.parked()} == {"undecodable", "revoked", "invalid"}
            assert "revoked" not in system.ids(TOPIC)
            worker.stop()
            assert real_rabbit.waiting(QUEUE) == 0


class TestStopping:
    def test_a_stopping_worker_loses_nothing(self, system: Stack, mock: MockKafka, nobody: Stack) -> None:
        before = outcome(system, "delivered")
        mock.delay(-1, 1_000)
        try:
            ids = set(send.bulk({"topic": TOPIC, "value": str(n)} for n in range(1_500)))  # 47 seconds' worth
            worker = system.worker(*ALONE)
            wait_until(lambda: outcome(system, "delivered") > before, 60, "some delivered")
            worker.stop()
        finally:
            mock.delay(-1, 0)
        assert ids - set(system.ids(TOPIC)), "there was a backlog"
        system.worker(*ALONE)
        system.wait_for(TOPIC, ids)

    def test_a_killed_worker_loses_nothing(self, system: Stack, mock: MockKafka, nobody: Stack) -> None:
        """RabbitMQ gives back what a connection did not acknowledge when it ends."""
        before = outcome(system, "delivered")
        mock.delay(-1, 200)
        try:
            ids = {send.delay(TOPIC, str(n)).id for n in range(200)}
            worker = system.worker(*ALONE)
            wait_until(lambda: outcome(system, "delivered") > before, 60, "some delivered")
            worker.kill()
        finally:
            mock.delay(-1, 0)
        system.worker(*ALONE)
        system.wait_for(TOPIC, ids)

    def test_what_goes_back_uses_no_attempt(self, system: Stack, mock: MockKafka, nobody: Stack) -> None:
        before = outcome(system, "retried")
        worker = system.worker(*ALONE, SHUTDOWN_TIMEOUT_S=1)
        mock.down()
        try:
            ids = {send.delay(TOPIC, str(n)).id for n in range(10)}
            wait_until(lambda: all(message_id in worker.log for message_id in ids), 60, "all received")
            worker.stop()  # a report may take two minutes
        finally:
            mock.up()
        system.worker(*ALONE)
        system.wait_for(TOPIC, ids)
        assert outcome(system, "retried") == before


class TestConfirmed:
    """`.delay()` returns when RabbitMQ has the message, and raises where it does not say so in time."""

    def test_a_queue_that_was_deleted_meanwhile(self, system: Stack, nobody: Stack, queue: amqp.Channel) -> None:
        """RabbitMQ confirms what no queue takes, and throws it away."""
        send.delay(TOPIC, "x")
        queue.queue_delete(QUEUE)
        with pytest.raises(EnqueueError):
            send.delay(TOPIC, "x")
        sent = send.delay(TOPIC, "x")  # makes the queue anew
        system.worker(*ALONE)
        system.wait_for(TOPIC, {sent.id})

    def test_a_queue_that_cannot_be_used(self, nobody: Stack, queue: amqp.Channel) -> None:
        queue.queue_delete(QUEUE)
        queue.queue_declare(QUEUE, durable=False, auto_delete=False)
        try:
            app._after_fork()  # a connection that knows the queue does not ask again
            with pytest.raises(EnqueueError, match="PRECONDITION_FAILED"):
                send.delay(TOPIC, "x")
        finally:
            queue.queue_delete(QUEUE)

    def test_by_a_connection_of_its_own_in_a_forked_process(self, system: Stack, nobody: Stack) -> None:
        """A server loads an application, which sends, and forks: on a shared connection confirmations are mixed up."""
        said = system.application(
            """
            import os
            from kafka_delivery import app, send

            def address(message_id):
                send.delay("elsewhere", "x", message_id=message_id)
                with app.amqp.confirming_pool.acquire() as producer:
                    return producer.channel.connection.transport.sock.getsockname()

            parent = address("parent")
            child = os.fork()
            if not child:
                print(address("child") != parent, flush=True)
                os._exit(0)
            os.waitpid(child, 0)
            print(address("after") == parent)
            """
        )
        assert said.split() == ["True", "True"]
        system.worker(*ALONE)
        system.wait_for(TOPIC, {"parent", "child", "after"})

    def test_a_rabbitmq_that_hangs(self, system: Stack, real_rabbit: RealRabbit, working: Worker) -> None:
        send.delay(TOPIC, "x")
        real_rabbit.pause()
        started = time.monotonic()
        try:
            with pytest.raises(EnqueueError) as caught:
                send.delay(TOPIC, "y")
            assert time.monotonic() - started < 30
        finally:
            real_rabbit.resume()
        again = accepted(caught.value.message_id)
        others = {send.delay(TOPIC, str(n)).id for n in range(3)}
        system.wait_for(TOPIC, others | {again})

    def test_a_rabbitmq_that_is_full(
        self, system: Stack, mock: MockKafka, real_rabbit: RealRabbit, nobody: Stack
    ) -> None:
        """It takes nothing and says nothing. Workers must go on, or it would stay full."""
        waiting = {send.delay(TOPIC, str(n)).id for n in range(200)}
        real_rabbit.block()
        try:
            started = time.monotonic()
            with pytest.raises(EnqueueError):
                send.delay(TOPIC, "x")
            assert time.monotonic() - started < 30
            worker = system.worker("-E")
            system.wait_for(TOPIC, waiting)
            mock.fail_next(PASSING)
        finally:
            real_rabbit.unblock()
        system.wait_for(TOPIC, {accepted("again")})
        worker.stop()

    def test_a_rabbitmq_that_is_restarted_or_away(self, system: Stack, real_rabbit: RealRabbit, nobody: Stack) -> None:
        waiting = {send.delay(TOPIC, str(n)).id for n in range(20)}
        worker = system.worker(*ALONE)
        worker.signal(signal.SIGSTOP)
        waiting |= {send.delay(TOPIC, str(n)).id for n in range(20)}
        real_rabbit.kill()
        started = time.monotonic()
        with pytest.raises(EnqueueError):
            send.delay(TOPIC, "x")
        assert time.monotonic() - started < 30
        worker.signal(signal.SIGCONT)
        real_rabbit.start()
        waiting.add(accepted("after"))
        system.wait_for(TOPIC, waiting)
        wait_until(lambda: real_rabbit.waiting(QUEUE) == 0, 60, "what is repeated to be delivered, too")
        worker.stop()


def accepted(message_id: str) -> str:
    """A record that RabbitMQ takes: when it is back it needs its time, and may have taken an earlier try."""

    def taken() -> bool:
        with suppress(EnqueueError):
            send.delay(TOPIC, "x", message_id=message_id)
            return True
        return False

    wait_until(taken, 60, "RabbitMQ to take a message")
    return message_id


class TestCommands:
    def test_status_tells_what_waits_and_what_it_cannot_know(self, system: Stack, nobody: Stack) -> None:
        for n in range(3):
            send.delay(TOPIC, str(n))
        found = json.loads(system.command("status", "--json").stdout)
        assert found["queues"] == {QUEUE: 3, DEAD_LETTER_QUEUE: 0}
        assert (found["in_flight"], found["delayed"]) == (None, None)
        shown = system.command("status").stdout
        assert "waiting in kafka-delivery " in shown
        assert "this broker does not tell" in shown
        with exporter(system) as port:
            metrics = scrape(port)
            assert metrics.by("kafka_delivery_waiting_messages", "queue") == {(QUEUE,): 3}
            assert metrics.sum("kafka_delivery_backlog_messages") == 3
            assert not metrics.has("kafka_delivery_leased_messages")
        system.worker(*ALONE)
        wait_until(lambda: len(workers_seen(system)) == 1, 60, "the worker to answer in time")

    def test_doctor_looks_at_the_broker(self, system: Stack) -> None:
        done = system.command("doctor", "--json", check=False)
        found = {one["check"]: one for one in map(json.loads, done.stdout.splitlines())}
        assert RealRabbit.password not in done.stdout + done.stderr
        assert found["broker"]["level"] == "ok"
        assert "waiting in kafka-delivery" in found["broker-queues"]["what"]
        assert found["broker-guarantees"]["level"] == "warning"

    def test_a_broker_that_is_away_is_named_as_such(self, system: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(system.settings, "BROKER_URL", f"amqp://me:{RealRabbit.password}@127.0.0.1:1//")
        findings = [json.loads(line) for line in system.command("doctor", "--json", check=False).stdout.splitlines()]
        (broker,) = [one for one in findings if one["check"] == "broker"]
        assert broker["level"] == "error"
        assert "kafka" in {one["check"] for one in findings}, "the rest is checked too"
        done = system.command("status", check=False)
        assert done.returncode == 1
        assert "KAFKA_DELIVERY_BROKER_URL" in done.stderr
        assert RealRabbit.password not in json.dumps(findings) + done.stdout + done.stderr

    def test_the_password_is_shown_nowhere(self, system: Stack, working: Worker) -> None:
        """After all of the above: outages, refusals, reconnects."""
        shown = [system.command(words, check=False) for words in ("status", "settings")]
        said = [done.stdout + done.stderr for done in shown] + [worker.log for worker in system.workers]
        assert [text for text in said if RealRabbit.password in text] == []
        assert [worker.log_path for worker in system.workers if PAYLOAD in worker.log] == []


def a_message(body: bytes, **properties: Any) -> amqp.Message:
    return amqp.Message(body, content_type="application/json", content_encoding="utf-8", **properties)


def workers_seen(system: Stack) -> list[str]:
    """Those that answer in a second, as `kafka-delivery status` tells."""
    found: list[str] = json.loads(system.command("status", "--json").stdout)["workers"]
    return found


def nothing_left(system: Stack) -> bool:
    """Whether no message waits; with all workers stopped, none is held either."""
    found: dict[str, int] = json.loads(system.command("status", "--json").stdout)["queues"]
    return set(found.values()) == {0}
