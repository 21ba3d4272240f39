"""An application's own tests, run by pytest and by Django in an interpreter where no worker is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path


def run_tests(folder: Path, *arguments: str, env: Mapping[str, str] = {}, **files: str) -> str:
    """Run an application's own tests, where no worker is installed; return what the runner says."""
    (folder / "sitecustomize.py").write_text(
        "import sys\nfor name in ('confluent_kafka', 'flower', 'prometheus_client', 'rich', 'orjson', 'pybase64'):\n"
        "    sys.modules[name] = None\n"
    )
    for name, code in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_fixture_of_an_application(tmp_path: Path) -> None:
    said = run_tests(
        tmp_path,
        *("-m", "pytest", "-p", "no:cacheprovider", "-q"),
        conftest='pytest_plugins = ["kafka_delivery.pytest_plugin"]',
        test_shop="""
            import pytest
            from kafka_delivery import RejectedError, send, send_and_wait

            def test_an_order_is_sent(kafka_sent):
                send.delay("orders", {"id": 42}, key="42")
                assert kafka_sent.one(topic="orders", key="42").json == {"id": 42}

            def test_an_order_is_refused(kafka_sent):
                kafka_sent.fail("MSG_SIZE_TOO_LARGE", topic="orders")
                with pytest.raises(RejectedError):
                    send_and_wait("orders", {"id": 42})
        """,
    )
    assert "2 passed" in said


def test_a_test_case_of_django(tmp_path: Path) -> None:
    said = run_tests(
        tmp_path,
        *("-m", "django", "test"),
        env={"DJANGO_SETTINGS_MODULE": "shop_settings"},
        shop_settings="DATABASES = {'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': ':memory:'}}",
        test_shop="""
            from functools import partial

            from django.db import transaction
            from django.test import TestCase
            from kafka_delivery import send
            from kafka_delivery.testing import capture

            def place_order(number):
                with transaction.atomic():
                    transaction.on_commit(partial(send.delay, "orders", {"id": number}, key=str(number)))

            class OrderTest(TestCase):
                def setUp(self):
                    self.sent = self.enterContext(capture())

                def test_is_sent_with_the_commit(self):
                    with self.captureOnCommitCallbacks(execute=True):
                        place_order(42)
                        self.sent.none()
                    self.assertEqual(self.sent.one(topic="orders", key="42").json, {"id": 42})

                def test_is_not_sent_without(self):
                    place_order(42)
                    self.sent.none()
        """,
    )
    assert "Ran 2 tests" in said
