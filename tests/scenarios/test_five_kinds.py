"""Dead letters of five kinds, made by real failures on a real Kafka, are listed, summarised, filtered and redriven at a
rate, with a SIGKILL in the middle; each is accounted for by its message id.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from five_kinds import KINDS, FiveKinds
from kafka_delivery_worker.redrive import IN_FLIGHT
from letters import command, redrive, waiting
from servers import RealKafka, wait_until
from stack import BIN, Stack, stack
from watching import ALONE, emptied

pytestmark = pytest.mark.long

TOPIC = "five-kinds"
NUMBER = dict(zip(KINDS, (3, 10, 29, 87, -190), strict=True))


@pytest.mark.real
def test_a_few_hundred_dead_letters_of_five_kinds(redis_url: str, real_kafka: RealKafka, tmp_path: Path) -> None:
    seen_understood_and_sent_again(redis_url, real_kafka, tmp_path, 60, "10/s")  # a second's worth goes at once


def seen_understood_and_sent_again(
    redis_url: str, real_kafka: RealKafka, tmp_path: Path, count: int, rate: str
) -> None:
    topic = f"{TOPIC}-{count}"
    real_kafka.create_topic(f"{topic}-dlq", partitions=3)
    with stack(emptied(redis_url), real_kafka) as system:
        system.worker(*ALONE)
        letters = FiveKinds(system, real_kafka, topic, count)
        started = time.monotonic()
        letters.make(timeout=600)
        print(f"\n{5 * count} dead letters made in {time.monotonic() - started:.0f} s")  # noqa: T201

        # Seen and understood.
        (row,) = [one for one in _json(system, "topics") if topic in one["topic"]]
        assert (row["topic"], row["waiting"]) == ([topic], 5 * count)
        (summary,) = _json(system, "summary", topic)
        assert {one["error"]: one["count"] for one in summary["errors"]} == dict.fromkeys(KINDS.values(), count)
        for kind, name in KINDS.items():
            found = _json(system, "list", topic, "--error-code", name)
            assert {one["message_id"] for one in found} == {f"{kind}-{n}" for n in range(count)}
            assert {one["error_code"] for one in found} == {NUMBER[kind]}
            of_header = _json(system, "list", topic, "--header", f"kind={kind}")
            assert {one["message_id"] for one in of_header} == {one["message_id"] for one in found}
        assert len(_json(system, "list", topic, "--key", "customer-7")) == 4 * len(range(7, count, 50))

        # A redrive of one kind while the cause is still there uses up nothing else, and says so.
        refused = redrive(system, topic, "--error-code", "TOPIC_AUTHORIZATION_FAILED", "--limit", "5", fails=True)
        assert refused["refused"] == 5
        again = {
            one["message_id"] for one in _wait_listed(system, topic, 5, "--since", "1h", "--header", "kind=forbidden")
        }

        # Mended, and one kind redriven: killed in the middle, and run again.
        letters.repair()
        killed = subprocess.Popen(
            [BIN / "kafka-delivery", "dead-letters", "redrive", topic, "--error-code", "29", "--rate", rate, "--yes"],
            env=system.env(),
            stdout=subprocess.DEVNULL,
        )
        wait_until(lambda: len(letters.delivered()) > count // 3, 60, "a third of them delivered")
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert 0 < waiting(system, topic) < 5 * count
        system.redis.delete(f"kafka-delivery:redrive:1:{topic}-dlq:lock")  # instead of waiting for its end
        done = redrive(system, topic, "--error-code", "29", "--rate", rate)
        assert done["refused"] == done["parked"] == done["left"] == done["in_flight"] == 0
        once = Counter(letters.delivered())
        assert set(once) == {f"forbidden-{n}" for n in range(count)}
        twice = once.total() - count
        print(f"sent twice after SIGKILL: {twice}, of at most {IN_FLIGHT}")  # noqa: T201
        assert twice <= IN_FLIGHT
        assert waiting(system, topic) == 4 * count

        # One is given up, the rest goes.
        command(system, "discard", topic, "--message-id", "keyless-1", "--reason", "a test order", "--yes")
        done = redrive(system, topic)
        assert done["delivered"] == 4 * count - 1
        assert redrive(system, topic)["sent"] == 0

        # Accounted for.
        accounted = Counter(letters.delivered())
        assert set(accounted) == letters.ids - {"keyless-1"}
        assert accounted.total() - len(accounted) == twice
        counts = {
            message_id: next(int(v or 0) for n, v in record.headers if n == "redrive-count")
            for record in system.read(topic)
            for message_id in [next(v.decode() for n, v in record.headers if n == "message-id" and v)]
        }
        assert {message_id for message_id, redrives in counts.items() if redrives == 2} == again
        assert waiting(system, topic) == 0
        assert system.parked() == []
        lag = real_kafka.admin.list_consumer_groups()
        assert f"kafka-delivery-redrive.{topic}-dlq" in {group.group_id for group in lag.result(10).valid}


def _wait_listed(system: Stack, topic: str, count: int, *arguments: str) -> list[dict[str, Any]]:
    """Those that were redriven and died again."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = [one for one in _json(system, "list", topic, *arguments) if one["redrive_count"]]
        return len(found) == count

    wait_until(there, 60, f"{count} that died again")
    return found


def _json(system: Stack, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in command(system, *arguments, "--json").stdout.splitlines()]
