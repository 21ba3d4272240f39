"""Why a client cannot be made is said without a secret, and whose fault it is, is told apart."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import cimpl

from kafka_delivery.errors import SettingsError
from kafka_delivery.settings import Settings
from kafka_delivery_worker import client
from kafka_delivery_worker.client import NotMadeError, connect, identities, own_class
from kafka_delivery_worker.producer import check_properties

SECRET = "hunter2"  # noqa: S105  # it is in what fails, and must be in nothing that is said
TLS: dict[str, Any] = {"security.protocol": "ssl", "log_level": 0}


def refused(**properties: Any) -> str:
    """Why librdkafka makes no client with these properties, `_` for `.` in their names."""
    given = TLS | {name.replace("_", "."): value for name, value in properties.items()}
    with pytest.raises(NotMadeError) as caught:
        connect(given, print)
    assert SECRET not in str(caught.value)
    return str(caught.value)


class TestAReason:
    def test_names_the_file_that_is_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "key.pem"
        assert refused(ssl_key_location=str(path)) == f"ssl.key.location: No such file or directory: {path}"

    def test_names_the_file_that_is_no_certificate(self, tmp_path: Path) -> None:
        path = tmp_path / "ca.pem"
        path.write_text(SECRET)
        why = refused(ssl_ca_location=str(path))
        assert why == "ssl.ca.location: _INVALID_ARG, no certificate or crl found"

    def test_names_a_plugin(self) -> None:
        assert refused(plugin_library_paths=f"{SECRET}.so") == "plugin.library.paths: _INVALID_ARG"

    def test_names_a_property_and_not_its_value(self) -> None:
        assert refused(retry_backoff_ms=SECRET) == "retry.backoff.ms: _INVALID_ARG"
        assert refused(ssl_key_pem=SECRET).startswith("ssl.key.pem: _INVALID_ARG")

    def test_names_a_property_by_its_other_name(self) -> None:
        assert refused(acks=SECRET) == "request.required.acks: _INVALID_ARG"


def settings(**properties: Any) -> Settings:
    return Settings(producer={name.replace("_", "."): value for name, value in properties.items()})


class TestAtStart:
    def test_what_is_not_there_is_waited_for(self, tmp_path: Path) -> None:
        for name in ("ssl_ca_location", "ssl_certificate_location", "ssl_key_location", "ssl_crl_location"):
            missing = check_properties(settings(security_protocol="ssl", **{name: str(tmp_path / "away")}))
            assert missing.startswith(f"{name.replace('_', '.')}: No such file")
        assert check_properties(settings(plugin_library_paths="away")) == "plugin.library.paths: _INVALID_ARG"
        assert check_properties(settings()) == ""

    def test_half_of_a_pair_is_waited_for_whether_the_other_half_is_a_file_or_not(self, tmp_path: Path) -> None:
        path = str(tmp_path / "away")
        assert check_properties(
            settings(security_protocol="ssl", ssl_key_location=path, ssl_certificate_pem=SECRET)
        ).startswith("ssl.key.location: No such file")

    def test_a_file_that_is_not_used_is_not_missed(self, tmp_path: Path) -> None:
        assert check_properties(settings(ssl_key_location=str(tmp_path / "away"))) == ""

    @pytest.mark.parametrize("wrong", [{"batch_sizes": 1}, {"retry_backoff_ms": SECRET}, {"security_protocol": SECRET}])
    def test_a_wrong_setting_is_refused_also_where_something_is_not_there(self, wrong: dict[str, Any]) -> None:
        (name,) = wrong
        with pytest.raises(SettingsError, match=name.replace("_", ".")) as caught:
            check_properties(settings(**{"plugin_library_paths": "away"} | wrong))
        assert SECRET not in str(caught.value)

    def test_a_token_function_that_nobody_would_call_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="OAUTHBEARER"):
            check_properties(Settings(oauth_cb="time:time"))


class TestFiles:
    def test_change_when_a_link_on_the_way_points_elsewhere(self, tmp_path: Path) -> None:
        """As in a volume of Kubernetes, where the path of the file itself stays a link to the same path."""
        for version in ("1", "2"):
            (tmp_path / version).mkdir()
            (tmp_path / version / "tls.key").write_text("same size")
            os.utime(tmp_path / version / "tls.key", (1, 1))
        (tmp_path / "..data").symlink_to("1")
        (tmp_path / "tls.key").symlink_to("..data/tls.key")
        properties = {"security.protocol": "SASL_SSL", "ssl.key.location": str(tmp_path / "tls.key")}
        before = identities(properties)
        assert identities(properties) == before
        (tmp_path / "..new").symlink_to("2")
        os.replace(tmp_path / "..new", tmp_path / "..data")
        assert identities(properties) != before

    def test_are_none_when_they_are_away(self, tmp_path: Path) -> None:
        properties = TLS | {"ssl.ca.location": str(tmp_path / "away"), "ssl.key.location": ""}
        assert identities(properties) == {"ssl.ca.location": None}
        assert identities(properties | {"security.protocol": "plaintext"}) == {}


def test_the_class_is_confluents_own() -> None:
    assert own_class() is cimpl.Producer


class TestLog:
    FAIL = "FAIL [kafka-delivery#producer-1] [thrd:%s]: %s: Connect to ipv4#%s failed: Connection refused"

    def said(self, few: client.FewerFailures, text: str, *args: str) -> bool:
        return few.filter(logging.LogRecord("l", logging.ERROR, "p", 1, text, args, None))

    def test_a_broker_that_is_away_is_named_once_in_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 100.0
        monkeypatch.setattr(client, "monotonic", lambda: now)
        few = client.FewerFailures()
        one, other = ("a:1", "a:1", "a:1"), ("b:1", "b:1", "b:1")
        assert self.said(few, self.FAIL, *one)
        assert self.said(few, self.FAIL, *other)
        now += 9.9
        assert not self.said(few, self.FAIL, *one)
        assert self.said(few, "ERROR [x] [thrd:a:1]: something else")
        now += 0.2
        assert self.said(few, self.FAIL, *one)

    def test_it_remembers_a_bounded_number_of_brokers(self) -> None:
        few = client.FewerFailures()
        for n in range(3 * few.MOST):
            self.said(few, self.FAIL, *[f"b{n}:1"] * 3)
        assert len(few._said_at) <= few.MOST
