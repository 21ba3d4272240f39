"""Write the terminal output in dead-letters.md anew: two hundred dead letters of five kinds, made by real failures on a
real Kafka, from the alert to the empty dead-letter topic. Needs java, as the tests do.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from five_kinds import FiveKinds  # noqa: E402
from kafka_delivery_worker.embedded import Valkey  # noqa: E402
from servers import RealKafka, wait_until  # noqa: E402
from stack import BIN, Stack, stack  # noqa: E402
from watching import ALONE  # noqa: E402

PAGE = HERE / "dead-letters.md"
TOPIC = "orders"
COUNT = 40
ROWS, COLUMNS = 50, 110


class Terminal:
    """Runs commands as somebody at a terminal sees them."""

    def __init__(self, system: Stack) -> None:
        self._env = system.env() | {"TERM": "dumb", "COLUMNS": str(COLUMNS), "LINES": str(ROWS), "LOGNAME": "ops"}

    def run(self, line: str, answer: str = "") -> str:
        """The command line and what it prints; `answer` is typed where it asks."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        argv = shlex.split(line)
        with (
            subprocess.Popen(  # noqa: S603  # the commands of this page
                [BIN / argv[0], *argv[1:]], env=self._env, stdin=theirs, stdout=theirs, stderr=theirs
            ) as process
        ):
            os.close(theirs)
            said = b""
            while part := _read(ours):
                said += part
                if answer and said.endswith(b"[y/N]: "):
                    os.write(ours, answer.encode() + b"\n")
            os.close(ours)
            process.wait()
        text = re.sub(r"\r+\n", "\n", said.decode())
        return "\n".join(one.rstrip() for one in [f"$ {line}", *text.splitlines()]).rstrip()


def _read(file: int) -> bytes:
    try:
        return os.read(file, 65_536)
    except OSError:  # a terminal's way to say that nobody is there any more
        return b""


def story(system: Stack, kafka: RealKafka) -> dict[str, str]:
    """Each capture by its name on the page."""
    letters = FiveKinds(system, kafka, TOPIC, COUNT)
    letters.make(timeout=120)
    terminal = Terminal(system)
    command = f"kafka-delivery dead-letters %s {TOPIC}"
    found = {
        "alert": terminal.run("kafka-delivery dead-letters topics"),
        "summary": terminal.run(command % "summary"),
        "list": terminal.run(command % "list" + " --error-code TOPIC_AUTHORIZATION_FAILED --since 2h --limit 3"),
    }
    place = re.findall(r"show orders (\d+:\d+)", found["list"])[0]
    found["show"] = terminal.run(command % "show" + f" {place}")
    letters.repair()
    found["dry-run"] = terminal.run(command % "redrive" + " --dry-run")

    def redrive_forbidden() -> None:
        line = command % "redrive" + " --error-code TOPIC_AUTHORIZATION_FAILED --rate 10/s"
        found["redrive"] = Terminal(system).run(line, "y")

    running = threading.Thread(target=redrive_forbidden)
    running.start()
    wait_until(lambda: len(letters.delivered()) > 2, 30, "the first to arrive")
    found["two-at-once"] = terminal.run(command % "redrive")
    running.join()
    found["discard"] = terminal.run(command % "discard" + ' --message-id keyless-1 --reason "a test order"', "y")
    found["rest"] = terminal.run(command % "redrive", "y")
    found["empty"] = terminal.run("kafka-delivery dead-letters topics")
    found["history"] = terminal.run("kafka-delivery dead-letters history")
    return found


def written(page: str, captures: dict[str, str]) -> str:
    """`page` with these captures between its markers."""
    for name, text in captures.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        between = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        block = "\n".join([begin, "", "```", text, "```", "", end])
        page, replaced = between.subn(lambda _, block=block: block, page)  # type: ignore[misc]
        if replaced != 1:
            raise ValueError(f"{PAGE.name} has {replaced} places for {name}")
    return page


def main() -> None:
    with (
        tempfile.TemporaryDirectory() as directory,
        RealKafka(Path(directory) / "kafka", authorizer=True) as kafka,
        Valkey() as redis,
        stack(redis.url, kafka) as system,
    ):
        kafka.create_topic(f"{TOPIC}-dlq", partitions=1)
        system.worker(*ALONE)
        PAGE.write_text(written(PAGE.read_text(), story(system, kafka)))


if __name__ == "__main__":
    main()
