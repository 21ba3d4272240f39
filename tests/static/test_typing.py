"""The typed surface: an application's type checker knows what it may call and what it gets, though Celery has no types.

As an application has it: another folder, no settings of ours, no stubs for Celery.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

APPLICATION = Path(__file__).parent / "application.py"


def wrong_lines() -> set[int]:
    lines = APPLICATION.read_text().splitlines()
    return {number for number, line in enumerate(lines, start=1) if line.endswith("# wrong")}


@pytest.fixture
def application(tmp_path: Path) -> Path:
    return Path(shutil.copy(APPLICATION, tmp_path))


def run(*command: str, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, timeout=120
    ).stdout


def test_celery_has_no_types_here() -> None:
    assert importlib.util.find_spec("celery-stubs") is None


def test_mypy_knows_what_is_wrong(application: Path) -> None:
    said = run("mypy", "--strict", "--no-error-summary", application.name, folder=application.parent)
    found = {int(match[1]) for match in re.finditer(r"^application\.py:(\d+): error:", said, re.MULTILINE)}
    assert found == wrong_lines(), said


def test_pyright_knows_what_is_wrong(application: Path) -> None:
    settings = {"typeCheckingMode": "strict", "include": [application.name], "reportUnusedExpression": "none"}
    (application.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    said = run("pyright", "--outputjson", "--pythonpath", sys.executable, folder=application.parent)
    found = {problem["range"]["start"]["line"] + 1 for problem in json.loads(said)["generalDiagnostics"]}
    assert found == wrong_lines(), said
