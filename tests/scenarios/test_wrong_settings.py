"""A worker that is started with a wrong setting says so in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_worker_with_a_wrong_setting_ends_with_the_sentence_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "kafka_delivery_worker", "report"],
        env=os.environ | {"KAFKA_DELIVERY_MAX_RETRIES": "many"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "KAFKA_DELIVERY_MAX_RETRIES='many' must be a whole number (count)" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
