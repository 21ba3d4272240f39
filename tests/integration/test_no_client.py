"""Without a client nothing is handed over and nothing is stranded, and who cannot make one says why and tries again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from confluent_kafka import KafkaError

from kafka_delivery.errors import ProducerError
from kafka_delivery.record import Record
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker import breaker, engine, producer
from kafka_delivery_worker.breaker.rules import Rules
from kafka_delivery_worker.breaker.store import CircuitStore
from kafka_delivery_worker.classify import Retry, Scope, delivery_error, verdict
from kafka_delivery_worker.client import Connection, NotMadeError, connect
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.producer import NoClientError, Outgoing, Producer, Report
from kafka_delivery_worker.topics import DeadLetterTopics
from servers import fatal_error, read_all, wait_until

TOPIC = "produced"
WHY = "ssl.key.location: No such file or directory: /run/key"


class Gate:
    """Whether clients can be made: what surrounds them is there, or is not, or hangs."""

    def __init__(self) -> None:
        self.shut = False
        self.hangs = False
        self.goes_on = threading.Event()
        self.tried = 0
        self.made: list[Connection] = []

    def __call__(self, *args: Any) -> Connection:
        self.tried += 1
        if self.hangs:
            self.goes_on.wait(60)
        if self.shut:
            raise NotMadeError(WHY)
        self.made.append(connect(*args))
        return self.made[-1]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(producer, "connect", gate)
    monkeypatch.setattr(producer, "FIRST_PAUSE_S", 0.05)
    yield gate
    gate.goes_on.set()


@pytest.fixture
def kafka() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC)
        yield kafka


@pytest.fixture
def make(kafka: MockKafka) -> Iterator[Callable[..., Producer]]:
    made: list[Producer] = []

    def make(polled: bool, **options: Any) -> Producer:
        made.append(Producer(Settings(bootstrap_servers=kafka.bootstrap_servers), **options))
        if polled:
            made[-1].poll_by_caller(lambda: None)
        return made[-1]

    yield make
    for one in made:
        one.close(0)


EITHER_WAY = pytest.mark.parametrize("polled", [True, False], ids=["is polled", "polls itself"])


def record(value: bytes = b"x", topic: str = TOPIC) -> Outgoing:
    return Outgoing(topic, value, None, [], 0, int(time.time() * 1000))


def test_who_polls_is_told_at_once_and_others_wait(gate: Gate, make: Callable[..., Producer]) -> None:
    gate.hangs = True
    loop, thread = make(polled=True), make(polled=False)
    reports: list[Report] = []
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(thread.produce, record(), reports.append)
        with pytest.raises(NoClientError, match="being made"):
            loop.produce(record(), reports.append)
        assert (loop.in_flight, loop.missing, loop.has_client) == (0, "", False)
        wait_until(lambda: gate.tried == 2, 30, "both to be made")
        assert not sending.done()
        gate.goes_on.set()
        sending.result(30)
    wait_until(lambda: bool(reports), 30, "the report")
    assert [report.error for report in reports] == [None]


def test_a_wait_for_a_client_has_an_end(
    gate: Gate, make: Callable[..., Producer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer, "FIRST_CLIENT_S", 0.2)
    gate.shut = True
    without = make(polled=False)
    with pytest.raises(NoClientError, match=WHY):
        without.produce(record(), print)
    assert without.in_flight == 0
    assert not without.lacks(TOPIC, 1)


def test_closing_ends_a_wait_for_a_client_and_the_pauses(
    gate: Gate, make: Callable[..., Producer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer, "FIRST_CLIENT_S", 600)
    monkeypatch.setattr(producer, "FIRST_PAUSE_S", 600)
    gate.shut = True
    without = make(polled=False)
    with ThreadPoolExecutor(1) as threads:
        sending = threads.submit(without.produce, record(), print)
        wait_until(lambda: without.missing != "", 30, "the first try")
        without.close(0)
        with pytest.raises(NoClientError):
            sending.result(60)
    maker = without._maker
    assert maker is not None
    maker.join(60)
    assert not maker.is_alive()


def test_each_try_is_told_and_the_pauses_grow(
    gate: Gate, make: Callable[..., Producer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer, "LONGEST_PAUSE_S", 0.3)
    pauses: list[float] = []
    told: list[str] = []
    pause = Producer._pause

    def noted(self: Producer, pause_s: float) -> None:
        pauses.append(pause_s)
        pause(self, pause_s)

    monkeypatch.setattr(Producer, "_pause", noted)
    gate.shut = True
    without = make(polled=True, on_client=told.append)
    without.start()
    wait_until(lambda: len(pauses) >= 5, 60, "five tries")
    assert pauses[:5] == [0.05, 0.1, 0.2, 0.3, 0.3]
    assert without.missing == WHY
    gate.shut = False
    wait_until(lambda: "" in told, 60, "a client")
    assert without.has_client
    assert (set(told[:-1]), told[-1], without.missing) == ({WHY}, "", "")


@EITHER_WAY
def test_a_client_that_appears_after_the_end_is_closed(gate: Gate, make: Callable[..., Producer], polled: bool) -> None:
    gate.hangs = True
    late = make(polled)
    late.start()
    wait_until(lambda: gate.tried == 1, 30, "a try")
    begun = time.monotonic()
    late.close(0)
    assert time.monotonic() - begun < 10
    gate.goes_on.set()
    wait_until(lambda: bool(gate.made), 30, "a client")

    def closed() -> bool:
        try:
            gate.made[0].client.poll(0)
        except RuntimeError:
            return True
        return False

    wait_until(closed, 30, "its end")
    assert not late.has_client


@EITHER_WAY
@pytest.mark.parametrize("how", ["shut", "hangs"])
def test_records_of_a_failed_client_are_the_fault_of_the_process_if_there_is_no_other(
    gate: Gate,
    kafka: MockKafka,
    make: Callable[..., Producer],
    monkeypatch: pytest.MonkeyPatch,
    polled: bool,
    how: str,
) -> None:
    """None is stranded, none raises into a poll, and what may be in the log says so."""
    failing = make(polled)
    failing.start()
    failing.wait_for_client(30)
    kafka.delay(-1, 60_000)  # none arrives before the client fails
    reports: list[list[Report]] = [[] for _ in range(20)]
    for number, own in enumerate(reports):
        failing.produce(record(b"%d" % number), own.append)
    setattr(gate, how, True)
    monkeypatch.setattr(producer, "FIRST_CLIENT_S", 0.5)
    assert failing._made is not None

    fatal_error(failing._made.client, KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "a test")

    def settled() -> bool:
        if polled:
            failing.serve(0.02)
        return failing.in_flight == 0

    if how == "hangs" and not polled:  # nobody looks, and the caller waits for a time of its own
        wait_until(lambda: bool(failing._waiting), 60, "the replacement")
        failing.give_back()
    wait_until(settled, 60, "reports")
    assert [len(own) for own in reports] == [1] * 20
    codes = [report.error.code() for (report,) in reports if report.error is not None]
    assert len(codes) == 20
    assert {(verdict(code).scope, verdict(code).retry) for code in codes} == {(Scope.PRODUCER, Retry.RESEND)}
    assert failing.replaced == 1
    assert not failing.has_client
    kafka.delay(-1, 0)
    unsent = {number for number, code in enumerate(codes) if code == KafkaError._PURGE_QUEUE}
    assert not unsent & {int(one.value or b"") for one in read_all(kafka.bootstrap_servers, [TOPIC])}


@EITHER_WAY
def test_a_record_that_the_client_does_not_take_is_not_kept(make: Callable[..., Producer], polled: bool) -> None:
    taking = make(polled)
    taking.start()
    taking.wait_for_client(30)
    wrong: Any = [("name", 1)]
    with pytest.raises(TypeError):
        taking.produce(record()._replace(headers=wrong), print)
    assert taking.in_flight == 0


def test_a_record_that_is_sent_again_meets_a_client_that_has_failed_too(
    gate: Gate, make: Callable[..., Producer]
) -> None:
    """It happens in a poll, which must not raise."""
    failing = make(polled=True)
    failing.start()
    failing.wait_for_client(30)
    gate.shut = True
    assert failing._made is not None
    fatal_error(failing._made.client, KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "a test")
    reports: list[Report] = []
    again = producer._Pending(failing, record(), reports.append, (), 1)
    failing._pending.add(again)

    failing._send_or_wait(again, KafkaError._PURGE_INFLIGHT)

    wait_until(lambda: bool(reports), 30, "the report")
    assert [report.error.code() for report in reports if report.error] == [KafkaError._PURGE_INFLIGHT]
    assert failing.in_flight == 0


def renew(one: Producer) -> Connection:
    """What the thread that makes clients does when their files have changed; the client before it."""
    before = one._made
    assert before is not None
    one._install(one._connect())
    with one._changed:
        one._changed.notify_all()
    return before


@EITHER_WAY
def test_a_client_that_makes_room_for_another_reports_what_it_holds(
    kafka: MockKafka, make: Callable[..., Producer], polled: bool
) -> None:
    """What a broker refuses then is refused, and not sent again as after a failure of the client."""
    renewed = make(polled)
    renewed.start()
    renewed.wait_for_client(30)
    kafka.delay(-1, 1_000)
    kafka.fail_next(KafkaError.POLICY_VIOLATION)
    reports: list[Report] = []
    renewed.produce(record(b"before"), reports.append)
    wait_until(lambda: renewed._made is not None and len(renewed._made.client) > 0, 30, "the record to be taken")
    before = renew(renewed)
    kafka.delay(-1, 0)

    wait_until(lambda: bool(reports), 60, "the report")  # nobody serves: it is not the caller's client any more
    wait_until(lambda: not renewed._retired, 60, "the end of the client")
    assert [report.error.code() for report in reports if report.error] == [KafkaError.POLICY_VIOLATION]
    assert (before.current, before.failed, renewed.replaced) == (False, False, 0)
    later: list[Report] = []
    renewed.produce(record(b"after"), later.append)

    def come() -> bool:
        renewed.serve(0.02)
        return bool(later)

    wait_until(come, 60, "a report by the new client")
    assert [one.value for one in read_all(kafka.bootstrap_servers, [TOPIC])] == [b"after"]


@EITHER_WAY
def test_a_client_that_never_gets_rid_of_its_records_gives_them_back(
    kafka: MockKafka, make: Callable[..., Producer], polled: bool
) -> None:
    renewed = make(polled)
    renewed.start()
    renewed.wait_for_client(30)
    kafka.down()
    reports: list[Report] = []
    renewed.produce(record(), reports.append)
    renewed._drained_s = 0.2
    renew(renewed)
    wait_until(lambda: bool(reports), 60, "the report")
    assert reports[0].error is not None
    assert reports[0].error.code() in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT)
    wait_until(lambda: not renewed._retired, 60, "the end of the client")
    assert renewed.in_flight == 0


def test_a_topic_is_not_missing_for_want_of_a_client_that_makes_it() -> None:
    nowhere = {"security.protocol": "ssl", "ssl.ca.location": "/nowhere/ca.crt"}
    s = Settings(producer=nowhere, create_dead_letter_topics=True)
    error = delivery_error(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART), TOPIC, "an id")
    with pytest.raises(ProducerError):
        DeadLetterTopics(s, Producer(s)).create(TOPIC, error)


def test_without_a_thread_it_is_tried_again(make: Callable[..., Producer], monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "kafka-delivery-client":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    told: list[str] = []
    without = make(polled=True, on_client=told.append)
    with pytest.raises(NoClientError, match="no thread"):
        without.produce(record(), print)
    assert told == ["no thread to make it: RuntimeError"]
    monkeypatch.setattr(threading.Thread, "start", start)

    def served() -> bool:
        without.serve(0)  # as the event loop does once a second
        return without.has_client

    wait_until(served, 60, "a client")


def test_a_record_refused_with_its_batch_is_not_refused_for_want_of_the_second_client(
    gate: Gate, kafka: MockKafka, redis_client: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(producer, "FIRST_CLIENT_S", 0.5)
    s = Settings(bootstrap_servers=kafka.bootstrap_servers, redis_url=redis_url)
    rules = Rules.of(s)
    store = CircuitStore(RedisClient(s), s.cluster, rules, "a test")
    monkeypatch.setattr(breaker, "current", lambda: breaker.Breaker(store, rules, s.stall_s))
    working = engine.Engine(s)
    try:
        assert working.deliver(Record(TOPIC, "first"))["topic"] == TOPIC
        gate.shut = True
        kafka.fail_next(KafkaError.MSG_SIZE_TOO_LARGE)
        outcomes = working.deliver_many([Record(TOPIC, f"{number}", key="k") for number in range(5)], "batch")
        assert caplog.text.count("engine.no_client") == 1, "each record waited for a client"
        refused = [one for one in outcomes if isinstance(one, Exception)]
        assert refused
        assert {type(one) for one in refused} == {ProducerError}
        assert [one.in_flight for one in working.producers] == [0, 0]
    finally:
        working.close()
