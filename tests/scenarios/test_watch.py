"""`kafka-delivery status --watch` shows what happens, also that nothing can be seen just now, and ends cleanly."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kafka_delivery import send
from kafka_delivery_worker.embedded import MockKafka, Valkey
from servers import wait_until
from stack import BIN, Stack, stack
from watching import ALONE


class Screen:
    """What a terminal shows of a command, without colours."""

    def __init__(self, system: Stack, *arguments: str) -> None:
        ours, its = pty.openpty()
        env = system.env() | {"TERM": "xterm", "COLUMNS": "120", "LINES": "50"}
        self.process = subprocess.Popen(
            [BIN / "kafka-delivery", *arguments], env=env, stdin=its, stdout=its, stderr=its, start_new_session=True
        )
        os.close(its)
        self._written = b""
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, terminal: int) -> None:
        try:
            while some := os.read(terminal, 4096):
                self._written += some
        except OSError:  # how a terminal says that nobody has it any more
            os.close(terminal)

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._written.decode(errors="replace"))

    def forget(self) -> None:
        self._written = b""

    def wait_for(self, pattern: str, timeout: float = 60) -> None:
        wait_until(lambda: re.search(pattern, self.text) is not None, timeout, f"{pattern!r} on the screen")


@contextmanager
def screen(system: Stack, *arguments: str) -> Iterator[Screen]:
    shown = Screen(system, *arguments)
    try:
        yield shown
    finally:
        if shown.process.poll() is None:
            shown.process.kill()
        shown.process.wait()


def test_it_shows_what_happens_survives_redis_and_ends_cleanly(mock_kafka: MockKafka) -> None:
    mock_kafka.create_topic("orders")
    with Valkey() as valkey, stack(valkey.url, mock_kafka) as system, screen(system, "status", "--watch") as shown:
        shown.wait_for(r"waiting in kafka-delivery +│ 0 ")
        send.bulk([{"topic": "orders", "value": "x"} for _ in range(40)])
        shown.wait_for(r"waiting in kafka-delivery +│ 40 ")
        shown.wait_for(r"workers +│ none answered")
        system.worker(*ALONE)
        shown.wait_for(r"orders +│ [1-9]\d*\.\d +│ 0\.0 +│")
        shown.wait_for(r"workers +│ w0@")
        system.workers[0].kill()

        valkey.stop()
        shown.wait_for(r"No answer for \d+ s \(Redis: nothing listens there\); looking again")
        assert shown.process.poll() is None
        shown.forget()
        valkey.start()
        shown.wait_for(r"waiting in kafka-delivery")
        wait_until(lambda: "No answer" not in shown.text[-3_000:], 60, "it to be well again")

        shown.process.send_signal(signal.SIGINT)
        assert shown.process.wait(60) == 0
        assert "Traceback" not in shown.text


def test_programs_get_a_line_a_second(delivery: Stack) -> None:
    command = [str(BIN / "kafka-delivery"), "status", "--watch", "--json"]
    with subprocess.Popen(command, env=delivery.env(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert [json.loads(line)["in_flight"] for line in lines] == [0, 0]
