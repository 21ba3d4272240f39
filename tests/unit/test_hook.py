"""An application's own function is told of each dead letter; whatever it does, the work does not notice."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kafka_delivery.errors import SettingsError
from kafka_delivery_worker import hook
from kafka_delivery_worker.dotted import load
from kafka_delivery_worker.hook import DeadLettered, Hook
from servers import wait_until

LETTER = DeadLettered(
    topic="orders",
    dead_letter_topic="orders-dlq",
    message_id="id-1",
    error_class="RejectedError",
    error_code=10,
    error_message="too large [MSG_SIZE_TOO_LARGE] (topic orders, message id-1)",
    retry_count=0,
    failed_at="2026-01-02T03:04:05.678+00:00",
    partition=3,
    offset=42,
)


def numbered(number: int) -> DeadLettered:
    return dataclasses.replace(LETTER, message_id=f"id-{number}")


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the hook logged, and no other thread of these tests."""
    return [record.getMessage() for record in caplog.records if record.name == hook.log.name]


def test_what_it_is_told_has_no_place_for_a_payload() -> None:
    assert {field.name for field in dataclasses.fields(DeadLettered)} == {
        "topic", "dead_letter_topic", "message_id", "error_class", "error_code", "error_message", "retry_count",
        "failed_at", "redrive_count", "partition", "offset", "parked_id",
    }  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        LETTER.topic = "other"  # type: ignore[misc]


def test_it_is_told_of_each_in_order_in_a_thread_of_its_own() -> None:
    told: list[tuple[str, str]] = []
    one = Hook(lambda letter: told.append((letter.message_id, threading.current_thread().name)))
    for number in range(100):
        one.tell(numbered(number))
    one.close(60)
    assert told == [(f"id-{number}", "kafka-delivery-hook") for number in range(100)]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_what_it_raises_is_logged_and_changes_nothing(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    def function(letter: DeadLettered) -> None:
        told.append(letter.message_id)
        if letter.message_id == "id-0":
            raise error

    one = Hook(function)
    one.tell(numbered(0))
    one.tell(numbered(1))
    one.close(60)
    assert told == ["id-0", "id-1"]
    (line,) = logged(caplog)
    assert line == f"on_dead_letter.failed message_id=id-0 error={type(error).__name__}"


class TestSlow:
    @pytest.fixture
    def held(self) -> Iterator[threading.Event]:
        event = threading.Event()
        yield event
        event.set()

    def test_one_that_hangs_holds_up_nobody(
        self, held: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(hook, "MOST_WAITING", 10)
        begun = threading.Event()

        def hang(letter: DeadLettered) -> None:
            begun.set()
            held.wait(120)

        one = Hook(hang)
        one.tell(numbered(0))
        assert begun.wait(60)
        for number in range(1, 16):
            one.tell(numbered(number))  # returns, or the test times out
        skipped = logged(caplog)
        assert skipped == [f"on_dead_letter.skipped message_id=id-{number} waiting=10" for number in range(11, 16)]
        one.close(0.05)
        assert "on_dead_letter.not_told" in logged(caplog)[-1]

    def test_the_end_waits_for_what_is_told(self, held: threading.Event) -> None:
        told: list[str] = []

        def wait(letter: DeadLettered) -> None:
            held.wait(120)
            told.append(letter.message_id)

        one = Hook(wait)
        for number in range(3):
            one.tell(numbered(number))
        threading.Timer(0.1, held.set).start()
        one.close(60)
        assert told == ["id-0", "id-1", "id-2"]

    def test_many_threads_tell(self) -> None:
        told: list[str] = []
        one = Hook(lambda letter: told.append(letter.message_id))

        def tell(start: int) -> None:
            for number in range(start, start + 20):
                one.tell(numbered(number))

        threads = [threading.Thread(target=tell, args=(start,)) for start in range(0, 320, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        one.close(60)
        assert sorted(told) == sorted(f"id-{number}" for number in range(320))


def test_without_a_dead_letter_there_is_no_thread() -> None:
    before = set(threading.enumerate())
    one = Hook(lambda letter: None)
    one.close(1)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("path", ["hooks_of_a_user:told", "hooks_of_a_user.told"])
def test_the_function_may_lie_where_the_worker_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "hooks_of_a_user.py").write_text("def told(letter): return 'told'")
    monkeypatch.chdir(tmp_path)
    assert load("X", path)(LETTER) == "told"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("told", "must look like package.module:function"),
        (":told", "must look like"),
        ("module:", "must look like"),
        ("no_such_module:told", "cannot be imported: No module named 'no_such_module'"),
        ("json:no_such", "cannot be imported: module 'json' has no attribute 'no_such'"),
        ("string:digits", "is no function but str"),
    ],
)
def test_a_wrong_path_is_refused_by_a_sentence(path: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load("KAFKA_DELIVERY_ON_DEAD_LETTER", path)
    assert f"KAFKA_DELIVERY_ON_DEAD_LETTER={path!r}" in str(refused.value)
    assert said in str(refused.value)


def test_nothing_is_left_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[DeadLettered] = []
    one = Hook(told.append)
    one.tell(LETTER)
    wait_until(lambda: told == [LETTER], 60, "it to be told")
    one.close(1)
