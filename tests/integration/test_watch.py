"""`kafka-delivery status --watch` needs a terminal."""

from __future__ import annotations

from stack import Stack


def test_where_there_is_no_terminal_it_says_so(delivery: Stack) -> None:
    done = delivery.command("status", "--watch", check=False)
    assert done.returncode == 2
    assert "--json" in done.stderr
