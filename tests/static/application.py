"""What an application may write, as its type checker sees it. A line that ends in `# wrong` must be refused.

Read by `static/test_typing.py`, never run.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TypedDict, assert_type
from uuid import uuid4

from kafka_delivery import (
    CircuitBreakerOpen,
    Delivered,
    DeliveryTimeoutError,
    EnqueueError,
    Fate,
    Record,
    RejectedError,
    Result,
    asend_and_wait,
    circuit,
    dead_letter,
    send,
    send_and_wait,
    send_many,
)
from kafka_delivery.testing import Sent, capture


@dataclass
class Order:
    id: int
    total: Decimal


class Event(TypedDict):
    id: int


def sends() -> None:
    assert_type(send.delay("orders", {"id": 42}, key="42"), Result[None])
    assert_type(send.delay("orders", {"id": 42}).id, str)
    assert_type(send.delay("orders", {"id": 42}).get(timeout=1), None)
    send.delay("orders", None, b"key", {"kind": "a", "raw": b"b", "none": None})
    send.delay("orders", [1, 2], headers=[("kind", "a"), ("kind", b"b")])
    send.delay("orders", Order(42, Decimal("9.90")), partition=3, timestamp=datetime.now(UTC), message_id=uuid4())
    event: Event = {"id": 42}
    send.delay("orders", event, timestamp=1767323045678)

    assert_type(send.delay_on_commit("orders", event, key="42", using="archive"), str)
    assert_type(send_many.delay_on_commit([Record("orders", "v")], using="archive"), str)

    send.delay()  # wrong
    send.delay_on_commit("orders")  # wrong
    send.delay_on_commit("orders", "v", countdown=60)  # wrong
    send.delay("orders")  # wrong
    send.delay(b"orders", "v")  # wrong
    send.delay("orders", 42)  # wrong
    send.delay("orders", "v", key=42)  # wrong
    send.delay("orders", "v", headers={"kind": 42})  # wrong
    send.delay("orders", "v", partition="3")  # wrong
    send.delay("orders", "v", timestamp=1.5)  # wrong
    send.delay("orders", "v", countdown=60)  # wrong
    send.dealy("orders", "v")  # wrong


def options(unheard: bool) -> None:
    assert_type(send.apply_async(("orders", "v"), {"key": "k"}, countdown=60), Result[None])
    wanted = send.apply_async((Record("orders", "v"),), ignore_result=False, expires=3600, link=send.si("orders", "v"))
    assert_type(wanted, Result[Delivered])
    assert_type(wanted.get(timeout=10), Delivered)
    assert_type(wanted.get(timeout=10)["offset"], int)
    assert_type(wanted.get(propagate=False), Delivered | BaseException)
    assert_type(wanted.state, str)
    assert_type(send.apply_async(("orders", "v"), ignore_result=unheard), Result[Delivered] | Result[None])
    assert_type(send.AsyncResult("id").result, Delivered | BaseException | None)

    send.apply_async("orders", "v")  # wrong
    send.apply_async(("orders", "v"), countdwon=60)  # wrong
    send.apply_async(("orders", "v"), countdown="60")  # wrong
    wanted.get(timeout=10)["ofset"]  # wrong


def many() -> None:
    assert_type(send_many.delay([Record("orders", "v"), {"topic": "orders", "value": "v"}]), Result[None])
    fates = send_many.apply_async(([Record("orders", "v")],), ignore_result=False).get()
    assert_type(fates, list[Fate])
    assert_type(fates[0]["message_id"], str)
    assert_type(send.bulk(Record("orders", str(n)) for n in range(10)), list[str])
    dead_letter.delay("orders", "v", error_class="Late", error_message="too late", retry_count=0)

    send_many.delay(["orders"])  # wrong
    send.bulk("orders")  # wrong
    dead_letter.delay("orders", "v", error_code="29")  # wrong


async def in_a_loop() -> None:
    assert_type(await send.adelay("orders", {"id": 42}, key="42"), Result[None])
    assert_type(await send_many.adelay([Record("orders", "v")]), Result[None])
    assert_type(await send.abulk([Record("orders", "v")]), list[str])
    assert_type(await asend_and_wait("orders", "v", timeout=5), Delivered)

    (await send.adelay("orders", "v", key=42))  # wrong
    _ = send.adelay("orders", "v").id  # wrong


def waits() -> int:
    try:
        return send_and_wait("orders", {"id": 42}, key="42", timeout=5)["offset"]
    except CircuitBreakerOpen as error:
        assert_type(error.retry_after, float)
    except (RejectedError, EnqueueError, DeliveryTimeoutError) as error:
        assert_type(error.message_id, str)
    assert_type(circuit("orders").state, str)
    send_and_wait("orders", "v", timeout="5")  # wrong
    return 0


def tests() -> None:
    with capture() as sent:
        assert_type(sent.one(topic="orders", key="42", value={"id": 42}), Sent)
        assert_type(sent[0], Sent)
        sent.fail("MSG_SIZE_TOO_LARGE", topic="orders", times=1)
        sent.fail(EnqueueError)
        sent.one(topik="orders")  # wrong
        sent.fail(ValueError)  # wrong
