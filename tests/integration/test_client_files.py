"""The files of a client may be away, half renewed, or renewed: the broker's own view of it, and every record's.

On Apache Kafka, which asks each client for a certificate.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError

from certificates import Authority, put
from kafka_delivery.settings import Settings
from kafka_delivery_worker import producer as module
from kafka_delivery_worker.classify import Retry, Scope, verdict
from kafka_delivery_worker.producer import NoClientError, Outgoing, Producer, Report
from servers import SecureKafka, fatal_error, read_all, wait_until

pytestmark = pytest.mark.real


@dataclass
class Files:
    """What a client's properties name."""

    directory: Path
    authority: Authority

    @property
    def certificate(self) -> Path:
        return self.directory / "client.crt"

    @property
    def key(self) -> Path:
        return self.directory / "client.key"

    def renew(self, name: str) -> None:
        certificate, key = self.authority.pair(name)
        put(self.certificate, certificate)
        put(self.key, key)

    @property
    def properties(self) -> dict[str, Any]:
        return {
            "security.protocol": "ssl",
            "ssl.ca.location": str(self.authority.path),
            "ssl.certificate.location": str(self.certificate),
            "ssl.key.location": str(self.key),
        }


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> Files:
    files = Files(tmp_path, authority)
    files.renew("first")
    return files


@pytest.fixture
def topic(request: pytest.FixtureRequest, secure_kafka: SecureKafka) -> str:
    name = f"{request.node.originalname}-{time.monotonic_ns()}"
    secure_kafka.create_topic(name)
    return name


class Loop:
    """A thread that produces and polls, as the event loop of a worker does."""

    def __init__(self, producer: Producer, topic: str) -> None:
        self.producer, self.topic = producer, topic
        self.reports: dict[int, list[Report]] = {}
        self.refused: list[str] = []
        self.slowest_s = 0.0
        """The longest time for which a call held the loop up."""
        self._over = threading.Event()
        producer.poll_by_caller(lambda: None)
        producer.start()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join(30)

    def _run(self) -> None:
        number = 0
        while not self._over.is_set():
            begun = time.monotonic()
            if self.send(number):
                number += 1
            self.producer.serve(0)
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
            self._over.wait(0.005)

    def send(self, number: int, topic: str | None = None) -> bool:
        outgoing = Outgoing(topic or self.topic, str(number).encode(), None, [], None, int(time.time() * 1000))
        self.reports[number] = []
        try:
            self.producer.produce(outgoing, self.reports[number].append)
        except NoClientError as error:
            self.refused.append(str(error))
            assert self.reports.pop(number) == []
            return False
        return True

    def wait(self, number: int) -> Report:
        def come() -> bool:
            self.producer.serve(0.02)
            return bool(self.reports[number])

        wait_until(come, 60, "the report")
        return self.reports[number][0]

    @property
    def delivered(self) -> int:
        return sum(1 for reports in list(self.reports.values()) if reports and reports[0].error is None)


@pytest.fixture
def make(secure_kafka: SecureKafka, files: Files, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Producer]]:
    monkeypatch.setattr(module, "LOOK_S", 0.2)
    made: list[Producer] = []

    def make(**options: Any) -> Producer:
        s = Settings(bootstrap_servers=secure_kafka.tls_servers, producer=files.properties)
        made.append(Producer(s, **options))
        return made[-1]

    yield make
    for producer in made:
        producer.close(0)


def found(kafka: SecureKafka, topic: str) -> list[int]:
    return sorted(int(record.value or b"") for record in read_all(kafka.bootstrap_servers, [topic], timeout=60))


def test_a_key_that_is_not_there_is_waited_for(
    secure_kafka: SecureKafka, topic: str, files: Files, make: Callable[..., Producer]
) -> None:
    key = files.key.read_bytes()
    files.key.unlink()
    told: list[str] = []
    loop = Loop(make(on_client=told.append), topic)
    wait_until(lambda: bool(told), 30, "the first try")
    assert told[0] == loop.producer.missing == f"ssl.key.location: No such file or directory: {files.key}"
    assert not loop.producer.has_client
    assert not loop.send(0)
    assert loop.refused == [told[0]]
    assert loop.producer.in_flight == 0

    put(files.key, key)

    wait_until(lambda: loop.producer.has_client, 60, "a client")
    wait_until(lambda: told[-1] == "", 10, "word of it")
    assert loop.producer.missing == ""
    assert loop.send(0)
    assert loop.wait(0).error is None
    assert found(secure_kafka, topic) == [0]


def test_renewed_certificates_are_taken_up_while_records_flow(
    secure_kafka: SecureKafka,
    topic: str,
    files: Files,
    make: Callable[..., Producer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The broker says who connects: only one name may write to the second topic."""
    caplog.set_level(logging.INFO, "kafka_delivery.producer")
    reserved = f"{topic}-reserved"
    secure_kafka.create_topic(reserved)
    secure_kafka.reserve(reserved, "User:CN=second")
    producer = make()
    asked = Loop(producer, topic)
    producer.wait_for_client(30)
    asked.send(-1, reserved)
    error = asked.wait(-1).error
    assert error is not None
    assert error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
    before = producer._made
    loop = Loop(producer, topic)
    loop.start()
    wait_until(lambda: loop.delivered > 100, 60, "records")

    certificate, key = files.authority.pair("second")
    put(files.certificate, certificate)  # now the pair does not fit
    wait_until(lambda: "producer.not_renewed" in caplog.text, 60, "a look at half of the pair")
    assert producer._made is before
    put(files.key, key)
    wait_until(lambda: "producer.renewed" in caplog.text, 60, "a look at the pair")
    sent = len(loop.reports)
    wait_until(lambda: loop.delivered > sent + 100, 60, "more records")
    wait_until(lambda: not producer._retired, 60, "the end of the first client")
    loop.end()

    asked.send(-2, reserved)
    assert asked.wait(-2).error is None, "the broker still sees the first certificate"
    assert before is not None
    with pytest.raises(RuntimeError):
        before.client.poll(0)  # it was closed
    wait_until(lambda: bool(asked.wait(-2)) and all(loop.reports.values()), 60, "all reports")
    assert all(len(reports) == 1 and reports[0].error is None for reports in loop.reports.values())
    assert found(secure_kafka, topic) == sorted(loop.reports), "lost, or sent twice"
    assert loop.refused == []
    assert producer.replaced == 0
    assert "key values mismatch" in caplog.text


def test_a_client_that_fails_while_its_key_is_away_strands_no_record(
    secure_kafka: SecureKafka, topic: str, files: Files, make: Callable[..., Producer]
) -> None:
    producer = make()
    loop = Loop(producer, topic)
    producer.wait_for_client(30)
    assert producer._made is not None
    key = files.key.read_bytes()
    files.key.unlink()

    def settled() -> bool:
        producer.serve(0.02)
        return producer.in_flight == 0

    os.kill(secure_kafka.pid, signal.SIGSTOP)  # no record arrives before the client fails
    try:
        for number in range(20):
            loop.send(number)
        fatal_error(producer._made.client, KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "a test")
        wait_until(settled, 60, f"reports; {producer.in_flight} have none")
    finally:
        os.kill(secure_kafka.pid, signal.SIGCONT)
    assert not producer.has_client
    codes = {report.error.code() for (report,) in loop.reports.values() if report.error is not None}
    assert codes <= {KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}
    assert all((verdict(code).scope, verdict(code).retry) == (Scope.PRODUCER, Retry.RESEND) for code in codes)
    put(files.key, key)
    wait_until(lambda: producer.has_client, 60, "a client")
    again = [number for number, (report,) in list(loop.reports.items()) if report.error is not None]
    assert len(again) == 20
    for number in again:
        assert loop.send(number)
        assert loop.wait(number).error is None
    assert set(found(secure_kafka, topic)) == set(range(20))
