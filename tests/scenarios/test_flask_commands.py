"""A Flask application's own processes: its command line, and its own Celery, which is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import redis

from fresh import python
from kafka_delivery_worker.embedded import Valkey

FACTORY = """
from flask import Flask
from kafka_delivery.contrib.flask import KafkaDelivery

delivery = KafkaDelivery()


def create_app():
    app = Flask("shop")
    app.config.from_mapping(%r)
    delivery.init_app(app)
    return app
"""


OWN_CELERY = """
import json, os
from celery import Celery, Task, current_app, shared_task
from flask import Flask
from kafka_delivery import send
import kafka_delivery
from kafka_delivery.contrib.flask import KafkaDelivery


def celery_init_app(app):  # as Flask's documentation has it
    class FlaskTask(Task):
        def __call__(self, *args, **kwargs):
            with app.app_context():
                return self.run(*args, **kwargs)

    celery_app = Celery(app.name, task_cls=FlaskTask)
    celery_app.config_from_object(app.config["CELERY"])
    celery_app.set_default()
    app.extensions["celery"] = celery_app
    return celery_app


app = Flask("shop")
app.config.from_mapping(
    CELERY={"broker_url": os.environ["THEIRS"], "task_default_queue": "theirs"},
    KAFKA_DELIVERY_REDIS_URL=os.environ["OURS"],
)
KafkaDelivery(app)
theirs = celery_init_app(app)

@shared_task(name="shop.bill")
def bill(order):
    pass

print(json.dumps({
    "sent": [send.delay("orders", "v").id, bill.delay(1).id],
    "current": current_app.main,
    "bill": bill.app.main,
    "theirs": sorted(name for name in theirs.tasks if not name.startswith("celery.")),
    "ours": sorted(name for name in kafka_delivery.app.tasks if not name.startswith("celery.")),
    "bases": [theirs.Task.__bases__[0].__name__, type(send).__mro__[1].__name__],
}))
"""


def queued(client: redis.Redis) -> list[str]:
    return [json.loads(message)["headers"]["id"] for message in reversed(client.lrange("kafka-delivery", 0, -1))]


class TestTheCommandLine:
    def test_runs_commands_of_kafka_delivery_with_the_applications_settings(self, tmp_path: Path) -> None:
        config = {"KAFKA_DELIVERY_REDIS_URL": "redis://r:1/2", "KAFKA_DELIVERY_CLUSTER": "blue", "DEBUG": True}
        (tmp_path / "shop.py").write_text(FACTORY % config)
        command = ["-m", "flask", "--app", "shop", "kafka-delivery"]
        done = python(*command, "settings", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = {row["variable"]: row["value"] for row in map(json.loads, done.stdout.splitlines())}
        assert rows["KAFKA_DELIVERY_CLUSTER"] == "blue"
        assert rows["KAFKA_DELIVERY_REDIS_URL"] == "(changed; not shown)"
        assert "--create" in python(*command, "doctor", "--help", cwd=tmp_path).stdout
        assert "--loglevel" in python(*command, "worker", "--help", cwd=tmp_path).stdout


@pytest.mark.smoke
def test_the_projects_own_celery_is_untouched(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    with Valkey() as other, redis.Redis.from_url(other.url) as their_client:
        env = {
            "OURS": redis_url,
            "THEIRS": other.url,
            "CELERY_BROKER_URL": other.url,
            "KAFKA_DELIVERY_ENQUEUE_TIMEOUT_S": "10",
        }
        done = python("-c", OWN_CELERY, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        ours, theirs = said["sent"]
        assert queued(redis_client) == [ours]
        (message,) = their_client.lrange("theirs", 0, -1)
        assert json.loads(message)["headers"]["id"] == theirs
    assert said["current"] == said["bill"] == "shop"
    assert said["theirs"] == ["shop.bill"]
    assert said["ours"] == ["kafka_delivery.dead_letter", "kafka_delivery.send", "kafka_delivery.send_many"]
    assert said["bases"] == ["FlaskTask", "DeliveryTask"]
