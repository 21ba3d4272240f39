"""Every record handed to the producer gets exactly one report, and a report of success only when Kafka has the record:
whatever happens to buffers, brokers, or the client itself.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from confluent_kafka import KafkaError

from kafka_delivery.settings import Settings
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.producer import NoClientError, Outgoing, Producer, Report
from servers import fatal_error, read_all, wait_until

TOPIC = "produced"
PURGED = {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}


class Sends:
    """Records by number, and the reports that came for each."""

    def __init__(self, producer: Producer) -> None:
        self.producer = producer
        self.reports: dict[int, list[Report]] = {}
        self.most_in_flight = 0
        self._lock = threading.Lock()

    def send(self, number: int, partition: int | None = None) -> None:
        with self._lock:
            self.reports[number] = []
        outgoing = Outgoing(TOPIC, str(number).encode(), None, [], partition, int(time.time() * 1000))
        try:
            self.producer.produce(outgoing, lambda report: self._reported(number, report))
        except NoClientError:
            with self._lock:
                assert self.reports.pop(number) == []
            raise

    def _reported(self, number: int, report: Report) -> None:
        with self._lock:
            self.reports[number].append(report)
            self.most_in_flight = max(self.most_in_flight, self.producer.in_flight)

    def wait(self, timeout: float = 60) -> dict[int, Report]:
        """Wait until each has a report; that no second one comes is checked with some more polls."""
        wait_until(lambda: all(self.reports.values()), timeout, f"reports; missing {self.missing()}")
        self.poll()
        assert {number: len(reports) for number, reports in self.reports.items() if len(reports) != 1} == {}
        assert self.producer.in_flight == 0
        return {number: reports[0] for number, reports in self.reports.items()}

    def poll(self) -> None:
        """Ask the client a few times more for what nothing else announces."""
        for _ in range(5):
            self.producer.serve(0.01)

    def missing(self) -> list[int]:
        return [number for number, reports in self.reports.items() if not reports]

    def codes(self) -> Counter[int | None]:
        return Counter(r.error.code() if r.error else None for reports in self.reports.values() for r in reports)


@pytest.fixture
def kafka() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC)
        yield kafka


@pytest.fixture(params=["polls itself", "is polled"])
def make(request: pytest.FixtureRequest, kafka: MockKafka) -> Iterator[Callable[..., Producer]]:
    """Make a producer, polled by a thread of its own, or by its caller as the in-flight pool does."""
    made: list[Producer] = []
    over = threading.Event()

    def make(**changes: Any) -> Producer:
        s: dict[str, Any] = {"message_timeout_ms": 120_000, "request_timeout_ms": 5_000, "topic_propagation_ms": 1_000}
        producer = Producer(Settings(**{"bootstrap_servers": kafka.bootstrap_servers, **s, **changes}))
        made.append(producer)
        if request.param == "is polled":
            producer.poll_by_caller(lambda: None)
            threading.Thread(target=serve, args=(producer,), daemon=True).start()
            producer.start()
            producer.wait_for_client(60)
        return producer

    def serve(producer: Producer) -> None:
        while not over.is_set():
            producer.serve(0.02)
            time.sleep(0.001)  # while there is no client, serve() returns at once

    yield make
    over.set()
    for producer in made:
        producer.close(0)


ONE_WAY = pytest.mark.parametrize("make", ["polls itself"], indirect=True)
"""For what does not depend on who polls."""


def contents(kafka: MockKafka) -> list[int]:
    return [int(record.value or b"") for record in read_all(kafka.bootstrap_servers, [TOPIC])]


def test_whoever_fails_with_a_report_fails_alone(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    """librdkafka would be taken for broken, and the reports after it would come to nobody."""
    producer = make()
    sends = Sends(producer)

    def fail(report: Report) -> None:
        raise RuntimeError("can't start new thread")

    producer.produce(Outgoing(TOPIC, b"x", None, [], 0, 1), fail)
    for number in range(5):
        sends.send(number)
    assert len(sends.wait()) == 5
    wait_until(lambda: producer.in_flight == 0, 30, "nothing in flight")
    assert producer.replaced == 0


def client_of(producer: Producer) -> Any:
    """The librdkafka client that it has now."""
    assert producer._made is not None
    return producer._made.client


def test_many_threads_share_one_client(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    producer = make()
    sends = Sends(producer)
    start = threading.Barrier(8)

    def send(first: int) -> None:
        start.wait()
        for number in range(first, first + 200):
            sends.send(number)

    clients = set()
    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(send, n * 1000) for n in range(8)]:
            done.result()
            clients.add(id(client_of(producer)))
    reports = sends.wait()

    assert all(report.error is None for report in reports.values())
    assert len({(report.partition, report.offset) for report in reports.values()}) == 1600
    assert sorted(contents(kafka)) == sorted(reports)
    assert (len(clients), producer.replaced) == (1, 0)


def test_success_is_what_the_report_says(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    producer = make()
    sends = Sends(producer)
    sends.send(0, partition=1)
    sends.wait()
    kafka.delay(-1, 1_000)
    started = time.monotonic()
    sends.send(1, partition=1)
    meanwhile = (producer.in_flight, sends.missing())
    assert meanwhile == (1, [1]) or time.monotonic() - started >= 1

    reports = sends.wait()

    assert time.monotonic() - started >= 1
    assert (reports[1].partition, reports[1].offset) == (1, 1)


@ONE_WAY
def test_a_full_buffer_is_back_pressure(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    producer = make(producer={"queue.buffering.max.messages": 10})
    sends = Sends(producer)
    kafka.delay(-1, 20)
    for number in range(200):
        sends.send(number)

    reports = sends.wait()

    assert all(report.error is None for report in reports.values())
    assert sends.most_in_flight <= 10
    kafka.delay(-1, 0)
    assert sorted(contents(kafka)) == list(range(200))
    assert producer.waited_s > 0


@ONE_WAY
def test_a_timeout_says_why_no_broker_answered(make: Callable[..., Producer]) -> None:
    for _ in range(10):  # a machine that stands still may let the time run out before it has tried to connect
        producer = make(
            bootstrap_servers="127.0.0.1:1",
            message_timeout_ms=1_500,
            request_timeout_ms=1_000,
            topic_propagation_ms=1_000,
        )
        sends = Sends(producer)
        sends.send(0)
        report = sends.wait()[0]
        assert report.error is not None
        assert report.error.code() == KafkaError._MSG_TIMED_OUT
        if report.cause is not None:
            break

    assert report.cause is not None
    assert report.cause.code() in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN)


@ONE_WAY
def test_an_error_of_long_ago_is_not_the_cause(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    producer = make(message_timeout_ms=1_500, request_timeout_ms=1_000)
    sends = Sends(producer)
    sends.send(0)
    sends.wait()
    kafka.down()
    wait_until(lambda: producer._last_error is not None, 30, "an error of a broker")
    kafka.up()
    sends.send(1)
    sends.wait()
    kafka.delay(-1, 4000)  # this time nothing breaks, it only takes too long
    sends.send(2)

    report = sends.wait()[2]

    assert report.error is not None
    assert report.error.code() == KafkaError._MSG_TIMED_OUT
    # The client gives up a request that takes too long, which is an error of its own.
    assert report.cause is None or report.cause.code() in (KafkaError._TIMED_OUT, KafkaError._TRANSPORT)


@ONE_WAY
def test_a_verdict_is_reported_as_it_is(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    sends = Sends(make())
    kafka.fail_next(KafkaError.POLICY_VIOLATION)
    sends.send(0)
    sends.wait()
    sends.send(1)
    sends.wait()
    assert sends.codes() == {KafkaError.POLICY_VIOLATION: 1, None: 1}


@ONE_WAY
def test_a_missing_topic_is_reported_first_late_and_then_at_once(
    kafka: MockKafka, make: Callable[..., Producer]
) -> None:
    producer = make()
    reports: list[Report] = []
    for count in (1, 2):
        producer.produce(Outgoing("missing", b"x", None, [], None, 1), reports.append)
        wait_until(lambda count=count: len(reports) == count, 30, "the report")  # type: ignore[misc]
    codes = [report.error.code() for report in reports if report.error]
    assert codes == [KafkaError.UNKNOWN_TOPIC_OR_PART] * 2  # the second is librdkafka's own, said in the broker's words
    assert producer.in_flight == 0


def test_a_client_that_failed_is_replaced_and_what_it_held_is_delivered(
    kafka: MockKafka, make: Callable[..., Producer]
) -> None:
    producer = make()
    sends = Sends(producer)
    sends.send(0)
    sends.wait()
    kafka.delay(-1, 3_000)  # the client has them all when it fails
    for number in range(1, 21):
        sends.send(number)
    fatal_error(client_of(producer), KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "a test")
    kafka.delay(-1, 0)

    reports = sends.wait()

    assert all(report.error is None for report in reports.values())
    assert producer.replaced == 1
    assert set(contents(kafka)) == set(range(21))  # some may be there twice: they were on their way


def test_clients_fail_while_many_threads_send(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    """With a buffer so small that threads wait in it when the client is taken from under them."""
    producer = make(producer={"queue.buffering.max.messages": 20})
    sends = Sends(producer)
    kafka.delay(-1, 5)
    enough = threading.Event()

    def send(first: int) -> int:
        number = first
        while not enough.is_set():  # who sent a number of records would be done before the second one fails
            try:
                sends.send(number)
                number += 1
            except NoClientError:  # told at once where the caller polls
                producer.wait_for_client(60)
        return number - first

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(send, n * 1_000_000) for n in range(4)]
        try:
            for round_ in range(2):  # a record is handed to a third client by itself, not to a fourth
                before = len(sends.reports)
                wait_until(lambda before=before: len(sends.reports) > before + 100, 60, "some sends")  # type: ignore[misc]
                fatal_error(client_of(producer), KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, f"a test, round {round_}")
                wait_until(lambda: producer.replaced > round_, 60, "another client")  # noqa: B023
            before = len(sends.reports)
            wait_until(lambda: len(sends.reports) > before + 100, 60, "more sends")
        finally:
            enough.set()
        sent = sum(done.result() for done in running)
    reports = sends.wait()

    assert len(reports) == sent
    assert set(sends.codes()) <= {None, *PURGED}  # purged is an answer too: the record is innocent and not in the log
    kafka.delay(-1, 0)
    assert {number for number, report in reports.items() if report.error is None} <= set(contents(kafka))


def test_a_client_that_fails_at_once_is_not_made_again_and_again(
    kafka: MockKafka, make: Callable[..., Producer]
) -> None:
    """As without the permission to write idempotently: each new client ends before it has sent anything."""
    kafka.fail_next(KafkaError.CLUSTER_AUTHORIZATION_FAILED, 100, "InitProducerId")
    producer = make()
    sends = Sends(producer)
    sends.send(0)

    report = sends.wait()[0]

    assert report.error is not None
    assert producer.replaced <= 3
    replaced = producer.replaced
    sends.poll()
    assert producer.replaced == replaced, "clients are made without a record to send"


@ONE_WAY
def test_it_recovers_from_such_a_failure(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    kafka.fail_next(KafkaError.CLUSTER_AUTHORIZATION_FAILED, 3, "InitProducerId")
    sends = Sends(make())
    sends.send(0)
    sends.wait()
    sends.send(1)
    assert sends.wait()[1].error is None


def test_closing_reports_the_rest_as_purged(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    producer = make()
    sends = Sends(producer)
    sends.send(0)
    sends.wait()
    kafka.down()
    for number in range(1, 51):
        sends.send(number)
    started = time.monotonic()

    producer.close(0)

    assert time.monotonic() - started < 30, "it waits for the records"
    reports = sends.wait()
    assert reports[0].error is None
    assert {report.error.code() for number, report in reports.items() if number and report.error} <= PURGED
    assert sends.codes()[None] == 1
    sends.send(99)  # too late: reported at once
    late = sends.wait()[99]
    assert late.error is not None
    assert late.error.code() in PURGED


def test_closing_waits_for_what_is_on_its_way(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    producer = make()
    sends = Sends(producer)
    kafka.delay(-1, 300)
    for number in range(20):
        sends.send(number)
    producer.close(60)
    assert sends.codes() == {None: 20}
    kafka.delay(-1, 0)
    assert sorted(contents(kafka)) == list(range(20))


def test_giving_back_ends_a_wait_for_room(kafka: MockKafka, make: Callable[..., Producer]) -> None:
    producer = make(producer={"queue.buffering.max.messages": 5})
    sends = Sends(producer)
    kafka.down()

    def send() -> None:
        for number in range(20):
            sends.send(number)

    sending = threading.Thread(target=send)
    sending.start()
    wait_until(lambda: producer.in_flight >= 5, 60, "a full buffer")
    producer.give_back()
    sending.join(30)
    assert not sending.is_alive(), "it waits for room in a closed producer"
    sends.wait()
    assert set(sends.codes()) <= PURGED
    assert len(sends.reports) == 20


def test_it_says_when_its_own_thread_has_looked_for_reports(kafka: MockKafka) -> None:
    """That time counts as attended; who calls `serve` itself knows when it has done with the reports."""
    looked = threading.Event()
    producer = Producer(Settings(bootstrap_servers=kafka.bootstrap_servers), on_collected=looked.set)
    producer.start()
    try:
        assert looked.wait(60)
    finally:
        producer.close(5)


def test_whether_a_broker_answers(make: Callable[..., Producer], kafka: MockKafka) -> None:
    """Asking makes no client and no topic, and takes no longer than it may."""
    new = Producer(Settings(bootstrap_servers=kafka.bootstrap_servers))
    assert not new.answers(TOPIC, 1)
    assert (new.has_client, new._maker) == (False, None)
    producer = make()
    sends = Sends(producer)
    sends.send(0)
    sends.wait()
    assert producer.answers(TOPIC, 30)
    assert producer.answers("nowhere", 30)
    kafka.down()
    wait_until(lambda: not producer.answers(TOPIC, 1), 60, "nobody to answer")
    kafka.up()
    wait_until(lambda: producer.answers(TOPIC, 1), 60, "somebody to answer")
    producer.close(1)
    assert not producer.answers(TOPIC, 1)
