"""Whether a Kafka is the one that a cluster's name stands for, and what is said if it is not, without any server."""

from __future__ import annotations

import pytest

from kafka_delivery import names
from kafka_delivery.errors import SettingsError
from kafka_delivery.settings import Settings
from kafka_delivery_worker.installation import AnotherKafkaError, fault, servers, shown

SECRET = "hunter2"  # noqa: S105  # it is in what is configured, and must be in nothing that is said
SETTINGS = Settings(bootstrap_servers="kafka-1:9092,kafka-2:9092", cluster="blue")


@pytest.mark.parametrize(("here", "remembered"), [("a", "a"), ("", "a"), ("a", ""), ("", "")])
def test_the_same_kafka_and_one_that_cannot_be_compared_are_no_fault(here: str, remembered: str) -> None:
    assert fault(SETTINGS, here, remembered) == ""


def test_another_kafka_is_one_that_says_which_and_what_to_change() -> None:
    said = str(AnotherKafkaError(fault(SETTINGS, "of-b", "of-a")))
    assert said.startswith(
        "the Kafka at kafka-1:9092,kafka-2:9092 is of-b, but in this Redis KAFKA_DELIVERY_CLUSTER=blue stands for the "
        "Kafka of-a, of another installation; "
    )
    for change in ("BOOTSTRAP_SERVERS", "CLUSTER", "global_keyprefix", "another database", "doctor --adopt-kafka"):
        assert change in said


def test_neither_a_password_nor_what_a_terminal_acts_on_is_said() -> None:
    settings = Settings(bootstrap_servers=f"SASL_SSL://me:{SECRET}@one:1, me:{SECRET}@two:2")
    assert servers(settings) == "SASL_SSL://one:1, two:2"
    said = fault(settings, "b\x1b[2J\n" + "x" * 999, "a")
    assert SECRET not in said
    assert said.isprintable()
    assert len(said) < 500
    assert shown("mockCluster1234") == "mockCluster1234"


class TestQueues:
    def test_the_default_cluster_has_the_names_that_it_always_had(self) -> None:
        assert Settings().queues == ("kafka-delivery", "kafka-delivery-dlq")
        assert names.redrive("default", "orders-dlq") == "kafka-delivery:redrive:1:orders-dlq"

    def test_another_one_has_its_own(self) -> None:
        assert SETTINGS.queues == ("kafka-delivery.blue", "kafka-delivery-dlq.blue")
        assert names.redrive("blue", "orders-dlq") == "kafka-delivery:redrive:1:blue/orders-dlq"

    @pytest.mark.parametrize("name", ["", "a b", "a:b", "a,b", "{a}", "a/b", "a\n", "\x06", "ü", "x" * 101])
    def test_a_name_that_queues_and_keys_cannot_carry_is_refused(self, name: str) -> None:
        with pytest.raises(SettingsError, match=r"KAFKA_DELIVERY_CLUSTER=.* cannot be part of a queue's name"):
            Settings(cluster=name)

    @pytest.mark.parametrize("name", ["blue", "eu-west_1.b", "x" * 100])
    def test_any_other_is_taken(self, name: str) -> None:
        assert Settings(cluster=name).cluster == name

    @pytest.mark.parametrize(
        ("name", "another"),
        [
            ("kafka-delivery.blue", False),
            ("kafka-delivery-dlq.blue", False),
            ("kafka-delivery", True),
            ("kafka-delivery-dlq", True),
            ("kafka-delivery.green", True),
            ("kafka-delivery-dlq.green", True),
            ("mine", False),
            ("kafka-delivery-mine", False),
        ],
    )
    def test_a_queue_tells_whether_it_is_another_clusters(self, name: str, another: bool) -> None:
        assert names.is_another_clusters(name, "blue") is another
