"""A TCP proxy on the loopback address that is slow, uneven, or lets nothing through: the network between two hosts."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import suppress
from types import TracebackType

CHUNK = 65_536


class Proxy:
    """Passes on what comes to its port, in order, each chunk later by `delay_s` and by a random part of `jitter_s`.

    A round trip takes that once: only what goes to the server is delayed. While it is partitioned, connections stay
    open, new ones are accepted, and nothing passes in either direction; what was sent meanwhile passes afterwards, as
    TCP does it.

    Args:
        port: of the server on the loopback address; it may be away, then each connection is closed at once.
        seed: of the jitter.
    """

    def __init__(self, port: int, seed: int = 0) -> None:
        self.delay_s = self.jitter_s = 0.0
        self._target = port
        self._closing = False
        self._dice = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._passes = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._passes.set()
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connected, "127.0.0.1", 0), self._loop
        ).result()
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def redis_url(self) -> str:
        """Database 0 of a Redis behind it."""
        return f"redis://127.0.0.1:{self.port}/0"

    def slow(self, delay_s: float, jitter_s: float = 0.0) -> None:
        """From the next chunk on; `slow(0)` ends it."""
        self.delay_s, self.jitter_s = delay_s, jitter_s

    def partition(self) -> None:
        """Let nothing through, and tell nobody."""
        self._loop.call_soon_threadsafe(self._passes.clear)

    def heal(self) -> None:
        """Let everything through again."""
        self._loop.call_soon_threadsafe(self._passes.set)

    def cut(self) -> None:
        """Close all connections."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(10)

    async def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _close(self) -> None:
        self._closing = True
        self._server.close()
        await self._cut()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, to_server}
        self._writers |= both
        try:
            await asyncio.gather(self._pump(reader, to_server, delayed=True), self._pump(from_server, writer))
        finally:
            self._writers -= both
            for one in both:
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, delayed: bool = False) -> None:
        """Read at once and pass on in time: what was sent close together arrives close together."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        passing = asyncio.create_task(self._pass_on(under_way, writer))
        at = 0.0
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                late = self.delay_s + self._dice.uniform(0, self.jitter_s) if delayed else 0.0
                at = max(at, self._loop.time() + late)
                under_way.put_nowait((at, data))
        under_way.put_nowait((at, b""))
        if self._closing:
            passing.cancel()
        with suppress(asyncio.CancelledError):
            await passing

    async def _pass_on(self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while True:
                at, data = await under_way.get()
                await asyncio.sleep(at - self._loop.time())
                await self._passes.wait()
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()
