"""Which tests stay together in a parallel run (`pytest -n`), and which begin first.

xdist's own groups (`--dist loadgroup`) are silently ignored with pytest 9.2: xdist 3.8 writes them where pytest no
longer keeps an item's id. So this is a scheduler of our own, by xdist's documented hook.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

HERE = Path(__file__).parent

SERVERS = ("real_kafka", "real_rabbit")
"""Fixtures that take seconds of a core to start: one process serves all files of a fast tier that name one."""

FIRST = ("soak", "scenarios", "integration", "unit")
"""The longest begin first, so that no process has one left when the others have finished."""


@functools.cache
def group(path: str) -> str:
    """Return the name of the tests that run in one process with those of this file: the file, or a server's fixture.

    Args:
        path: of a test file, below the root of the repository.
    """
    if tier(path) in ("integration", "unit"):
        text = (HERE.parent / path).read_text()
        return next((server for server in SERVERS if server in text), path)
    return path


def tier(path: str) -> str:
    """Return the folder below tests/ of a test file."""
    return Path(path).parts[1]


def order(items: list[pytest.Item]) -> None:
    """Sort the tests of a run by how soon they shall begin, and keep the order within a file."""
    paths = [_path(item.nodeid) for item in items]
    size = Counter(map(group, paths))
    long = {group(path) for path, item in zip(paths, items, strict=True) if item.get_closest_marker("long")}

    def rank(index: int) -> tuple[bool, int, bool, int, str]:
        path, name = paths[index], group(paths[index])
        place = FIRST.index(tier(path)) if tier(path) in FIRST else len(FIRST)
        return name not in SERVERS, place, name not in long, -size[name], name

    items[:] = [items[index] for index in sorted(range(len(items)), key=rank)]


class Scheduler(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Hands out groups, in the order in which their first test was collected."""

    def __init__(self, config: pytest.Config, log: object = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # `order` has done it

    def _split_scope(self, nodeid: str) -> str:
        return group(_path(nodeid))


def _path(nodeid: str) -> str:
    return nodeid.partition("::")[0]
