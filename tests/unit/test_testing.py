"""An application's own tests see what it sends, as production would have it, without Redis and without Kafka."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, chain, group
from celery.exceptions import TimeoutError as CeleryTimeoutError
from confluent_kafka import KafkaError

from kafka_delivery import (
    BulkEnqueueError,
    CircuitBreakerOpen,
    DeliveryTimeoutError,
    EnqueueError,
    InvalidRecordError,
    Record,
    RejectedError,
    RetriesExhaustedError,
    asend_and_wait,
    circuit,
    dead_letter,
    send,
    send_and_wait,
    send_many,
    settings,
)
from kafka_delivery.errors import RetriableError, UnavailableError
from kafka_delivery.testing import Captured, capture, failure
from kafka_delivery_worker.classify import Retry, delivery_error, verdict

NOBODY = "redis://127.0.0.1:1/0"
"""Where a send that is not captured fails."""


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("KAFKA_DELIVERY_REDIS_URL", NOBODY)
    settings.current.cache_clear()
    yield
    settings.current.cache_clear()


@pytest.fixture
def sent() -> Iterator[Captured]:
    with capture() as captured:
        yield captured


shop = Celery("shop", broker="memory://", set_as_current=False)


@shop.task(name="shop.charge")  # type: ignore[untyped-decorator]  # Celery has no types
def charge() -> str:
    return "charged"


CALLS: dict[str, Callable[[], Any]] = {
    "delay": lambda: send.delay("orders", {"id": 42}, key="42"),
    "adelay": lambda: asyncio.run(send.adelay("orders", {"id": 42}, key="42")),
    "apply_async": lambda: send.apply_async(("orders", {"id": 42}), {"key": "42"}, countdown=60),
    "bulk": lambda: send.bulk([Record("orders", {"id": 42}, key="42")]),
    "abulk": lambda: asyncio.run(send.abulk([Record("orders", {"id": 42}, key="42")])),
    "send_many": lambda: send_many.delay([{"topic": "orders", "value": {"id": 42}, "key": "42"}]),
    "send_many.adelay": lambda: asyncio.run(send_many.adelay([Record("orders", {"id": 42}, key="42")])),
    "send_and_wait": lambda: send_and_wait("orders", {"id": 42}, key="42"),
    "asend_and_wait": lambda: asyncio.run(asend_and_wait("orders", {"id": 42}, key="42", message_id="mine")),
    "signature": lambda: send.si("orders", {"id": 42}, key="42").delay(),
    "chain": lambda: chain(send.si("orders", {"id": 42}, key="42"), shop.signature("shop.charge")).delay(),
    "eager chain": lambda: chain(charge.si(), send.si("orders", {"id": 42}, key="42")).apply(),
    "group": lambda: group([send.si("orders", {"id": 42}, key="42")]).apply_async(),
    "another thread": lambda: in_thread(lambda: send.delay("orders", {"id": 42}, key="42")),
}


def in_thread(call: Callable[[], Any]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


class TestCapture:
    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    def test_takes_what_is_sent_by(self, call: Callable[[], Any], sent: Captured) -> None:
        call()
        record = sent.one(topic="orders", key="42", value={"id": 42})
        assert isinstance(record, Record)
        assert (record.key_bytes, record.value_bytes, record.json, record.text) == (
            b"42", b'{"id":42}', {"id": 42}, '{"id":42}',
        )  # fmt: skip
        assert record.error is None

    @pytest.mark.parametrize("call", [CALLS["delay"], CALLS["bulk"], CALLS["send_many"], CALLS["send_and_wait"]])
    def test_ends_with_its_block(self, call: Callable[[], Any]) -> None:
        with capture() as sent:
            pass
        with pytest.raises(EnqueueError):
            call()
        assert len(sent) == 0

    def test_keeps_the_order(self, sent: Captured) -> None:
        ids = [send.delay("orders", str(n)).id for n in range(3)] + send.bulk([Record("orders", "b") for _ in range(3)])
        assert [record.id for record in sent] == ids
        assert [record.id for record in sent[1:3]] == ids[1:3]
        assert sent[-1].id == ids[-1]

    def test_shows_the_options(self, sent: Captured) -> None:
        send.apply_async(("orders", "v"), countdown=60, link=shop.signature("shop.charge"))
        options = sent.one().options
        assert options["countdown"] == 60
        assert options["link"].task == "shop.charge"

    def test_a_signature_asks_nothing_of_celery(self, sent: Captured) -> None:
        """It names our queue, for the chains of others; that is where a send goes anyway, and the short way."""
        assert send.si("orders", "v").options["queue"] == "kafka-delivery"
        send.si("orders", "v").delay()
        assert "queue" not in sent.one().options
        elsewhere = send.signature(("orders", "v"), options={"queue": "slow"})
        assert elsewhere.options["queue"] == "slow"

    def test_keeps_dead_letters_apart(self, sent: Captured) -> None:
        dead_letter.delay("orders", "v", error_message="by hand")
        sent.none()
        (letter,) = sent.dead_letters
        assert letter.topic == "orders"
        assert letter.reason is not None
        assert letter.reason["error_message"] == "by hand"

    def test_validates_as_in_production(self, sent: Captured) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: send.delay("no topic!", "v"),
            lambda: asyncio.run(send.adelay("orders", object())),  # type: ignore[arg-type]
            lambda: send.apply_async(("orders", "v"), {"nonsense": 1}),
            lambda: send.apply_async((Record("orders", "v", message_id="mine"),), task_id="other"),
            lambda: send_many.delay([Record("orders", "v"), {"topic": "no topic!", "value": "v"}]),
            lambda: send_and_wait("orders", "x" * 2_000_000),
            lambda: send.bulk([{"topic": "orders", "value": float("nan")}]),
        ]
        for call in calls:
            with pytest.raises(InvalidRecordError):
                call()
        sent.none()

    def test_results_are_those_of_production(self, sent: Captured) -> None:
        plain = send.delay("orders", "v", message_id="mine")
        assert (plain.id, plain.get(timeout=1)) == ("mine", None)
        wanted = send.apply_async(("orders", "v"), ignore_result=False)
        place = {"topic": "orders", "partition": 0, "offset": 1, "message_id": wanted.id}
        assert place.items() <= wanted.get(timeout=1).items()
        assert send.AsyncResult(wanted.id).state == "SUCCESS"
        assert send.AsyncResult("unknown").state == "PENDING"
        assert send_and_wait("orders", "v", partition=5)["partition"] == 5
        (fate,) = send_many.apply_async(([Record("orders", "v", message_id="m")],), ignore_result=False).get()
        assert (fate["outcome"], fate["message_id"]) == ("delivered", "m")

    def test_of_a_large_batch_is_whole(self, sent: Captured) -> None:
        batch = [Record("orders", "x" * 300_000, message_id=str(n)) for n in range(5)]
        fates = send_many.apply_async((batch,), ignore_result=False).get()
        assert [fate["message_id"] for fate in fates] == [record.id for record in sent] == list("01234")


class TestAssertions:
    def test_one_of_several(self, sent: Captured) -> None:
        for n in range(3):
            send.delay("orders", {"id": n, "tags": ["a"]}, key=str(n), headers={"kind": f"k{n}"}, message_id=f"id-{n}")
        assert sent.one(key=b"1").id == "id-1"
        assert sent.one(value={"tags": ["a"], "id": 2}).id == "id-2"
        assert sent.one(headers={"kind": "k0"}).id == "id-0"
        assert sent.one(message_id="id-2").key_bytes == b"2"
        assert [record.id for record in sent.all(topic="orders")] == ["id-0", "id-1", "id-2"]
        sent.none(topic="payments")

    def test_a_tombstone_is_not_any_value(self, sent: Captured) -> None:
        send.delay("orders", None, key="a")
        send.delay("orders", "v", key="b")
        assert sent.one(value=None).key_bytes == b"a"

    def test_what_fails_shows_what_was_sent(self, sent: Captured) -> None:
        with pytest.raises(AssertionError, match=r"0 records with topic='orders' were sent, not one: nothing was sent"):
            sent.one(topic="orders")
        send.delay("orders", {"id": 41}, key="41", message_id="mine")
        with pytest.raises(AssertionError) as caught:
            sent.one(topic="orders", key="42")
        assert str(caught.value).splitlines() == [
            "0 records with topic='orders', key='42' were sent, not one: all that were sent are",
            "  topic='orders' key=b'41' value=b'{\"id\":41}' message_id='mine'",
        ]
        with pytest.raises(AssertionError, match="1 records with topic='orders' were sent, not none"):
            sent.none(topic="orders")
        send.delay("orders", "v")
        with pytest.raises(AssertionError, match="2 records were sent, not one"):
            sent.one()

    def test_a_misspelt_field_is_no_match_for_everything(self, sent: Captured) -> None:
        send.delay("orders", "v")
        with pytest.raises(TypeError, match="topik"):
            sent.none(topik="orders")  # type: ignore[call-arg]

    def test_a_record_shows_no_payload_elsewhere(self, sent: Captured) -> None:
        send.delay("orders", "secret", key="secret", headers={"a": "secret"})
        assert "secret" not in repr(sent.one())


class TestFaults:
    def test_redis_does_not_confirm(self, sent: Captured) -> None:
        sent.fail(EnqueueError, topic="orders")
        for call in (CALLS["delay"], CALLS["adelay"], CALLS["apply_async"], CALLS["send_many"], CALLS["send_and_wait"]):
            with pytest.raises(EnqueueError):
                call()
        with pytest.raises(EnqueueError) as caught:
            send.delay("orders", "v", message_id="mine")
        assert caught.value.message_id == "mine"
        with pytest.raises(BulkEnqueueError) as bulk:
            send.bulk([Record("other", "v", message_id="a"), Record("orders", "v", message_id="b")])
        assert (bulk.value.accepted, bulk.value.unknown) == (["a"], ["b"])
        assert sent.one().topic == "other"

    def test_redis_fails_within_many(self, sent: Captured) -> None:
        sent.fail(BulkEnqueueError, topic="orders")
        with pytest.raises(BulkEnqueueError) as bulk:
            send.bulk([Record(topic, "v", message_id=topic) for topic in ("other", "orders", "third")])
        assert (bulk.value.accepted, bulk.value.unknown, bulk.value.unsent) == (["other"], ["orders"], ["third"])

    def test_only_so_many_times(self, sent: Captured) -> None:
        sent.fail(EnqueueError, times=1)
        with pytest.raises(EnqueueError):
            send.delay("orders", "v")
        send.delay("orders", "v")
        assert len(sent) == 1

    @pytest.mark.parametrize("error", ["MSG_SIZE_TOO_LARGE", KafkaError.MSG_SIZE_TOO_LARGE])
    def test_kafka_refuses(self, error: str | int, sent: Captured) -> None:
        sent.fail(error, key="bad")
        send.delay("orders", "v", key="bad")  # which does not say so
        assert isinstance(sent.one().error, RejectedError)
        with pytest.raises(RejectedError) as caught:
            send_and_wait("orders", "v", key="bad", message_id="mine")
        assert (caught.value.code, caught.value.name, caught.value.topic, caught.value.message_id) == (
            KafkaError.MSG_SIZE_TOO_LARGE, "MSG_SIZE_TOO_LARGE", "orders", "mine",
        )  # fmt: skip
        with pytest.raises(RejectedError):
            asyncio.run(asend_and_wait("orders", "v", key="bad"))
        with pytest.raises(RejectedError):
            send.apply_async(("orders", "v"), {"key": "bad"}, ignore_result=False).get(timeout=1)
        assert send_and_wait("orders", "v", key="good")["topic"] == "orders"

    def test_retries_are_used_up(self, sent: Captured) -> None:
        sent.fail("INVALID_REQUEST")
        with pytest.raises(RetriesExhaustedError):
            send_and_wait("orders", "v")

    def test_kafka_is_away(self, sent: Captured) -> None:
        sent.fail("_ALL_BROKERS_DOWN")
        with pytest.raises(DeliveryTimeoutError) as caught:
            send_and_wait("orders", "v", message_id="mine")
        assert caught.value.message_id == "mine"
        with pytest.raises(CeleryTimeoutError):
            send.apply_async(("orders", "v"), ignore_result=False).get(timeout=1)

    def test_of_a_batch_each_record_has_its_own(self, sent: Captured) -> None:
        for key, error in (("a", "POLICY_VIOLATION"), ("b", "INVALID_REQUEST"), ("c", "_TRANSPORT")):
            sent.fail(error, key=key)
        batch = [Record("orders", "v", key=key) for key in "abcd"]
        fates = send_many.apply_async((batch,), ignore_result=False).get()
        assert [fate["outcome"] for fate in fates] == ["dead-lettered", "retried", "deferred", "delivered"]
        assert [fate.get("error") for fate in fates] == ["POLICY_VIOLATION", "INVALID_REQUEST", None, None]

    def test_an_error_that_kafka_does_not_know_is_named_at_once(self, sent: Captured) -> None:
        with pytest.raises(ValueError, match="'TOPIC_AUTHORISATION_FAILED' is no Kafka error"):
            sent.fail("TOPIC_AUTHORISATION_FAILED")

    @pytest.mark.parametrize("topic", [None, "orders"])
    def test_a_circuit_is_open(self, topic: str | None, sent: Captured) -> None:
        assert circuit("orders").state == "closed"
        sent.open_circuit(topic, retry_after=12)
        with pytest.raises(CircuitBreakerOpen) as caught:
            send_and_wait("orders", "v")
        assert caught.value.retry_after == 12
        assert circuit("orders").state == "open"
        sent.none()
        send.delay("orders", "v")  # the queue is the buffer
        sent.close_circuits()
        send_and_wait("orders", "v")
        assert len(sent) == 2

    def test_outcomes_are_the_workers(self) -> None:
        """For each of Kafka's errors."""
        record = Record("orders", "v")
        codes = [getattr(KafkaError, name) for name in dir(KafkaError) if name.isupper()]
        for code in [code for code in codes if isinstance(code, int) and code]:
            real, found = delivery_error(KafkaError(code), "orders", record.id), failure(code, record)
            if isinstance(real, RejectedError):
                assert (type(found), found.args) == (RejectedError, real.args)
            elif isinstance(real, RetriableError):
                assert isinstance(found, RetriesExhaustedError)
                assert (found.code, found.name, found.scope) == (real.code, real.name, real.scope)
            else:
                assert verdict(code).retry in (Retry.HOLD, Retry.RESEND)
                assert isinstance(found, DeliveryTimeoutError)
                assert verdict(code).retry is Retry.RESEND or isinstance(real, UnavailableError)
