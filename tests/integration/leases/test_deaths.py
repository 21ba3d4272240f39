"""A message that takes workers down is found out, and parked; what was with it is not."""

from __future__ import annotations

import pytest
import redis

from integration.leases.workers import (
    CLAIMED,
    DEATHS,
    OTHER,
    QUEUE,
    SUSPECT,
    Worker,
    has_killed,
    message,
    publish,
    queued,
)
from kafka_delivery import Record, app, names, send_many
from kafka_delivery.publisher import envelope
from kafka_delivery_worker import parked_items
from kafka_delivery_worker.parking import ParkingStore
from servers import AnyRedis


def killed(client: redis.Redis, *sent: bytes, times: int, queue: str = QUEUE) -> None:
    """Let so many workers die with these messages, one after the other, starting with them in their list."""
    for _ in range(times):
        worker = Worker(client)
        while missing := set(sent) - set(worker.holds):
            assert worker.claim(lists=(queue,)).status == CLAIMED, missing
        worker.dies()
        Worker(client).reaps(worker)


def no_thread(topic: str) -> None:
    raise RuntimeError("can't start new thread")


def on_its_way(client: redis.Redis, wires: list[list[object]]) -> None:
    """A batch that took too many workers down."""
    made = envelope(app, send_many, QUEUE, "batch", [wires], "", "")
    client.rpush(names.POISON, f"{QUEUE}\n{made}")


class TestDeaths:
    def test_only_a_reaping_counts(self, client: redis.Redis) -> None:
        publish(client, message(1))
        for _ in range(DEATHS + 1):
            worker = Worker(client)
            tags = worker.claim().tags
            worker.claim(0, returns=tags)
            worker.claim()
            worker.lease.forget(tags[0].decode())
            worker.lease.reconcile()
            worker.claim()
            worker.lease.stop()
        assert not client.exists(names.DEATHS, names.POISON)
        assert Worker(client).claim().suspected == [0]

    def test_each_is_counted_and_told(self, client: redis.Redis) -> None:
        publish(client, message(1), message(2))
        killed(client, message(1), message(2), times=2)
        publish(client, message(3))
        assert Worker(client).claim().suspected == [2, 2, 0]
        assert 0 < client.ttl(names.DEATHS) <= 86400

    def test_a_header_of_the_callers_does_not_count_for_the_message(self, client: redis.Redis) -> None:
        """All that carry the same would be suspects together."""
        one, two = (message(n, delivery_tag="same", x={"delivery_tag": "same"}) for n in (1, 2))
        publish(client, one)
        killed(client, one, times=2)
        publish(client, two)
        assert Worker(client).claim().suspected == [2, 0]

    def test_a_suspect_is_claimed_alone_by_a_worker_that_holds_nothing_else(self, client: redis.Redis) -> None:
        first, suspect, *rest = publish(client, *(message(n) for n in range(5)))
        has_killed(client, message(1), 3)
        worker = Worker(client)
        before = worker.claim()
        assert before.items == [first]
        assert worker.claim().status == SUSPECT
        assert queued(client) == [suspect, *rest]
        alone = worker.claim(acks=before.tags)
        assert (alone.items, alone.suspected) == ([suspect], [3])
        assert queued(client) == rest
        assert worker.claim().status == SUSPECT  # nothing joins it: an innocent one would be blamed with it
        assert queued(client) == rest
        assert worker.claim(acks=alone.tags).items == rest

    def test_of_two_suspects_one_is_claimed_at_a_time(self, client: redis.Redis) -> None:
        sent = publish(client, message(1), message(2), message(3))
        has_killed(client, message(1), 3)
        has_killed(client, message(2), 4)
        worker = Worker(client)
        one = worker.claim()
        assert one.items == sent[:1]
        assert worker.claim().status == SUSPECT
        two = worker.claim(acks=one.tags)
        assert two.items == sent[1:2]
        assert worker.claim(acks=two.tags).items == sent[2:]

    def test_a_list_that_is_never_empty_does_not_keep_a_suspect_of_another_waiting(self, client: redis.Redis) -> None:
        """Nor what waits behind it: priorities come first, and there is always something in the first list."""
        behind = publish(client, message("suspect"), message("behind"), queue=OTHER)
        has_killed(client, message("suspect"), 3)
        worker = Worker(client)
        got: list[bytes] = []
        tags: list[bytes] = []
        for n in range(6):
            publish(client, message(n), message(f"{n}+"))
            answer = worker.claim(4, (QUEUE, OTHER), acks=tags)
            got += answer.items
            tags = answer.tags
        assert set(behind) <= set(got)

    @pytest.mark.parametrize("busy", [False, True])
    def test_a_suspect_that_is_due_is_alone_too(self, client: redis.Redis, busy: bool) -> None:
        publish(client, message("before"))
        worker = Worker(client)
        before = worker.claim().tags
        has_killed(client, message(1), 3)
        client.zadd(names.DELAYED + QUEUE, {message(1): 2, message(2): 3})
        if busy:
            assert worker.claim().status == SUSPECT
        alone = worker.claim(acks=before)
        assert alone.items == [message(1)]
        assert worker.claim(acks=alone.tags).items == [message(2)]

    def test_a_suspect_behind_others_waits_in_its_place(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(9)))
        has_killed(client, message(4), 3)
        assert Worker(client).claim().items == sent[:4]
        assert queued(client) == sent[4:]

    def test_a_message_that_took_five_workers_down_is_parked_and_what_was_with_it_is_not(
        self, client: redis.Redis
    ) -> None:
        poison, innocent = message("poison"), message("innocent")
        publish(client, innocent, poison)
        killed(client, innocent, poison, times=3)
        worker = Worker(client)
        alone = worker.claim()
        assert alone.items == [innocent]
        assert worker.claim(acks=alone.tags).items == [poison]
        worker.dies()
        survivor = Worker(client)
        assert survivor.reaps(worker) == (1, 0)
        worker = Worker(client)
        assert worker.claim().items == [poison]
        worker.dies()
        assert survivor.reaps(worker) == (0, 1)
        assert client.llen(QUEUE) == 0

        counted: list[str] = []
        survivor.lease.on_parked = counted.append
        survivor.lease.park_poison()

        assert len(counted) == 1
        (parked,) = ParkingStore(client).list()
        assert (parked.id, parked.kind, parked.content) == ("poison", "poison", "message")
        assert parked.data == {"queue": QUEUE, "raw": poison.decode()}
        assert client.llen(names.POISON) == 0

    def test_poison_is_parked_as_its_records(self, client: redis.Redis) -> None:
        wires = [Record("orders", "v", message_id=f"id-{n}").to_wire("default") for n in range(3)]
        on_its_way(client, wires)
        Worker(client).lease.park_poison()
        parked = [(item.id, item.kind, item.content) for item in ParkingStore(client).list()]
        assert sorted(parked) == [(f"id-{n}", "poison", "record") for n in range(3)]
        assert client.exists(names.POISON, names.POISON_APART) == 0

    def test_poison_that_kills_who_reads_it_is_not_read_again(
        self, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While the reader's lease lasts, it may be at it still."""

        def killed_by(_: str) -> None:
            raise SystemExit

        on_its_way(client, [Record("orders", "v", message_id="id-1").to_wire("default")])
        reader, survivor = Worker(client), Worker(client)
        reader.lease.renew()
        with monkeypatch.context() as reading:
            reading.setattr(parked_items, "_call_in_raw", killed_by)
            with pytest.raises(SystemExit):
                reader.lease.park_poison()
        survivor.lease.park_poison()
        assert ParkingStore(client).count() == 0
        assert 0 < client.ttl(names.POISON_APART) <= 86_400
        reader.dies()
        survivor.reaps(reader)
        survivor.lease.park_poison()
        (parked,) = ParkingStore(client).list()
        assert (parked.id, parked.content) == ("batch", "message")
        assert client.exists(names.POISON, names.POISON_APART) == 0

    def test_poison_for_which_there_was_no_room_is_read_again(self, client: redis.Redis) -> None:
        """Who read it has survived, and says so."""
        on_its_way(client, [Record("orders", "v", message_id="id-1").to_wire("default")])
        full, other = Worker(client), Worker(client)
        full.lease._parked_max_bytes = 1
        full.lease.park_poison()
        assert client.exists(names.POISON_APART) == 0
        other.lease.on_parked = no_thread
        other.lease.park_poison()
        (parked,) = ParkingStore(client).list()
        assert (parked.id, parked.content) == ("id-1", "record")

    def test_poison_that_is_no_text_is_parked_too(self, client: redis.Redis) -> None:
        raw = message("poison").replace(b"topic", b"\xff\xfe")
        publish(client, raw)
        killed(client, raw, times=DEATHS)
        Worker(client).lease.park_poison()
        (parked,) = ParkingStore(client).list()
        assert parked.data["raw"].encode(errors="surrogateescape") == raw

    def test_poison_is_parked_once_by_many(self, client: AnyRedis) -> None:
        publish(client, message("poison"))
        killed(client, message("poison"), times=DEATHS)
        entry = client.lindex(names.POISON, 0)
        Worker(client).lease.park_poison()
        client.rpush(names.POISON, entry)  # as it is for one that was interrupted before it could remove it
        Worker(client).lease.park_poison()
        assert ParkingStore(client).count() == 1
        assert client.llen(names.POISON) == 0
