"""A worker whose certificate, token or plugin is not there waits for it, as for a Kafka that is away; a renewed
certificate is taken up without a restart. Each record is delivered, and none is parked for what it cannot help.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority, put
from kafka_delivery import send
from servers import SecureKafka, wait_until
from stack import Stack, stack
from watching import emptied

pytestmark = [pytest.mark.real, pytest.mark.long]

POOLS = pytest.mark.parametrize(
    "pool", [(), ("-P", "threads", "-c", "4"), ("-P", "prefork", "-c", "2")], ids=["in-flight", "threads", "prefork"]
)

TOKENS = """
import pathlib
import time

UP, CALLS = pathlib.Path({up!r}), pathlib.Path({calls!r})


def get(config):
    with CALLS.open("a") as calls:
        calls.write("called\\n")
    if not UP.exists():
        if {hangs}:
            time.sleep(30)
        raise RuntimeError("hunter2")
    from servers import unsigned_token

    return unsigned_token(3600)
"""


@pytest.fixture
def topic(secure_kafka: SecureKafka, request: pytest.FixtureRequest) -> str:
    name = f"{request.node.originalname}-{time.monotonic_ns()}"[-60:]
    secure_kafka.create_topic(name)
    secure_kafka.create_topic(f"{name}-dlq")
    return name


@pytest.fixture
def renew(tmp_path: Path, authority: Authority) -> Callable[[str], None]:
    """Puts another certificate and its key where the worker looks."""

    def renew(name: str) -> None:
        certificate, key = authority.pair(name)
        put(tmp_path / "client.crt", certificate)
        put(tmp_path / "client.key", key)

    renew("first")
    return renew


@pytest.fixture
def system(
    redis_url: str, secure_kafka: SecureKafka, tmp_path: Path, authority: Authority, renew: Callable[[str], None]
) -> Iterator[Stack]:
    properties = {
        "security.protocol": "ssl",
        "ssl.ca.location": str(authority.path),
        "ssl.certificate.location": str(tmp_path / "client.crt"),
        "ssl.key.location": str(tmp_path / "client.key"),
    }
    changes = {"BOOTSTRAP_SERVERS": secure_kafka.tls_servers, "PRODUCER": json.dumps(properties)}
    with stack(emptied(redis_url), secure_kafka, **changes) as system:
        yield system


def sent(topic: str, count: int) -> set[str]:
    """Send so many records; their message ids."""
    ids = {f"{topic}-{number}" for number in range(count)}
    for one in sorted(ids):
        send.delay(topic, "x", message_id=one)
    return ids


@POOLS
def test_a_worker_without_its_key_starts_and_delivers_when_it_is_there(
    system: Stack, topic: str, tmp_path: Path, pool: tuple[str, ...]
) -> None:
    key = (tmp_path / "client.key").read_bytes()
    (tmp_path / "client.key").unlink()
    examined = system.command("doctor", "--json", check=False)
    assert examined.returncode == 1
    assert "ssl.key.location: No such file or directory" in examined.stdout
    worker = system.worker(*pool)
    assert "worker.no_client reason='ssl.key.location: No such file or directory" in worker.log
    ids = sent(topic, 30)
    wait_until(lambda: "producer.no_client" in worker.log, 60, "the worker to try")

    put(tmp_path / "client.key", key)

    system.wait_for(topic, ids, timeout=120)
    system.wait_empty()
    assert system.parked() == []
    assert system.read(f"{topic}-dlq") == []
    assert Counter(system.ids(topic)) == dict.fromkeys(ids, 1)


def test_a_renewed_certificate_is_taken_up_while_records_flow(
    system: Stack, topic: str, secure_kafka: SecureKafka, renew: Callable[[str], None]
) -> None:
    """The broker says who connects: only the second name may write to the second topic."""
    reserved = f"{topic}-2"[-60:]
    secure_kafka.create_topic(reserved)
    secure_kafka.reserve(reserved, "User:CN=second")
    worker = system.worker()
    ids: set[str] = set()

    def renewed() -> bool:
        one = f"{topic}-{len(ids)}"
        ids.add(one)
        send.delay(topic, "x", message_id=one)
        return "producer.renewed" in worker.log

    assert not renewed()
    system.wait_for(topic, ids)
    renew("second")
    wait_until(renewed, 60, "the worker to look")
    for _ in range(20):
        renewed()
    send.delay(reserved, "x", message_id="with the second name")
    system.wait_for(reserved, {"with the second name"})
    system.wait_for(topic, ids)
    system.wait_empty()
    assert Counter(system.ids(topic)) == dict.fromkeys(ids, 1)
    assert system.parked() == []
    assert worker.stop() < 30


@pytest.mark.parametrize("hangs", [False, True], ids=["raises", "hangs"])
@POOLS
def test_a_worker_without_a_token_starts_delivers_when_it_has_one_and_stops_in_time(
    system: Stack, topic: str, secure_kafka: SecureKafka, tmp_path: Path, hangs: bool, pool: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    up, calls = tmp_path / "up", tmp_path / "calls"
    (tmp_path / "tokens.py").write_text(TOKENS.format(up=str(up), calls=str(calls), hangs=hangs))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent), prepend=":")
    changes: dict[str, Any] = {
        "BOOTSTRAP_SERVERS": secure_kafka.token_servers,
        "PRODUCER": json.dumps({"security.protocol": "sasl_plaintext", "sasl.mechanism": "OAUTHBEARER"}),
        "OAUTH_CB": "tokens:get",
    }
    worker = system.worker(*pool, **changes)
    assert "worker.no_client reason='KAFKA_DELIVERY_OAUTH_CB: " in worker.log
    ids = sent(topic, 10)
    wait_until(lambda: "producer.no_client" in worker.log, 60, "the worker to try")
    assert worker.stop() < 40
    assert system.waiting >= len(ids)
    worker = system.worker(*pool, **changes)

    up.touch()

    system.wait_for(topic, ids, timeout=120)
    system.wait_empty()
    assert system.parked() == []
    assert Counter(system.ids(topic)) == dict.fromkeys(ids, 1)
    assert "hunter2" not in worker.log


def test_a_worker_whose_token_function_hangs_stops_in_time(
    system: Stack, secure_kafka: SecureKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, calls = str(tmp_path / "away"), str(tmp_path / "calls")
    (tmp_path / "tokens.py").write_text(TOKENS.format(up=away, calls=calls, hangs=True))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    changes: dict[str, Any] = {
        "BOOTSTRAP_SERVERS": secure_kafka.token_servers,
        "PRODUCER": json.dumps({"security.protocol": "sasl_plaintext", "sasl.mechanism": "OAUTHBEARER"}),
        "OAUTH_CB": "tokens:get",
    }
    worker = system.worker(**changes)
    assert worker.stop() < 15, "it waited for the function, which takes 30 s"


@pytest.mark.parametrize("wrong", [{"batch.sizes": 1}, {"retry.backoff.ms": "none at all"}])
def test_a_wrong_setting_still_ends_the_worker(system: Stack, wrong: dict[str, Any]) -> None:
    """Also where a file is not there: that is waited for, and this would be for ever."""
    properties = {"security.protocol": "ssl", "ssl.ca.location": "/nowhere/ca.crt"} | wrong
    worker = system.worker(ready=False, PRODUCER=json.dumps(properties))
    assert worker.process.wait(60) != 0
    assert f"KAFKA_DELIVERY_PRODUCER: librdkafka refuses it: {next(iter(wrong))}" in worker.log
    assert "none at all" not in worker.log
