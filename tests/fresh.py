"""Interpreters of their own, for what a process does once: it imports, it forks, it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kafka_delivery.settings import ENV_PREFIX


def python(*arguments: str, cwd: Path | None = None, env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments; no variable speaks to Celery or to us but those in `env`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith((ENV_PREFIX, "CELERY_"))}
    return subprocess.run(
        [sys.executable, *arguments], env=clean | dict(env), cwd=cwd, capture_output=True, text=True, timeout=120
    )


def printed(code: str, **env: str) -> Any:
    """Run `code`, which may use `json`; return what it prints as JSON."""
    done = python("-c", "import json\n" + textwrap.dedent(code), env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
