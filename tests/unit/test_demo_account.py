"""The demo's account counts each record once, by its id, and a loss is exit code 1."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from kafka_delivery_worker.cli import demo as cli_demo
from kafka_delivery_worker.demo import Account, balance


def test_a_lost_record_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_demo, "_run", lambda *_: 1)
    assert CliRunner().invoke(cli_demo.command, []).exit_code == 1


@pytest.mark.parametrize(
    ("delivered", "letters", "parked", "outcome"),
    [
        ({"a": 1, "b": 1}, ["c"], ["d"], Account(4, 2, 1, 1, duplicates=0, lost=0)),
        ({"a": 1}, ["c"], [], Account(4, 1, 1, 0, duplicates=0, lost=2)),
        ({"a": 3, "b": 1, "c": 1}, ["c", "c"], ["a", "d"], Account(4, 3, 1, 2, duplicates=5, lost=0)),
        ({"a": 1, "stranger": 9}, ["c", "stranger"], ["d"], Account(4, 1, 1, 1, duplicates=0, lost=1)),
    ],
)
def test_the_account_counts_ids(
    delivered: dict[str, int], letters: list[str], parked: list[str], outcome: Account
) -> None:
    assert balance("abcd", delivered, letters, parked) == outcome
