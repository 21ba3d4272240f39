"""A wrong setting stops the process with a sentence: which variable, and what to change. A secret is in no text.

Half-understood settings are worse than none: what contradicts itself loses or doubles records later.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest

from kafka_delivery import settings
from kafka_delivery.celery_app import tls
from kafka_delivery.errors import SettingsError
from kafka_delivery.settings import ENV_PREFIX, REFUSED_PROPERTIES, Settings, masked_url
from kafka_delivery_worker.producer import librdkafka_properties

FIELDS = dataclasses.fields(Settings)
KINDS = {field.name: str(field.type).partition("[")[0] for field in FIELDS}
NUMBERS = [name for name, kind in KINDS.items() if kind in ("int", "float")]
MAY_BE_ZERO = [
    "backlog_max_bytes",
    "linger_ms",
    "max_retries",
    "dead_letter_replication",
    "metrics_port",
    "metrics_topics",
    "success_events_per_s",
    "success_logs_per_s",
]
AT_LEAST = {"lease_s": "0.1 or more"}
PASSWORD = "hunter2"  # noqa: S105  # the tests look for it where it must not be


def variable(name: str) -> str:
    return ENV_PREFIX + name.upper()


def given(**variables: str) -> Settings:
    return Settings.from_env({variable(name): text for name, text in variables.items()})


def refusal(**variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        given(**variables)
    return str(caught.value)


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class TestDefaults:
    def test_are_valid(self) -> None:
        assert Settings.from_env({}) == Settings()

    def test_that_others_rely_on(self) -> None:
        s = Settings()
        assert s.redis_url == "redis://localhost:6379/0"
        assert s.bootstrap_servers == "localhost:9092"
        assert s.cluster == "default"
        assert s.dead_letter_topic("orders") == "orders-dlq"
        assert s.max_record_bytes + settings.DEAD_LETTER_HEADROOM_BYTES < 1_048_588
        assert (s.request_timeout_ms, s.message_timeout_ms, s.report_timeout_s) == (30_000, 120_000, 125)
        assert 0.5 <= s.enqueue_timeout_s <= 1
        assert not s.create_dead_letter_topics
        assert s.producer == s.redis_options == s.dead_letter_topics == {}

    @pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
    def test_stand_beside_their_unit_and_their_reason(self, field: dataclasses.Field[Any]) -> None:
        assert field.metadata["unit"].strip()
        assert len(field.metadata["why"].split()) >= 2
        assert KINDS[field.name] in ("str", "int", "float", "bool", "dict")

    def test_are_not_shared(self) -> None:
        Settings().producer["linger.ms"] = 1
        assert Settings().producer == {}


class TestParsing:
    @pytest.mark.parametrize("name", KINDS)
    def test_takes_each_default_as_text(self, name: str) -> None:
        assert given(**{name: as_text(getattr(Settings(), name))}) == Settings()

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("redis_url", "rediss://u:p@h:1/2?ssl_ca_certs=x", "rediss://u:p@h:1/2?ssl_ca_certs=x"),
            ("max_retries", "0", 0),
            ("max_record_bytes", "500", 500),
            ("dead_letter_replication", "-1", -1),
            ("linger_ms", "0", 0.0),
            ("linger_ms", "2.5", 2.5),
            ("enqueue_timeout_s", "1", 1.0),
            ("producer", '{"a.b": "c", "n": 1, "b": true}', {"a.b": "c", "n": 1, "b": True}),
            ("dead_letter_topics", '{"a": "b"}', {"a": "b"}),
        ],
    )
    def test_takes_text_by_the_type_of_the_field(self, name: str, text: str, value: Any) -> None:
        parsed = getattr(given(**{name: text}), name)
        assert parsed == value
        assert type(parsed) is type(value)

    @pytest.mark.parametrize("text", ["1", "true", "TRUE", "yes", "On", " true "])
    def test_knows_yes(self, text: str) -> None:
        assert given(create_dead_letter_topics=text).create_dead_letter_topics is True

    @pytest.mark.parametrize("text", ["0", "false", "False", "no", "OFF", " off"])
    def test_knows_no(self, text: str) -> None:
        assert given(retry_jitter=text).retry_jitter is False

    @pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind != "str"])
    def test_refuses_other_text_and_says_what_it_wants(self, name: str) -> None:
        bad, wanted = {
            "int": (["", "x", "1.5", "1e3", "0x10", "1,000", "true", "9" * 5_000], "a whole number"),
            "float": (["", "x", "1,5", "1 s", "[]"], "a number"),
            "bool": (["", "x", "2", "maybe", "null"], "true or false"),
            "dict": (["", "x", "[]", "1", "null", '"{}"', '{"a":}', "{'a': 1}"], "a JSON object"),
        }[KINDS[name]]
        unit = next(field.metadata["unit"] for field in FIELDS if field.name == name)
        for text in bad:
            refused = refusal(**{name: text})
            assert refused.startswith(variable(name))
            assert refused.endswith(f" must be {wanted} ({unit})")

    def test_refuses_json_that_is_too_deep(self) -> None:
        assert refusal(producer='{"a":' * 100_000)

    @pytest.mark.parametrize("name", [name for name in NUMBERS if name not in MAY_BE_ZERO])
    @pytest.mark.parametrize("text", ["0", "-1"])
    def test_refuses_what_is_not_positive(self, name: str, text: str) -> None:
        refused = refusal(**{name: text})
        assert refused.startswith(variable(name))
        assert f"must be {AT_LEAST.get(name, 'greater than 0')}" in refused

    @pytest.mark.parametrize("name", ["linger_ms", "max_retries", "metrics_port", "metrics_topics"])
    def test_refuses_less_than_none(self, name: str) -> None:
        assert variable(name) in refusal(**{name: "-1"})

    def test_refuses_to_park_what_one_worker_died_with(self) -> None:
        """Nothing would say which of all that it held is to blame."""
        name = variable("max_deaths")
        text = f"{name}=1 would park everything that a worker held when it died, the innocent too: give 2 or more"
        assert refusal(max_deaths="1").startswith(text)
        assert refusal(max_deaths="0").startswith(f"{name}=0 must be greater than 0")

    def test_refuses_a_port_that_there_is_not(self) -> None:
        assert refusal(metrics_port="65536") == f"{variable('metrics_port')}=65536 must be 65535 or less (port)"

    @pytest.mark.parametrize(("name", "typo"), [("pool", "inflight"), ("transport", "lease")])
    def test_refuses_a_choice_that_there_is_not(self, name: str, typo: str) -> None:
        assert refusal(**{name: typo}).startswith(f"{variable(name)}={typo!r} must be ")

    @pytest.mark.parametrize("text", ["0", "-2"])
    def test_refuses_a_replication_that_no_cluster_has(self, text: str) -> None:
        assert variable("dead_letter_replication") in refusal(dead_letter_replication=text)

    @pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "float"])
    @pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400"])
    def test_refuses_numbers_that_are_none(self, name: str, text: str) -> None:
        """A socket takes no infinite timeout, and nothing is less than NaN."""
        assert variable(name) in refusal(**{name: text})


class TestValuesOfTheirOwnType:
    """An application's configuration is Python, and need not be written as text."""

    @pytest.mark.parametrize("name", KINDS)
    def test_each_default_is_taken(self, name: str) -> None:
        assert Settings.from_env({variable(name): getattr(Settings(), name)}) == Settings()

    def test_a_whole_number_is_a_number(self) -> None:
        taken = Settings.from_env({"KAFKA_DELIVERY_LINGER_MS": 1}).linger_ms
        assert (taken, type(taken)) == (1.0, float)

    def test_an_object_is_copied(self) -> None:
        mine = {"a": {"b": 1}}
        taken = Settings.from_env({"KAFKA_DELIVERY_REDIS_OPTIONS": mine}).redis_options
        mine["a"]["b"] = 2
        assert taken == {"a": {"b": 1}}

    @pytest.mark.parametrize(
        ("name", "value", "wanted"),
        [
            ("REDIS_URL", None, "text"),
            ("BOOTSTRAP_SERVERS", ["a:1", "b:1"], "text"),
            ("MAX_RETRIES", 1.5, "a whole number"),
            ("MAX_RETRIES", True, "a whole number"),
            ("LINGER_MS", True, "a number"),
            ("LINGER_MS", 10**400, "a number"),
            ("RETRY_JITTER", 1, "true or false"),
            ("PRODUCER", [("a", 1)], "a JSON object"),
            ("PRODUCER", {"oauth_cb": print}, "a JSON object"),
            ("PRODUCER", {"a": PASSWORD.encode()}, "a JSON object"),
        ],
    )
    def test_another_type_is_refused(self, name: str, value: Any, wanted: str) -> None:
        with pytest.raises(SettingsError) as caught:
            Settings.from_env({ENV_PREFIX + name: value})
        assert str(caught.value).startswith(ENV_PREFIX + name)
        assert f" must be {wanted} (" in str(caught.value)
        assert PASSWORD not in str(caught.value)


class TestGiven:
    @pytest.fixture(autouse=True)
    def _given(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name in os.environ.keys() & {variable(name) for name in KINDS}:
            monkeypatch.delenv(name)
        settings.give({"KAFKA_DELIVERY_MAX_RETRIES": 3, "KAFKA_DELIVERY_CLUSTER": "blue"})
        yield
        settings.give({})

    def test_settings_are_those_of_the_process(self) -> None:
        assert settings.current() == Settings(max_retries=3, cluster="blue")

    def test_the_environment_comes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAFKA_DELIVERY_MAX_RETRIES", "4")
        assert settings.current() == Settings(max_retries=4, cluster="blue")

    def test_others_replace_them(self) -> None:
        settings.current()
        settings.give({"KAFKA_DELIVERY_CLUSTER": "green"})
        assert settings.current() == Settings(cluster="green")

    def test_wrong_ones_are_an_error_of_who_needs_them(self) -> None:
        settings.give({"KAFKA_DELIVERY_CLUSTR": "blue"})
        with pytest.raises(SettingsError, match="did you mean KAFKA_DELIVERY_CLUSTER"):
            settings.current()


class TestUnknownVariables:
    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("REDIS_URI", "REDIS_URL"),
            ("BOOTSTRAP_SERVER", "BOOTSTRAP_SERVERS"),
            ("MAX_RETRY", "MAX_RETRIES"),
            ("LINGER", "LINGER_MS"),
        ],
    )
    def test_are_refused_with_a_suggestion(self, name: str, meant: str) -> None:
        assert refusal(**{name: "x"}) == f"{ENV_PREFIX}{name} is not a setting; did you mean {ENV_PREFIX}{meant}?"

    def test_are_refused_without_one_where_none_is_near(self) -> None:
        assert refusal(NONSENSE="x") == "KAFKA_DELIVERY_NONSENSE is not a setting; the settings page lists them all"

    def test_do_not_show_what_they_hold(self) -> None:
        assert PASSWORD not in refusal(REDIS_PASSWORD=PASSWORD)

    def test_of_others_are_none_of_our_business(self) -> None:
        others = {"KAFKA_BOOTSTRAP": "x", "CELERY_BROKER_URL": "x", "XKAFKA_DELIVERY_CLUSTER": "x", "HOME": "/"}
        assert Settings.from_env(others) == Settings()


class TestNesting:
    @pytest.mark.parametrize(
        ("inner", "outer", "passes", "fails"),
        [
            ("linger_ms", "request_timeout_ms", "29999", "30000"),
            ("request_timeout_ms", "message_timeout_ms", "119999", "120000"),
            ("topic_propagation_ms", "message_timeout_ms", "119999", "120000"),
            ("retry_backoff_s", "retry_backoff_max_s", "300", "301"),
            ("defer_s", "defer_max_s", "60", "61"),
        ],
    )
    def test_inner_before_outer(self, inner: str, outer: str, passes: str, fails: str) -> None:
        assert given(**{inner: passes})
        refused = refusal(**{inner: fails})
        assert refused.startswith(f"{variable(inner)}={fails}")
        assert variable(outer) in refused

    @pytest.mark.parametrize(
        ("changes", "longest_hold"),
        [
            ({}, 2 * 125 + 300),
            ({"message_timeout_ms": "200000"}, 2 * 205 + 300),
            ({"retry_backoff_max_s": "500"}, 2 * 125 + 500),
            # With the most that the jitter adds: a third, or the first pause.
            ({"few_backoff_s": "600"}, 2 * 125 + 800),
            ({"defer_s": "100", "defer_max_s": "700"}, 2 * 125 + 800),
        ],
    )
    def test_a_message_comes_back_later_than_any_worker_may_hold_it(
        self, changes: dict[str, str], longest_hold: int
    ) -> None:
        assert given(visibility_timeout_s=str(longest_hold + 1), **changes)
        refused = refusal(visibility_timeout_s=str(longest_hold), **changes)
        assert refused.startswith(
            f"KAFKA_DELIVERY_VISIBILITY_TIMEOUT_S={longest_hold} must be more than {longest_hold}"
        )

    @pytest.mark.parametrize("option", ["visibility_timeout", "socket_timeout", "socket_connect_timeout"])
    def test_an_option_for_redis_cannot_undo_it(self, option: str) -> None:
        assert f"KAFKA_DELIVERY_REDIS_OPTIONS: {option} " in refusal(redis_options=json.dumps({option: 3}))


class TestKafka:
    @pytest.mark.parametrize("servers", ["", " "])
    def test_servers_cannot_be_empty(self, servers: str) -> None:
        assert "name at least one host:port" in refusal(bootstrap_servers=servers)

    @pytest.mark.parametrize(
        "name",
        [
            "acks",
            "request.required.acks",
            "enable.idempotence",
            "transactional.id",
            "delivery.report.only.error",
            "enable.gapless.guarantee",
            "bootstrap.servers",
            "metadata.broker.list",
            "message.timeout.ms",
            "delivery.timeout.ms",
            "request.timeout.ms",
            "message.max.bytes",
            "linger.ms",
            "queue.buffering.max.ms",
            "topic.metadata.propagation.max.ms",
            "oauthbearer_token_refresh_cb",
            "default.topic.config",
            "oauth_cb",
        ],
    )
    def test_properties_that_break_the_promise_are_refused_with_the_reason(self, name: str) -> None:
        refused = refusal(producer=json.dumps({"compression.type": "lz4", name: PASSWORD}))
        assert refused == f"KAFKA_DELIVERY_PRODUCER: {name} is refused: {REFUSED_PROPERTIES[name]}"

    def test_a_buffer_has_room_for_a_record(self) -> None:
        """Else librdkafka says that it is full, for ever, and the worker waits for room."""
        assert "queue.buffering.max.kbytes" in refusal(producer='{"queue.buffering.max.kbytes": 900}')
        assert given(producer='{"queue.buffering.max.kbytes": 1000}')
        large = given(max_record_bytes="100000000")
        assert librdkafka_properties(large)["queue.buffering.max.kbytes"] * 1024 > 100_000_000

    def test_a_property_is_refused_or_has_an_effect(self) -> None:
        """What a worker sets over the user's own would be ignored in silence."""
        for name in librdkafka_properties(Settings()):
            try:
                chosen = Settings(producer={name: "chosen"})
            except SettingsError:
                continue
            assert librdkafka_properties(chosen)[name] == "chosen"

    def test_no_refused_property_comes_in_by_the_back_door(self) -> None:
        hidden = {"default.topic.config": {"acks": 0, "enable.idempotence": False, "message.timeout.ms": 1}}
        assert "default.topic.config" in refusal(producer=json.dumps(hidden))


class TestDeadLetterTopics:
    def test_are_found_by_the_map_and_else_by_the_suffix(self) -> None:
        s = given(dead_letter_topics='{"orders": "graveyard"}', dead_letter_suffix=".dead")
        assert s.dead_letter_topic("orders") == "graveyard"
        assert s.dead_letter_topic("invoices") == "invoices.dead"

    @pytest.mark.parametrize(
        "topics",
        [
            {"orders": "orders"},
            {"orders": ""},
            {"orders": "no topic!"},
            {"no topic!": "orders"},
            {"": "orders"},
            {"orders": ".."},
            {"orders": None},
            {"orders": 1},
            {"orders": ["a"]},
            {"orders": {}},
            {"fine": "other", "orders": "x" * 250},
        ],
    )
    def test_are_topics_and_not_the_topic_itself(self, topics: dict[str, Any]) -> None:
        refused = refusal(dead_letter_topics=json.dumps(topics))
        assert refused.startswith("KAFKA_DELIVERY_DEAD_LETTER_TOPICS: ")
        assert refused.endswith("must map one topic name to another")

    @pytest.mark.parametrize("suffix", ["", " ", "/dlq", "-dlq\n", "ü", "x" * 249])
    def test_have_a_suffix_that_can_end_a_topic(self, suffix: str) -> None:
        assert "KAFKA_DELIVERY_DEAD_LETTER_SUFFIX=" in refusal(dead_letter_suffix=suffix)


class TestRedisUrl:
    @pytest.mark.parametrize("scheme", ["redis", "rediss", "sentinel", "redis+socket"])
    def test_is_one_of_redis(self, scheme: str) -> None:
        options = '{"master_name": "mine"}' if scheme == "sentinel" else "{}"
        assert given(redis_url=f"{scheme}://host/1", redis_options=options).redis_url == f"{scheme}://host/1"

    def test_of_sentinel_needs_the_name_of_the_master(self) -> None:
        assert "master_name" in refusal(redis_url="sentinel://host:26379/1")

    @pytest.mark.parametrize(
        "url", ["", "localhost:6379", "localhost", "amqp://h", "http://h", "memory://", "sqs://h", "//h", "redis+http://h"]
    )  # fmt: skip
    def test_of_another_broker_is_refused(self, url: str) -> None:
        refused = refusal(redis_url=url)
        assert refused.startswith("KAFKA_DELIVERY_REDIS_URL starts with ")
        assert refused.endswith("use redis://, rediss:// or sentinel://")

    @pytest.mark.parametrize(
        "url", ["redis://[::1", "redis://h:port/0", "redis://h/name", "redis://h/0?db=1", "socket:///tmp/redis.sock"]
    )
    def test_that_nothing_can_connect_to_is_refused(self, url: str) -> None:
        assert "KAFKA_DELIVERY_REDIS_URL" in refusal(redis_url=url)

    def test_with_tls_verifies_the_certificate(self) -> None:
        assert tls(given(redis_url="rediss://h/0")) is not None

    def test_in_capitals_is_refused_for_celery_does_not_know_it(self) -> None:
        assert "REDISS" in refusal(redis_url="REDISS://h/0")

    def test_without_tls_has_none(self) -> None:
        assert tls(Settings()) is None


class TestBrokerUrl:
    """Another broker's; what is wrong with it is said without its password."""

    @pytest.mark.parametrize(
        "url",
        ["rabbit", f"amqp://u:{PASSWORD}#@h//", f"amqp://u:{PASSWORD}/x@h//", f"amqp://h;amqp://u:p@h:{PASSWORD}//"],
    )
    def test_that_is_no_address_is_refused(self, url: str) -> None:
        refused = refusal(broker_url=url)
        assert refused.startswith("KAFKA_DELIVERY_BROKER_URL ")
        assert PASSWORD not in refused

    def test_takes_the_queue_from_redis(self) -> None:
        elsewhere = given(broker_url=f"amqp://u:{PASSWORD}@h1:5672//;amqp://u:{PASSWORD}@h2//")
        assert (elsewhere.queue_on_redis, elsewhere.queue_on_amqp, elsewhere.leases) == (False, True, False)
        assert PASSWORD not in repr(elsewhere)
        assert (given().queue_on_redis, given().queue_on_amqp) == (True, False)
        assert not given(broker_url="sqs://").queue_on_amqp


class TestSecrets:
    @pytest.mark.parametrize(
        "url",
        [
            f"redis://:{PASSWORD}@h:1/0",
            f"redis://user:{PASSWORD}@h:1/0",
            f"rediss://user:a%40{PASSWORD}@h:1/0?ssl_ca_certs=x",
            f"redis://:a@{PASSWORD}@h:1/0",
            f"redis+socket://:{PASSWORD}@/tmp/redis.sock",
        ],
    )
    def test_in_the_url_are_not_shown(self, url: str) -> None:
        for text in _all_texts(given(redis_url=url)):
            assert PASSWORD not in text

    @pytest.mark.parametrize(
        "url",
        [
            f"sentinel://:{PASSWORD}@h1:1;sentinel://:{PASSWORD}@h2:1/0",
            f"redis://:#{PASSWORD}@h:1/0",  # not quoted: read as a fragment
            f"redis://:/{PASSWORD}@h:1/0",
            f"redis://:?{PASSWORD}@h:1/0",
            f"rediss://h:1/0?ssl_password={PASSWORD}",
        ],
    )
    def test_elsewhere_in_the_url_are_not_shown_whether_it_is_taken_or_refused(self, url: str) -> None:
        try:
            texts = _all_texts(given(redis_url=url))
        except SettingsError as refused:
            texts = [str(refused)]
        for text in texts:
            assert PASSWORD not in text

    def test_in_the_url_leave_the_rest_readable(self) -> None:
        assert masked_url("redis://user:x@h:1/2?a=b") == "redis://user:***@h:1/2?a=b"
        assert masked_url("redis://h:1/2") == "redis://h:1/2"

    @pytest.mark.parametrize("name", ["producer", "redis_options"])
    def test_among_properties_are_not_shown_and_their_names_are(self, name: str) -> None:
        properties: dict[str, Any] = {"sasl.password": PASSWORD}
        if name == "redis_options":
            properties["deep"] = {"x": [PASSWORD]}
        for text in _all_texts(given(**{name: json.dumps(properties)})):
            assert PASSWORD not in text
            assert "sasl.password" in text

    @pytest.mark.parametrize("name", ["producer", "redis_options"])
    def test_in_a_malformed_setting_are_not_shown(self, name: str) -> None:
        refused = refusal(**{name: f'{{"sasl.password": "{PASSWORD}"'})
        assert refused == f"{variable(name)}=(not shown) must be a JSON object (JSON object)"


def _all_texts(s: Settings) -> list[str]:
    return [repr(s), str(s), f"{s}", f"{s!r}", "%s %r" % (s, s)]  # noqa: UP031  # as logging does


class TestValue:
    @pytest.mark.parametrize("name", KINDS)
    def test_is_frozen(self, name: str) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(Settings(), name, "other")

    def test_shows_what_differs_from_the_defaults(self) -> None:
        assert repr(Settings()) == "Settings()"
        assert repr(given(max_retries="3", cluster="blue")) == "Settings(cluster='blue', max_retries=3)"

    def test_waits_for_a_report_longer_than_librdkafka_tries(self) -> None:
        s = given(message_timeout_ms="60000")
        assert s.report_timeout_s * 1000 == s.message_timeout_ms + settings.REPORT_GRACE_MS
        assert math.isfinite(s.report_timeout_s)


class TestCurrent:
    @pytest.fixture(autouse=True)
    def forget(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
            monkeypatch.delenv(name)
        settings.current.cache_clear()
        yield
        settings.current.cache_clear()

    def test_is_read_from_the_environment_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAFKA_DELIVERY_CLUSTER", "blue")
        first = settings.current()
        monkeypatch.setenv("KAFKA_DELIVERY_CLUSTER", "green")
        assert settings.current() is first
        assert first.cluster == "blue"

    def test_is_read_again_after_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAFKA_DELIVERY_NONSENSE", "x")
        with pytest.raises(SettingsError):
            settings.current()
        monkeypatch.delenv("KAFKA_DELIVERY_NONSENSE")
        assert settings.current() == Settings()
