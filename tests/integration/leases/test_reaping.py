"""What a dead worker held is back at the front of its lists, once."""

from __future__ import annotations

import threading

import redis

from integration.leases.workers import OTHER, QUEUE, Worker, long_renewed, message, points, publish, queued
from kafka_delivery import names


class TestReaping:
    def test_everything_returns_to_the_front_of_its_list_the_oldest_first(self, client: redis.Redis) -> None:
        here = publish(client, *(message(n) for n in range(230)))
        there = publish(client, *(message(f"other {n}") for n in range(15)), queue=OTHER)
        worker = Worker(client)
        for _ in range(12):  # past "9.", so that numbers are not sorted as text
            worker.claim(20, (QUEUE, OTHER))
        worker.dies()
        assert Worker(client).reaps(worker) == (240, 0)
        assert queued(client) == here
        assert queued(client, OTHER) == there
        assert worker.holds == []
        assert client.zscore(names.LEASES, worker.lease.owner) is None

    def test_of_a_living_worker_nothing_is_returned(self, client: redis.Redis) -> None:
        sent = publish(client, message(1))
        worker = Worker(client)
        worker.claim()
        assert Worker(client).reaps(worker) == (-1, 0)
        assert worker.holds == sent

    def test_a_stopping_worker_returns_its_own_and_ends_its_lease(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(9)))
        worker = Worker(client)
        worker.lease.start()
        answers = worker.claim(4), worker.claim(3)
        worker.lease.settled(answers[0].tags[0].decode())
        worker.lease.returned(answers[1].tags[0].decode())
        worker.lease.stop()
        assert queued(client) == [*sent[1:4], *sent[5:], sent[4]]
        assert client.zscore(names.LEASES, worker.lease.owner) is None
        worker.lease.stop()
        assert client.llen(QUEUE) == 8

    def test_of_many_who_look_one_does_it(self, client: redis.Redis) -> None:
        sent = publish(client, *(message(n) for n in range(1000)))
        worker = Worker(client)
        for _ in range(2):
            worker.claim()
        worker.dies()
        barrier = threading.Barrier(24)
        outcomes: list[tuple[int, int]] = []

        def reap() -> None:
            with redis.Redis(port=client.get_connection_kwargs()["port"]) as own:
                own.ping()
                barrier.wait(60)
                outcomes.append(Worker(own).reaps(worker))

        threads = [threading.Thread(target=reap) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

        assert sorted(outcomes) == [(0, 0)] * 23 + [(1000, 0)]
        assert queued(client) == sent
        assert set(client.hvals(names.DEATHS)) == {str(points(1)).encode()}

    def test_one_that_cannot_be_returned_does_not_keep_others(self, client: redis.Redis) -> None:
        publish(client, message(1), queue=OTHER)
        sent = publish(client, message(2))
        stuck, dead, living = Worker(client), Worker(client), Worker(client)
        stuck.claim(1, (OTHER,))
        dead.claim(1, (QUEUE,))
        client.set(OTHER, "no list")
        long_renewed(client)
        client.zadd(names.LEASES, {stuck.lease.owner: 1, dead.lease.owner: 2})
        living.lease.renew()
        assert queued(client) == sent
        assert stuck.holds == [message(1)]
        client.delete(OTHER)
        living.lease.renew()
        assert queued(client, OTHER) == [message(1)]
