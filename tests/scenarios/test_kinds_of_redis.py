"""Any kind of Redis will do: with a prefix, a password, TLS, Sentinel. A Redis Cluster is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

from kafka_delivery import EnqueueError, send
from kafka_delivery_worker.embedded import MockKafka, OrphanGuard, Valkey, free_port
from servers import AnyRedis, RealRedis, have_real_redis, missing, valkey_binary, wait_until
from stack import Stack, Worker, stack
from watching import ALONE

TOPIC = "kinds-of-redis"


@pytest.fixture(scope="module")
def mock() -> Iterator[MockKafka]:
    with MockKafka() as kafka:
        kafka.create_topic(TOPIC)
        yield kafka


def delivers(system: Stack) -> Worker:
    """Records in time and delayed, with a worker that stops in order."""
    worker = system.worker(*ALONE)
    ids = {send.delay(TOPIC, str(n)).id for n in range(3)} | {send.apply_async((TOPIC, "x"), countdown=1).id}
    system.wait_for(TOPIC, ids)
    system.wait_empty()
    assert sorted(one for one in system.ids(TOPIC) if one in ids) == sorted(ids)
    worker.stop()
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
                    wait_until(lambda: "CERTIFICATE_VERIFY_FAILED" in worker.log, 60, "a refusal")

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
                wait_until(lambda: replica.info("replication")["master_link_status"] == "up", 60, "a replica")
                watcher.execute_command("SENTINEL", "FAILOVER", "mymaster")
                wait_until(lambda: replica.info("replication")["role"] == "master", 60, "a failover")
                sent: set[str] = set()

                def accepted() -> bool:
                    with suppress(EnqueueError):
                        sent.add(send.delay(TOPIC, "after").id)
                    return bool(sent)

                wait_until(accepted, 60, "a send to be accepted")
                system.wait_for(TOPIC, sent, timeout=60)
                assert worker.process.poll() is None


@contextmanager
def sentinel(directory: Path, master: int) -> Iterator[tuple[int, AnyRedis]]:
    """The port of one Sentinel, which watches a master and its replica, and a client of it.

    It is patient: a master that stands still for a moment is not taken for a dead one.
    """
    port = free_port()
    configuration = directory / "sentinel.conf"
    configuration.write_text(
        f"port {port}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {master} 1\n"
        "sentinel down-after-milliseconds mymaster 60000\nsentinel failover-timeout mymaster 60000\n"
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
        wait_until(knows, 60, "Sentinel to know the replica")
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
        worker.process.wait(60)
        assert worker.process.returncode != 0
        assert "KAFKA_DELIVERY_REDIS_URL names a Redis Cluster" in worker.log
        assert "Traceback" not in worker.log
        system.close()
