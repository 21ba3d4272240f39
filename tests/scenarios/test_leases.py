"""What a dead worker held is back within a lease, at the front; what a living one holds is its own, whatever happens to
its connections and to Redis. Celery's own workers may come before, after and beside.
"""

from __future__ import annotations

import json
import os
import signal
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from operator import gt
from pathlib import Path
from typing import Any

import pytest

from kafka_delivery import dead_letter, send
from kafka_delivery.names import GATE, LEASE_CLOCK
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka, Valkey
from servers import RealRedis, have_real_redis, missing, valkey_binary, wait_until
from stack import Stack, Worker, stack
from watching import ALONE, looks, other_worker, outage_after_the_first_answer, two_in_an_outage

pytestmark = pytest.mark.long

TOPIC = "leased"
QUEUE = "kafka-delivery"
LEASE_S = 5
"""A worker that stands still for two seconds is not taken for dead: it renews its lease every third of it."""

NO_PROBES = {"RESET_TIMEOUT_S": "60", "RESET_TIMEOUT_MAX_S": "60"}


@pytest.fixture
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC)
        kafka.create_topic(f"{TOPIC}-dlq")
        yield kafka


@pytest.fixture
def system(mock: MockKafka) -> Iterator[Stack]:
    """Without a worker yet."""
    with Valkey() as valkey, stack(valkey.url, mock, LEASE_S=LEASE_S, LINGER_MS=0) as system:
        yield system


def records(count: int) -> list[str]:
    return send.bulk([{"topic": TOPIC, "value": str(n)} for n in range(count)])


def held(system: Stack) -> int:
    return sum(system.redis.hlen(key) for key in system.redis.scan_iter("kafka-delivery:held:1:*"))


def queued(system: Stack) -> list[str]:
    """Ids of what waits, the next one first."""
    return [json.loads(item)["headers"]["id"] for item in reversed(system.redis.lrange(QUEUE, 0, -1))]


def delivered(system: Stack) -> int:
    return counts.read(system.redis).get(TOPIC, {}).get("delivered", 0)


def repeats(system: Stack, ids: list[str]) -> Counter[str]:
    """How often each record arrived, which all of them did."""
    system.wait_empty(60)
    times = Counter(system.ids(TOPIC))
    assert set(ids) - set(times) == set(), "lost"
    return times


def renewed_s(system: Stack) -> float:
    """For how long somebody has renewed without a gap."""
    seconds, microseconds = system.redis.time()
    since: Any = system.redis.hget(LEASE_CLOCK, "since")
    return float(seconds + microseconds / 1e6 - int(since) / 1000)


def down_for_long(system: Stack, mock: MockKafka) -> None:
    """Take Kafka down, and let no circuit stop the claims or add a probe to them, however long it takes."""
    system.command("breaker", "force-closed", "--reason", "a test")
    mock.down()


def reaped(*workers: Worker) -> list[str]:
    return [line for worker in workers for line in worker.log.splitlines() if "lease.reaped" in line]


class TestDeadWorkers:
    @pytest.mark.smoke
    def test_what_one_held_is_back_within_a_lease_at_the_front(self, system: Stack, mock: MockKafka) -> None:
        down_for_long(system, mock)
        ids = records(130)
        dead, living = two_in_an_outage(system, mock, MAX_IN_FLIGHT=50)
        wait_until(lambda: held(system) == 50, 60, "fifty in flight")
        living.signal(signal.SIGCONT)
        wait_until(lambda: held(system) == 100, 60, "a hundred in flight")
        wait_until(lambda: renewed_s(system) > LEASE_S, 60, "somebody to have renewed for a whole lease")

        dead.kill()
        killed = time.monotonic()
        wait_until(lambda: system.redis.llen(QUEUE) == 80, 60, "its messages to be back")

        # A lease, and the time until somebody looks; it begins anew where nobody could renew.
        assert min(time.monotonic() - killed, renewed_s(system)) < 10 * LEASE_S
        assert queued(system) == ids[:50] + ids[100:]
        assert held(system) == 50
        mock.up()
        times = repeats(system, ids)
        assert set(times.values()) == {1}  # Kafka never saw what the dead one had in flight
        assert len(reaped(living)) == 1

    def test_one_that_was_stopped_for_longer_than_its_lease_repeats_at_most_what_it_held(
        self, system: Stack, mock: MockKafka
    ) -> None:
        down_for_long(system, mock)
        ids = records(200)
        stopped, other = two_in_an_outage(system, mock, MAX_IN_FLIGHT=50)
        wait_until(lambda: held(system) == 50, 60, "fifty in flight")
        other.signal(signal.SIGCONT)
        wait_until(lambda: held(system) == 100, 60, "a hundred in flight")
        stopped.signal(signal.SIGSTOP)
        wait_until(lambda: held(system) == 50, 60, "its lease to end")
        mock.up()
        wait_until(lambda: delivered(system) >= 200, 60, "the other to deliver all")
        system.wait_empty()

        stopped.signal(signal.SIGCONT)
        more = records(50)

        times = repeats(system, ids + more)
        assert {task_id for task_id, count in times.items() if count > 1} <= set(ids[:50])
        assert max(times.values()) <= 2
        assert stopped.process.poll() is None
        assert reaped(stopped) == []
        assert len(reaped(other)) == 1
        wait_until(lambda: system.redis.zcard("kafka-delivery:leases:1") == 2, 60, "both to have a lease again")

    def test_what_takes_its_workers_down_is_parked_and_the_rest_is_delivered(
        self, system: Stack, mock: MockKafka, tmp_path: Path
    ) -> None:
        """A message whose decoding crashes the process, as a bug in a C library might."""
        poison = send.delay(TOPIC, "poison", message_id="poison")
        ids = records(20)
        code = """
            import os, signal
            from kafka_delivery import record
            from kafka_delivery_worker import app, lane

            unpack = record.unpack

            def crash(packed):
                if packed == "poison":
                    os.kill(os.getpid(), signal.SIGKILL)
                return unpack(packed)

            record.unpack = lane.unpack = crash
        """
        (tmp_path / "crashing.py").write_text(textwrap.dedent(code))
        env = system.env(LEASE_S=0.5) | {"PYTHONPATH": str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", "")}
        for _ in range(12):  # what a supervisor does
            worker = Worker(env, ("-n", "crashing@%h", *ALONE), "crashing")
            system.workers.append(worker)
            wait_until(
                lambda w=worker: w.process.poll() is not None or bool(system.parked()),  # type: ignore[misc]
                20,
                "another crash",
            )
            if system.parked():
                break
        (parked,) = system.parked()
        assert (parked.id, parked.kind) == (poison.id, "poison")
        assert "poison" not in repeats(system, ids)


BUSY = """
    import os, threading, time
    from pathlib import Path
    from celery.signals import worker_ready
    from kombu.asynchronous import get_event_loop
    from kafka_delivery_worker import app

    def block():
        os.write(2, b"BUSY\\n")
        while not Path({other_word!r}).exists():
            time.sleep(0.02)
        os.write(2, b"IDLE\\n")

    def wait_for_the_word(hub):
        while not Path({word!r}).exists():
            time.sleep(0.02)
        hub.call_soon(block)

    @worker_ready.connect
    def ready(**_):
        threading.Thread(target=wait_for_the_word, args=(get_event_loop(),), daemon=True).start()
"""


BUSY_LEASE_S = 3


class TestBusyWorkers:
    def test_one_whose_event_loop_is_stuck_for_three_leases_loses_nothing(
        self, system: Stack, mock: MockKafka, tmp_path: Path
    ) -> None:
        """Something in it blocks, a slow DNS or somebody's signal receiver; it is alive, and says so."""
        down_for_long(system, mock)
        word, other_word = tmp_path / "word", tmp_path / "other word"
        code = BUSY.format(word=str(word), other_word=str(other_word))
        with outage_after_the_first_answer(system, mock):
            busy = other_worker(system, tmp_path, code, LEASE_S=BUSY_LEASE_S)
        (sent,) = records(1)
        wait_until(lambda: held(system) == 1, 60, "it to be in flight")
        watching = system.worker(*ALONE, LEASE_S=BUSY_LEASE_S)
        (key,) = system.redis.scan_iter("kafka-delivery:held:1:*")
        wait_until(lambda: renewed_s(system) > BUSY_LEASE_S, 60, "the end of a lease to be believed")

        word.touch()
        wait_until(lambda: "BUSY" in busy.log, 60, "the event loop to be stuck")
        with looks(system.redis) as looked:
            looked.renewals(9, workers=2)  # three times a lease
        other_word.touch()
        wait_until(lambda: "IDLE" in busy.log, 60, "it to go on")

        assert system.redis.hlen(key) == 1, "it is still its own"
        mock.up()
        assert repeats(system, [sent]) == {sent: 1}
        assert reaped(busy, watching) == []
        assert busy.process.poll() is None


LOST = "Connection to broker lost"


def missed(worker: Worker) -> int:
    """How often a worker has said that Redis is away: it lost its connection, or could not connect again."""
    return worker.log.count(LOST) + worker.log.count("Cannot connect to")


class TestBrokenConnections:
    def test_nothing_is_lost_and_nothing_is_repeated(self, system: Stack, mock: MockKafka) -> None:
        system.settings["LEASE_S"] = "30"
        mock.delay(-1, 30)
        ids = records(3000)
        workers = [system.worker(*ALONE, MAX_IN_FLIGHT=200) for _ in range(2)]
        for n in range(1, 6):
            wait_until(lambda n=n: delivered(system) > n * 300, 60, "some deliveries")  # type: ignore[misc]
            for kind in ("pubsub", "normal"):
                system.redis.client_kill_filter(_type=kind, skipme=True)
        times = repeats(system, ids)
        assert [task_id for task_id, count in times.items() if count > 1] == []
        assert reaped(*workers) == []
        wait_until(lambda: sum(worker.log.count(LOST) for worker in workers) >= 2, 60, "it to be said")

    @pytest.mark.parametrize("binary", ["wheel", pytest.param("redis-server", marks=pytest.mark.real)])
    def test_redis_is_killed_and_restarted(self, mock: MockKafka, tmp_path: Path, binary: str) -> None:
        """With its AOF written always: what it has confirmed, it knows again."""
        if binary == "redis-server" and not have_real_redis():
            missing("redis-server")
        program = "redis-server" if binary == "redis-server" else valkey_binary()
        mock.delay(-1, 30)
        with (
            RealRedis(tmp_path, binary=program, options={"appendfsync": "always"}) as server,
            stack(server.url, mock, LEASE_S=LEASE_S, LINGER_MS=0) as system,
        ):
            workers = [system.worker(*ALONE, MAX_IN_FLIGHT=100) for _ in range(2)]
            ids = records(2000)
            for n in (1, 2):
                wait_until(lambda n=n: delivered(system) > n * 300, 60, "some deliveries")  # type: ignore[misc]
                before = [missed(worker) for worker in workers]
                server.kill()
                wait_until(
                    lambda before=before: all(map(gt, map(missed, workers), before)),  # type: ignore[misc]
                    60,
                    "the workers to notice it",
                )
                server.start()
            times = repeats(system, ids)
            assert [task_id for task_id, count in times.items() if count > 1] == []
            assert reaped(*workers) == []
            assert all(worker.process.poll() is None for worker in workers)

    def test_redis_hangs_for_longer_than_a_lease(self, mock: MockKafka, tmp_path: Path) -> None:
        """Nobody could renew; that nobody did proves nothing."""
        with (
            RealRedis(tmp_path, binary=valkey_binary()) as server,
            # Kafka is away all the time. Without Redis a worker goes by a circuit of its own, and a probe of that would
            # be one more in flight.
            stack(server.url, mock, LEASE_S=BUSY_LEASE_S, LINGER_MS=0, **NO_PROBES) as system,
        ):
            down_for_long(system, mock)
            ids = records(300)
            workers = two_in_an_outage(system, mock, MAX_IN_FLIGHT=100)
            workers[1].signal(signal.SIGCONT)
            wait_until(lambda: held(system) == 200, 60, "two hundred in flight")
            wait_until(lambda: renewed_s(system) > BUSY_LEASE_S, 60, "the end of a lease to be believed")
            server.pause()
            time.sleep(BUSY_LEASE_S + 1)  # the outage itself
            server.resume()
            with looks(system.redis) as looked:
                looked.renewals(5, workers=2)  # more than a lease
            assert held(system) == 200
            assert reaped(*workers) == []
            mock.up()
            assert set(repeats(system, ids).values()) == {1}


class TestOtherTransports:
    def test_a_leased_worker_takes_over_from_celerys(self, system: Stack, mock: MockKafka) -> None:
        """Which was killed: what it had is where Celery's transport keeps it, until it has been there for long."""
        down_for_long(system, mock)
        stock = system.worker(*ALONE, TRANSPORT="celery", POOL="threads", CONCURRENCY=10)
        ids = records(50)
        wait_until(lambda: system.redis.hlen("unacked") == 10, 60, "ten to be in Celery's hands")
        stock.kill()
        left = system.redis.zrange("unacked_index", 0, -1)
        system.redis.zadd("unacked_index", {tag: time.time() - 7200 for tag in left})
        mock.up()
        system.worker(*ALONE)
        assert set(repeats(system, ids).values()) == {1}

    def test_celerys_worker_takes_over_from_a_leased_one(self, system: Stack, mock: MockKafka) -> None:
        down_for_long(system, mock)
        ids = records(100)
        with outage_after_the_first_answer(system, mock):
            leased = system.worker(*ALONE, MAX_IN_FLIGHT=60, SHUTDOWN_TIMEOUT_S=1)
        wait_until(lambda: held(system) == 60, 60, "sixty in flight")
        leased.stop()
        assert queued(system) == ids
        mock.up()
        system.worker(*ALONE, TRANSPORT="celery", POOL="threads")
        assert set(repeats(system, ids).values()) == {1}

    def test_both_side_by_side(self, system: Stack, mock: MockKafka) -> None:
        mock.delay(-1, 20)
        system.worker(*ALONE, TRANSPORT="celery", POOL="threads", CONCURRENCY=10)
        system.worker(*ALONE, MAX_IN_FLIGHT=10)
        ids = records(400)
        assert set(repeats(system, ids).values()) == {1}


class TestQueues:
    def test_priorities(self, system: Stack, mock: MockKafka) -> None:
        """The higher ones (0 is the highest) are worked off before the lower ones, each in order, in many claims."""
        sent = {
            priority: [
                send.apply_async((TOPIC, "x"), {"partition": 0}, priority=priority, task_id=f"{priority}-{n}").id
                for n in range(20)
            ]
            for priority in (9, 3, 0, 6)
        }
        assert system.redis.exists(*(f"{QUEUE}\x06\x16{step}" for step in (3, 6, 9))) == 3
        system.worker(*ALONE, MAX_IN_FLIGHT=7, CONCURRENCY=7)
        system.wait_empty()
        assert system.ids(TOPIC) == sent[0] + sent[3] + sent[6] + sent[9]

    def test_nothing_is_taken_while_the_gate_is_shut(self, system: Stack, mock: MockKafka) -> None:
        system.redis.set(GATE, 1)
        ids = {*records(20), send.apply_async((TOPIC, "x"), countdown=1, priority=3).id}
        letter = dead_letter.delay(TOPIC, "x")
        worker = system.worker(*ALONE)

        with looks(system.redis) as looked:
            looked.claims(4)
        assert (held(system), system.waiting) == (0, 22)
        assert system.read(TOPIC, f"{TOPIC}-dlq") == []

        system.redis.delete(GATE)
        wait_until(lambda: delivered(system) > 0, 60, "it to begin")
        system.wait_for(TOPIC, ids)
        system.wait_for(f"{TOPIC}-dlq", {letter.id.removesuffix("-dlq")})

        system.redis.set(GATE, 1)
        late = send.delay(TOPIC, "late")
        with looks(system.redis) as looked:
            looked.claims(4)
        assert queued(system) == [late.id]
        system.redis.delete(GATE)
        system.wait_for(TOPIC, {late.id})
        assert worker.process.poll() is None

    def test_only_the_queues_that_are_named(self, system: Stack, mock: MockKafka) -> None:
        letter = dead_letter.delay(TOPIC, "x")
        (waiting,) = records(1)
        system.worker(*ALONE, "-Q", "kafka-delivery-dlq")
        system.wait_for(f"{TOPIC}-dlq", {letter.id.removesuffix("-dlq")})
        assert queued(system) == [waiting]
        system.worker(*ALONE, "-Q", "kafka-delivery")
        system.wait_for(TOPIC, {waiting})
