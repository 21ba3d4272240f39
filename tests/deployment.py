"""What Dockerfile, docker-compose.yml and Procfile say, and how it is run here without Docker.

What the containers would run is taken from the files word for word and run here as plain processes, with other
ports.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from kafka_delivery.settings import ENV_PREFIX
from kafka_delivery_worker.embedded import OrphanGuard

ROOT = Path(__file__).parents[1]
COMPOSE, DOCKERFILE, PROCFILE = ROOT / "docker-compose.yml", ROOT / "Dockerfile", ROOT / "Procfile"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
AUTH = "me:secret"
START_S, STOP_S = 60, 60
SEND = "import sys; from kafka_delivery import send; send.delay(sys.argv[1], {'n': 1}, message_id=sys.argv[2])"


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
    """Return the command of a container of the service."""
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


def copied() -> Iterator[tuple[str, str]]:
    """Yield each source in the build context that the Dockerfile copies, and its target."""
    for name, arguments in dockerfile():
        if name == "COPY" and not arguments.startswith("--from="):
            *sources, target = arguments.split()
            for source in sources:
                # Of a directory the content is copied; a file goes by its own name into a directory.
                yield source, target + source if target.endswith("/") and (ROOT / source).is_file() else target
