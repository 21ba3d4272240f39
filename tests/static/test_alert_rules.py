"""Prometheus's own tool finds that each alert fires when it should and not otherwise."""

from __future__ import annotations

import shutil
import subprocess

import yaml  # type: ignore[import-untyped]

from servers import missing
from unit.test_monitoring import ALERTS, ALERTS_TEST, rules


def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    if shutil.which("promtool") is None:
        missing("promtool, from Debian's package prometheus")
    done = subprocess.run(
        ["promtool", "test", "rules", ALERTS_TEST.name], cwd=ALERTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tested = {one["alertname"]: True for group in yaml.safe_load(ALERTS_TEST.read_text())["tests"]
              for one in group["alert_rule_test"] if one.get("exp_alerts")}  # fmt: skip
    assert tested.keys() == {rule["alert"] for rule in rules()}, "each is seen firing"
