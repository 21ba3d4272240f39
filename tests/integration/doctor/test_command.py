"""`kafka-delivery doctor` tells people and programs what it found, and never a password."""

from __future__ import annotations

import pytest

from integration.doctor.findings import NOBODY, SECRET, examined
from kafka_delivery_worker.embedded import MockKafka
from stack import Stack


def test_a_wrong_setting_is_a_finding(redis_url: str) -> None:
    found = examined(redis_url, NOBODY, LINGER_M="5")
    (finding,) = found.all
    assert (finding["check"], finding["level"]) == ("settings", "error")
    assert "did you mean KAFKA_DELIVERY_LINGER_MS?" in finding["what"]
    assert found.code == 1


def test_people_get_marks_and_what_to_do(mock_kafka: MockKafka) -> None:
    system = Stack(f"redis://:{SECRET}@{NOBODY}/0", mock_kafka, {})
    done = system.command("doctor", "--topic", "[red]", check=False)
    assert done.returncode == 1
    assert done.stderr == ""
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "✓ settings understood" in text
    assert f"✗ redis OperationalError: Error 111 connecting to {NOBODY}. Connection refused." in text
    assert "To do: Does Redis run, and is KAFKA_DELIVERY_REDIS_URL right?" in text
    assert "✗ topic '[red]' cannot be" in text
    assert text.endswith("2 error(s), 0 warning(s), 4 ok")
    assert SECRET not in text


def test_a_terminal_that_knows_only_ascii_gets_words(mock_kafka: MockKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = Stack(f"redis://{NOBODY}/0", mock_kafka, {}).command("doctor", check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "| error |" in done.stdout


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}@{NOBODY}/0",
        f"redis://:{SECRET}/{SECRET}@{NOBODY}/0",
        f"redis://:a[{SECRET}@{NOBODY}/0",
        f"redis://:{SECRET}#{SECRET}@{NOBODY}/0",
        f"redis://:{SECRET}?{SECRET}@{NOBODY}/0",
        f"redis://:{SECRET}@x@{NOBODY}/0",
        f"redis://:{SECRET}@{NOBODY}/0;redis://:{SECRET}@{NOBODY}/1",
        f"rediss://:{SECRET}@{NOBODY}/0?ssl_password={SECRET}",
    ],
)
def test_no_password_is_shown_however_the_url_is_malformed(url: str, mock_kafka: MockKafka) -> None:
    found = examined("redis://", mock_kafka.bootstrap_servers, REDIS_URL=url)
    assert found.code == 1
    assert SECRET not in str(found.all)
