"""Dockerfile, docker-compose.yml and Procfile, tried without Docker.

What the containers would run is taken from the files word for word and run here as plain processes, with other ports.
The server properties that the image apache/kafka makes of its environment are made by the image's own class, which
Kafka's jar contains.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pytest
import redis
import yaml  # type: ignore[import-untyped]
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]  # re-exported

from kafka_delivery.settings import ENV_PREFIX, Settings
from kafka_delivery_worker.embedded import OrphanGuard, free_port
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

ROOT = Path(__file__).parents[2]
COMPOSE, DOCKERFILE, PROCFILE = ROOT / "docker-compose.yml", ROOT / "Dockerfile", ROOT / "Procfile"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
AUTH = "me:secret"
START_S, STOP_S = 30, 20

SEND = "import sys; from kafka_delivery import send; send.delay(sys.argv[1], {'n': 1}, message_id=sys.argv[2])"


# -- the files


@functools.cache
def compose() -> dict[str, Any]:
    """The compose file, with its variables replaced as Compose does it."""
    text = COMPOSE.read_text()
    assert set(re.findall(r"(?<!\$)\$\{(\w+)", text)) == {"FLOWER_BASIC_AUTH"}
    content: dict[str, Any] = yaml.safe_load(re.sub(r"(?<!\$)\$\{\w+:\?[^}]*\}", AUTH, text).replace("$$", "$"))
    return content


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile with their arguments, in order."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    logical = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    split = [line.split(None, 1) for line in logical if line]
    return [(instruction, arguments) for instruction, arguments in split]


def last(instruction: str) -> str:
    return [arguments for name, arguments in dockerfile() if name == instruction][-1]


def command(service: str) -> list[str]:
    """What a container of the service runs."""
    argv: list[str] = services()[service].get("command") or json.loads(last("CMD"))
    return argv


def health_check(service: str) -> list[str]:
    kind, *argv = services()[service]["healthcheck"]["test"]
    return ["/bin/sh", "-c", *argv] if kind == "CMD-SHELL" else argv


def seconds(duration: str) -> int:
    parts = re.findall(r"(\d+)([hms])", duration)
    assert "".join(number + unit for number, unit in parts) == duration
    return sum(int(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)


def replaced(text: str, ports: Mapping[str, int]) -> str:
    """`text` with the places where containers find each other replaced by places on this machine."""
    return re.sub(r"[\w.-]*:(\d{4,5})\b", lambda place: f"127.0.0.1:{ports[place[1]]}", text)


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment as a container would have it: nothing of ours in it but `variables`."""
    foreign = re.compile(f"{ENV_PREFIX}|KAFKA_|CELERY_|FLOWER_|CLUSTER_ID|PORT$|PYTHONPATH$")
    kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    return {**kept, "PATH": PATH, "PYTHONUNBUFFERED": "1", "HOSTNAME": socket.gethostname(), **variables}


def run(argv: list[str], environ: Mapping[str, str], directory: Path, timeout: float = 60) -> str:
    """Run to the end; return what it printed. AssertionError with that text if it failed."""
    done = subprocess.run(
        argv, env=environ, cwd=directory, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}"
    return done.stdout


@contextlib.contextmanager
def running(argv: list[str], environ: Mapping[str, str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the background, which is gone afterwards; after a failure its output is shown."""
    log = directory / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, env=environ, cwd=directory, stdout=output, stderr=output, start_new_session=True
        )
    guard = OrphanGuard(process.pid)
    try:
        yield process
    except BaseException:
        print(log.read_text(errors="replace")[-8000:])  # noqa: T201  # pytest shows it with the failure
        raise
    finally:
        guard.release()
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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


# -- Dockerfile


def test_the_dockerfile_passes_the_linter(tmp_path: Path) -> None:
    if shutil.which("hadolint", path=PATH) is None:
        missing("hadolint")
    run(["hadolint", "--no-color", str(DOCKERFILE)], environment({}), tmp_path)


def test_the_image_runs_without_root_and_gets_its_signals() -> None:
    user = last("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "numbers, or an orchestrator cannot know that it is not root"
    (made,) = [arguments for name, arguments in dockerfile() if name == "RUN" and "useradd" in arguments]
    assert f"--uid {user.partition(':')[0]}" in made
    assert f"--gid {user.partition(':')[2]}" in made
    assert json.loads(last("CMD"))[0] == "celery", "the exec form"
    assert not [name for name, _ in dockerfile() if name == "ENTRYPOINT"]
    assert last("STOPSIGNAL") == "SIGTERM"
    assert "PYTHONUNBUFFERED=1" in last("ENV").split()


def test_the_build_context_is_what_the_dockerfile_copies() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignored[0] == "*", "first everything is left out"
    assert {line[1:] for line in ignored if line.startswith("!")} == {name for name, _ in copied()}


def copied() -> Iterator[tuple[str, str]]:
    """What the Dockerfile copies from the build context, and to where."""
    for name, arguments in dockerfile():
        if name == "COPY" and not arguments.startswith("--from="):
            *sources, target = arguments.split()
            for source in sources:
                # Of a directory the content is copied; a file goes by its own name into a directory.
                yield source, target + source if target.endswith("/") and (ROOT / source).is_file() else target


def test_the_image_builds_a_whole_wheel_and_installs_it(tmp_path: Path) -> None:
    """Both RUN instructions of the first stage are run as they are, in a copy of the build context."""
    source, wheels, venv = (tmp_path / name for name in ("source", "wheels", "venv"))
    source.mkdir()
    for name, target in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / target)
    build, install = (
        re.sub(r"--mount=\S+\s+", "", arguments).replace("/wheels", str(wheels)).replace("/opt/venv", str(venv))
        for name, arguments in dockerfile()
        if name == "RUN" and "pip" in arguments
    )
    built = subprocess.run(
        ["/bin/sh", "-c", build], env=environment({}), cwd=source, capture_output=True, text=True, timeout=120
    )
    if "No matching distribution found" in built.stdout + built.stderr:
        missing("a package index that has hatchling")
    assert built.returncode == 0, built.stderr

    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in packed if name.endswith(".dist-info/METADATA")]
    roots = (source / "tasks", source / "workers")
    assert packed >= {str(file.relative_to(root)) for root in roots for file in root.rglob("*") if file.is_file()}
    (extra,) = re.findall(r'"\$1\[(\w+)\]"', install)
    assert f"Provides-Extra: {extra}\n" in metadata

    # What the wheel depends on is here already: it is found where this Python finds it, after the wheel itself.
    run(["/bin/sh", "-c", install], environment({"PIP_NO_DEPS": "1"}), source)
    python = str(venv / "bin" / "python")
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], environment({}), tmp_path)
    there = [path for path in sys.path if path.endswith("-packages")]
    (Path(site.strip()) / "there.pth").write_text("\n".join(there))
    empty = tmp_path / "app"
    empty.mkdir()
    where = "import kafka_delivery, kafka_delivery_worker as worker; print(kafka_delivery.__file__, worker.__file__)"
    for path in run([python, "-c", where], environment({}), empty).split():
        assert Path(path).is_relative_to(venv)
    report = run([python, "-m", "celery", "-A", "kafka_delivery_worker", "report"], environment({}), empty)
    assert "kafka_delivery_worker.consumer:Consumer" in report
    assert "kafka-delivery" in run([str(venv / "bin" / "kafka-delivery"), "--version"], environment({}), empty)


# -- docker-compose.yml, as a file


def test_compose_follows_the_specification(tmp_path: Path) -> None:
    if importlib.util.find_spec("check_jsonschema") is None:
        missing("check-jsonschema")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    run(check, environment({}), tmp_path)
    assert "version" not in compose()


def test_docker_compose_accepts_it_and_wants_a_password_for_flower(tmp_path: Path) -> None:
    probe = ["docker", "compose", "version"]
    if shutil.which("docker") is None or subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("needs docker compose")
    check = ["docker", "compose", "--env-file", "/dev/null", "-f", str(COMPOSE), "config", "--format", "json"]
    config = json.loads(run(check, environment({"FLOWER_BASIC_AUTH": AUTH}), tmp_path))
    assert set(config["services"]) == set(services())
    for name, service in services().items():
        assert config["services"][name].get("environment") == service.get("environment")
    for nothing in ({}, {"FLOWER_BASIC_AUTH": ""}):
        refused = subprocess.run(check, env=environment(nothing), cwd=tmp_path, capture_output=True, text=True)
        assert refused.returncode != 0
        assert "user:password" in refused.stderr


def test_services_wait_for_services_that_can_be_waited_for() -> None:
    for service in services().values():
        for name, wait in service.get("depends_on", {}).items():
            if wait["condition"] == "service_healthy":
                assert "healthcheck" in services()[name]
            else:
                assert wait["condition"] == "service_completed_successfully"
                assert services()[name]["restart"] == "no", "else it never completes"
    assert set(services()["worker"]["depends_on"]) == {"kafka", "redis", "topics"}


def test_ports_are_published_on_the_loopback_interface_only() -> None:
    published = [port for service in services().values() for port in service.get("ports", [])]
    assert len(published) == 4
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)


def test_an_application_on_the_host_finds_the_servers_where_the_defaults_look() -> None:
    defaults = Settings()
    assert f"HOST://{defaults.bootstrap_servers}" in services()["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    for address, service in ((defaults.bootstrap_servers, "kafka"), (defaults.redis_url, "redis")):
        (port,) = re.findall(r":(\d+)", address)
        assert f"127.0.0.1:{port}:{port}" in services()[service]["ports"]


def test_data_outlives_its_container() -> None:
    assert services()["kafka"]["volumes"] == ["kafka-data:/var/lib/kafka/data"]
    assert services()["kafka"]["environment"]["KAFKA_LOG_DIRS"] == "/var/lib/kafka/data"
    assert services()["redis"]["volumes"] == ["redis-data:/data"]
    assert set(compose()["volumes"]) == {"kafka-data", "redis-data"}


def test_there_can_be_many_workers_and_each_may_stop_in_peace() -> None:
    worker = services()["worker"]
    assert not {"container_name", "ports", "hostname"} & set(worker)
    settings = Settings.from_env(worker["environment"])
    # Twice: the operation that hands a record back, and the one that acknowledges it in its old place.
    handing_back = 2 * settings.worker_socket_timeout_s
    assert seconds(worker["stop_grace_period"]) >= settings.shutdown_timeout_s + handing_back


def test_settings_are_known_and_go_to_our_services_only() -> None:
    ours = {name for name, service in services().items() if service.get("build") == "."}
    assert ours == {"topics", "worker", "flower", "exporter"}
    for name, service in services().items():
        given = {variable for variable in service.get("environment", {}) if variable.startswith(ENV_PREFIX)}
        if name in ours:
            assert Settings.from_env(service["environment"]).bootstrap_servers == "kafka:19092"
        else:
            assert not given, "the image would make server properties of them"


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
        assert time.monotonic() - started < 15, "an idle worker has nothing to wait for"
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
        assert exporter.wait(10) == 0
    assert subprocess.run(check, env=container["exporter"], cwd=tmp_path, capture_output=True).returncode != 0


def _topics(admin: AdminClient) -> dict[str, Any]:
    return admin.list_topics(timeout=10).topics


def _ids(kafka: KafkaLike, topic: str) -> list[str]:
    return [_id(record) for record in read_all(kafka.bootstrap_servers, [topic])]


def _id(record: Consumed) -> str:
    return (dict(record.headers)["message-id"] or b"").decode()


# -- Procfile


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
    start = ["honcho", "--no-colour", "start", "-f", "Procfile", "--concurrency", "worker=2"]
    with running(start, environ, tmp_path) as honcho:
        wait_until(lambda: status(f"http://127.0.0.1:{port}/healthcheck") == 200, START_S, "Flower did not start")
        assert status(f"http://127.0.0.1:{port}/") == 401
        run([sys.executable, "-c", SEND, topic, "deployment-2"], environ, tmp_path)
        wait_until(lambda: _ids(kafka, topic) == ["deployment-2"], 20, "the record did not arrive")
        ready = re.compile(r"worker\.\d .* (worker-\d+@\S+) ready\.$", re.MULTILINE)
        wait_until(
            lambda: len(set(ready.findall((tmp_path / "output.log").read_text()))) == 2,
            START_S,
            "two workers, each with a name of its own, are not ready",
        )
        honcho.terminate()
        honcho.wait(STOP_S)
        log = (tmp_path / "output.log").read_text()
        assert "SIGKILL" not in log, "what honcho sends when 5 s were not enough"
        for process in ("worker.1", "worker.2", "flower.1"):
            assert f"{process} stopped" in log, "what honcho says when nobody holds the other end of its pipe"
    assert status(f"http://127.0.0.1:{port}/healthcheck") is None
