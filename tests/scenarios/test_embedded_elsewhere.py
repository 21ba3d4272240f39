"""Embedded servers and other processes: who else can use them, and with whom they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients import refuses
from kafka_delivery_worker.embedded import MockKafka
from servers import (
    read_all,
    wait_until,
)


def python(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Another process, in a session of its own, that talks over its standard output."""
    command, environ = [sys.executable, "-c", script, *arguments], os.environ | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environ)


def test_another_process_can_use_the_mock(mock_kafka: MockKafka) -> None:
    mock_kafka.create_topic("topic")
    script = """
import sys
from confluent_kafka import Producer
producer = Producer({"bootstrap.servers": sys.argv[1], "allow.auto.create.topics": False})
producer.produce("topic", b"from afar")
print(producer.flush(60))
"""
    with python(script, mock_kafka.bootstrap_servers) as process:
        assert process.communicate(timeout=60)[0] == "0\n"
    assert [record.value for record in read_all(mock_kafka.bootstrap_servers, ["topic"])] == [b"from afar"]


def test_a_fork_neither_uses_nor_ends_the_mock() -> None:
    script = """
import os
from confluent_kafka import Producer
from kafka_delivery_worker.embedded import MockKafka
mock = MockKafka()
child = os.fork()
if child == 0:
    try:
        mock.create_topic("from the fork")
    except RuntimeError:
        mock.close()
        os._exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
mock.create_topic("topic")
print(code, "topic" in Producer({"bootstrap.servers": mock.bootstrap_servers}).list_topics(timeout=30).topics)
"""
    with python(script) as process:
        assert process.communicate(timeout=60)[0] == "7 True\n"


VALKEY_IN_ANOTHER_PROCESS = """
import signal
import redis
from kafka_delivery_worker.embedded import Valkey
with Valkey() as valkey:
    try:
        print(valkey.url, flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print(redis.Redis.from_url(valkey.url).ping(), flush=True)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that starts a Valkey and says where."""
    with python(VALKEY_IN_ANOTHER_PROCESS, TMPDIR=str(tmp_path)) as process:
        yield process
        process.kill()


def url_of(owner: subprocess.Popen[str]) -> str:
    assert owner.stdout is not None
    return owner.stdout.readline().strip()


def test_valkey_dies_with_a_killed_owner(owner: subprocess.Popen[str]) -> None:
    url = url_of(owner)
    assert not refuses(url)
    owner.kill()
    wait_until(lambda: refuses(url), 30, "Valkey outlived its owner")


def test_ctrl_c_reaches_the_owner_and_not_valkey(owner: subprocess.Popen[str]) -> None:
    url = url_of(owner)
    os.killpg(owner.pid, signal.SIGINT)
    assert owner.communicate(timeout=60)[0] == "True\n"
    assert owner.returncode == 0
    assert refuses(url)
