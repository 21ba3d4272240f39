"""What each command says of a Redis that does not do what it was asked: is it connected, what is wrong, what to do.

Each state is a real one of a real server. The question about the URL comes only where nothing that answers is a Redis.
"""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import redis
from kombu.exceptions import KombuError
from redis.exceptions import BusyLoadingError, RedisError, ResponseError

from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker.embedded import MockKafka, Valkey
from kafka_delivery_worker.redis_faults import RIGHT_URL, explained, sentence
from proxy import Proxy
from servers import wait_until
from stack import Stack

SECRET = "hunter2"  # noqa: S105  # it is in what the tests configure, and must be in nothing that is printed

SPIN = "while true do end"


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    """Whoever changes it changes it back."""
    with Valkey() as valkey:
        yield valkey


@pytest.fixture
def client(valkey: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url, socket_timeout=60) as client:
        yield client


@contextmanager
def configured(client: redis.Redis, **options: str | int) -> Iterator[None]:
    names = {name.replace("_", "-"): value for name, value in options.items()}
    before = {name: str(client.config_get(name)[name]) for name in names}
    for name, value in names.items():
        client.config_set(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            client.config_set(name, value)


@contextmanager
def blocked(client: redis.Redis, url: str) -> Iterator[None]:
    """A script of somebody's runs for ever."""

    def spin() -> None:
        with redis.Redis.from_url(url) as other, pytest.raises(ResponseError, match="killed"):
            other.eval(SPIN, 0)

    with configured(client, busy_reply_threshold=1):
        spinning = threading.Thread(target=spin)
        spinning.start()
        try:
            wait_until(lambda: is_busy(client), 60, "the script to run")
            yield
        finally:
            client.script_kill()
            spinning.join(60)


def is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except ResponseError as error:
        return str(error).startswith("BUSY")
    return False


@contextmanager
def replica(client: redis.Redis, stale: str) -> Iterator[None]:
    with configured(client, replica_serve_stale_data=stale):
        client.replicaof("127.0.0.1", "1")
        try:
            yield
        finally:
            client.replicaof("NO", "ONE")


@contextmanager
def forbidden(client: redis.Redis) -> Iterator[None]:
    client.acl_setuser("limited", enabled=True, passwords=[f"+{SECRET}"], keys=["*"], commands=["+@all", "-set"])
    try:
        yield
    finally:
        client.acl_deluser("limited")


@contextmanager
def password(valkey: Valkey) -> Iterator[None]:
    with redis.Redis.from_url(valkey.url) as first:
        first.config_set("requirepass", SECRET)
    try:
        yield
    finally:
        with redis.Redis.from_url(valkey.url, password=SECRET) as last:
            last.config_set("requirepass", "")


def error_of(url: str, timeout_s: float = 10) -> tuple[BaseException, Settings]:
    """What a command gets that wants to write."""
    s = Settings(redis_url=url)
    with pytest.raises((RedisError, KombuError)) as raised:
        RedisClient(s, timeout_s).client.set("key", "value")
    return raised.value, s


def said(url: str, timeout_s: float = 10) -> str:
    text = sentence(*error_of(url, timeout_s))
    assert SECRET not in text
    assert "\n" not in text
    return text


class TestConnected:
    """The URL is right."""

    @pytest.mark.parametrize(
        ("state", "what", "do"),
        [
            (lambda c, v: blocked(c, v.url), "a script has blocked it", "SCRIPT KILL"),
            (lambda c, v: replica(c, "yes"), "a replica and refuses writes", "Name the primary"),
            (lambda c, v: replica(c, "no"), "has lost its primary", "Name the primary"),
            (lambda c, v: configured(c, maxmemory=1), "it is full", "maxmemory"),
            (lambda c, v: configured(c, min_replicas_to_write=1), "fewer replicas follow it", "replicas back"),
        ],
        ids=["BUSY", "READONLY", "MASTERDOWN", "OOM", "NOREPLICAS"],
    )
    def test_what_it_answers_is_explained(
        self,
        valkey: Valkey,
        client: redis.Redis,
        state: Callable[[redis.Redis, Valkey], AbstractContextManager[None]],
        what: str,
        do: str,
    ) -> None:
        with state(client, valkey):
            text = said(valkey.url)
        assert what in text
        assert do in text
        assert RIGHT_URL not in text

    def test_no_password(self, valkey: Valkey) -> None:
        with password(valkey):
            text = said(valkey.url)
        assert "it wants a password" in text

    @pytest.mark.parametrize("who", ["", "nobody"])
    def test_a_wrong_password(self, valkey: Valkey, who: str) -> None:
        with password(valkey):
            text = said(valkey.url.replace("//", f"//{who}:not-{SECRET}@"))
        assert "it refuses this user or this password" in text
        assert "percent-encoded" in text

    def test_a_command_that_the_user_may_not(self, valkey: Valkey, client: redis.Redis) -> None:
        with forbidden(client):
            text = said(valkey.url.replace("//", f"//limited:{SECRET}@"))
        assert "it forbids this user that command" in text
        assert "'set'" in text

    def test_no_such_database(self, valkey: Valkey) -> None:
        assert "no database of that number" in said(valkey.url.replace("/0", "/999"))

    def test_too_many_clients(self) -> None:
        with Valkey(maxclients=1) as valkey, redis.Redis.from_url(valkey.url) as only:
            only.ping()
            assert "as many clients as it may have" in said(valkey.url)

    def test_a_disk_that_is_full(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        """As Redis says it; a disk cannot be filled here."""
        error = ResponseError(
            "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk."
        )
        assert "cannot write to its disk" in sentence(error, Settings())

    def test_loading(self) -> None:
        for error in (BusyLoadingError("Redis is loading the dataset in memory"), BusyLoadingError("another text")):
            text = sentence(error, Settings())
            assert "it is connected, and reads its data from disk" in text
            assert RIGHT_URL not in text

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_silence(self, valkey: Valkey, when: str) -> None:
        """It is frozen, or the network lets nothing through, before the first answer or after it."""
        with Proxy(valkey.port) as proxy:
            client = RedisClient(Settings(redis_url=proxy.redis_url), 0.5)
            if when == "after":
                client.client.ping()
            proxy.partition()
            with pytest.raises((RedisError, KombuError)) as raised:
                client.client.set("key", "value")
            proxy.heal()
        text = sentence(raised.value, Settings(redis_url=proxy.redis_url))
        assert "it is connected, and has not answered in time" in text
        assert "SLOWLOG" in text
        assert RIGHT_URL not in text


class TestNotConnected:
    """The URL may be wrong."""

    def test_nobody_listens(self) -> None:
        text = said(f"redis://:{SECRET}@127.0.0.1:1/0")
        assert text.startswith("Redis at redis://127.0.0.1:1/0: nothing listens there (Error 111 connecting to ")
        assert RIGHT_URL in text

    def test_no_such_name(self) -> None:
        text = said("redis://no-such-host.invalid:6379/0")
        assert "its name is not known here" in text
        assert RIGHT_URL in text

    def test_no_such_socket(self) -> None:
        assert RIGHT_URL in said("redis+socket:///no/such/socket")

    def test_another_protocol(self) -> None:
        with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
            text = said(f"redis://127.0.0.1:{port}/0")
        assert "does not speak as a Redis does" in text
        assert "rediss://" in text

    def test_tls_where_none_is_spoken(self) -> None:
        with answering(b"-ERR unknown command\r\n") as port:
            text = said(f"rediss://127.0.0.1:{port}/0")
        assert "does not speak as a Redis does" in text

    def test_none_where_tls_is_spoken(self) -> None:
        with answering(b"") as port:
            text = said(f"redis://127.0.0.1:{port}/0")
        assert "it closed the connection" in text
        assert "rediss://" in text

    def test_no_answer_to_a_connection(self) -> None:
        error = redis.exceptions.TimeoutError("Timeout connecting to server")
        text = sentence(error, Settings(redis_url="rediss://10.0.0.1/0"))
        assert "it cannot be connected in time" in text
        assert RIGHT_URL in text
        assert "TLS may not be spoken there" in text


@contextmanager
def answering(reply: bytes) -> Iterator[int]:
    """A server that is no Redis: it says this to each client, and hangs up; yields its port."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(reply)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


COMMANDS = {
    "status": ("status",),
    "parked": ("parked", "list"),
    "parked redrive": ("parked", "redrive", "--all", "--yes"),
    "breaker": ("breaker", "show"),
    "trace": ("trace", "id"),
    "release": ("release",),
    "history": ("dead-letters", "history"),
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_every_command_says_it(
    valkey: Valkey, client: redis.Redis, mock_kafka: MockKafka, arguments: tuple[str, ...]
) -> None:
    with blocked(client, valkey.url):
        done = Stack(valkey.url, mock_kafka, {}).command(*arguments, check=False)
    assert done.returncode == 1, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kafka-delivery: Redis at {valkey.url}: it is connected, and a script has blocked it")


def test_the_doctor_says_what_to_do(valkey: Valkey, client: redis.Redis, mock_kafka: MockKafka) -> None:
    with blocked(client, valkey.url):
        done = Stack(valkey.url, mock_kafka, {}).command("doctor", check=False)
    assert done.returncode == 1
    assert "SCRIPT KILL" in " ".join(done.stdout.split())
    assert RIGHT_URL not in done.stdout


def test_another_brokers_error_is_not_said_of_redis() -> None:
    s = Settings(broker_url=f"amqp://user:{SECRET}@127.0.0.1:1//")
    text = sentence(KombuError("it is away"), s)
    assert text == "the broker at amqp://127.0.0.1:1//: it is away; is KAFKA_DELIVERY_BROKER_URL right?"


def test_what_nobody_knows_is_said_as_it_is() -> None:
    fault = explained(ResponseError("Command # 1 (SET secret) of pipeline caused error: ERR new"), Settings())
    assert fault.what == "it does not do what it was asked"
