"""`kafka-delivery breaker` shows the circuits to people and programs, and names what is wrong with its arguments."""

from __future__ import annotations

import json

import pytest

from stack import Stack


def test_show_and_history_for_people_and_programs(delivery: Stack) -> None:
    shown = delivery.command("breaker", "show").stdout
    assert "cluster" in shown
    assert "closed" in shown
    (line,) = delivery.command("breaker", "show", "--json").stdout.splitlines()
    assert json.loads(line)["state"] == "closed"
    assert json.loads(delivery.command("status", "--json").stdout)["circuits"] == {"cluster": "closed"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("force-open",), "--reason"),
        (("force-open", "--reason", "x", "--for", "soon"), "90s, 10m or 2h"),
        (("force-open", "--reason", "x", "--for", "0s"), "90s, 10m or 2h"),
        (("auto", "--reason", "x", "--topic", "no topic"), "no name of a topic"),
    ],
)
def test_mistakes_end_in_a_sentence(delivery: Stack, arguments: tuple[str, ...], complaint: str) -> None:
    done = delivery.command("breaker", *arguments, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert delivery.redis.exists("kafka-delivery:cb:1:{default}:cluster:st") == 0
