"""Dockerfile, docker-compose.yml and Procfile, tried without Docker.

What the containers would run is taken from the files word for word and run here as plain processes, with other ports.
The server properties that the image apache/kafka makes of its environment are made by the image's own class, which
Kafka's jar contains.
"""

from __future__ import annotations

import base64
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import redis
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]  # re-exported

from deployment import (
    AUTH,
    PROCFILE,
    SEND,
    START_S,
    STOP_S,
    command,
    environment,
    health_check,
    last,
    replaced,
    run,
    running,
    seconds,
    services,
)
from kafka_delivery.settings import Settings
from kafka_delivery_worker.embedded import free_port
from scraping import scrape
from servers import (
    Consumed,
    KafkaLike,
    RealKafka,
    RealRedis,
    have_real_kafka,
    have_real_redis,
    kafka_jars,
    missing,
    read_all,
    wait_until,
)


def status(url: str, auth: str | None = None) -> int | None:
    """The HTTP status of a page; None if nobody answers."""
    request = urllib.request.Request(url)  # noqa: S310  # http, on this machine
    if auth:
        request.add_header("Authorization", "Basic " + base64.b64encode(auth.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=5) as response:  # noqa: S310
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


# -- docker-compose.yml, running: one Kafka, one Redis, and what runs beside them


@pytest.fixture(scope="module")
def ports() -> defaultdict[str, int]:
    """The port here for each port in the compose file."""
    return defaultdict(free_port)


class ComposeRedis(RealRedis):
    """A Redis with the command line of the compose file."""

    def _command(self, log: IO[bytes]) -> list[str]:
        return [*command("redis"), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.directory)]


@pytest.fixture(scope="module")
def compose_redis(ports: defaultdict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    if not have_real_redis():
        missing("redis-server")
    server = ComposeRedis(tmp_path_factory.mktemp("redis"))
    server.port = ports["6379"]
    with server:
        yield server


@pytest.fixture(scope="module")
def compose_kafka(ports: defaultdict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealKafka]:
    """A Kafka with the server properties that the image makes of its environment, and none besides."""
    if not have_real_kafka():
        missing("java, and Maven or KAFKA_DELIVERY_TEST_KAFKA_LIB")
    directory = tmp_path_factory.mktemp("kafka")
    variables = {name: replaced(value, ports) for name, value in services()["kafka"]["environment"].items()}
    variables["KAFKA_LOG_DIRS"] = str(directory / "data")
    (directory / "none").mkdir()
    image = ["java", "-cp", f"{kafka_jars()}/*", "kafka.docker.KafkaDockerWrapper", "setup"]
    places = ["--default-configs-dir", "none", "--mounted-configs-dir", "none", "--final-configs-dir", "."]
    run([*image, *places], environment(variables), directory)
    # It has written server.properties and formatted the data directory: where both are, RealKafka only starts.
    server = RealKafka(directory)
    server.port = ports["9092"]
    with server:
        yield server


@pytest.fixture(scope="module")
def container(
    compose_redis: RealRedis, compose_kafka: RealKafka, ports: defaultdict[str, int]
) -> dict[str, dict[str, str]]:
    """For each of our services the environment of a container of it."""
    assert {"6379", "9092", "19092"} <= set(ports)
    return {
        name: environment({variable: replaced(value, ports) for variable, value in service["environment"].items()})
        for name, service in services().items()
        if "build" in service
    }


@pytest.fixture(scope="module")
def orders(container: dict[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The topic that the service `topics` makes."""
    run(command("topics"), container["topics"], tmp_path_factory.mktemp("topics"))
    return command("topics")[-1]


@pytest.mark.real
def test_redis_takes_its_command_line(compose_redis: RealRedis, tmp_path: Path) -> None:
    with redis.Redis.from_url(compose_redis.url, decode_responses=True) as client:
        wanted = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory": str(2**30),
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        assert client.config_get(*wanted) == wanted
    shell, option, check = health_check("redis")
    run([shell, option, check.replace("redis-cli", f"redis-cli -p {compose_redis.port}")], environment({}), tmp_path)
    nobody = check.replace("redis-cli", f"redis-cli -p {free_port()}")
    assert subprocess.run([shell, option, nobody], capture_output=True).returncode != 0


@pytest.mark.real
def test_kafka_takes_its_environment(compose_kafka: RealKafka) -> None:
    variables = services()["kafka"]["environment"]
    metadata = (compose_kafka.directory / "data" / "meta.properties").read_text()
    assert f"cluster.id={variables['CLUSTER_ID']}\n" in metadata
    broker = ConfigResource(ConfigResource.Type.BROKER, variables["KAFKA_NODE_ID"])
    config = compose_kafka.admin.describe_configs([broker])[broker].result(10)
    for variable, value in variables.items():
        name = variable.removeprefix("KAFKA_").lower().replace("_", ".")
        if variable != "CLUSTER_ID" and name != "log.dirs" and not re.search(r":\d", value):
            assert config[name].value == value
    assert config["auto.create.topics.enable"].value == "false"
    for name, entry in config.items():
        if name.endswith((".replication.factor", ".min.isr")):
            assert entry.value == "1", f"{name}: there is one broker"
    # What the health check asks is a place where clients are told that the broker is.
    asked = health_check("kafka")[-1]
    assert f"//{asked}" in variables["KAFKA_ADVERTISED_LISTENERS"]


@pytest.mark.real
def test_the_one_shot_service_makes_the_topics_again_and_again(
    compose_kafka: RealKafka, container: dict[str, dict[str, str]], orders: str, tmp_path: Path
) -> None:
    settings = Settings.from_env(services()["topics"]["environment"])
    assert {orders, settings.dead_letter_topic(orders)} <= set(_topics(compose_kafka.admin))
    run(command("topics"), container["topics"], tmp_path)


@pytest.mark.real
def test_a_worker_delivers_is_healthy_and_stops(
    compose_kafka: RealKafka, container: dict[str, dict[str, str]], orders: str, tmp_path: Path
) -> None:
    environ, check = container["worker"], health_check("worker")
    with running(command("worker"), environ, tmp_path) as worker:
        run([sys.executable, "-c", SEND, orders, "deployment-1"], environ, tmp_path)
        wait_until(lambda: _ids(compose_kafka, orders) == ["deployment-1"], START_S, "the record did not arrive")
        run(check, environ, tmp_path, seconds(services()["worker"]["healthcheck"]["timeout"]))
        started = time.monotonic()
        worker.send_signal(getattr(signal, last("STOPSIGNAL")))
        assert worker.wait(seconds(services()["worker"]["stop_grace_period"])) == 0
        assert time.monotonic() - started < float(environ["KAFKA_DELIVERY_SHUTDOWN_TIMEOUT_S"]), "it is idle"
    hurried = [part.replace("--timeout 5", "--timeout 1") for part in check]
    assert subprocess.run(hurried, env=environ, cwd=tmp_path, capture_output=True).returncode != 0


@pytest.mark.real
def test_flower_asks_for_the_password(container: dict[str, dict[str, str]], tmp_path: Path) -> None:
    port = free_port()
    inside = services()["flower"]["ports"][0].rpartition(":")[2]
    argv = [part.replace(inside, str(port)) for part in command("flower")]
    assert "--address=0.0.0.0" in argv, "what is published is the container's address, and not its loopback"
    assert argv != command("flower"), "it listens on the port that is published"
    with running([*argv, "--address=127.0.0.1"], container["flower"], tmp_path):
        wait_until(lambda: status(f"http://127.0.0.1:{port}/healthcheck") == 200, START_S, "Flower did not start")
        assert status(f"http://127.0.0.1:{port}/") == 401
        assert status(f"http://127.0.0.1:{port}/api/workers") == 401
        assert status(f"http://127.0.0.1:{port}/", AUTH) == 200
        assert status(f"http://127.0.0.1:{port}/metrics") == 200, "open: what the compose file warns of"
        check = [part.replace(inside, str(port)) for part in health_check("flower")]
        run(check, container["flower"], tmp_path)
    assert subprocess.run(check, env=container["flower"], cwd=tmp_path, capture_output=True).returncode != 0


@pytest.mark.real
def test_the_exporter_tells_of_the_fleet_and_stops(container: dict[str, dict[str, str]], tmp_path: Path) -> None:
    port = free_port()
    inside = services()["exporter"]["ports"][0].rpartition(":")[2]

    def here(argv: list[str]) -> list[str]:
        return [part.replace(inside, str(port)).replace("0.0.0.0", "127.0.0.1") for part in argv]  # noqa: S104

    assert here(command("exporter")) != command("exporter"), "it listens on the port that is published"
    check = here(health_check("exporter"))
    with running(here(command("exporter")), container["exporter"], tmp_path) as exporter:
        wait_until(lambda: status(f"http://127.0.0.1:{port}/metrics") == 200, START_S, "the exporter did not start")
        run(check, container["exporter"], tmp_path)
        assert scrape(port).sum("kafka_delivery_up") == 1
        exporter.send_signal(getattr(signal, last("STOPSIGNAL")))
        assert exporter.wait(60) == 0
    assert subprocess.run(check, env=container["exporter"], cwd=tmp_path, capture_output=True).returncode != 0


def _topics(admin: AdminClient) -> dict[str, Any]:
    return admin.list_topics(timeout=10).topics


def _ids(kafka: KafkaLike, topic: str) -> list[str]:
    return [_id(record) for record in read_all(kafka.bootstrap_servers, [topic])]


def _id(record: Consumed) -> str:
    return (dict(record.headers)["message-id"] or b"").decode()


# -- Procfile
HONCHO = """
import sys

from honcho import command, manager

manager.KILL_WAIT = 60  # instead of 5 s, which a slow machine may take
sys.exit(command.main())
"""


@pytest.mark.usefixtures("redis_client")  # for an empty Redis: what an earlier test left would be sent first
def test_honcho_runs_the_procfile_and_ends_all_of_it(
    redis_url: str, kafka: KafkaLike, topic: str, tmp_path: Path
) -> None:
    port = free_port()
    environ = environment(
        {
            "KAFKA_DELIVERY_REDIS_URL": redis_url,
            "KAFKA_DELIVERY_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            "FLOWER_BASIC_AUTH": AUTH,
            "PORT": str(port - 100),  # honcho's step from one line to the next
        }
    )
    shutil.copy(PROCFILE, tmp_path)  # honcho runs everything, and reads .env, where the Procfile is
    start = [sys.executable, "-c", HONCHO, "--no-colour", "start", "-f", "Procfile", "--concurrency", "worker=2"]
    with running(start, environ, tmp_path) as honcho:
        wait_until(lambda: status(f"http://127.0.0.1:{port}/healthcheck") == 200, START_S, "Flower did not start")
        assert status(f"http://127.0.0.1:{port}/") == 401
        run([sys.executable, "-c", SEND, topic, "deployment-2"], environ, tmp_path)
        wait_until(lambda: _ids(kafka, topic) == ["deployment-2"], START_S, "the record did not arrive")
        ready = re.compile(r"worker\.\d .* (worker-\d+@\S+) ready\.$", re.MULTILINE)
        wait_until(
            lambda: len(set(ready.findall((tmp_path / "output.log").read_text()))) == 2,
            START_S,
            "two workers, each with a name of its own, are not ready",
        )
        honcho.terminate()
        honcho.wait(STOP_S)
        log = (tmp_path / "output.log").read_text()
        assert "SIGKILL" not in log, "what honcho sends to processes that do not end by themselves"
        for process in ("worker.1", "worker.2", "flower.1"):
            assert f"{process} stopped" in log, "what honcho says when nobody holds the other end of its pipe"
    assert status(f"http://127.0.0.1:{port}/healthcheck") is None
