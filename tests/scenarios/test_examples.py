"""The examples, started as their users start them: what is ordered over HTTP is in Kafka, and nothing else is.

Each of the shops is asked the same, on real servers: an order, one that is rolled back, one while Redis hangs, and one
while Kafka is down.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from kafka_delivery.settings import ENV_PREFIX
from kafka_delivery_worker.embedded import Valkey, free_port
from servers import KafkaLike, RealKafka, RealRedis, have_real_redis, missing, read_all, wait_until
from stack import BIN, IMPATIENT, QUICK, message_id

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

PATIENCE_S = 20
"""For a response: less than the 30 s after which gunicorn ends a worker, and far more than any should take."""

pytestmark = [pytest.mark.long, pytest.mark.real]


@dataclass(frozen=True)
class Shop:
    """One way to start one of the examples.

    Attributes:
        directory: of the example.
        prepare: makes its tables.
        serve: its web server, but for the port.
        worker: its worker.
        resend: sends what was missed while Redis was away.
        by_environment: whether the settings of ours are environment variables, and not the application's.
    """

    directory: str
    prepare: tuple[str, ...]
    serve: tuple[str, ...]
    worker: tuple[str, ...]
    resend: tuple[str, ...]
    by_environment: bool = False


def django(*options: str) -> Shop:
    manage = ("python", "manage.py")
    serve = ("gunicorn", "shop.wsgi", "--workers", "2", *options)
    return Shop("django", (*manage, "migrate"), serve, (*manage, "kafka_delivery", "worker"), (*manage, "resend"))


def flask(*options: str) -> Shop:
    command = ("flask", "--app", "shop")
    serve = ("gunicorn", "shop:create_app()", "--workers", "2", *options)
    worker = (*command, "kafka-delivery", "worker")
    return Shop("flask", (*command, "init-db"), serve, worker, (*command, "resend"))


FASTAPI = Shop(
    "fastapi",
    ("python", "shop.py", "init-db"),
    ("uvicorn", "shop:app", "--workers", "2"),
    ("celery", "-A", "kafka_delivery_worker", "worker"),
    ("python", "shop.py", "resend"),
    by_environment=True,
)

SHOPS = {
    "django": django(),
    "flask": flask(),
    "fastapi": FASTAPI,
    "django, preloaded": django("--preload"),
    "django, threads": django("--threads", "4"),
    "flask, preloaded": flask("--preload"),
}

APPLICATIONS = 3
"""The first of them: the others differ in how the web server makes its processes, which never talk to Kafka."""

each_shop = pytest.mark.parametrize("shop", list(SHOPS), indirect=True)
each_application = pytest.mark.parametrize("shop", list(SHOPS)[:APPLICATIONS], indirect=True)


class Open:
    """A shop with its servers and its worker, that a test orders from."""

    def __init__(
        self, shop: Shop, kafka: KafkaLike, redis: RealRedis | Valkey, directory: Path, **settings: str
    ) -> None:
        self.shop, self.kafka = shop, kafka
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith((ENV_PREFIX, "CELERY_"))}
        self.env = clean | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "SHOP_DATABASE": str(directory / f"{uuid.uuid4()}.sqlite3"),
            "SHOP_REDIS_URL": redis.url,
            "SHOP_KAFKA": kafka.bootstrap_servers,
            **{ENV_PREFIX + name: value for name, value in (QUICK | IMPATIENT | settings).items()},
        }
        if shop.by_environment:
            self.env[ENV_PREFIX + "REDIS_URL"] = redis.url
            self.env[ENV_PREFIX + "BOOTSTRAP_SERVERS"] = kafka.bootstrap_servers
        self.log = Path(tempfile.mkstemp(prefix="shop-", suffix=".log", dir=directory)[1])
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Open:
        try:
            self.run(*self.shop.prepare)
            self.start(*self.shop.serve, *(("--port", str(self.port)) if self.uvicorn else ("--bind", self.url[7:])))
            self.start(*self.shop.worker, "--loglevel=INFO")
            wait_until(self.is_open, 120, "the shop to open")
        except BaseException:
            self.__exit__()
            sys.stderr.write(self.log.read_text(errors="replace"))
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def uvicorn(self) -> bool:
        return self.shop.serve[0] == "uvicorn"

    def is_open(self) -> bool:
        assert [process.poll() for process in self.processes] == [None, None], self.log.read_text(errors="replace")
        try:
            return httpx.get(f"{self.url}/health").is_success and " ready." in self.log.read_text(errors="replace")
        except httpx.TransportError:
            return False

    def start(self, *command: str) -> None:
        with self.log.open("ab") as log:
            self.processes.append(
                subprocess.Popen(command, env=self.env, cwd=self.directory, stdout=log, stderr=subprocess.STDOUT)
            )

    def run(self, *command: str) -> str:
        """Run a command of the example to its end."""
        done = subprocess.run(
            command, env=self.env, cwd=self.directory, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def directory(self) -> Path:
        return EXAMPLES / self.shop.directory

    def order(self, quantity: int = 1) -> httpx.Response:
        """Order books, on a connection of its own."""
        return httpx.post(f"{self.url}/orders", json={"item": "book", "quantity": quantity}, timeout=PATIENCE_S)

    def ordered(self, quantity: int = 1) -> str:
        """The message id of an order that was taken."""
        response = self.order(quantity)
        assert response.status_code == 201, response.text + self.log.read_text(errors="replace")
        identifier: str = response.json()["message_id"]
        return identifier

    def sent(self) -> dict[str, bytes | None]:
        """Values by message id, as an independent consumer reads them."""
        return {message_id(one): one.value for one in read_all(self.kafka.bootstrap_servers, ["orders"])}

    def wait_for(self, identifiers: set[str], timeout: float = 60) -> None:
        try:
            wait_until(lambda: identifiers <= self.sent().keys(), timeout, f"{len(identifiers)} records in Kafka")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log.read_text(errors='replace')[-4000:]}") from None


@pytest.fixture(scope="module")
def kafka(real_kafka: RealKafka) -> RealKafka:
    there = real_kafka.admin.list_topics(timeout=10).topics
    for name in {"orders", "orders-dlq"} - there.keys():  # the server is shared
        real_kafka.create_topic(name)
    return real_kafka


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    """A Redis that these tests may stop."""
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def shop(
    request: pytest.FixtureRequest, kafka: RealKafka, redis: RealRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Open]:
    with Open(SHOPS[request.param], kafka, redis, tmp_path_factory.mktemp("shop")) as opened:
        yield opened


@each_shop
def test_an_order_is_in_kafka_under_the_id_of_the_response(shop: Open) -> None:
    with ThreadPoolExecutor(4) as customers:
        identifiers = list(customers.map(shop.ordered, [1] * 8))
    shop.wait_for(set(identifiers))
    value = shop.sent()[identifiers[0]]
    assert value is not None
    assert b'"item":"book","quantity":1}' in value


@each_shop
def test_an_order_that_is_rolled_back_is_not(shop: Open) -> None:
    before = shop.sent().keys()
    response = shop.order(quantity=10_000)
    assert response.status_code == 409, response.text
    after = shop.ordered()  # of the same process or another: whatever was sent before it would be there
    shop.wait_for({after})
    assert shop.sent().keys() - before == {after}


@each_shop
def test_with_redis_hung_an_order_is_taken_in_time_and_arrives_later(shop: Open, redis: RealRedis) -> None:
    with ThreadPoolExecutor(6) as customers:
        redis.pause()
        try:
            identifiers = set(customers.map(shop.ordered, [1] * 6))
        finally:
            redis.resume()
    assert len(identifiers) == 6
    shop.run(*shop.shop.resend)
    shop.wait_for(identifiers)


@each_application
def test_with_kafka_down_an_order_is_taken_and_arrives_later(shop: Open, kafka: RealKafka) -> None:
    kafka.kill()
    try:
        identifiers = {shop.ordered() for _ in range(4)}
        assert httpx.get(f"{shop.url}/health").is_success
    finally:
        kafka.start()
    shop.wait_for(identifiers)


def test_with_redis_hung_other_requests_go_on_in_an_event_loop(
    kafka: RealKafka, redis: RealRedis, tmp_path: Path
) -> None:
    """One process, and more orders at a time than any pool of threads would take."""
    one_process = Shop(**vars(FASTAPI) | {"serve": ("uvicorn", "shop:app")})
    with (
        # Long enough for all looks, on a slow machine too: Redis answers again when they are done.
        Open(one_process, kafka, redis, tmp_path, ENQUEUE_TIMEOUT_S="15") as shop,
        ThreadPoolExecutor(60) as customers,
        httpx.Client(base_url=shop.url, timeout=PATIENCE_S) as visitor,  # made now: it takes its time
    ):
        shop.ordered()
        redis.pause()
        try:
            orders = [customers.submit(shop.ordered) for _ in range(60)]
            looks = [visitor.get("/health").status_code for _ in range(20)]
            waiting = sum(not order.done() for order in orders)
        finally:
            redis.resume()
        identifiers = {order.result() for order in orders}
        assert looks == [200] * 20
        assert waiting > 0, "all looks were answered while orders were still waiting for Redis"
        shop.run(*shop.shop.resend)
        shop.wait_for(identifiers)


def test_the_django_example_passes_its_own_tests(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "manage.py", "test"],
        cwd=EXAMPLES / "django",
        env=os.environ | {"SHOP_DATABASE": str(tmp_path / "shop.sqlite3")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Ran 2 tests" in done.stderr
