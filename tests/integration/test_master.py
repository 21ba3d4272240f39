"""Whom a process takes for the master: the newest that any Sentinel has said, and what a frozen one says is old."""

from __future__ import annotations

import socket
from time import monotonic
from typing import Any
from unittest.mock import Mock

import pytest
from redis.sentinel import MasterNotFoundError

from kafka_delivery import sentinel
from kafka_delivery.sentinel import REMEMBERED_S, Answer, GuardedConnection, GuardedSSLConnection, Master

OLD, NEW = ("10.0.0.1", 6379), ("10.0.0.2", 6379)


@pytest.fixture
def master() -> Master:
    return Master([("127.0.0.1", port) for port in (1, 2, 3)], "mymaster", {}, 0)


class TestWhoIsMaster:
    def test_the_newest_configuration_counts(self, master: Master) -> None:
        master._answers = {0: Answer(9.0, 1, OLD), 1: Answer(5.0, 2, NEW), 2: Answer(9.0, 1, OLD)}
        assert master._best(10.0) == NEW

    def test_but_not_for_ever(self, master: Master) -> None:
        later = 6.0 + REMEMBERED_S
        master._answers = {0: Answer(later, 1, OLD), 1: Answer(5.0, 2, NEW)}
        assert master._best(later) == OLD

    def test_one_of_them_that_reaches_it_is_enough(self, master: Master) -> None:
        master._answers = {0: Answer(9.0, 2, None), 1: Answer(9.0, 2, NEW)}
        assert master._best(10.0) == NEW

    def test_nobody_while_all_take_it_for_down(self, master: Master) -> None:
        master._answers = {0: Answer(9.0, 2, None), 1: Answer(9.0, 1, OLD)}
        assert master._best(10.0) is None

    def test_sentinels_that_are_away_are_named(self, master: Master) -> None:
        with pytest.raises(MasterNotFoundError, match=r"for 'mymaster' : 127.0.0.1:1 .*ConnectionError"):
            master.ask(10.0)


class TestAFrozenSentinel:
    def test_holds_nobody_up_longer_than_his_patience(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and says nothing
            frozen = Master([silent.getsockname()], "mymaster", {}, 0)
            began = monotonic()
            with pytest.raises(MasterNotFoundError):
                frozen.ask(0.1)
            assert monotonic() - began < sentinel.PATIENCE_S / 2


@pytest.mark.parametrize("kind", [GuardedConnection, GuardedSSLConnection])
class TestConnections:
    def test_to_the_old_master_end_under_who_waits_on_them(self, master: Master, kind: Any) -> None:
        ends = socket.socketpair(), socket.socketpair()
        with ends[0][0], ends[0][1], ends[1][0], ends[1][1]:
            to_old, to_new = kind(connection_pool=Mock()), kind(connection_pool=Mock())
            for connection, address, (near, far) in ((to_old, OLD, ends[0]), (to_new, NEW, ends[1])):
                connection.connected_to, connection._sock = address, near
                far.settimeout(10)
                master.add(connection)
            master._drop_others(NEW)
            assert ends[0][1].recv(1) == b""
            assert ends[0][0].recv(1) == b""
            ends[1][0].send(b"x")
            assert ends[1][1].recv(1) == b"x"
            to_old._sock = to_new._sock = None

    def test_one_that_is_being_made_is_dropped_as_soon_as_it_is_there(self, master: Master, kind: Any) -> None:
        near, far = socket.socketpair()
        with near, far:
            late = kind(connection_pool=Mock())
            late.connected_to = OLD
            master.add(late)
            master._drop_others(NEW)
            late._sock = near
            far.settimeout(10)
            master._drop_others(NEW)
            assert far.recv(1) == b""
            late._sock = None
