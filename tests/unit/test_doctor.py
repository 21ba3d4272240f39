"""What the doctor makes of what servers and settings say, without any."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kafka_delivery_worker import doctor

SECRET = "hunter2"  # noqa: S105  # it is in what fails, and must be in nothing that is said


def test_an_aof_that_cannot_be_written_is_an_error() -> None:
    # A full disk is not to be had on demand; what INFO says then is known.
    wrong = {"aof_enabled": 1, "aof_last_write_status": "err"}
    assert doctor._persistence(wrong, {"appendfsync": "everysec"}).level == "error"
    assert doctor._persistence(wrong | {"aof_last_write_status": "ok"}, {"appendfsync": "everysec"}).level == "ok"


@pytest.mark.parametrize(
    ("version", "level"), [("6.0.16", "error"), ("6.2.0", "ok"), ("10.0.1", "ok"), (None, "error")]
)
def test_an_old_redis_is_an_error(version: str | None, level: str) -> None:
    assert doctor._version({"redis_version": version}).level == level


@pytest.mark.parametrize(
    ("url", "level"),
    [
        ("redis://127.0.0.1:6379/0", "ok"),
        ("redis://localhost/0", "ok"),
        ("redis://[::1]:6379/0", "ok"),
        ("redis+socket:///run/redis.sock", "ok"),
        ("redis://10.0.0.5:6379/0", "warning"),
        ("redis://:secret@redis.example.org/0", "warning"),
        ("redis://localhost/0;redis://redis.example.org/0", "warning"),
        ("rediss://redis.example.org/0", "ok"),
        ("rediss://redis.example.org/0?ssl_ca_certs=/etc/ca.pem", "ok"),
        ("rediss://redis.example.org/0?ssl_cert_reqs=required", "ok"),
        ("rediss://redis.example.org/0?ssl_cert_reqs=none", "error"),
        ("rediss://redis.example.org/0?ssl_cert_reqs=CERT_NONE", "error"),
        ("rediss://redis.example.org/0?ssl_check_hostname=false", "warning"),
    ],
)
def test_a_connection_that_others_can_read_or_fake_is_found(url: str, level: str) -> None:
    (finding,) = doctor._encryption(url)
    assert (finding.check, finding.level) == ("redis-tls", level)


def test_what_has_no_timeout_of_its_own_does_not_hang_the_command_either() -> None:
    end, ended = threading.Event(), threading.Event()

    def endless() -> Iterator[doctor.Finding]:
        yield doctor.Finding("first", "ok", "fine")
        end.wait(60)
        ended.set()
        yield doctor.Finding("late", "ok", "never seen")

    try:
        findings = list(doctor._within(0.1, "slow", endless(), "do this"))
        assert not ended.is_set()
    finally:
        end.set()
    assert [(f.check, f.level, f.do) for f in findings] == [("first", "ok", ""), ("slow", "error", "do this")]


def test_an_error_that_nobody_expected_is_a_finding_without_its_text() -> None:
    def broken() -> Iterator[doctor.Finding]:
        yield doctor.Finding("first", "ok", "fine")
        raise ValueError(f"cannot parse {SECRET}")

    _, finding = doctor._within(1, "broken", broken(), "do this")
    assert (finding.check, finding.level, finding.do) == ("broken", "error", "do this")
    assert "ValueError" in finding.what
    assert SECRET not in finding.what


@pytest.mark.parametrize(
    ("copies", "least", "level"), [(1, 1, "ok"), (3, 1, "warning"), (3, 2, "ok"), (3, 3, "ok"), (2, 3, "warning")]
)
def test_confirmed_by_one_of_many_replicas_is_a_warning(copies: int, least: int, level: str) -> None:
    assert doctor._durability("orders", copies, least).level == level
