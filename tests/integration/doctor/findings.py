"""What `kafka-delivery doctor` found in one run."""

from __future__ import annotations

import json
import time
from typing import Any

from stack import Stack

SECRET = "hunter2"  # noqa: S105  # it is in what the tests configure, and must be in nothing that is printed


NOBODY = "127.0.0.1:1"


class Findings:
    """What one run of the command said."""

    def __init__(self, lines: str, code: int, seconds: float) -> None:
        self.all: list[dict[str, str]] = [json.loads(line) for line in lines.splitlines()]
        self.code = code
        self.seconds = seconds

    def of(self, check: str, about: str = "") -> list[dict[str, str]]:
        return [finding for finding in self.all if finding["check"] == check and about in finding["what"]]

    def level(self, check: str, about: str = "") -> str:
        """The level of the one finding of `check` whose text has `about`."""
        (finding,) = self.of(check, about)
        assert bool(finding["do"]) == (finding["level"] != "ok"), finding
        return finding["level"]

    def bad(self, prefix: str = "") -> dict[str, str]:
        """Level by check of all that is not well."""
        return {f["check"]: f["level"] for f in self.all if f["level"] != "ok" and f["check"].startswith(prefix)}


class _Elsewhere:
    """A Kafka by its address only."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers

    def create_topic(self, name: str, partitions: int = 4) -> None:
        raise NotImplementedError


def examined(redis_url: str, bootstrap_servers: str, *arguments: str, **settings: Any) -> Findings:
    """Run the command as its users do."""
    system = Stack(redis_url, _Elsewhere(bootstrap_servers), settings)
    started = time.monotonic()
    done = system.command("doctor", "--json", *arguments, check=False)
    assert done.stderr == ""
    return Findings(done.stdout, done.returncode, time.monotonic() - started)
