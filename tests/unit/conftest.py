"""Unit tests start no process and open no connection."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from typing import NoReturn

import pytest

NOBODY = ("127.0.0.1", 1)
"""The address of a server that is away, by convention of these tests."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse what belongs to another tier: a child process, a fork, a connection."""

    def refuse(*_: object, **__: object) -> NoReturn:
        pytest.fail("a unit test starts no process and opens no connection; see the tiers in CONTRIBUTING.md")

    def connect(_: socket.socket, address: object) -> NoReturn:
        if address == NOBODY:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        refuse()

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    monkeypatch.setattr(socket.socket, "connect", connect)
