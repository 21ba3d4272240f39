"""What others depend on: the names that an application imports, and those on the wire, in Redis and in Kafka headers.

A failure here is a change that breaks somebody. A new name is added below; a changed one needs an alias and a reason.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import inspect
import pkgutil

import pytest

import kafka_delivery
from kafka_delivery import dead_letters, names


def test_the_exports_are_these() -> None:
    assert sorted(kafka_delivery.__all__) == [
        "BacklogFullError",
        "BulkEnqueueError",
        "Circuit",
        "CircuitBreakerOpen",
        "Delivered",
        "DeliveryError",
        "DeliveryTimeoutError",
        "EnqueueError",
        "Fate",
        "InvalidRecordError",
        "KafkaDeliveryError",
        "NotInWorkerError",
        "ParkingFullError",
        "ProducerError",
        "Record",
        "RejectedError",
        "Result",
        "RetriableError",
        "RetriesExhaustedError",
        "SettingsError",
        "UnavailableError",
        "app",
        "asend_and_wait",
        "circuit",
        "dead_letter",
        "send",
        "send_and_wait",
        "send_many",
    ]


def test_every_export_is_there() -> None:
    assert [name for name in kafka_delivery.__all__ if not hasattr(kafka_delivery, name)] == []


def test_no_module_has_the_name_of_an_export() -> None:
    """`import kafka_delivery.send` would replace the task by the module."""
    modules = {module.name for module in pkgutil.iter_modules(kafka_delivery.__path__)}
    assert {"base", "delivery", "record"} <= modules
    assert modules.isdisjoint(kafka_delivery.__all__)


def test_the_tasks_have_their_names_before_any_worker_registers_them() -> None:
    assert kafka_delivery.send.name == "kafka_delivery.send"
    assert kafka_delivery.send_many.name == "kafka_delivery.send_many"
    assert kafka_delivery.dead_letter.name == "kafka_delivery.dead_letter"
    assert kafka_delivery.app.main == "kafka_delivery"


@pytest.mark.parametrize(
    ("task", "signature"),
    [
        (
            kafka_delivery.send,
            "(topic, value, key=None, headers=None, *, partition=None, timestamp=None, message_id=None)",
        ),
        (kafka_delivery.send_many, "(records, *, message_id=None)"),
    ],
    ids=["send", "send_many"],
)
def test_a_task_is_called_with(task: object, signature: str) -> None:
    delay = inspect.signature(task.delay)  # type: ignore[attr-defined]
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in delay.parameters.values()]
    assert str(delay.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == signature


PINNED = {
    "APP": "kafka_delivery",
    "SEND": "kafka_delivery.send",
    "SEND_MANY": "kafka_delivery.send_many",
    "DEAD_LETTER": "kafka_delivery.dead_letter",
    "QUEUE": "kafka-delivery",
    "DEAD_LETTER_QUEUE": "kafka-delivery-dlq",
    "DEFAULT_CLUSTER": "default",
    "CLUSTER_MAX_LENGTH": 100,
    "CLUSTERS": "kafka-delivery:clusters:1",
    "WIRE_VERSION": 1,
    "DEFERRALS": "kafka_delivery_deferrals",
    "DEFERRED_EVENT": "task-deferred",
    "REVIVED": "kafka_delivery_revived",
    "REDRIVES": "kafka_delivery_redrives",
    "MESSAGE_ID": "message-id",
    "REDRIVE_COUNT": "redrive-count",
    "REDRIVE_GROUP": "kafka-delivery-redrive.",
    "REDRIVE_OFFSET": "kafka-delivery:1",
    "REDRIVE": "kafka-delivery:redrive:1:",
    "AUDIT": "kafka-delivery:audit:1",
    "KEY_PREFIX": "kafka-delivery:",
    "PARKED": "kafka-delivery:parked:1",
    "PARKED_INDEX": "kafka-delivery:parked:1:at",
    "PARKED_ROOM": "kafka-delivery:parked:1:room",
    "PARKED_LOCK": "kafka-delivery:parked:1:lock",
    "RELEASE_LOCK": "kafka-delivery:release:1:lock",
    "COUNTS": "kafka-delivery:counts:1",
    "LEASES": "kafka-delivery:leases:1",
    "LEASE_CLOCK": "kafka-delivery:leases:1:clock",
    "LEASES_BEGAN": "kafka-delivery:leases:1:began",
    "LEASES_ENDED": "kafka-delivery:leases:1:ended",
    "HELD": "kafka-delivery:held:1:",
    "DELAYED": "kafka-delivery:delayed:1:",
    "DEATHS": "kafka-delivery:deaths:2",
    "POISON": "kafka-delivery:poison:1",
    "FAILED": "kafka-delivery:failed:1:",
    "PAUSED": "kafka-delivery:paused:1",
    "POISON_APART": "kafka-delivery:poison:1:apart",
    "GATE": "kafka-delivery:gate",
    "WAITING": "kafka-delivery:waiting:1",
    "CIRCUITS": "kafka-delivery:cb:1:{{{cluster}}}:",
    "CLUSTER_SCOPE": "cluster",
    "TOPIC_SCOPE": "topic:",
    "PROBE": "kafka_delivery_probe",
    "RELEASED": "kafka_delivery_released",
    "TOPIC_MAX_LENGTH": 249,
}


def test_the_names_on_the_wire_and_in_redis_are_these() -> None:
    assert {name: value for name, value in vars(names).items() if name.isupper() and not name.startswith("_")} == PINNED


def test_the_headers_of_a_dead_letter_are_these() -> None:
    headers = {name: value for name, value in vars(names.DeadLetterHeaders).items() if name.isupper()}
    assert headers == {
        "ORIGINAL_TOPIC": "original-topic",
        "ERROR_MESSAGE": "error-message",
        "ERROR_CLASS": "error-class",
        "ERROR_CODE": "error-code",
        "TIMESTAMP": "timestamp",
        "RETRY_COUNT": "retry-count",
        "MESSAGE_ID": "message-id",
        "RECORD_TIMESTAMP": "record-timestamp",
        "REDRIVE_COUNT": "redrive-count",
        "OWN_PREFIX": "original-",
    }


@pytest.mark.parametrize(
    ("family", "names_of_it"),
    [
        (
            names.SpringHeaders,
            {
                "ORIGINAL_TOPIC": "kafka_dlt-original-topic",
                "ORIGINAL_PARTITION": "kafka_dlt-original-partition",
                "ORIGINAL_TIMESTAMP": "kafka_dlt-original-timestamp",
                "ORIGINAL_TIMESTAMP_TYPE": "kafka_dlt-original-timestamp-type",
                "EXCEPTION_FQCN": "kafka_dlt-exception-fqcn",
                "EXCEPTION_MESSAGE": "kafka_dlt-exception-message",
            },
        ),
        (
            names.ConnectHeaders,
            {
                "TOPIC": "__connect.errors.topic",
                "PARTITION": "__connect.errors.partition",
                "STAGE": "__connect.errors.stage",
                "EXCEPTION_CLASS": "__connect.errors.exception.class.name",
                "EXCEPTION_MESSAGE": "__connect.errors.exception.message",
                "RECORD_TIMESTAMP": "__connect.errors.record.timestamp",
            },
        ),
    ],
    ids=["spring", "connect"],
)
def test_the_headers_of_other_tools_are_these(family: type, names_of_it: dict[str, str]) -> None:
    assert {name: value for name, value in vars(family).items() if name.isupper()} == names_of_it


def test_the_parts_of_a_dead_letters_reason_are_these() -> None:
    assert {
        "error_class",
        "error_code",
        "error_message",
        "retry_count",
        "redrive_count",
        "failed_at",
    } == dead_letters.REASON_FIELDS
    assert set(dead_letters.reason()) == dead_letters.REASON_FIELDS
    assert dead_letters.TASK_ID_SUFFIX == "-dlq"


def test_a_record_on_the_wire_is_this_list() -> None:
    record = kafka_delivery.Record("orders", b"\xff", "k", [("a", "b"), ("c", None)], 3, 1767323045678, "id-1")
    assert record.to_wire("blue") == [
        1, "blue", "orders", ["/w=="], "k", [["a", "b"], ["c", None]], 3, 1767323045678, "id-1",
    ]  # fmt: skip


@pytest.mark.parametrize("package", ["kafka_delivery", "kafka_delivery_worker"])
def test_the_package_says_that_it_has_types(package: str) -> None:
    assert importlib.util.find_spec(package) is not None
    assert importlib.resources.files(package).joinpath("py.typed").is_file()
