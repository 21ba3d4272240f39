"""The mutation tool notices a planted fault, shows a survivor, and trusts no tests that prove nothing."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from mutation.command import main
from mutation.guards import Target


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with one rule, whose test knows one of its sides only."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take longer than its tests
    (tmp_path / "workers").mkdir()
    (tmp_path / "tests" / "mutation").mkdir(parents=True)
    (tmp_path / "workers" / "small_rules.py").write_text("def is_large(n):\n    return n > 5\n")
    test = """
        from small_rules import is_large

        def test_six_is_large():
            assert is_large(6)
            assert not is_large(4)
        """
    (tmp_path / "tests" / "test_small_rules.py").write_text(dedent(test))
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['real', 'acceptance']\n")
    return tmp_path


TARGET = Target("workers/small_rules.py", ("test_small_rules.py",))


SURVIVED = "- return n > 5\n    + return n >= 5"


def test_a_fault_is_noticed_and_a_survivor_shown_and_explained(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--jobs", "1"], repository, (TARGET,)) == 1
    told = capsys.readouterr().out
    assert SURVIVED in told
    assert "| workers/small_rules.py | 2 | 1 | 0 | 0 | 1 | 0 |" in told
    assert (repository / "workers" / "small_rules.py").read_text() == "def is_large(n):\n    return n > 5\n"

    reason = (
        '[[survivor]]\nfile = "small_rules.py"\nline = "return n > 5"\nmutated = ["return n >= 5"]\nwhy = "So what."\n'
    )
    (repository / "tests" / "mutation" / "accepted.toml").write_text(reason)
    assert main(["--report", "--write"], repository, (TARGET,)) == 0
    page = (repository / "tests" / "mutation" / "results.md").read_text()
    assert "`small_rules.py:2` So what." in page


def test_tests_that_fail_without_a_mutant_prove_nothing(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "tests" / "test_small_rules.py").write_text("def test_it() -> None:\n    assert False\n")
    assert main(["--jobs", "1"], repository, (TARGET,)) == 2
    assert "test_small_rules.py::test_it fails without a mutant" in capsys.readouterr().err


def test_tests_that_do_not_run_the_file_prove_nothing(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "tests" / "test_small_rules.py").write_text("def test_it() -> None:\n    assert True\n")
    assert main(["--jobs", "1"], repository, (TARGET,)) == 2
    assert "no test notices that workers/small_rules.py is empty" in capsys.readouterr().err
