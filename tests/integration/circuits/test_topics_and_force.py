"""A topic has a circuit of its own, and a person may force each."""

from __future__ import annotations

import redis

from integration.circuits.fleet import BASE, CLUSTER, RULES, SLOW, TOPIC, Worker, history, opened, passes
from kafka_delivery_worker.breaker.store import Counted


class TestTopics:
    def test_a_topic_that_fails_while_the_cluster_serves_others_is_alone_in_it(self, client: redis.Redis) -> None:
        worker = Worker(client)
        for _ in range(RULES.threshold):
            worker.says(ok=5, topic=(0, 5))
        assert worker.views[TOPIC].state == "open"
        assert worker.views[CLUSTER].state == "closed"
        assert history(client) == [(TOPIC, "closed", "open")]

    def test_where_nobody_succeeds_it_is_the_clusters(self, client: redis.Redis) -> None:
        worker = Worker(client)
        for _ in range(RULES.threshold):
            worker.says(fail=5, topic=(0, 5))
        assert worker.views[CLUSTER].state == "open"
        assert worker.views[TOPIC].state == "closed"

    def test_while_the_cluster_is_open_no_topic_is_probed(self, client: redis.Redis) -> None:
        worker = Worker(client)
        for _ in range(RULES.threshold):
            worker.says(ok=5, topic=(0, 5))
        worker.says(hard="down")
        passes(client, 6_000)
        assert worker.probes("x", TOPIC) == "denied"
        assert worker.probes("y") == "probe"

    def test_everybody_learns_of_it(self, client: redis.Redis) -> None:
        worker = Worker(client)
        for _ in range(RULES.threshold):
            worker.says(ok=5, topic=(0, 5))
        other = Worker(client, "other")
        assert other.views[TOPIC].shut

    def test_there_is_a_bound_to_them(self, client: redis.Redis) -> None:
        worker = Worker(client)
        reports = [Counted(CLUSTER, ok=1), *(Counted(f"topic:t{n}", fail=1, row=1) for n in range(500))]
        worker.store.report(reports)
        assert client.zcard(BASE + "topics") == 200
        assert len(list(client.scan_iter(BASE + "topic:*:st"))) == 200

    def test_one_that_is_well_for_long_is_forgotten(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.says(ok=1, topic=(0, 1))
        passes(client, 660_000)
        worker.looks()
        assert TOPIC not in worker.views
        assert client.zcard(BASE + "topics") == 0


class TestForcing:
    def test_open_and_closed_and_automatic_again(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.store.force(CLUSTER, "open", 0, "me", "maintenance")
        assert worker.looks().shut
        assert worker.probes() == "denied", "a person's word is not looked behind"
        assert not worker.fails(10).changed or worker.looks().shut
        worker.store.force(CLUSTER, "closed", 0, "me", "it works, I know")
        assert not worker.looks().shut
        worker.store.force(CLUSTER, "", 0, "me", "done")
        assert [(before, after) for _, before, after in history(client)] == [
            ("closed", "forced open"),
            ("closed", "open"),  # underneath
            ("forced open", "forced closed"),
            ("forced closed", "auto"),
        ]

    def test_underneath_the_circuit_goes_on_counting(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.store.force(CLUSTER, "closed", 0, "me", "all through")
        worker.looks()
        view = worker.says(hard="down")
        assert (view.state, view.shut) == ("open", False)
        worker.store.force(CLUSTER, "", 0, "me", "done")
        assert worker.looks().shut

    def test_what_arrives_while_it_is_forced_closed_closes_it_underneath(self, client: redis.Redis) -> None:
        """Nobody probes meanwhile."""
        worker = opened(client, rules=SLOW)
        worker.store.force(CLUSTER, "closed", 0, "me", "it works")
        worker.looks()
        assert worker.says(ok=5).state == "open"
        passes(client, 600_000)
        assert worker.says(ok=5, fail=1).state == "open"
        assert worker.says(ok=5).state == "closed"

    def test_it_ends_by_itself_and_says_so(self, client: redis.Redis) -> None:
        worker = Worker(client)
        worker.store.force(CLUSTER, "open", 3_600_000, "me", "for an hour")
        passes(client, 3_540_000)
        assert worker.looks().shut
        passes(client, 120_000)
        view = worker.looks()
        assert (view.shut, view.changed) == (False, True)
        assert history(client)[-1] == (CLUSTER, "forced open", "auto")
