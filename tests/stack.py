"""A whole system for one test: an application (this process), a Redis database, a Kafka, and worker processes.

Workers are started as their users start them. The application's side runs in the test's own process, so that a test
can say `send.delay(...)`; `Stack.application` runs code in a process of its own where that matters.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

import command_line
from kafka_delivery import names, settings
from kafka_delivery.celery_app import reload
from kafka_delivery_worker.parking import Parked, ParkingStore
from servers import AnyRedis, Consumed, KafkaLike, read_all, wait_until

BIN = Path(sys.executable).parent

QUICK = {
    # Seconds instead of minutes, and no spread: what is waited for in a test is the thing itself.
    "RETRY_BACKOFF_S": "1",
    "RETRY_BACKOFF_MAX_S": "1",
    "RETRY_JITTER": "false",
    "FEW_BACKOFF_S": "1",
    "DEFER_S": "1",
    "DEFER_MAX_S": "1",
    "RESET_TIMEOUT_S": "1",
    "RESET_TIMEOUT_MAX_S": "2",
    "RAMP_S": "0.5",
    "TOPIC_PROPAGATION_MS": "1500",
    "COUNTS_INTERVAL_S": "0.1",
    "MAX_RETRIES": "3",
    # A machine that stands still for a moment fails no send.
    "ENQUEUE_TIMEOUT_S": "3",
}

IMPATIENT = {"ENQUEUE_TIMEOUT_S": "0.5"}
"""The default again, for tests of a Redis that hangs or is away."""


started: list[Worker] = []
"""Workers that run, or have ended since the last test: a test that fails shows their logs."""


class Worker:
    """A worker process.

    Args:
        env: its environment.
        arguments: options of `celery worker`.
        module: what `-A` names.
    """

    def __init__(self, env: dict[str, str], arguments: tuple[str, ...], module: str = "kafka_delivery_worker") -> None:
        self.log_path = Path(tempfile.mkstemp(prefix="worker-", suffix=".log")[1])
        self._log = self.log_path.open("ab")
        self.process = subprocess.Popen(
            [BIN / "celery", "-A", module, "worker", "--loglevel=INFO", *arguments],
            env=env,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        started.append(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_ready(self, timeout: float = 120) -> Worker:
        wait_until(lambda: " ready." in self.log or self.process.poll() is not None, timeout, "the worker to be ready")
        assert self.process.poll() is None, self.log
        return self

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """End the process the hard way."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout: float = 60) -> float:
        """End the process as a supervisor does; return how long it took (seconds)."""
        started = time.monotonic()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout)
        return time.monotonic() - started


class Stack:
    """Everything between an application's call and a consumer.

    Args:
        redis_url: an empty database.
        kafka: where records go.
        changes: settings without their prefix, over `QUICK`.
    """

    def __init__(self, redis_url: str, kafka: KafkaLike, changes: Mapping[str, Any]) -> None:
        self.kafka = kafka
        self.redis: AnyRedis = redis.Redis.from_url(redis_url, socket_timeout=5)
        self.settings = {
            "REDIS_URL": redis_url,
            "BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            **QUICK,
            **{name: str(value) for name, value in changes.items()},
        }
        self.workers: list[Worker] = []

    def env(self, **changes: Any) -> dict[str, str]:
        """An environment for a process of this stack."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(settings.ENV_PREFIX)}
        given = self.settings | {name: str(value) for name, value in changes.items()}
        return clean | {settings.ENV_PREFIX + name: value for name, value in given.items()}

    def worker(self, *arguments: str, ready: bool = True, **changes: Any) -> Worker:
        """Start a worker; it is ended with the stack."""
        worker = Worker(self.env(**changes), ("-n", f"w{len(self.workers)}@%h", *arguments))
        self.workers.append(worker)
        return worker.wait_ready() if ready else worker

    def application(self, code: str, **env: str) -> str:
        """Run `code` in a Python process of its own and return what it prints."""
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=self.env() | env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def command(
        self, *arguments: str, check: bool = True, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `kafka-delivery` with these arguments, in this process."""
        done = command_line.run(arguments, self.env(), stdin)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def program(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run `kafka-delivery` with these arguments, as a user does."""
        return subprocess.run(
            [BIN / "kafka-delivery", *arguments],
            env=self.env(),
            capture_output=True,
            text=True,
            timeout=60,
            input=stdin,
        )

    def read(self, *topics: str) -> list[Consumed]:
        """What is in these topics now, by an independent consumer."""
        return read_all(self.kafka.bootstrap_servers, list(topics), timeout=60)

    def ids(self, *topics: str) -> list[str]:
        """The message ids in these topics, repeats included."""
        return [message_id(record) for record in self.read(*topics)]

    def wait_for(self, topic: str, ids: set[str], timeout: float = 60) -> list[Consumed]:
        """Wait until all of `ids` are in `topic`; return everything that is in it."""
        found: list[Consumed] = []

        def complete() -> bool:
            found[:] = self.read(topic)
            return ids <= {message_id(record) for record in found}

        wait_until(complete, timeout, f"{len(ids)} records in {topic}")
        return found

    def parked(self) -> list[Parked]:
        return list(ParkingStore(self.redis).list())

    def wait_parked(self, count: int = 1, timeout: float = 60) -> list[Parked]:
        wait_until(lambda: len(self.parked()) >= count, timeout, f"{count} parked")
        return self.parked()

    @property
    def waiting(self) -> int:
        """Messages in the queues, delayed, or held by workers, with either transport."""
        counts = leftovers(self.redis)
        return sum(counts.values()) - counts.get("unacked_index", 0)

    def wait_empty(self, timeout: float = 60) -> None:
        """Wait until nothing waits in a queue and no worker holds a message."""
        wait_until(lambda: self.waiting == 0, timeout, "the queues to be empty")

    def close(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.signal(signal.SIGCONT)
                worker.kill()
        self.redis.close()


@contextmanager
def stack(redis_url: str, kafka: KafkaLike, **changes: Any) -> Iterator[Stack]:
    """A stack whose application is this process: `send.delay` goes to its Redis while it is open."""
    system = Stack(redis_url, kafka, changes)
    before = dict(os.environ)
    try:
        os.environ.update(system.env())
        reload()
        yield system
    finally:
        system.close()
        os.environ.clear()
        os.environ.update(before)
        reload()


# What may be there when nothing waits: bookkeeping, and what is parked.
KEPT = {
    names.PARKED,
    names.PARKED_INDEX,
    names.PARKED_ROOM,
    names.COUNTS,
    names.LEASES,
    names.LEASE_CLOCK,
    names.LEASES_BEGAN,
    names.LEASES_ENDED,
    names.DEATHS,
    names.CLUSTERS,
}

CIRCUITS = names.CIRCUITS.partition("{")[0]

_SIZES = """
local command, found = {list = 'LLEN', hash = 'HLEN', zset = 'ZCARD'}, {}
for _, pattern in ipairs(ARGV) do
  for _, key in ipairs(redis.call('KEYS', pattern)) do
    local count = command[redis.call('TYPE', key).ok]
    if count then
      found[#found + 1] = key
      found[#found + 1] = redis.call(count, key)
    end
  end
end
return found
"""
"""All at one moment: who looks at each key in turn may find a message that moves between them in none."""


def leftovers(client: redis.Redis) -> dict[str, int]:
    """What still waits in Redis, with either transport: key -> messages in lists, sorted sets and hashes."""
    found: Any = client.eval(_SIZES, 0, "kafka-delivery*", "unacked*")
    counts = {key.decode(): count for key, count in zip(found[::2], found[1::2], strict=True)}
    return {
        key: count
        for key, count in counts.items()
        if key not in KEPT and not key.startswith((CIRCUITS, names.REDRIVE, names.FAILED, names.PAUSED))
    }


def message_id(record: Consumed) -> str:
    """The id that a record says it has: the first header of that name."""
    return next(value.decode() for name, value in record.headers if name == "message-id" and value is not None)
