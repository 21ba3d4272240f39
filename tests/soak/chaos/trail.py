"""Where a lost message was last seen: its way through Redis, read from the append-only files after the run."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .foreign import mark_in

_ID = re.compile(rb'"correlation_id": ?"([^"]+)"')


@dataclass
class Trail:
    """The steps of the messages of some task ids, as ``(seconds since the epoch, what happened)``."""

    wanted: frozenset[bytes]
    steps: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))
    _lists: dict[bytes, deque[bytes]] = field(default_factory=lambda: defaultdict(deque))
    _fields: dict[tuple[bytes, bytes], bytes] = field(default_factory=dict)
    _now: int = 0

    def follow(self, directory: Path) -> None:
        """Replay the append-only files of a server from its beginning."""
        files = sorted((directory / "appendonlydir").glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))
        for path in files:
            with path.open("rb") as file:
                for command in _commands(file):
                    self._step(command)

    def _step(self, command: list[bytes]) -> None:
        name = command[0].upper()
        if name == b"#TS":
            self._now = int(command[1])
        elif name in (b"LPUSH", b"RPUSH"):
            self._push(name, command[1], command[2:])
        elif name in (b"RPOP", b"LPOP"):
            self._pop(name, command[1], int(command[2]) if len(command) > 2 else 1)
        elif name in (b"HSET", b"HMSET"):
            self._set(command[1], command[2:])
        elif name == b"HDEL":
            self._delete(command[1], command[2:])
        elif name in (b"ZADD", b"ZREM"):
            for part in command[2:]:
                self._seen(task_id_of(part), f"{name.decode()} {_text(command[1])}")

    def _push(self, name: bytes, key: bytes, values: list[bytes]) -> None:
        for value in values:
            task_id = task_id_of(value)
            (self._lists[key].appendleft if name == b"LPUSH" else self._lists[key].append)(task_id)
            self._seen(task_id, f"{name.decode()} {_text(key)}")

    def _pop(self, name: bytes, key: bytes, count: int) -> None:
        values = self._lists[key]
        for _ in range(min(count, len(values))):
            self._seen(values.pop() if name == b"RPOP" else values.popleft(), f"{name.decode()} {_text(key)}")

    def _set(self, key: bytes, pairs: list[bytes]) -> None:
        for tag, value in zip(pairs[::2], pairs[1::2], strict=True):
            task_id = task_id_of(value)
            if task_id in self.wanted:
                self._fields[key, tag] = task_id
                self._seen(task_id, f"HSET {_text(key)} {_text(tag)}")

    def _delete(self, key: bytes, tags: list[bytes]) -> None:
        for tag in tags:
            task_id = self._fields.pop((key, tag), b"")
            self._seen(task_id, f"HDEL {_text(key)} {_text(tag)}")

    def _seen(self, task_id: bytes, where: str) -> None:
        if task_id in self.wanted:
            self.steps[task_id.decode()].append((self._now, where))


def task_id_of(value: bytes) -> bytes:
    """The task id of a message as it lies in Redis, or a stranger's mark; b"" if it has none."""
    if mark := mark_in(value):
        return mark.encode()
    found = _ID.search(value)
    return found[1] if found else b""


def _text(name: bytes) -> str:
    return re.sub(r"([0-9a-f]{6})[0-9a-f]{26}", r"\1", name.decode(errors="replace"))


def _commands(file: BinaryIO) -> Iterator[list[bytes]]:
    while line := file.readline():
        if line.startswith(b"#TS:"):
            yield [b"#TS", line[4:].strip()]
        elif line.startswith(b"*"):
            command = [_bulk(file) for _ in range(int(line[1:]))]
            if not all(part is not None for part in command):
                return  # cut off by a kill
            yield [part for part in command if part is not None]


def _bulk(file: BinaryIO) -> bytes | None:
    size = file.readline()
    if not size.startswith(b"$"):
        return None
    part = file.read(int(size[1:]) + 2)
    return part[:-2] if len(part) == int(size[1:]) + 2 else None


def trails(directory: Path, task_ids: Collection[str]) -> dict[str, list[tuple[int, str]]]:
    """The steps of each message through the lists and hashes of the server in `directory`."""
    trail = Trail(frozenset(task_id.encode() for task_id in task_ids))
    trail.follow(directory)
    return dict(trail.steps)
