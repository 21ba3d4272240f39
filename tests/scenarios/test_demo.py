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

from servers import RealKafka, RealRedis, wait_until
from stack import BIN

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc"),
]


class Demo:
    """A `kafka-delivery demo` as a user starts it.

    Args:
        arguments: of the demo.
        ignored: names of signals that are ignored where it is started, as shells and `nohup` do it.
        environment: more variables.
    """

    def __init__(self, *arguments: str, ignored: str = "", **environment: str) -> None:
        self._mark = f"DEMO_MARK={uuid.uuid4()}"
        given = {name: text for name, text in os.environ.items() if not name.startswith("KAFKA_DELIVERY_")}
        self.process = subprocess.Popen(
            ["sh", "-c", f'trap "" {ignored}; exec "$@"', "sh", BIN / "kafka-delivery", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**given, **environment, **dict([self._mark.split("=")]), "PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
        )

    def until(self, text: str) -> str:
        """Wait until it has shown `text`; return what it has shown since the last call."""
        assert self.process.stdout is not None
        shown = ""
        for line in self.process.stdout:
            shown += line
            if text in line:
                return shown
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

    def start(*arguments: str, **given: str) -> Demo:
        started.append(Demo(*arguments, **given))
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


def test_every_record_is_accounted_for_and_ctrl_c_ends_a_demo_that_stays(demo: Callable[..., Demo]) -> None:
    # A user's own settings are not for the embedded servers.
    mine = {"KAFKA_DELIVERY_BOOTSTRAP_SERVERS": "127.0.0.1:1", "KAFKA_DELIVERY_NO_SUCH_SETTING": "1"}
    run = demo("--records", "300", "--stay", **mine)
    shown = run.until("stays open until Ctrl-C")
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    assert "are stopped" in run.end()

    assert run.process.returncode == 0
    assert run.family() == {}
    found = account(shown)
    # The mock may append what it had when the brokers went down, and append the resend too: real brokers drop that.
    assert found.pop("duplicates") < 30
    assert found == {"accepted": 303, "delivered": 300, "dead-lettered": 2, "parked": 1, "lost": 0}
    assert "never for production" in shown
    assert re.search(r"record: 2000\d{3} bytes .* more than KAFKA_DELIVERY_MAX_RECORD_BYTES=1000000", shown)

    # The outage stops deliveries and no sends; after it all is delivered, without a dead letter.
    down, up, later = (
        (int(queued), int(delivered))
        for queued, delivered in re.findall(r"(?:down|after 5 s|later) +queued +(\d+) +delivered +(\d+)", shown)
    )
    assert up[0] > down[0] + 60
    assert up[1] <= down[0]
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
    shown = run.end()

    assert run.process.returncode == 128 + number
    assert shown.splitlines()[-1] == f"Stopped by {number.name}; nothing is left running."
    assert run.family() == {}


def test_a_signal_while_it_starts_stops_everything(demo: Callable[..., Demo]) -> None:
    run = demo()
    wait_until(lambda: any(" worker " in command for command in run.family().values()), 60, "no worker was started")
    run.process.send_signal(signal.SIGTERM)
    assert "Stopped by SIGTERM" in run.end()
    assert run.process.returncode == 128 + signal.SIGTERM
    assert run.family() == {}


def test_of_ignored_signals_only_hangups_stay_ignored(demo: Callable[..., Demo]) -> None:
    """`nohup` asks for the one. A shell ignores the other in its background, where Ctrl-C must end the demo too."""
    run = demo("--records", "90", ignored="HUP INT")
    run.until("Redis")
    run.process.send_signal(signal.SIGHUP)
    run.until("all brokers are down")
    run.process.send_signal(signal.SIGINT)
    assert run.end().splitlines()[-1] == "Stopped by SIGINT; nothing is left running."
    assert run.process.returncode == 128 + signal.SIGINT
    assert run.family() == {}


def test_nothing_outlives_a_killed_demo(demo: Callable[..., Demo]) -> None:
    run = demo("--records", "90")
    run.until("all brokers are down")
    run.process.kill()
    run.process.wait()
    wait_until(lambda: run.family() == {}, 60, "some process outlived the demo")


def test_a_worker_that_dies_ends_the_demo_with_its_log(demo: Callable[..., Demo]) -> None:
    run = demo("--records", "90")
    run.until("all brokers are down")
    (worker,) = [pid for pid, command in run.family().items() if " worker " in command]
    os.kill(worker, signal.SIGKILL)
    shown = run.end()
    assert run.process.returncode == 1
    assert "Error: the worker ended with exit code -9; its log" in shown
    assert "kafka-delivery-dlq" in shown.partition("ends:")[2]  # of Celery's banner
    assert run.family() == {}


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
