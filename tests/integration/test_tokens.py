"""A token function that raises, hangs or returns nonsense holds up nobody: not the event loop, not the end of a worker.

On Apache Kafka, which asks each client for a token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kafka_delivery.settings import Settings
from kafka_delivery_worker import client, producer
from kafka_delivery_worker.producer import NoClientError, Outgoing, Producer, Report, check_properties
from servers import SecureKafka, read_all, unsigned_token, wait_until

pytestmark = pytest.mark.real

SECRET = "hunter2"  # noqa: S105  # it is in what fails, and must be in nothing that is said
OAUTH = {"security.protocol": "sasl_plaintext", "sasl.mechanism": "OAUTHBEARER", "sasl.oauthbearer.config": SECRET}


class TokenServer:
    """The token function of a setting, and what it does next."""

    def __init__(self) -> None:
        self.lifetime_s = 3600.0
        self.fails: Callable[[], Any] | None = None
        self.calls: list[str] = []
        """The threads that called it."""
        self.answered = 0

    def __call__(self, config: str) -> Any:
        assert config == SECRET
        self.calls.append(threading.current_thread().name)
        if self.fails is not None:
            return self.fails()
        self.answered += 1
        return unsigned_token(self.lifetime_s)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> TokenServer:
    server = TokenServer()
    monkeypatch.setattr(producer, "load", lambda variable, path: server)
    return server


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Ends what hangs, with the test."""
    over = threading.Event()
    yield over
    over.set()


@pytest.fixture
def settings(secure_kafka: SecureKafka) -> Settings:
    return Settings(bootstrap_servers=secure_kafka.token_servers, producer=OAUTH, oauth_cb="a:function")


@pytest.fixture
def topic(request: pytest.FixtureRequest, secure_kafka: SecureKafka) -> str:
    name = f"{request.node.originalname}-{time.monotonic_ns()}"
    secure_kafka.create_topic(name)
    return name


@pytest.fixture
def polled(settings: Settings, server: TokenServer) -> Iterator[Producer]:
    """As the event loop has it."""
    made = Producer(settings)
    made.poll_by_caller(lambda: None)
    yield made
    made.close(0)


def raising() -> Any:
    raise RuntimeError(f"the token server refused {SECRET}")


def leaving() -> Any:
    raise SystemExit(1)


def record(topic: str, value: bytes = b"x") -> Outgoing:
    return Outgoing(topic, value, None, [], None, int(time.time() * 1000))


def deliver(made: Producer, topic: str) -> Report:
    reports: list[Report] = []
    made.produce(record(topic), reports.append)

    def come() -> bool:
        made.serve(0.02)
        return bool(reports)

    wait_until(come, 60, "the report")
    return reports[0]


@pytest.mark.parametrize("fails", [raising, leaving, lambda: SECRET, lambda: (SECRET, 1.0)])
def test_a_client_is_made_when_there_is_a_token_at_last(
    secure_kafka: SecureKafka, topic: str, server: TokenServer, polled: Producer, fails: Callable[[], Any]
) -> None:
    server.fails = fails
    polled.start()
    wait_until(lambda: polled.missing != "", 30, "the first try")
    assert polled.missing.startswith("KAFKA_DELIVERY_OAUTH_CB: ")
    assert SECRET not in polled.missing
    with pytest.raises(NoClientError):
        polled.produce(record(topic), print)

    server.fails = None

    wait_until(lambda: polled.has_client, 60, "a client")
    assert deliver(polled, topic).error is None
    assert [one.value for one in read_all(secure_kafka.bootstrap_servers, [topic], timeout=60)] == [b"x"]
    assert set(server.calls) == {"kafka-delivery-token"}
    assert server.answered == 1, "its first token was thrown away"


def test_a_function_that_hangs_is_called_once_and_holds_up_nobody(
    topic: str, server: TokenServer, polled: Producer, over: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TOKEN_S", 0.2)
    server.fails = over.wait
    begun = time.monotonic()
    polled.start()
    with pytest.raises(NoClientError):
        polled.produce(record(topic), print)
    polled.serve(0)
    assert time.monotonic() - begun < 10, "the event loop waited"
    tries: list[str] = []
    polled._on_client = tries.append
    wait_until(lambda: len(tries) >= 2, 60, "two tries")
    assert set(tries) == {"KAFKA_DELIVERY_OAUTH_CB: no token within 0.2 s"}
    assert len(server.calls) == 1
    begun = time.monotonic()
    polled.close(0)
    assert time.monotonic() - begun < 10, "the end waited"


def test_a_refresh_that_hangs_holds_up_neither_the_loop_nor_the_end(
    topic: str, server: TokenServer, polled: Producer, over: threading.Event
) -> None:
    server.lifetime_s = 4  # librdkafka asks again at four fifths of it
    polled.start()
    polled.wait_for_client(30)
    assert deliver(polled, topic).error is None
    server.fails = over.wait
    slowest_s = 0.0

    def asked() -> bool:
        nonlocal slowest_s
        begun = time.monotonic()
        polled.serve(0)
        slowest_s = max(slowest_s, time.monotonic() - begun)
        return len(server.calls) > server.answered

    wait_until(asked, 60, "a refresh")
    asked()
    assert slowest_s < 3, "the event loop waited"
    begun = time.monotonic()
    polled.close(0)
    assert time.monotonic() - begun < 8, "the end waited"


def test_a_refresh_that_fails_is_tried_again(
    topic: str, server: TokenServer, polled: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    server.lifetime_s = 3
    server.fails = None
    polled.start()
    polled.wait_for_client(30)
    server.fails = lambda: (SECRET, "soon")  # of this librdkafka's binding would not ask again

    def warned() -> bool:
        polled.serve(0.02)
        return "producer.no_token" in caplog.text

    wait_until(warned, 60, "a refresh")
    server.fails, server.lifetime_s = None, 3600
    answered = server.answered

    def renewed() -> bool:
        polled.serve(0.02)
        return server.answered > answered

    wait_until(renewed, 60, "another refresh")
    assert deliver(polled, topic).error is None
    assert SECRET not in caplog.text


def test_a_worker_starts_whatever_the_function_does(
    settings: Settings, server: TokenServer, over: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(producer, "CHECK_TOKEN_S", 0.2)
    assert check_properties(settings) == ""
    server.fails = raising
    assert check_properties(settings) == "KAFKA_DELIVERY_OAUTH_CB: it raised RuntimeError"
    server.fails = over.wait
    assert check_properties(settings) == "KAFKA_DELIVERY_OAUTH_CB: no token within 0.2 s"
