"""Dockerfile and docker-compose.yml fit the settings and each other."""

from __future__ import annotations

import json
import re

from deployment import ROOT, compose, copied, dockerfile, last, seconds, services
from kafka_delivery.settings import ENV_PREFIX, Settings


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
