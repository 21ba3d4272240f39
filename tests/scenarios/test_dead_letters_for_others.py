"""Dead letters tell others: tools that read Spring's or Connect's headers, and a function of the application's."""

from __future__ import annotations

import json
import os
import struct
import textwrap
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kafka_delivery import Record, dead_letter, send
from kafka_delivery_worker.embedded import MockKafka
from servers import RealKafka, wait_until
from stack import Stack, stack
from watching import ALONE, emptied

PAYLOAD = "secret-payload"


@pytest.mark.real
@pytest.mark.parametrize("preset", ["spring", "connect"])
class TestPresets:
    """On a broker that refuses: a record too large for its topic."""

    @pytest.fixture
    def system(self, redis_url: str, real_kafka: RealKafka, preset: str) -> Iterator[Stack]:
        with stack(emptied(redis_url), real_kafka, DEAD_LETTER_HEADERS=preset) as system:
            system.worker(*ALONE)
            yield system

    def test_in_the_words_of_another_tool(self, system: Stack, real_kafka: RealKafka, preset: str) -> None:
        topic = f"{preset}-{uuid.uuid4().hex[:8]}"
        real_kafka.create_topic(topic, max_message_bytes=1000)
        real_kafka.create_topic(f"{topic}-dlq")
        value = os.urandom(3000)
        own = [("a", b"1"), ("kafka_dlt-original-topic", b"forged"), ("__connect.errors.topic", b"forged"), ("a", None)]
        record = Record(topic, value, "k", own, 2, 1767323045678)
        send.apply_async((record,))

        (letter,) = system.wait_for(f"{topic}-dlq", {record.id})

        assert (letter.key, letter.value) == (b"k", value)
        assert letter.timestamp / 1000 == pytest.approx(time.time(), abs=60)  # for the record's, it might be gone soon
        assert letter.headers[: len(own) + 1] == [("message-id", record.id.encode()), *own]
        said = dict(letter.headers)  # the last of each name, as Java's Headers.lastHeader
        if preset == "spring":
            assert said["kafka_dlt-original-topic"] == topic.encode()
            assert struct.unpack(">i", said["kafka_dlt-original-partition"] or b"") == (2,)
            assert struct.unpack(">q", said["kafka_dlt-original-timestamp"] or b"") == (1767323045678,)
            assert said["kafka_dlt-exception-fqcn"] == b"RejectedError"
            assert b"MSG_SIZE_TOO_LARGE" in (said["kafka_dlt-exception-message"] or b"")
        else:
            assert said["__connect.errors.topic"] == topic.encode()
            assert said["__connect.errors.partition"] == b"2"
            assert said["__connect.errors.record.timestamp"] == b"1767323045678"
            assert said["__connect.errors.exception.class.name"] == b"RejectedError"
            assert b"MSG_SIZE_TOO_LARGE" in (said["__connect.errors.exception.message"] or b"")


HOOKS = """
    import json, os, time
    from dataclasses import asdict

    def tell(letter):
        with open(os.environ["TOLD"], "a") as file:
            file.write(json.dumps(asdict(letter)) + "\\n")

    def fail(letter):
        tell(letter)
        raise LookupError("of the hook")

    def hang(letter):
        tell(letter)
        time.sleep(600)
"""


class TestHook:
    """In a real worker, with a function in the directory that it is started in."""

    @pytest.fixture
    def system(
        self, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
    ) -> Iterator[Stack]:
        (tmp_path / "hooks.py").write_text(textwrap.dedent(HOOKS))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TOLD", str(tmp_path / "told"))
        with MockKafka() as kafka, stack(emptied(redis_url), kafka, TOPIC_PROPAGATION_MS=300) as system:
            kafka.create_topic("there")
            kafka.create_topic("there-dlq")
            yield system

    def told(self) -> list[dict[str, Any]]:
        path = Path(os.environ["TOLD"])
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @pytest.mark.parametrize("pool", ["", "prefork"])
    def test_it_is_told_where_the_letter_is(self, system: Stack, pool: str) -> None:
        worker = system.worker(*ALONE, *(("-P", pool, "-c", "1") if pool else ()), ON_DEAD_LETTER="hooks:tell")
        headers = {"h": PAYLOAD}
        dead_letter.delay("there", PAYLOAD, PAYLOAD, headers, message_id="id-1", error_class="Mine", error_message="m")
        dead_letter.delay("missing", PAYLOAD, PAYLOAD, headers, message_id="id-2", error_code=3, retry_count=2)
        wait_until(lambda: len(self.told()) == 2, 60, "both to be told")

        told = {letter.pop("message_id"): letter for letter in self.told()}
        (written,) = system.read("there-dlq")
        assert told["id-1"].pop("failed_at")
        assert told["id-2"].pop("failed_at")
        assert told["id-1"] == {
            "topic": "there", "dead_letter_topic": "there-dlq", "error_class": "Mine", "error_code": None,
            "error_message": "m", "retry_count": 0, "redrive_count": 0, "partition": written.partition,
            "offset": written.offset, "parked_id": None,
        }  # fmt: skip
        assert told["id-2"] == {
            "topic": "missing", "dead_letter_topic": "missing-dlq", "error_class": "Application", "error_code": 3,
            "error_message": "", "retry_count": 2, "redrive_count": 0, "partition": None, "offset": None,
            "parked_id": "id-2",
        }  # fmt: skip
        assert PAYLOAD not in json.dumps(self.told()) + worker.log

    def test_one_that_fails_changes_nothing(self, system: Stack) -> None:
        worker = system.worker(*ALONE, ON_DEAD_LETTER="hooks:fail")
        for number in range(3):
            dead_letter.delay("there", "v", message_id=f"id-{number}")
        system.wait_for("there-dlq", {f"id-{number}" for number in range(3)})
        wait_until(lambda: worker.log.count("on_dead_letter.failed") == 3, 60, "three failures")
        system.wait_empty()
        assert len(system.read("there-dlq")) == 3

    def test_one_that_hangs_holds_up_nobody(self, system: Stack) -> None:
        """More dead letters than the worker has threads, and sends and a stop after them."""
        worker = system.worker(*ALONE, "-c", "2", ON_DEAD_LETTER="hooks:hang")
        ids = {dead_letter.delay("there", "v", message_id=f"id-{number}").id for number in range(20)}
        assert len(ids) == 20
        system.wait_for("there-dlq", {f"id-{number}" for number in range(20)})
        sent = send.apply_async(("there", "v"), ignore_result=False)
        assert sent.get(timeout=60)["message_id"] == sent.id
        wait_until(lambda: len(self.told()) > 0, 60, "the first to be told")  # by a thread of its own
        assert len(self.told()) == 1
        worker.stop(timeout=120)  # the function would take 600 s
        assert "on_dead_letter.not_told" in worker.log

    def test_a_stopping_worker_tells_what_waits(self, system: Stack) -> None:
        worker = system.worker(*ALONE, ON_DEAD_LETTER="hooks:tell")
        for number in range(20):
            dead_letter.delay("there", "v", message_id=f"id-{number}")
        system.wait_for("there-dlq", {f"id-{number}" for number in range(20)})
        worker.stop()
        assert len(self.told()) == 20

    @pytest.mark.parametrize(("path", "said"), [("hooks:tel", "cannot be imported"), ("hooks", "must look like")])
    def test_a_wrong_path_stops_the_worker_with_a_sentence(self, system: Stack, path: str, said: str) -> None:
        worker = system.worker(*ALONE, ready=False, ON_DEAD_LETTER=path)
        assert worker.process.wait(60) == 1
        assert f"kafka-delivery: KAFKA_DELIVERY_ON_DEAD_LETTER='{path}'" in worker.log
        assert said in worker.log
        assert "Traceback" not in worker.log
