"""`kafka-delivery trace` finds a record wherever its way has taken it, and says honestly where it has not looked."""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from confluent_kafka import Producer

from kafka_delivery import Record, dead_letter, send, send_many, settings
from kafka_delivery.record import uuid7
from kafka_delivery.redis_client import RedisClient
from kafka_delivery_worker import whereabouts
from kafka_delivery_worker.embedded import MockKafka
from kafka_delivery_worker.parking import Parked, ParkingStore
from kafka_delivery_worker.readback import SKEW_MS, TAIL, Readback, told_ms
from kafka_delivery_worker.whereabouts import Where, Whereabouts, base64_of
from servers import RealKafka
from stack import Stack, stack
from traced import DEAD, ON_ITS_WAY, PAYLOAD, place, trace


class TestInRedis:
    """Without a worker, which would take everything away, and answer when it is asked."""

    @pytest.fixture(autouse=True)
    def nobody_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(whereabouts, "ASKED_S", 0.01)

    def test_it_waits_and_so_many_before_it(self, delivery: Stack) -> None:
        ids = send.bulk([{"topic": "orders", "value": PAYLOAD} for _ in range(500)])
        found = trace(ids[420], code=ON_ITS_WAY)
        assert (found["where"], found["queue"], found["before"], found["topic"]) == (
            "queued",
            "kafka-delivery",
            420,
            "orders",
        )

    def test_it_waits_with_a_priority(self, delivery: Stack) -> None:
        sent = send.apply_async(("orders", PAYLOAD), priority=9)
        found = place(sent.id)
        assert (found.where, found.facts["priority"]) == (Where.QUEUED, 9)

    def test_it_waits_for_its_time(self, delivery: Stack) -> None:
        sent = send.apply_async(("orders", PAYLOAD), countdown=100)
        item = delivery.redis.rpop("kafka-delivery")
        delivery.redis.zadd("kafka-delivery:delayed:1:kafka-delivery", {item: (time.time() + 100) * 1000})
        found = trace(sent.id, code=ON_ITS_WAY)
        assert found["where"] == "delayed"
        assert found["in_s"] == pytest.approx(100, abs=60)

    def test_it_waits_for_its_topics_circuit(self, delivery: Stack) -> None:
        sent = send.delay("orders", PAYLOAD)
        delivery.redis.sadd("kafka-delivery:waiting:1", "orders:kafka-delivery")
        delivery.redis.lmove("kafka-delivery", "kafka-delivery:waiting:1:orders:kafka-delivery")
        found = place(sent.id)
        assert (found.where, found.facts["topic"]) == (Where.PUT_ASIDE, "orders")

    def test_a_worker_that_died_holds_it(self, delivery: Stack) -> None:
        sent = send.delay("orders", PAYLOAD)
        delivery.redis.zadd("kafka-delivery:leases:1", {"dead": (time.time() + 200) * 1000})
        delivery.redis.hset("kafka-delivery:held:1:dead", "1.1:kafka-delivery", delivery.redis.rpop("kafka-delivery"))
        found = place(sent.id)
        assert (found.where, found.facts["lease"], found.facts["worker"]) == (Where.HELD, "dead", None)
        assert found.facts["lease_ends_in_s"] == pytest.approx(200, abs=60)

    def test_celerys_own_transport_holds_it(self, delivery: Stack) -> None:
        sent = send.delay("orders", PAYLOAD)
        envelope = json.loads(delivery.redis.rpop("kafka-delivery"))
        delivery.redis.hset("unacked", "tag", json.dumps([envelope, "", "kafka-delivery"]))
        assert place(sent.id).where == Where.HELD

    def test_its_dead_letter_waits(self, delivery: Stack) -> None:
        sent = dead_letter.delay("orders", PAYLOAD)
        found = trace(sent.id.removesuffix("-dlq"), code=DEAD)
        assert (found["where"], found["queue"], found["topic"]) == ("queued", "kafka-delivery-dlq", "orders")

    def test_it_is_about_to_be_parked(self, delivery: Stack) -> None:
        sent = send.delay("orders", PAYLOAD)
        item = delivery.redis.rpop("kafka-delivery").decode()
        delivery.redis.rpush("kafka-delivery:poison:1", f"kafka-delivery\n{item}")
        assert place(sent.id).where == Where.POISON

    @pytest.mark.parametrize("kept_as", ["x?*[1]", "x?*[1]~0a1b2c3d", "x?*[1]-dlq"])
    def test_it_is_parked(self, delivery: Stack, kept_as: str) -> None:
        store = ParkingStore(delivery.redis)
        for item_id in (kept_as, "x??[1]~0a1b2c3d"):
            data = {"task": "t", "id": item_id, "args": [PAYLOAD], "kwargs": {}}
            store.park(Parked(id=item_id, kind="bug", error_class="E", error_message="m", content="call", data=data))
        found = trace("x?*[1]", code=DEAD)
        assert (found["where"], found["parked_id"], found["kind"]) == ("parked", kept_as, "bug")

    def test_it_is_parked_in_a_batch_that_was_kept_whole(self, delivery: Stack) -> None:
        store = ParkingStore(delivery.redis)
        wires = [Record("orders", PAYLOAD, message_id=f'one-{n}"').to_wire("default") for n in range(3)]
        data = {"task": send_many.name, "id": "batch", "args": [wires], "kwargs": {}}
        made = Parked(id="batch", kind="expired", error_class="E", error_message="m", content="call", data=data)
        store.park(dataclasses.replace(made, data={**data, "args": [wires[:1]]}))
        kept = store.park(made)
        found = place('one-1"')
        assert (found.where, found.batch, found.facts["parked_id"]) == (Where.PARKED, "batch", kept)
        assert place("one-") is None

    @pytest.mark.parametrize("position", [0, 1, 2, 99])
    def test_it_is_in_a_batch(self, delivery: Stack, position: int) -> None:
        records = [Record("orders", PAYLOAD * (n % 3), key=str(n)) for n in range(100)]
        sent = send_many.delay(records)
        found = place(records[position].id)
        assert (found.where, found.batch, found.facts["topic"]) == (Where.QUEUED, sent.id, "orders")
        assert place(sent.id).batch is None

    def test_it_is_a_batch_in_several_messages(self, delivery: Stack) -> None:
        send_many.delay([Record("orders", PAYLOAD * 50_000) for _ in range(3)], message_id="batch")
        send.delay("orders", "v", message_id="other.party")
        send.delay("orders", "v", message_id="one.part1")
        found = place("batch")
        assert (found.where, found.batch) == (Where.QUEUED, "batch.part2")  # looked at from where messages come in
        assert place("other") is None
        assert place("one") is None

    def test_what_is_found_is_it_and_not_what_contains_its_id(self, delivery: Stack) -> None:
        send.delay("orders", "a", message_id="id-10")
        send.delay("orders", '"correlation_id": "id-1"')
        send_many.delay([{"topic": "orders", "value": "id-1", "message_id": "id-100"}])
        assert place("id-1") is None
        sent = send.delay("orders", "b", message_id="id-1")
        assert place(sent.id).facts["before"] == 3

    @pytest.mark.parametrize("spacing", [(",", ":"), (", ", ": "), (" ,\n", "\t: ")])
    def test_a_message_of_another_client_is_found(self, delivery: Stack, spacing: tuple[str, str]) -> None:
        headers = {"id": "a/b", "task": send.name, "root_id": "root", "argsrepr": "root"}
        text = json.dumps({"body": "", "headers": headers, "properties": {"correlation_id": "a/b"}}, separators=spacing)
        delivery.redis.lpush("kafka-delivery", text, text.replace("a/b", r"c\/d"))
        delivery.redis.lpush("kafka-delivery", "garbage", '["', "[]", "[" * 10_000, '{"headers": ["root"]}', '"root"')
        assert [place(name) and place(name).where for name in ("a/b", "c/d")] == [Where.QUEUED] * 2
        assert place("root") is None, "its children only name it"

    def test_what_moves_on_while_it_is_looked_for_is_met_further_on(
        self, delivery: Stack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is claimed just when its queue has been looked through."""
        delivery.redis.zadd("kafka-delivery:leases:1", {"worker": (time.time() + 20) * 1000})
        looks = Whereabouts(RedisClient(settings.current()), "moving")
        search = looks._search

        def moving(kind: str, key: str, watch: Callable[[int, int], None]) -> Any:
            found = list(search(kind, key, watch))
            if key == "kafka-delivery":
                sent = send.delay("orders", PAYLOAD, message_id="moving")
                item = delivery.redis.rpop("kafka-delivery")
                delivery.redis.hset("kafka-delivery:held:1:worker", "1.1:kafka-delivery", item)
                assert sent.id == "moving"
            return iter(found)

        monkeypatch.setattr(looks, "_search", moving)
        found = looks.look()
        assert found is not None
        assert found.where == Where.HELD

    def test_taking_from_a_queue_and_adding_to_it_hides_nothing(self, delivery: Stack) -> None:
        """Between one part and the next, many go out and many come in."""
        value = "x" * 3_000
        ids = send.bulk([{"topic": "orders", "value": value} for _ in range(1_200)])
        parts: list[int] = []

        def watch(looked: int, there: int) -> None:
            if there > 1:
                parts.append(looked)
                send.bulk([{"topic": "orders", "value": value} for _ in range(40)])
                delivery.redis.rpop("kafka-delivery", 40)

        looked_for = ids[700]
        found = Whereabouts(RedisClient(settings.current()), looked_for).look(watch)
        assert len(parts) >= 2
        assert found is not None
        assert found.where == Where.QUEUED

    def test_a_slice_is_bounded_in_bytes(self, delivery: Stack) -> None:
        send.bulk([{"topic": "orders", "value": "x" * 100_000} for _ in range(60)])
        looked: list[int] = []
        assert Whereabouts(RedisClient(settings.current()), "none").look(lambda some, _: looked.append(some)) is None
        steps = [later - earlier for earlier, later in pairwise(looked) if later > earlier]
        assert max(steps) < 15, "a megabyte of messages of 140 KB, in base64"
        assert max(looked) == 60


def test_a_piece_of_base64_is_the_same_wherever_the_text_lies() -> None:
    pieces = base64_of("01a210f0-5b70-7d6e-a022-415a0df64ffa")
    for before in range(9):
        encoded = base64.b64encode(b"x" * before + b"01a210f0-5b70-7d6e-a022-415a0df64ffa" + b"yy").decode()
        assert sum(piece in encoded for piece in pieces) == 1
    assert not any(piece in base64.b64encode(b"x" * 100).decode() for piece in pieces)


def test_a_topic_is_read_from_the_time_that_the_id_tells_and_once(redis_url: str, mock_kafka: MockKafka) -> None:
    """The mock cluster knows no times, which is the worst case: only the end of each partition is read."""
    mock_kafka.create_topic("orders", 1)
    producer = Producer({"bootstrap.servers": mock_kafka.bootstrap_servers, "linger.ms": 5})

    def produce(count: int, message_id: str) -> None:
        for _ in range(count):
            producer.produce("orders", "x", headers=[("message-id", message_id), ("message-id", "another")])
            producer.poll(0)
        producer.flush(60)

    with stack(redis_url, mock_kafka):
        produce(TAIL + 500, "old")
        told = told_ms(uuid7())
        with Readback(settings.current(), "new", told, 10_000) as readback:
            assert readback.look(["orders"]) is None
            assert readback.looked == TAIL
            produce(3, "another")
            assert readback.look(["orders"]) is None
            assert readback.looked == TAIL + 3
            produce(1, "new")
            found = readback.look(["orders"])
            assert found is not None
            assert found.offset == TAIL + 503
            assert readback.looked == TAIL + 4
        with Readback(settings.current(), "old", None, 10_000) as readback:
            found = readback.look(["orders"])
            assert found is not None
            assert found.offset == 0


@pytest.mark.real
def test_time_bounds_what_is_read(redis_url: str, real_kafka: RealKafka) -> None:
    """Of twenty thousand older records none is read, though some are delivered after it."""
    name = f"bounded-{uuid7()}"
    real_kafka.create_topic(name, 3)
    producer = Producer({"bootstrap.servers": real_kafka.bootstrap_servers, "linger.ms": 5})
    hour_ago = int(time.time() * 1000) - 3_600_000

    def produce(count: int, message_id: str, timestamp: int) -> None:
        for number in range(count):
            producer.produce(name, "x", str(number), headers=[("message-id", message_id)], timestamp=timestamp)
            producer.poll(0)
        assert producer.flush(60) == 0

    produce(20_000, "older", hour_ago)
    sent = uuid7()
    produce(30, "newer", int(time.time() * 1000))
    produce(1, sent, told_ms(sent) or 0)
    produce(30, "older, and late", hour_ago)
    with stack(redis_url, real_kafka):
        since = (told_ms(sent) or 0) - SKEW_MS
        with Readback(settings.current(), sent, since, 10_000) as readback:
            found = readback.look([name])
            assert found is not None
            assert found.topic == name
            assert readback.looked <= 61
        with Readback(settings.current(), "nowhere", since, 10_000) as readback:
            assert readback.look([name]) is None
            # From a partition without a newer record, its end is read.
            assert 31 <= readback.looked <= 61 + 2 * TAIL


def test_an_id_tells_its_time_if_it_is_a_uuid7() -> None:
    assert told_ms(uuid7()) == pytest.approx(time.time() * 1000, abs=2_000)
    assert told_ms("8c6d5a3e-8a3b-4f0e-9b1c-0d2e4f6a8b9c") is None
    assert told_ms("order-42") is None
