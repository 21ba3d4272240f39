"""What the faults do. Each undoes what it did before it returns, whatever happens."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import redis

from certificates import Authority, put
from proxy import Proxy
from servers import RealKafka, RealRedis, wait_until

from . import plan
from .application import Sent
from .circuits import Outage
from .foreign import Foreign
from .operators import Operators
from .plan import Fault
from .processes import ApplicationProcess, Joiners, Slot, Supervisor

BURST = 1_000
UNDO_S = 60
WITHOUT_CLIENT_S = 20
"""Longest wait for workers that have started to find that they can make no client. Redis may be away meanwhile."""

SLOW_S = (0.05, 0.5)
VERY_SLOW_S = 2.0
"""The least latency of a slow network; as much comes on top of it by lot. Above the latter, a fifth."""

UNCHANGED = ("maxclients", "maxmemory", "min-replicas-to-write")
QUEUE = "kafka-delivery"


class Files:
    """The files that a worker's client is made of: a certificate and its key, which can be taken away and renewed."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self._authority = authority
        self._certificate, self._key = directory / "client.crt", directory / "client.key"
        self.renew()

    @property
    def properties(self) -> dict[str, str]:
        """What they are to librdkafka."""
        return {
            "security.protocol": "ssl",
            "ssl.ca.location": str(self._authority.path),
            "ssl.certificate.location": str(self._certificate),
            "ssl.key.location": str(self._key),
        }

    def renew(self, between: Callable[[], Any] = lambda: None) -> None:
        """Put another pair there, one half after the other."""
        certificate, key = self._authority.pair("worker")
        put(self._certificate, certificate)
        try:
            between()
        finally:
            put(self._key, key)

    def lose(self) -> None:
        """Take the key away."""
        self._key.unlink()


class Faults:
    """The faults on one system.

    Args:
        files: of the workers' clients.
        network: between the workers and Redis.
        operators: run commands.
        joiners: of another installation.
        zoo: what strangers write.
        accepted: told the kind and what is due of each foreign message.
        over: no new faults from then on.
        abort: cut short what is under way, too.
        say: told what happens to whom: the kind and the target.
    """

    def __init__(
        self,
        kafka: RealKafka,
        server: RealRedis,
        supervisor: Supervisor,
        application: ApplicationProcess,
        files: Files,
        network: Proxy,
        operators: Operators,
        joiners: Joiners,
        zoo: Mapping[str, bytes],
        accepted: Callable[[str, Sent], None],
        over: threading.Event,
        abort: threading.Event,
        say: Callable[[str, str], None],
    ) -> None:
        self._kafka, self._server, self._slots, self._application = kafka, server, supervisor.slots, application
        self._files, self._network = files, network
        self._operators, self._joiners = operators, joiners
        self._over, self._abort = over, abort
        self._fleet = threading.Lock()
        self._say = say
        self._control = redis.Redis.from_url(server.url, socket_timeout=10)
        self._foreign = Foreign(zoo, self._push, accepted)
        self.outages: list[Outage] = []
        self._before = {name: self._config(name) for name in UNCHANGED}
        self.failure: BaseException | None = None
        self._do: dict[str, Callable[[Fault], None]] = {
            plan.KILL: self._kill,
            plan.FREEZE: self._freeze,
            plan.TERMINATE: self._terminate,
            plan.FREEZE_ALL: self._freeze_all,
            plan.CLIENT_KILL: self._client_kill,
            plan.REDIS_KILL: self._redis_kill,
            plan.REDIS_HUNG: self._redis_hung,
            plan.MAXCLIENTS: self._maxclients,
            plan.MAXMEMORY: self._maxmemory,
            plan.READONLY: self._readonly,
            plan.NOREPLICAS: self._noreplicas,
            plan.KAFKA_KILL: self._kafka_kill,
            plan.NO_KEY: self._no_key,
            plan.RENEWAL: self._renewal,
            plan.SLOW: self._slow,
            plan.VERY_SLOW: self._very_slow,
            plan.PARTITION: self._partition,
            plan.CUT: self._cut,
            plan.STRANGERS: self._strangers,
            plan.LARGE: self._large,
            plan.FROZEN_REDRIVE: self._frozen,
            plan.FROZEN_DISCARD: self._frozen,
            plan.FROZEN_DEAD_LETTERS: self._frozen,
            plan.JOINER: self._join,
        }

    def run(self, faults: Iterator[Fault]) -> None:
        """Do one after the other until it is over."""
        try:
            for fault in faults:
                if self._over.wait(fault.pause):
                    return
                self._do[fault.kind](fault)
        except BaseException as error:  # of the harness, not of what it tests
            self.failure = error
            self._over.set()
            self._abort.set()

    # -- workers
    def _slot(self, fault: Fault, detail: str = "") -> Slot:
        slot = self._slots[fault.target]
        self._say(fault.kind, f"worker {slot.number} (pid {slot.worker.pid}){detail}")
        return slot

    def _kill(self, fault: Fault) -> None:
        self._slot(fault).end(signal.SIGKILL, fault.kind)

    def _freeze(self, fault: Fault) -> None:
        slot = self._slot(fault, f" for {fault.hold:.1f} s")
        slot.send(signal.SIGSTOP)
        try:
            self._abort.wait(fault.hold)
        finally:
            slot.send(signal.SIGCONT)

    def _terminate(self, fault: Fault) -> None:
        """All workers stand still while the backlog grows; then one is told to stop, and all go on."""
        with self._frozen_workers():
            self._application.burst(BURST)
            with contextlib.suppress(TimeoutError, redis.RedisError):
                wait_until(lambda: self._control.llen(QUEUE) >= BURST / 2, 2, "no backlog: Redis is away")
            self._slot(fault).end(signal.SIGTERM, fault.kind)

    def _freeze_all(self, fault: Fault) -> None:
        with self._fleet:  # one that starts anew for want of a key would take its time
            self._say(fault.kind, f"for {fault.hold:.1f} s")
            with self._frozen_workers():
                self._abort.wait(fault.hold)

    @contextmanager
    def _frozen_workers(self) -> Iterator[None]:
        for slot in self._slots:
            slot.send(signal.SIGSTOP)
        try:
            yield
        finally:
            for slot in self._slots:
                slot.send(signal.SIGCONT)

    # -- what a client is made of
    def _no_key(self, fault: Fault) -> None:
        """The key is away, and all workers are restarted in an orderly way, as for a release: none has a client.

        They are not killed: what several workers died with is claimed alone, which slows down everything.
        """
        with self._fleet:
            self._say(fault.kind, f"for {fault.hold:.1f} s, and all workers start anew")
            self._files.lose()
            try:
                before = {slot.worker.pid for slot in self._slots}
                for slot in self._slots:
                    slot.end(signal.SIGTERM, fault.kind)
                with contextlib.suppress(TimeoutError):
                    wait_until(lambda: self._abort.is_set() or self._without_client(before), WITHOUT_CLIENT_S, "")
                self._abort.wait(fault.hold)
            finally:
                self._files.renew()

    def _without_client(self, before: set[int]) -> bool:
        """Whether each worker is a new one, and has tried in vain to make a client."""
        return all(slot.worker.pid not in before and "producer.no_client" in slot.worker.log for slot in self._slots)

    def _renewal(self, fault: Fault) -> None:
        """Another pair, whose second half comes later; workers look at the files every ten seconds."""
        self._say(fault.kind, f"its key comes {fault.hold:.1f} s later")
        self._files.renew(lambda: self._abort.wait(fault.hold))

    # -- the network
    def _slow(self, fault: Fault) -> None:
        least, most = SLOW_S
        self._late(fault, least + fault.strength * (most - least), 1.0)

    def _very_slow(self, fault: Fault) -> None:
        self._late(fault, VERY_SLOW_S, 0.2)

    def _late(self, fault: Fault, delay_s: float, jitter: float) -> None:
        """Each chunk comes later by this, and by up to such a share of it besides."""
        self._say(fault.kind, f"by {delay_s:.2f} s and up to {delay_s * jitter:.2f} s more, for {fault.hold:.1f} s")
        self._network.slow(delay_s, delay_s * jitter)
        try:
            self._abort.wait(fault.hold)
        finally:
            self._network.slow(0)

    def _partition(self, fault: Fault) -> None:
        self._say(fault.kind, f"for {fault.hold:.1f} s")
        self._network.partition()
        try:
            self._abort.wait(fault.hold)
        finally:
            self._network.heal()

    def _cut(self, fault: Fault) -> None:
        self._say(fault.kind, "of all workers")
        self._network.cut()

    # -- strangers, operators, other installations
    def _strangers(self, fault: Fault) -> None:
        self._say(fault.kind, f"{self._foreign.some()} of them")

    def _large(self, fault: Fault) -> None:
        self._say(fault.kind, f"{self._foreign.large()} of them")

    def _push(self, queue: str, items: list[bytes]) -> None:
        """As often as it takes: the same one twice is the same one."""
        for item in items:
            self._surely(partial(self._control.lpush, queue, item))

    def _frozen(self, fault: Fault) -> None:
        self._say(fault.kind, f"for {fault.hold:.1f} s")
        self._operators.freeze(fault.kind, fault.hold)

    def _join(self, fault: Fault) -> None:
        self._say(fault.kind, "the same Redis and names, another Kafka")
        self._joiners.join()

    # -- Redis
    def _client_kill(self, fault: Fault) -> None:
        killed = self._control.client_kill_filter(_type="normal", skipme=True)
        self._say(fault.kind, f"{killed} connections")

    def _redis_kill(self, fault: Fault) -> None:
        self._say(fault.kind, f"down for {fault.hold:.1f} s")
        self._server.kill()
        try:
            self._abort.wait(fault.hold)
        finally:
            self._server.start()

    def _redis_hung(self, fault: Fault) -> None:
        self._say(fault.kind, f"for {fault.hold:.1f} s")
        self._server.pause()
        try:
            self._abort.wait(fault.hold)
        finally:
            self._server.resume()

    def _maxclients(self, fault: Fault) -> None:
        before = self._config("maxclients")
        now = int(self._control.info("clients")["connected_clients"])
        self._configured(fault, "maxclients", now, before)

    def _maxmemory(self, fault: Fault) -> None:
        used = int(self._control.info("memory")["used_memory"])
        self._configured(fault, "maxmemory", used // 2, self._config("maxmemory"))

    def _configured(self, fault: Fault, name: str, value: int, before: str) -> None:
        self._say(fault.kind, f"{name} {value} for {fault.hold:.1f} s")
        try:
            self._control.config_set(name, value)
            self._abort.wait(fault.hold)
        finally:
            self._surely(lambda: self._control.config_set(name, before))

    def _config(self, name: str) -> str:
        return str(self._control.config_get(name)[name])

    def _noreplicas(self, fault: Fault) -> None:
        """It wants a replica, and has none."""
        self._configured(fault, "min-replicas-to-write", 1, self._config("min-replicas-to-write"))

    def check_undone(self) -> None:
        """Raise RuntimeError unless Redis is as it was: a fault that goes on would be taken for the product's."""
        now = {name: self._config(name) for name in UNCHANGED}
        if now != self._before or self._control.info("replication")["role"] != "master":
            raise RuntimeError(f"a fault was not undone: {now} instead of {self._before}")

    def _readonly(self, fault: Fault) -> None:
        """A replica of a master that does not exist refuses writes and keeps its data."""
        with _dead_port() as port:
            self._say(fault.kind, f"for {fault.hold:.1f} s")
            try:
                self._control.replicaof("127.0.0.1", port)
                self._abort.wait(fault.hold)
            finally:
                self._surely(lambda: self._control.replicaof("NO", "ONE"))

    def _surely(self, undo: Callable[[], Any]) -> None:
        """The control connection may have gone, and there may be no room for another one yet."""
        deadline = time.monotonic() + UNDO_S
        while True:
            try:
                undo()
                return
            except redis.RedisError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    # -- Kafka
    def _kafka_kill(self, fault: Fault) -> None:
        self._say(fault.kind, f"down for {fault.hold:.1f} s")
        began = time.time()
        self._kafka.kill()
        try:
            self._abort.wait(fault.hold)
        finally:
            self._kafka.start()
            self.outages.append(Outage(began, time.time()))


@contextmanager
def _dead_port() -> Iterator[int]:
    """A port of which it is sure that nobody listens on it: it is ours, and we do not."""
    with socket.socket() as ours:
        ours.bind(("127.0.0.1", 0))
        yield ours.getsockname()[1]
