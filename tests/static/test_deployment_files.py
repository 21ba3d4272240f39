"""Dockerfile and docker-compose.yml, as other people's tools see them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deployment import AUTH, COMPOSE, DOCKERFILE, PATH, compose, environment, run, services
from servers import (
    missing,
)


def test_the_dockerfile_passes_the_linter(tmp_path: Path) -> None:
    if shutil.which("hadolint", path=PATH) is None:
        missing("hadolint")
    run(["hadolint", "--no-color", str(DOCKERFILE)], environment({}), tmp_path)


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
