"""A parked item is a value that shows why and not what: its content is somebody's payload. The store: integration."""

from __future__ import annotations

import dataclasses

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kafka_delivery_worker.parking import Parked, ParkingStore

CARD = "4111-1111-1111-1111"


def item(**changes: object) -> Parked:
    fields = {"id": "id-1", "kind": "bug", "error_class": "E", "error_message": "m", "content": "call", "data": None}
    return Parked(**{**fields, **changes})  # type: ignore[arg-type]


def test_its_repr_says_what_a_log_may_hold() -> None:
    shown = item(data={"args": [CARD]}, error_message=CARD, topic="orders")
    assert repr(shown) == "Parked(id='id-1', kind='bug', topic='orders', error_class='E')"
    assert CARD not in f"{shown}"


def test_it_is_frozen() -> None:
    for field in dataclasses.fields(Parked):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(item(), field.name, "other")


def test_its_fields_are_named_when_it_is_made() -> None:
    with pytest.raises(TypeError):
        Parked("id-1", "bug", "E", "m", "call", None)  # type: ignore[call-arg]


def test_what_redis_did_not_confirm_is_not_parked() -> None:
    with redis.Redis(port=1, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0)) as nobody:
        store = ParkingStore(nobody)
        for ask in (
            lambda: store.park(item()),
            store.count,
            lambda: list(store.list()),
            lambda: store.get("x"),
            lambda: store.remove("x"),
        ):
            with pytest.raises(redis.RedisError):
                ask()
