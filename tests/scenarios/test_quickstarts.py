"""The quickstart pages, done as they say: each block in turn, in an empty folder, and the order is in Kafka.

A Python block belongs to the file that the line before it names. A shell block is run line by line; what would not end
(a worker, a web server) goes on until the page is done. Nothing is changed in a block. Where Redis, Kafka and the site
are comes from the environment, since those of this machine need not be on their usual ports.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kafka_delivery.settings import ENV_PREFIX
from kafka_delivery_worker.embedded import free_port
from servers import RealKafka, RealRedis, have_real_redis, missing, read_all, wait_until
from stack import BIN, message_id

DOCS = Path(__file__).parent.parent.parent / "docs"

BLOCK = re.compile(r"^(?P<before>[^\n]*)\n\n```(?P<language>\w+)\n(?P<text>.*?)(?=^```$)", re.DOTALL | re.MULTILINE)

UNENDING = re.compile(r"(gunicorn|uvicorn)\b|.*\bworker --loglevel=INFO$")

pytestmark = pytest.mark.real


@dataclass(frozen=True)
class Block:
    before: str
    language: str
    text: str

    @property
    def file(self) -> str:
        """The file that it belongs to."""
        found = re.fullmatch(r"(?:Add to )?`([\w/.]+)`:", self.before)
        assert found is not None, f"{self.before!r} names no file"
        return found[1]


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text()
    found = [Block(**one.groupdict()) for one in BLOCK.finditer(text)]
    assert len(found) == text.count("\n```") / 2, "each block is found, and says its language"
    return found


class Newcomer:
    """Somebody with an empty folder and the page before them."""

    def __init__(self, folder: Path, kafka: RealKafka, redis: RealRedis) -> None:
        self.folder, self.port = folder, free_port()
        home = folder.parent / "home"
        home.mkdir()
        (home / ".curlrc").write_text(f'connect-to = "localhost:8000:127.0.0.1:{self.port}"\nsilent\nfail-with-body\n')
        clean = {name: value for name, value in os.environ.items() if not name.startswith((ENV_PREFIX, "CELERY_"))}
        self.env = clean | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "CURL_HOME": str(home),
            "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{self.port}",
            "UVICORN_PORT": str(self.port),
            ENV_PREFIX + "REDIS_URL": redis.url,
            ENV_PREFIX + "BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        }
        self.log = folder.parent / "log"
        self.running: list[subprocess.Popen[bytes]] = []
        self.said: dict[str, str] = {}

    def do(self, block: Block) -> None:
        if block.language == "python":
            path = self.folder / block.file
            before = path.read_text() if block.before.startswith("Add to ") else ""
            path.write_text(before + ("\n\n" if before else "") + block.text)
            return
        assert block.language == "sh"
        for line in block.text.splitlines():
            if UNENDING.match(line):
                self.start(line)
            else:
                self.said[line.split()[0]] = self.run(line)

    def start(self, line: str) -> None:
        with self.log.open("ab") as log:
            started = ["bash", "-c", f"exec {line}"]
            self.running.append(
                subprocess.Popen(started, env=self.env, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)
            )
        # A person waits until it says so.
        ready = " ready." if " worker " in line else "Booting worker|Application startup complete"
        try:
            wait_until(lambda: re.search(ready, self.output) is not None, 60, line)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.output}") from None

    def run(self, line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line], env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}{self.output}"
        return done.stdout

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def leave(self) -> None:
        for process in reversed(self.running):
            process.terminate()
        for process in self.running:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRedis]:
    if not have_real_redis():
        missing("redis-server")
    with RealRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.mark.parametrize("page", ["django.md", "flask.md", "fastapi.md"])
def test_who_does_as_the_page_says_finds_the_order_in_kafka(
    page: str, real_kafka: RealKafka, redis: RealRedis, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    newcomer = Newcomer(folder, real_kafka, redis)
    try:
        for block in blocks(page):
            newcomer.do(block)
        answer = json.loads(newcomer.said["curl"])
        identifier = answer["message_id"]

        def arrived() -> bool:
            return identifier in {message_id(one) for one in read_all(real_kafka.bootstrap_servers, ["orders"])}

        wait_until(arrived, 60, f"{identifier} in Kafka\n{newcomer.output}")
        assert answer["id"] == 1
    finally:
        newcomer.leave()


@pytest.mark.parametrize("page", ["django.md", "flask.md", "fastapi.md"])
def test_a_page_is_short(page: str) -> None:
    assert len((DOCS / page).read_text().splitlines()) <= 80
