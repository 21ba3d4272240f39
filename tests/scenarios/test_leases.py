"""What a dead worker held is back within a lease, at the front; what a living one holds is its own, whatever happens to
its connections and to Redis. Any kind of Redis will do, and Celery's own workers may come before, after and beside.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from kafka_delivery import EnqueueError, dead_letter, send
from kafka_delivery.names import GATE, LEASE_CLOCK
from kafka_delivery_worker import counts
from kafka_delivery_worker.embedded import MockKafka, OrphanGuard, Valkey, free_port
from servers import AnyRedis, RealRedis, have_real_redis, missing, valkey_binary, wait_until
from stack import Stack, Worker, stack
from watching import ALONE, OtherWorker, other_worker

TOPIC = "leased"
QUEUE = "kafka-delivery"
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
    with Valkey() as valkey, stack(valkey.url, mock, LEASE_S=2, LINGER_MS=0) as system:
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


def reaped(*workers: Worker) -> list[str]:
    return [line for worker in workers for line in worker.log.splitlines() if "lease.reaped" in line]


class TestDeadWorkers:
    def test_what_one_held_is_back_within_a_lease_at_the_front(self, system: Stack, mock: MockKafka) -> None:
        system.settings |= NO_PROBES
        mock.down()
        ids = records(130)
        dead = system.worker(*ALONE, MAX_IN_FLIGHT=50)
        wait_until(lambda: held(system) == 50, 20, "fifty in flight")
        living = system.worker(*ALONE, MAX_IN_FLIGHT=50)
        wait_until(lambda: held(system) == 100, 20, "a hundred in flight")
        wait_until(lambda: renewed_s(system) > 2, 20, "somebody to have renewed for a whole lease")

        dead.kill()
        killed = time.monotonic()
        wait_until(lambda: system.redis.llen(QUEUE) == 80, 20, "its messages to be back")

        # A lease, and the time until somebody looks; it begins anew where nobody could renew.
        assert min(time.monotonic() - killed, renewed_s(system)) < 4
        assert queued(system) == ids[:50] + ids[100:]
        assert held(system) == 50
        mock.up()
        times = repeats(system, ids)
        assert set(times.values()) == {1}  # Kafka never saw what the dead one had in flight
        assert len(reaped(living)) == 1

    def test_one_that_was_stopped_for_longer_than_its_lease_repeats_at_most_what_it_held(
        self, system: Stack, mock: MockKafka
    ) -> None:
        system.settings |= NO_PROBES
        mock.down()
        ids = records(200)
        stopped = system.worker(*ALONE, MAX_IN_FLIGHT=50)
        wait_until(lambda: held(system) == 50, 20, "fifty in flight")
        other = system.worker(*ALONE, MAX_IN_FLIGHT=50)
        wait_until(lambda: held(system) == 100, 20, "a hundred in flight")
        stopped.signal(signal.SIGSTOP)
        wait_until(lambda: held(system) == 50, 20, "its lease to end")
        mock.up()
        wait_until(lambda: delivered(system) >= 200, 30, "the other to deliver all")
        system.wait_empty()

        stopped.signal(signal.SIGCONT)
        more = records(50)

        times = repeats(system, ids + more)
        assert {task_id for task_id, count in times.items() if count > 1} <= set(ids[:50])
        assert max(times.values()) <= 2
        assert stopped.process.poll() is None
        assert reaped(stopped) == []
        assert len(reaped(other)) == 1
        wait_until(lambda: system.redis.zcard("kafka-delivery:leases:1") == 2, 10, "both to have a lease again")

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
            worker = OtherWorker(env, "crashing", ("-n", "crashing@%h", *ALONE))
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
        time.sleep({seconds})
        os.write(2, b"IDLE\\n")

    def wait_for_the_word(hub):
        while not Path({word!r}).exists():
            time.sleep(0.02)
        hub.call_soon(block)

    @worker_ready.connect
    def ready(**_):
        threading.Thread(target=wait_for_the_word, args=(get_event_loop(),), daemon=True).start()
"""


class TestBusyWorkers:
    def test_one_whose_event_loop_is_stuck_for_three_leases_loses_nothing(
        self, system: Stack, mock: MockKafka, tmp_path: Path
    ) -> None:
        """Something in it blocks, a slow DNS or somebody's signal receiver; it is alive, and says so."""
        mock.down()
        word = tmp_path / "word"
        busy = other_worker(system, tmp_path, BUSY.format(seconds=3.5, word=str(word)), LEASE_S=1)
        (sent,) = records(1)
        wait_until(lambda: held(system) == 1, 20, "it to be in flight")
        watching = system.worker(*ALONE, LEASE_S=1)
        (key,) = system.redis.scan_iter("kafka-delivery:held:1:*")
        wait_until(lambda: renewed_s(system) > 1, 20, "the end of a lease to be believed")

        word.touch()
        wait_until(lambda: "BUSY" in busy.log, 10, "the event loop to be stuck")
        wait_until(lambda: "IDLE" in busy.log, 10, "it to go on")

        assert system.redis.hlen(key) == 1, "it is still its own"
        mock.up()
        assert repeats(system, [sent]) == {sent: 1}
        assert reaped(busy, watching) == []
        assert busy.process.poll() is None


class TestBrokenConnections:
    def test_nothing_is_lost_and_nothing_is_repeated(self, system: Stack, mock: MockKafka) -> None:
        mock.delay(-1, 30)
        ids = records(3000)
        workers = [system.worker(*ALONE, MAX_IN_FLIGHT=200) for _ in range(2)]
        for n in range(1, 6):
            wait_until(lambda n=n: delivered(system) > n * 300, 30, "some deliveries")  # type: ignore[misc]
            for kind in ("pubsub", "normal"):
                system.redis.client_kill_filter(_type=kind, skipme=True)
        times = repeats(system, ids)
        assert [task_id for task_id, count in times.items() if count > 1] == []
        assert reaped(*workers) == []
        wait_until(
            lambda: sum(worker.log.count("Connection to broker lost") for worker in workers) >= 2, 10, "it to be said"
        )

    @pytest.mark.parametrize("binary", ["wheel", pytest.param("redis-server", marks=pytest.mark.real)])
    def test_redis_is_killed_and_restarted(self, mock: MockKafka, tmp_path: Path, binary: str) -> None:
        """With its AOF written always: what it has confirmed, it knows again."""
        if binary == "redis-server" and not have_real_redis():
            missing("redis-server")
        program = "redis-server" if binary == "redis-server" else valkey_binary()
        mock.delay(-1, 30)
        with (
            RealRedis(tmp_path, binary=program, options={"appendfsync": "always"}) as server,
            stack(server.url, mock, LEASE_S=2, LINGER_MS=0) as system,
        ):
            workers = [system.worker(*ALONE, MAX_IN_FLIGHT=100) for _ in range(2)]
            ids = records(2000)
            for n in (1, 2):
                wait_until(lambda n=n: delivered(system) > n * 300, 30, "some deliveries")  # type: ignore[misc]
                server.kill()
                time.sleep(1)
                server.start()
            times = repeats(system, ids)
            assert [task_id for task_id, count in times.items() if count > 1] == []
            assert reaped(*workers) == []
            assert all(worker.process.poll() is None for worker in workers)

    def test_redis_hangs_for_longer_than_a_lease(self, mock: MockKafka, tmp_path: Path) -> None:
        """Nobody could renew; that nobody did proves nothing."""
        mock.down()
        with (
            RealRedis(tmp_path, binary=valkey_binary()) as server,
            # Kafka is away all the time: a probe of the circuit would be one more in flight.
            stack(server.url, mock, LEASE_S=1, LINGER_MS=0, **NO_PROBES) as system,
        ):
            ids = records(300)
            workers = [system.worker(*ALONE, MAX_IN_FLIGHT=100) for _ in range(2)]
            wait_until(lambda: held(system) == 200, 20, "two hundred in flight")
            time.sleep(1.5)
            server.pause()
            time.sleep(4)
            server.resume()
            time.sleep(2)
            assert held(system) == 200
            assert reaped(*workers) == []
            mock.up()
            assert set(repeats(system, ids).values()) == {1}


class TestOtherTransports:
    def test_a_leased_worker_takes_over_from_celerys(self, system: Stack, mock: MockKafka) -> None:
        """Which was killed: what it had is where Celery's transport keeps it, until it has been there for long."""
        mock.down()
        stock = system.worker(*ALONE, TRANSPORT="celery", POOL="threads", CONCURRENCY=10)
        ids = records(50)
        wait_until(lambda: system.redis.hlen("unacked") == 10, 20, "ten to be in Celery's hands")
        stock.kill()
        left = system.redis.zrange("unacked_index", 0, -1)
        system.redis.zadd("unacked_index", {tag: time.time() - 7200 for tag in left})
        mock.up()
        system.worker(*ALONE)
        assert set(repeats(system, ids).values()) == {1}

    def test_celerys_worker_takes_over_from_a_leased_one(self, system: Stack, mock: MockKafka) -> None:
        mock.down()
        ids = records(100)
        leased = system.worker(*ALONE, MAX_IN_FLIGHT=60, SHUTDOWN_TIMEOUT_S=1)
        wait_until(lambda: held(system) == 60, 20, "sixty in flight")
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

        def asked() -> int:
            """How often it wanted to claim; the lease is renewed by EVAL."""
            stats: dict[str, Any] = system.redis.info("commandstats")
            return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))

        before = asked()
        wait_until(lambda: asked() >= before + 4, 20, "the worker to have asked again and again")
        assert (held(system), system.waiting) == (0, 22)
        assert system.read(TOPIC, f"{TOPIC}-dlq") == []

        system.redis.delete(GATE)
        wait_until(lambda: delivered(system) > 0, 5, "it to begin")  # it looks twice a second
        system.wait_for(TOPIC, ids)
        system.wait_for(f"{TOPIC}-dlq", {letter.id.removesuffix("-dlq")})

        system.redis.set(GATE, 1)
        late = send.delay(TOPIC, "late")
        before = asked()
        wait_until(lambda: asked() >= before + 4, 20, "the worker to have asked again and again")
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


def delivers(system: Stack) -> Worker:
    """Records in time and delayed, with a worker that stops in order."""
    worker = system.worker(*ALONE)
    ids = {send.delay(TOPIC, str(n)).id for n in range(3)} | {send.apply_async((TOPIC, "x"), countdown=1).id}
    found = system.wait_for(TOPIC, ids)
    assert len(found) == len(ids)
    assert worker.stop() < 15
    return worker


@contextmanager
def certificates(directory: Path) -> Iterator[dict[str, str]]:
    """A CA of our own, and a certificate of the server's for the loopback address."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, cwd=directory, capture_output=True)

    (directory / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=a CA of a test")
    openssl("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
        "-out", "server.crt", "-days", "2", "-extfile", "ext",
    )  # fmt: skip
    yield {name: str(directory / name) for name in ("ca.crt", "server.crt", "server.key")}


class TestKindsOfRedis:
    def test_with_a_prefix_of_all_keys(self, mock: MockKafka) -> None:
        options = json.dumps({"global_keyprefix": "x:"})
        with Valkey() as valkey, stack(valkey.url, mock, REDIS_OPTIONS=options) as system:
            delivers(system)
            assert {key.partition(b":")[0] for key in system.redis.scan_iter()} <= {b"x"}

    def test_with_a_password(self, mock: MockKafka) -> None:
        with Valkey() as valkey:
            with redis.Redis.from_url(valkey.url) as client:
                client.config_set("requirepass", "p@ss/word#1")
            url = valkey.url.replace("redis://", "redis://:p%40ss%2Fword%231@")
            with stack(url, mock) as system:
                worker = delivers(system)
                assert "ss/word" not in worker.log
                assert "ss%2Fword" not in worker.log

    @pytest.mark.real
    def test_with_tls(self, mock: MockKafka, tmp_path: Path) -> None:
        if not have_real_redis():
            missing("redis-server")
        port = free_port()
        with certificates(tmp_path) as files:
            options = {
                "tls-port": str(port),
                "tls-cert-file": files["server.crt"],
                "tls-key-file": files["server.key"],
                "tls-ca-cert-file": files["ca.crt"],
                "tls-auth-clients": "no",
            }
            with RealRedis(tmp_path / "redis", options=options) as server:
                url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={files['ca.crt']}"
                with stack(server.url, mock, REDIS_URL=url) as system:
                    delivers(system)
                # And not with anybody else's certificate.
                with stack(server.url, mock, REDIS_URL=f"rediss://127.0.0.1:{port}/0") as system:
                    worker = system.worker(*ALONE, ready=False)
                    wait_until(lambda: "CERTIFICATE_VERIFY_FAILED" in worker.log, 20, "a refusal")

    @pytest.mark.real
    def test_with_sentinel(self, mock: MockKafka, tmp_path: Path) -> None:
        """The master hands over to its replica, and caller and worker follow."""
        if not have_real_redis():
            missing("redis-server")
        with (
            RealRedis(tmp_path / "one") as one,
            RealRedis(tmp_path / "two", options={"replicaof": f"127.0.0.1 {one.port}"}) as two,
            sentinel(tmp_path, one.port) as (port, watcher),
        ):
            changes = {
                "REDIS_URL": f"sentinel://127.0.0.1:{port}/0",
                "REDIS_OPTIONS": json.dumps({"master_name": "mymaster"}),
            }
            with stack(one.url, mock, **changes) as system, redis.Redis(port=two.port) as replica:
                delivers(system)
                worker = system.worker(*ALONE)
                wait_until(lambda: replica.info("replication")["master_link_status"] == "up", 20, "a replica")
                watcher.execute_command("SENTINEL", "FAILOVER", "mymaster")
                wait_until(lambda: replica.info("replication")["role"] == "master", 20, "a failover")
                sent: set[str] = set()

                def accepted() -> bool:
                    with suppress(EnqueueError):
                        sent.add(send.delay(TOPIC, "after").id)
                    return bool(sent)

                wait_until(accepted, 30, "a send to be accepted")
                system.wait_for(TOPIC, sent, timeout=40)
                assert worker.process.poll() is None


@contextmanager
def sentinel(directory: Path, master: int) -> Iterator[tuple[int, AnyRedis]]:
    """The port of one Sentinel, which watches a master and its replica, and a client of it."""
    port = free_port()
    configuration = directory / "sentinel.conf"
    configuration.write_text(
        f"port {port}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {master} 1\n"
        "sentinel down-after-milliseconds mymaster 1000\nsentinel failover-timeout mymaster 3000\n"
    )
    process = subprocess.Popen(
        ["redis-server", str(configuration), "--sentinel"], stdout=subprocess.DEVNULL, start_new_session=True
    )
    guard = OrphanGuard(process.pid)

    client: AnyRedis = redis.Redis(port=port)

    def knows() -> bool:
        with suppress(redis.RedisError):
            return int(client.sentinel_master("mymaster")["num-slaves"]) == 1
        return False

    try:
        wait_until(knows, 30, "Sentinel to know the replica")
        yield port, client
    finally:
        client.close()
        guard.release()
        process.kill()
        process.wait()


def test_a_redis_cluster_is_refused_at_start(tmp_path: Path) -> None:
    """Celery would work on it until the first message that lies on another node."""
    cluster = {"cluster-enabled": "yes", "cluster-config-file": str(tmp_path / "nodes.conf"), "appendonly": "no"}
    cluster["cluster-port"] = str(free_port())  # else the port and 10,000, which anybody may have
    with MockKafka() as mock, RealRedis(tmp_path, binary=valkey_binary(), options=cluster) as server:
        system = Stack(server.url, mock, {})
        worker = system.worker(ready=False)
        worker.process.wait(30)
        assert worker.process.returncode != 0
        assert "KAFKA_DELIVERY_REDIS_URL names a Redis Cluster" in worker.log
        assert "Traceback" not in worker.log
        system.close()
