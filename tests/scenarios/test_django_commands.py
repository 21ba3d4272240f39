"""A Django project's own processes: manage.py, its settings, and its own Celery, which is left alone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import redis

from fresh import python
from kafka_delivery_worker.embedded import Valkey

PASSWORD = "hunter2"  # noqa: S105  # looked for where it must not be

PROJECT = """
import os, sys
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["kafka_delivery.contrib.django"],
    KAFKA_DELIVERY=%s,
)
from django.core.management import execute_from_command_line
execute_from_command_line(sys.argv)
"""


def queued(client: redis.Redis) -> list[str]:
    """Ids of the messages that wait, oldest first."""
    return [json.loads(message)["headers"]["id"] for message in reversed(client.lrange("kafka-delivery", 0, -1))]


@pytest.fixture
def manage(tmp_path: Path) -> Any:
    """A project's manage.py, with these settings."""

    def manage(given: dict[str, Any], *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "manage.py"
        script.write_text(PROJECT % repr(given))
        return python(str(script), *arguments, env=env)

    return manage


class TestManage:
    WRONG = {"REDIS_URI": "redis://r:1/2"}  # noqa: RUF012

    def test_check_names_a_wrong_setting(self, manage: Any) -> None:
        done = manage(self.WRONG, "check")
        assert done.returncode == 1
        assert "KAFKA_DELIVERY_REDIS_URI is not a setting; did you mean KAFKA_DELIVERY_REDIS_URL?" in done.stderr
        assert 'KAFKA_DELIVERY["X"]' in done.stderr

    SENDS = """
from kafka_delivery import SettingsError, send
try:
    send.delay("orders", "v")
except SettingsError as error:
    print(error)
"""

    @pytest.mark.parametrize("given", [WRONG, "redis://r:1/2", None])
    def test_works_with_a_wrong_setting_which_is_an_error_of_who_sends(self, given: Any, manage: Any) -> None:
        done = manage(given, "shell", "-c", self.SENDS)
        assert done.returncode == 0, done.stderr
        assert " is not a setting; " in done.stdout

    def test_gives_help_with_a_wrong_setting(self, manage: Any) -> None:
        assert manage(self.WRONG, "help").returncode == 0

    def test_runs_commands_of_kafka_delivery_with_djangos_settings(self, manage: Any) -> None:
        given = {
            "REDIS_URL": f"redis://u:{PASSWORD}@r:1/2",
            "PRODUCER": {"a": 1},
            "RETRY_JITTER": False,
            "CLUSTER": "c",
        }
        done = manage(given, "kafka_delivery", "settings", "--json", KAFKA_DELIVERY_CLUSTER="of-the-environment")
        assert done.returncode == 0, done.stderr
        rows = {row["variable"]: row["value"] for row in map(json.loads, done.stdout.splitlines())}
        assert rows["KAFKA_DELIVERY_REDIS_URL"] == "(changed; not shown)"
        assert rows["KAFKA_DELIVERY_PRODUCER"] == "(changed; not shown)"
        assert rows["KAFKA_DELIVERY_RETRY_JITTER"] is False
        assert rows["KAFKA_DELIVERY_CLUSTER"] == "of-the-environment"

    def test_passes_options_on(self, manage: Any) -> None:
        assert "--loglevel" in manage({}, "kafka_delivery", "worker", "--help").stdout
        assert "--create" in manage({}, "kafka_delivery", "doctor", "--help").stdout

    def test_starts_no_worker_with_a_wrong_setting(self, manage: Any) -> None:
        done = manage(self.WRONG, "kafka_delivery", "worker")
        assert done.returncode == 1
        assert "did you mean KAFKA_DELIVERY_REDIS_URL?" in done.stderr


OWN_CELERY = """
import json, os
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["kafka_delivery.contrib.django"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    CELERY_BROKER_URL=os.environ["THEIRS"],
    CELERY_TASK_DEFAULT_QUEUE="theirs",
    KAFKA_DELIVERY={"REDIS_URL": os.environ["OURS"]},
)
import django
from celery import Celery, current_app, shared_task
theirs = Celery("shop")
theirs.config_from_object("django.conf:settings", namespace="CELERY")
theirs.autodiscover_tasks()
django.setup()

@shared_task(name="shop.bill")
def bill(order):
    pass

import kafka_delivery
from kafka_delivery import send
sent = [send.delay("orders", "v").id, bill.delay(1).id, send.delay_on_commit("orders", "v")]
print(json.dumps({
    "sent": sent,
    "current": current_app.main,
    "bill": bill.app.main,
    "theirs": sorted(name for name in theirs.tasks if not name.startswith("celery.")),
    "ours": sorted(name for name in kafka_delivery.app.tasks if not name.startswith("celery.")),
}))
"""


@pytest.mark.smoke
def test_the_projects_own_celery_is_untouched(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    with Valkey() as other, redis.Redis.from_url(other.url) as their_client:
        done = python(
            "-c",
            OWN_CELERY,
            env={
                "OURS": redis_url,
                "THEIRS": other.url,
                "CELERY_BROKER_URL": other.url,
                "KAFKA_DELIVERY_ENQUEUE_TIMEOUT_S": "10",
            },
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        first, theirs, second = said["sent"]
        assert queued(redis_client) == [first, second]
        (message,) = their_client.lrange("theirs", 0, -1)
        assert json.loads(message)["headers"]["id"] == theirs
    assert said["current"] == said["bill"] == "shop"
    assert said["theirs"] == ["shop.bill"]
    assert said["ours"] == ["kafka_delivery.dead_letter", "kafka_delivery.send", "kafka_delivery.send_many"]


def test_nothing_of_ours_is_logged_at_start(manage: Any) -> None:
    done = manage(
        {"CLUSTER": "c"}, "shell", "-c", "import logging; print(logging.getLogger('kafka_delivery').handlers)"
    )
    assert done.stdout.splitlines()[-1] == "[]"
