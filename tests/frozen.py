"""Operators' commands that stand still in the middle: SIGSTOP, and what they had just written is still on its way.

The command reaches Redis by a `Proxy` of its own, which is slow, so that the command is in the middle of something, and
which lets nothing through while the command is frozen: a write that was under way then comes late, after another
command has begun and ended.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Mapping
from types import TracebackType

from proxy import Proxy
from servers import wait_until
from stack import BIN


class Frozen:
    """`kafka-delivery` with these arguments, as a process that can be frozen; a context manager that ends it.

    Args:
        arguments: of the command.
        env: its environment; its Redis is the one behind the proxy.
        port: of the Redis on the loopback address.
        delay_s: of each round trip to Redis.
        stdin: what it is answered before it asks; without it the command has no terminal and no input.
    """

    def __init__(
        self, arguments: tuple[str, ...], env: Mapping[str, str], port: int, delay_s: float = 0.0, stdin: bool = False
    ) -> None:
        self._arguments, self._env, self._stdin = arguments, env, stdin
        self.proxy = Proxy(port)
        self.proxy.slow(delay_s)

    def __enter__(self) -> Frozen:
        self.proxy.__enter__()
        self.process = subprocess.Popen(
            [BIN / "kafka-delivery", *self._arguments],
            env={**self._env, "KAFKA_DELIVERY_REDIS_URL": self.proxy.redis_url},
            stdin=subprocess.PIPE if self._stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()  # also a stopped one
        self.process.communicate()
        self.proxy.__exit__(kind, error, at)

    def freeze(self, begun: Callable[[], bool], timeout: float = 60) -> Frozen:
        """Stop the process, and all that it has just written, when it has `begun` and before it ends."""
        wait_until(lambda: begun() or self.process.poll() is not None, timeout, "the command to be in the middle")
        self.proxy.partition()
        self.process.send_signal(signal.SIGSTOP)
        assert self.process.poll() is None, self.process.communicate()
        return self

    def thaw(self, answer: str | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Let what it has written pass, then itself; return how it ended."""
        self.proxy.heal()
        self.process.send_signal(signal.SIGCONT)
        out, err = self.process.communicate(answer, timeout)
        return subprocess.CompletedProcess(self._arguments, self.process.returncode, out, err)

    def kill(self) -> None:
        """End it where it stands; what it has written passes."""
        self.process.kill()
        self.process.wait()
        self.proxy.heal()
