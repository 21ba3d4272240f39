"""A redrive of what is parked that is interrupted: nothing is lost, and nothing is repeated."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from collections.abc import Iterator

import pytest

from kafka_delivery.names import PARKED_LOCK, QUEUE
from kafka_delivery_worker.parking import ParkingStore
from parked_items import park, queued, run
from servers import OtherKafka, wait_until
from stack import BIN, Stack, stack
from watching import emptied


@pytest.fixture
def system(redis_url: str) -> Iterator[Stack]:
    """No worker, and a Kafka that nobody asks."""
    with stack(emptied(redis_url), OtherKafka("127.0.0.1:1")) as system:
        yield system


@pytest.fixture
def store(system: Stack) -> ParkingStore:
    return ParkingStore(system.redis)


class TestInterrupted:
    """A process of its own, since signals are the process's."""

    COUNT = 100
    """At two a second they last for most of a minute: the run is not over before the signal."""

    @pytest.fixture
    def process(self, system: Stack, store: ParkingStore) -> Iterator[subprocess.Popen[str]]:
        for number in range(self.COUNT):
            park(store, f"a-{number}")
        started = subprocess.Popen(
            [BIN / "kafka-delivery", "parked", "redrive", "--all", "--yes", "--rate", "2/s"],
            env=system.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: system.redis.llen(QUEUE) >= 2, 60, "some to be sent")
        yield started
        started.kill()
        started.communicate()

    @pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.smoke), signal.SIGTERM])
    def test_a_signal_ends_it_between_two_and_the_next_run_goes_on(
        self, system: Stack, store: ParkingStore, process: subprocess.Popen[str], number: signal.Signals
    ) -> None:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "Run it again to go on" in err
        left = {item.id for item in store.list()}
        assert 0 < len(left) < self.COUNT
        assert f"{self.COUNT - len(left)} redriven, {len(left)} still parked" in out
        assert len(queued(system)) == self.COUNT - len(left)

        run("redrive", "--all", "--yes")
        assert Counter(queued(system)) == Counter(f"a-{number}" for number in range(self.COUNT))
        assert store.count() == 0

    def test_killed_it_repeats_nothing(
        self, system: Stack, store: ParkingStore, process: subprocess.Popen[str]
    ) -> None:
        process.kill()
        process.communicate()
        system.redis.delete(PARKED_LOCK)  # instead of waiting for its end
        run("redrive", "--all", "--yes")
        assert Counter(queued(system)) == Counter(f"a-{number}" for number in range(self.COUNT))

    @pytest.mark.smoke
    def test_frozen_past_its_lock_it_wakes_and_sends_nothing(
        self, system: Stack, store: ParkingStore, process: subprocess.Popen[str]
    ) -> None:
        process.send_signal(signal.SIGSTOP)
        system.redis.delete(PARKED_LOCK)  # instead of waiting for its end
        run("redrive", "--all", "--yes")
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "the lock on the parking store was lost" in err
        assert Counter(queued(system)) == Counter(f"a-{number}" for number in range(self.COUNT))
