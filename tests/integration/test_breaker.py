"""One process's part of the breaker: what counts for whom, when it looks, and what it does when Redis or the fleet is
away. The clock is moved, not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from confluent_kafka import KafkaError
from redis.exceptions import ConnectionError as RedisConnectionError

from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery_worker.breaker import MAX_TOPICS, REDIS_TIMEOUT_S, Breaker, Probe
from kafka_delivery_worker.breaker.outcomes import LOCAL
from kafka_delivery_worker.breaker.rules import Rules
from kafka_delivery_worker.breaker.silence import Silences
from kafka_delivery_worker.breaker.store import CircuitStore, View
from kafka_delivery_worker.engine import Engine
from kafka_delivery_worker.producer import Report
from servers import RealRedis, valkey_binary, wait_until

RULES = Rules.of(Settings())
STALL_S = 10.0
DOWN = KafkaError._TRANSPORT
TIMED_OUT = KafkaError._MSG_TIMED_OUT
TOPICS_OWN = KafkaError.NOT_ENOUGH_REPLICAS
RECORDS_OWN = KafkaError.MSG_SIZE_TOO_LARGE
FORBIDDEN = KafkaError.TOPIC_AUTHORIZATION_FAILED


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Direct:
    """What `CircuitStore` needs of a `RedisClient`; away when told."""

    prefix = ""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.away = False
        self.looks = 0

    @property
    def client(self) -> redis.Redis:
        self.looks += 1
        if self.away:
            raise RedisConnectionError("away")
        return self._client


class Process:
    """A breaker without its thread, and what it needs."""

    def __init__(self, client: redis.Redis, name: str = "one", *, claims: bool = True) -> None:
        self.clock = Clock()
        self.redis = Direct(client)
        store = CircuitStore(self.redis, "default", RULES, name)  # type: ignore[arg-type]
        self.breaker = Breaker(store, RULES, STALL_S, clock=self.clock)
        self.woken = 0
        if claims:
            self.breaker.claim_by(self._wake)
        self.breaker.tick()

    def _wake(self) -> None:
        self.woken += 1

    def fails(self, code: int = DOWN, times: int = 1, topic: str = "orders") -> None:
        for _ in range(times):
            admission = self.breaker.admission(topic)
            self.breaker.failed(0 if admission is None else admission, topic, code)
            self.breaker.tick()

    def succeeds(self, topic: str = "orders") -> None:
        admission = self.breaker.admission(topic)
        assert admission is not None
        self.breaker.delivered(admission, topic)
        self.breaker.tick()

    def passes(self, seconds: float) -> None:
        """So much time goes by, for this process and for the fleet."""
        from integration.test_circuits import passes

        passes(self.redis._client, int(seconds) * 1000)
        self.clock.now += int(seconds)
        self.breaker.tick()

    def recovers(self) -> None:
        """As many probes arrive as close the circuit."""
        for _ in range(RULES.successes):
            probe = self.breaker.take_probe()
            assert probe is not None
            self.breaker.delivered(probe, "orders")
            self.breaker.tick()

    def asked(self, *, answer: bool) -> list[tuple[float, str]]:
        """When a broker is asked from now on, and of which topic; it answers, or it does not."""
        asked: list[tuple[float, str]] = []

        def answers(topic: str, timeout_s: float) -> bool:
            asked.append((self.clock.now, topic))
            return answer

        self.breaker.answers = answers
        return asked

    def state(self, scope: str = "cluster") -> str:
        return self.breaker._views.get(scope, View(scope)).state


@pytest.fixture
def one(redis_client: redis.Redis) -> Process:
    return Process(redis_client)


@pytest.fixture
def two(one: Process, redis_client: redis.Redis) -> Process:
    return Process(redis_client, "two")


class TestWhatCounts:
    """The table of codes decides."""

    def test_the_clusters_failures_open_the_clusters_circuit(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        assert one.state() == "open"
        assert one.breaker.shut
        assert one.breaker.admission("orders") is None
        assert one.breaker.retry_after("orders") > 4

    @pytest.mark.parametrize(
        "code", [RECORDS_OWN, FORBIDDEN, KafkaError._PURGE_INFLIGHT, KafkaError.UNKNOWN_TOPIC_OR_PART]
    )
    def test_a_bad_record_and_a_refused_topic_count_for_neither(self, one: Process, code: int) -> None:
        one.fails(code, 20)
        assert not one.breaker.shut
        assert one.breaker.shut_topics == frozenset()

    def test_a_brokers_verdict_about_a_topic_opens_that_topic_only(self, one: Process) -> None:
        one.fails(TOPICS_OWN, RULES.threshold)
        assert one.breaker.shut_topics == {"orders"}
        assert not one.breaker.shut
        assert one.breaker.admission("orders") is None
        assert one.breaker.admission("others") is not None
        assert one.breaker.is_shut("orders")

    def test_records_of_one_topic_that_time_out_while_others_arrive_open_that_topic(self, one: Process) -> None:
        for _ in range(RULES.threshold):
            one.succeeds("others")
            one.fails(TIMED_OUT)
        assert one.breaker.shut_topics == {"orders"}
        assert not one.breaker.shut

    def test_where_nothing_arrives_it_is_the_clusters(self, one: Process) -> None:
        one.fails(TIMED_OUT, RULES.threshold)
        assert one.breaker.shut
        assert one.breaker.shut_topics == frozenset()

    def test_what_was_sent_before_says_nothing_about_after(self, one: Process) -> None:
        old = one.breaker.admission("orders")
        assert old is not None
        one.fails(DOWN, RULES.threshold)
        trips = one.breaker._views["cluster"].trips
        for _ in range(20):
            one.breaker.failed(old, "orders", TIMED_OUT)
            one.breaker.tick()
        assert one.breaker._views["cluster"].trips == trips

    def test_what_arrives_late_makes_it_worth_a_look(self, one: Process) -> None:
        old = one.breaker.admission("orders")
        assert old is not None
        one.fails(DOWN, RULES.threshold)
        assert one.breaker.take_probe() is None
        one.breaker.delivered(old, "orders")
        one.breaker.tick()
        one.breaker.tick()
        assert one.breaker.take_probe() is not None


@pytest.mark.parametrize(("codes", "row"), [([DOWN, None], 0), ([None, DOWN], 1), ([DOWN, None, DOWN, None], 0)])
def test_reports_of_one_poll_count_in_their_order(one: Process, codes: list[int | None], row: int) -> None:
    """Whether the last of them failed begins a row of failures."""
    worker = object.__new__(Engine)
    worker.breaker = one.breaker
    admission = one.breaker.admission("orders")
    assert admission is not None
    worker.tell_breaker(admission, "orders", [Report(None if code is None else KafkaError(code)) for code in codes])
    counted = one.breaker._cluster
    assert (counted.ok, counted.fail, counted.row) == (codes.count(None), codes.count(DOWN), row)


class TestStalls:
    def test_records_in_flight_without_any_report_are_an_outage(self, one: Process) -> None:
        one.breaker.in_flight = lambda: {"orders": 3}
        one.passes(1)
        one.passes(STALL_S - 1)
        assert not one.breaker.shut
        one.passes(1)
        assert one.breaker.shut
        assert one.breaker._views["cluster"].why == "no report for 10 s"

    def test_any_report_is_a_sign_of_life(self, one: Process) -> None:
        one.breaker.in_flight = lambda: {"orders": 3}
        for _ in range(5):
            one.passes(STALL_S - 1)
            one.succeeds()
        assert not one.breaker.shut

    def test_nothing_in_flight_is_no_stall_however_long(self, one: Process) -> None:
        one.breaker.broker_error(KafkaError._ALL_BROKERS_DOWN)
        one.passes(600)
        assert not one.breaker.shut

    def test_what_is_in_flight_for_a_topic_in_trouble_says_nothing_about_the_cluster(self, one: Process) -> None:
        one.breaker.in_flight = lambda: {"orders": 3}
        one.succeeds("payments")
        one.fails(TOPICS_OWN, RULES.threshold)
        assert one.state("topic:orders") == "open"
        for _ in range(5):
            one.passes(STALL_S)
        assert not one.breaker.shut
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        one.passes(1)
        one.passes(STALL_S)
        assert one.breaker.shut

    def test_a_topic_without_reports_while_others_arrive_is_in_trouble(self, one: Process) -> None:
        """And soon: librdkafka tells of it after two minutes."""
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        for _ in range(int(STALL_S) + 2):
            one.succeeds("payments")
            assert not one.breaker.shut_topics
            one.passes(1)
        assert one.breaker.shut_topics == {"orders"}
        assert one.breaker._views["topic:orders"].why == "no report for 12 s, while others arrive"
        assert not one.breaker.shut
        assert one.breaker.stuck == 3

    def test_a_topic_that_fills_the_room_is_found_out_though_nothing_arrives_any_more(self, one: Process) -> None:
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        one.passes(1)
        for _ in range(3):
            one.passes(1)
            one.succeeds("payments")
        one.breaker.in_flight = lambda: {"orders": 1_000}
        one.passes(STALL_S - 1)
        assert one.breaker.shut_topics == {"orders"}
        assert not one.breaker.shut, "it would be the cluster's, but for those that overtook it"
        one.passes(STALL_S + 1)
        assert not one.breaker.shut

    def test_a_topic_that_fills_the_room_at_once_is_found_out_by_asking(self, one: Process) -> None:
        """Nothing arrives, of anybody; but a broker says what it knows of the topic."""
        asked = one.asked(answer=True)
        one.breaker.in_flight = lambda: {"orders": 1_000}
        began = one.clock.now
        for _ in range(int(STALL_S) + 3):
            assert not one.breaker.shut_topics
            one.passes(1)
        assert one.breaker.shut_topics == {"orders"}
        assert asked == [(began + 1 + STALL_S, "orders")]
        assert not one.breaker.shut

    def test_a_cluster_that_does_not_answer_is_asked_once(self, one: Process) -> None:
        asked = one.asked(answer=False)
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        for _ in range(30):
            one.passes(1)
        assert one.breaker.shut
        assert not one.breaker.shut_topics
        assert [topic for _, topic in asked] == ["orders"]

    def test_a_topic_whose_last_report_was_a_little_earlier_when_an_outage_began_is_not(self, one: Process) -> None:
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        one.succeeds("orders")
        one.passes(1)
        one.succeeds("payments")
        one.passes(STALL_S + 1)
        assert one.breaker.shut
        assert not one.breaker.shut_topics

    def test_a_topic_that_is_a_little_slower_to_go_on_after_an_outage_is_not(self, one: Process) -> None:
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        one.passes(1)
        one.passes(STALL_S)
        assert one.breaker.shut
        one.breaker.delivered(1, "payments")
        one.passes(1)
        one.breaker.delivered(1, "orders")
        for _ in range(5):
            one.passes(1)
            one.breaker.delivered(1, "payments")
        assert not one.breaker.shut_topics

    def test_a_topic_can_be_in_trouble_while_the_circuit_of_the_cluster_is_open(self, one: Process) -> None:
        """It is what opened it: its records took all the room."""
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        one.passes(1)
        one.passes(STALL_S)
        assert one.breaker.shut
        one.breaker.in_flight = lambda: {"orders": 3}
        one.breaker.delivered(1, "payments")  # late
        one.passes(1)
        mark = one.breaker.take_probe()
        assert mark is not None
        one.breaker.admission("orders", mark.mark)
        one.passes(2)
        assert one.breaker.shut_topics == {"orders"}

        # Its record is no probe of the cluster any more; the next one is.
        assert one.state() == "half-open"
        one.passes(1)
        again = one.breaker.take_probe()
        assert again is not None
        assert again.token != mark.token

    def test_when_its_records_time_out_that_is_still_the_topics_trouble(self, one: Process) -> None:
        """With one topic both circuits would be open, and no record could be a probe of either."""
        one.asked(answer=True)
        one.breaker.in_flight = lambda: {"orders": 1_000}
        admission = one.breaker.admission("orders")
        assert admission is not None
        for _ in range(int(STALL_S) + 3):
            one.passes(1)
        assert one.breaker.shut_topics == {"orders"}
        for _ in range(2 * RULES.threshold):
            for _ in range(RULES.min_calls):
                one.breaker.failed(admission, "orders", TIMED_OUT)
            one.breaker.tick()
        assert not one.breaker.shut
        one.fails(DOWN, RULES.threshold)
        assert one.breaker.shut, "what hides nothing counts"

    def test_a_cluster_whose_only_records_are_of_a_topic_in_trouble_is_probed_with_these(self, one: Process) -> None:
        """The topic is not probed meanwhile, and others may never come."""
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        for _ in range(int(STALL_S) + 2):
            one.succeeds("payments")
            one.passes(1)
        assert one.breaker.shut_topics == {"orders"}
        one.fails(DOWN, RULES.threshold, "payments")
        one.breaker.in_flight = dict
        assert one.breaker.shut

        def probed(seconds: int, arrives: bool) -> int:
            sent = 0
            for _ in range(seconds):
                one.passes(1)
                probe = one.breaker.take_probe()
                if probe is None:
                    continue
                if one.breaker.admission("orders", probe.mark) is None:
                    one.breaker.not_sent(probe.mark)
                    continue
                sent += 1
                if arrives:
                    one.breaker.delivered(probe, "orders")
            return sent

        assert 1 < probed(30, arrives=False) <= 30
        assert one.breaker.shut
        probed(30, arrives=True)
        assert not one.breaker.shut
        assert not one.breaker.shut_topics

    def test_what_was_silent_before_says_nothing_once_the_circuit_is_closed(self, one: Process, two: Process) -> None:
        """It may be one partition's, which librdkafka holds here for two minutes while probes of others arrive."""
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        for _ in range(int(STALL_S) + 2):
            one.succeeds("payments")
            one.passes(1)
        assert one.breaker.shut_topics == {"orders"}
        two.passes(6)
        two.recovers()
        assert two.state("topic:orders") == "closed"
        for _ in range(int(STALL_S)):
            one.succeeds("payments")
            assert not one.breaker.shut_topics
            one.passes(1)

    @pytest.mark.parametrize("looked_at", [False, True])
    def test_once_its_records_arrive_the_silence_is_over(self, one: Process, looked_at: bool) -> None:
        """Also where nothing is left that could be a probe, and before the first one and after it has failed."""
        one.breaker.in_flight = lambda: {"orders": 1, "payments": 1}
        admission = one.breaker.admission("orders")
        assert admission is not None
        for _ in range(int(STALL_S) + 2):
            one.succeeds("payments")
            one.passes(1)
        assert one.state("topic:orders") == "open"
        if looked_at:
            one.passes(6)
            probe = one.breaker.take_probe()
            assert probe is not None
            one.breaker.begun(probe.mark, "orders")
            for _ in range(int(STALL_S) + 1):
                one.passes(1)
                one.succeeds("payments")
            assert (one.state("topic:orders"), one.breaker.probed["fail"]) == ("open", 1)
        one.breaker.delivered(admission, "orders")
        one.breaker.tick()
        assert one.state("topic:orders") == "closed"

    def test_a_topic_that_may_be_missing_has_the_time_until_that_is_known(self, one: Process) -> None:
        """Else its records waited for its circuit, instead of becoming dead letters at once."""
        one.breaker._silences = Silences(STALL_S, STALL_S + 5)
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        for _ in range(int(STALL_S) + 7):
            one.succeeds("payments")
            assert not one.breaker.shut_topics
            one.passes(1)
        assert one.breaker.shut_topics == {"orders"}

    def test_a_report_of_any_kind_ends_a_silence(self, one: Process) -> None:
        one.breaker.in_flight = lambda: {"orders": 3, "payments": 1}
        for second in range(30):
            one.succeeds("payments")
            if second % 9 == 0:
                one.fails(RECORDS_OWN)
            one.passes(1)
        assert not one.breaker.shut_topics

    def test_all_brokers_down_is_noticed_sooner(self, one: Process) -> None:
        one.breaker.in_flight = lambda: {"orders": 1}
        one.passes(1)
        one.breaker.broker_error(KafkaError._ALL_BROKERS_DOWN)
        one.passes(4)
        assert not one.breaker.shut
        one.passes(1)
        assert one.breaker.shut

    def test_a_success_since_then_takes_it_back(self, one: Process) -> None:
        one.breaker.in_flight = lambda: {"orders": 1}
        one.breaker.broker_error(KafkaError._ALL_BROKERS_DOWN)
        one.succeeds()
        for _ in range(4):
            one.passes(STALL_S - 1)
            one.succeeds()
        assert not one.breaker.shut


class TestProbes:
    def test_one_is_granted_when_it_is_due_also_without_traffic(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        woken = one.woken
        assert one.breaker.take_probe() is None
        one.passes(6)
        assert one.woken > woken
        probe = one.breaker.take_probe()
        assert probe is not None
        assert one.breaker.take_probe() is None
        assert one.breaker.admission("orders", probe.mark) == probe

    def test_enough_that_arrive_open_the_way_again(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        one.recovers()
        assert not one.breaker.shut
        assert one.state() == "closed"

    def test_each_change_is_logged_once_by_the_process_that_made_it(
        self, one: Process, redis_client: redis.Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        one.fails(DOWN, RULES.threshold)
        two = Process(redis_client, "two")
        one.passes(6)
        one.recovers()
        two.breaker.tick()
        changes = [record.message.split()[0] for record in caplog.records if record.message.startswith("circuit.")]
        assert changes == ["circuit.open", "circuit.half-open", "circuit.closed"]

    @pytest.mark.parametrize(
        ("code", "state"),
        [(DOWN, "open"), (TIMED_OUT, "open"), (RECORDS_OWN, "half-open"), (KafkaError._PURGE_QUEUE, "half-open")],
    )
    def test_one_that_fails_says_something_or_nothing(self, one: Process, code: int, state: str) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        probe = one.breaker.take_probe()
        assert probe is not None
        one.breaker.failed(probe, "orders", code)
        one.breaker.tick()
        assert one.state() == state

    def test_one_without_a_report_has_failed_and_is_evidence_when_it_arrives(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        probe = one.breaker.take_probe()
        assert probe is not None
        assert one.breaker.admission("orders", probe.mark) == probe
        one.passes(STALL_S)
        one.breaker.tick()
        assert (one.state(), one.breaker._views["cluster"].trips) == ("open", 2)
        one.breaker.delivered(probe, "orders")
        one.clock.now += 1
        one.breaker.tick()
        assert one.breaker.take_probe() is not None

    def test_one_without_a_record_is_asked_for_again(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        probe = one.breaker.take_probe()
        assert probe is not None
        one.breaker.unused(probe)
        one.breaker.tick()
        assert one.breaker.take_probe() is None, "not at once: it would be asked for all the time"
        one.passes(2)
        assert one.breaker.take_probe() not in (None, probe)

    def test_who_claims_nothing_asks_with_the_record_at_hand(self, redis_client: redis.Redis) -> None:
        process = Process(redis_client, claims=False)
        process.fails(DOWN, RULES.threshold)
        assert process.breaker.ask("orders") is None
        process.passes(6)
        probe = process.breaker.ask("orders")
        assert isinstance(probe, Probe)
        assert process.breaker.ask("orders") is None
        process.breaker.delivered(probe, "orders")
        process.clock.now += 1
        process.breaker.tick()
        assert isinstance(process.breaker.ask("orders"), Probe)


def _ended(process: Process) -> None:
    """Its thread does end; the breaker waits a second for it."""
    assert process.breaker._thread is not None
    process.breaker._thread.join(10)
    assert not process.breaker._thread.is_alive()


def test_a_worker_that_stops_leaves_its_probe_to_the_others(one: Process, two: Process) -> None:
    """Else nothing shows that the cluster is back until the probe's lease is over."""
    for _ in range(RULES.threshold):
        one.fails()
        two.fails()
    one.breaker.tick()
    assert (one.state(), two.state()) == ("open", "open")
    one.passes(RULES.max_open_ms / 1000)
    assert one.breaker.take_probe() is not None
    two.passes(0)
    assert two.breaker.take_probe() is None
    one.breaker.start()
    one.breaker.stop()
    _ended(one)
    two.passes(2)  # it asks again a second after it was refused one
    assert two.breaker.take_probe() is not None


def test_a_probe_that_a_parent_claimed_is_settled_by_the_child_that_sends_it(redis_client: redis.Redis) -> None:
    """Prefork: one process claims, others send."""
    parent, child = Process(redis_client), Process(redis_client, claims=False)
    parent.fails(DOWN, RULES.threshold)
    for _ in range(RULES.successes):
        parent.passes(6)
        probe = parent.breaker.take_probe()
        assert probe is not None
        admission = child.breaker.admission("orders", probe.mark)
        assert admission == probe
        child.breaker.delivered(admission, "orders")
        child.breaker.tick()
    assert child.state() == "closed"
    parent.breaker.tick()
    assert not parent.breaker.shut


class TestProbesThatAreNone:
    """What was claimed as a probe and is not sent says nothing."""

    @pytest.mark.parametrize("mark", ["", "nonsense", "a|b|c", 7, ["x"]])
    def test_a_strangers_header_harms_nobody(self, one: Process, mark: Any) -> None:
        """Celery's transport and RabbitMQ bring what somebody wrote; only a claim takes it away."""
        admission = one.breaker.admission("orders", mark)
        assert admission is not None
        one.breaker.begun(mark)
        one.breaker.delivered(admission, "orders")
        one.breaker.not_sent(mark)
        one.breaker.tick()
        assert one.state() == "closed"
        assert not one.breaker.shut

    def test_it_frees_the_place_at_once(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        for _ in range(3 * RULES.max_lost):
            probe = one.breaker.take_probe()
            assert probe is not None
            one.breaker.not_sent(probe.mark)
            one.breaker.tick()
        assert (one.state(), one.breaker._views["cluster"].trips) == ("half-open", 1)

    def test_it_is_no_failed_round_if_nobody_says_so(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.passes(6)
        assert one.breaker.take_probe() is not None
        one.passes(STALL_S)
        one.breaker.tick()
        assert (one.state(), one.breaker._views["cluster"].trips) == ("half-open", 1)

    def test_a_record_of_a_topic_in_trouble_is_no_probe_of_the_cluster(self, one: Process) -> None:
        one.fails(TOPICS_OWN, RULES.threshold)
        one.fails(DOWN, RULES.threshold, topic="others")
        one.passes(6)
        probe = one.breaker.take_probe()
        assert probe is not None
        assert one.breaker.admission("orders", probe.mark) is None
        assert one.breaker.admission("orders", probe.mark, released=True) == probe, "there is no other"
        assert one.breaker.admission("others", probe.mark) == probe

    def test_an_answer_that_was_lost_is_asked_for_again_with_the_same_token(
        self, one: Process, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one.fails(DOWN, RULES.threshold)
        admit = one.breaker._store.admit

        def lost(*arguments: Any) -> Any:
            admit(*arguments)
            raise RedisConnectionError("the answer was lost")

        with monkeypatch.context() as patch:
            patch.setattr(one.breaker._store, "admit", lost)
            one.passes(6)
            assert one.breaker.take_probe() is None
        one.breaker.tick()
        assert one.breaker.take_probe() is not None

    def test_what_became_of_one_is_said_again_if_redis_was_away(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        for _ in range(RULES.successes):
            one.passes(6)
            probe = one.breaker.take_probe()
            assert probe is not None
            one.breaker.delivered(probe, "orders")
            one.redis.away = True
            one.breaker.tick()
            one.redis.away = False
            one.breaker.tick()
        assert one.state() == "closed"

    @pytest.mark.parametrize(
        "code", [KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, FORBIDDEN, RECORDS_OWN]
    )
    def test_a_verdict_of_another_kind_ends_a_topics_trouble(self, one: Process, code: int) -> None:
        """There is nothing to wait for any more: its records become dead letters."""
        one.fails(TOPICS_OWN, RULES.threshold)
        for _ in range(RULES.successes):
            one.passes(6)
            probe = one.breaker.take_probe()
            assert probe is not None
            admission = one.breaker.admission("orders", probe.mark)
            assert admission == probe
            one.breaker.failed(admission, "orders", code)
            one.breaker.tick()
        assert one.breaker.shut_topics == frozenset()


class TestAlone:
    """Where only this process fails, the fleet goes on."""

    def test_it_pauses_itself_and_leaves_the_queue_to_the_others(self, one: Process, two: Process) -> None:
        two.succeeds()
        one.fails(DOWN, RULES.threshold)
        assert one.breaker.shut
        assert one.state() == "closed"
        assert not two.breaker.shut

    def test_it_looks_again_by_itself(self, one: Process, two: Process) -> None:
        two.succeeds()
        one.fails(DOWN, RULES.threshold)
        for _ in range(RULES.successes):
            one.clock.now += 6
            two.succeeds()
            one.breaker.tick()
            probe = one.breaker.take_probe()
            assert probe is not None
            assert probe.scope == LOCAL
            one.breaker.delivered(probe, "orders")
            one.breaker.tick()
        assert not one.breaker.shut

    def test_what_is_still_in_flight_when_the_fleet_goes_on_pauses_nobody(self, redis_client: redis.Redis) -> None:
        """The records of failed probes, which wait in librdkafka for the cluster that has just come back."""
        one, two = Process(redis_client, "one", claims=False), Process(redis_client, "two")
        one.breaker.in_flight = lambda: {"orders": 2}
        one.fails(DOWN, RULES.threshold)
        two.fails(DOWN)
        one.passes(STALL_S + 1)
        for _ in range(RULES.successes):
            two.passes(1)
            probe = two.breaker.take_probe()
            assert probe is not None
            two.breaker.delivered(probe, "orders")
            two.breaker.tick()
            one.clock.now += STALL_S
        one.breaker.tick()
        assert one.state() == "closed"
        assert not one.breaker.shut

    def test_who_claims_nothing_pauses_and_looks_again_too(self, redis_client: redis.Redis) -> None:
        """Children of prefork, and workers of another broker."""
        one, two = Process(redis_client, "one", claims=False), Process(redis_client, "two")
        two.succeeds()
        one.fails(DOWN, RULES.threshold)
        assert one.breaker.shut
        assert one.breaker.ask("orders") is None
        for _ in range(RULES.successes):
            one.clock.now += 6
            two.succeeds()
            one.breaker.tick()
            probe = one.breaker.ask("orders")
            assert isinstance(probe, Probe)
            assert one.breaker.ask("orders") is None, "one at a time"
            one.breaker.delivered(probe, "orders")
            one.breaker.tick()
        assert not one.breaker.shut

    def test_who_is_told_to_go_on_does(self, one: Process, two: Process) -> None:
        one.breaker._store.force("cluster", "closed", 0, "me", "all through")
        for _ in range(3):
            one.fails(DOWN, RULES.threshold)
            two.fails(DOWN, RULES.threshold)
        assert not one.breaker.shut
        assert not two.breaker.shut

    def test_when_a_second_one_fails_it_is_the_fleets(self, one: Process, two: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        two.fails(DOWN)
        one.breaker.tick()
        assert one.state() == two.state() == "open"
        assert one.breaker.local.state == "closed"

    def test_the_only_worker_of_a_fleet_is_the_fleet(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        assert one.state() == "open"
        assert one.breaker.local.state == "closed"


class TestNewcomers:
    def test_one_that_is_born_in_an_outage_sends_nothing_before_it_knows(self, one: Process, two: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        two.fails(DOWN, 2)
        assert Process(one.redis._client, "new").breaker.admission("orders") is None

    def test_one_that_finds_no_redis_starts_all_the_same(self, tmp_path: Path) -> None:
        settings = Settings(redis_url="redis://127.0.0.1:1/0")
        store = CircuitStore(RedisClient(settings, REDIS_TIMEOUT_S), "default", RULES, "new")
        breaker = Breaker(store, RULES, STALL_S)
        breaker.tick()
        assert breaker.admission("orders") is not None


class TestRedisAway:
    def test_what_was_open_stays_so_until_its_time_and_then_one_record_shows(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.redis.away = True
        one.breaker.tick()
        assert one.breaker.shut
        one.clock.now += 4
        one.breaker.tick()
        assert one.breaker.take_probe() is None
        one.clock.now += 2
        one.breaker.tick()
        probe = one.breaker.take_probe()
        assert probe is not None
        assert probe.scope == LOCAL
        one.breaker.failed(probe, "orders", DOWN)
        one.breaker.tick()
        assert one.breaker.shut
        assert one.breaker.take_probe() is None

    def test_what_was_closed_goes_on_and_is_guarded_by_the_same_rules(self, one: Process) -> None:
        one.redis.away = True
        one.succeeds()
        one.fails(DOWN, RULES.threshold - 1)
        assert not one.breaker.shut
        one.fails(DOWN)
        assert one.breaker.shut

    def test_it_is_asked_once_a_look_and_nothing_waits_for_it(self, one: Process) -> None:
        one.redis.away = True
        looks = one.redis.looks
        for _ in range(1_000):
            admission = one.breaker.admission("orders")
            assert admission is not None
            one.breaker.delivered(admission, "orders")
        one.breaker.tick()
        assert one.redis.looks == looks + 1

    def test_when_it_is_back_what_it_knows_holds(self, one: Process, two: Process) -> None:
        one.redis.away = True
        one.fails(DOWN, RULES.threshold)
        assert one.breaker.shut
        two.succeeds()
        one.redis.away = False
        one.breaker.tick()
        assert not one.breaker.shut
        one.redis.away = True
        one.breaker.tick()
        two.passes(6)  # the other is taken for gone
        two.fails(DOWN, RULES.threshold)
        one.redis.away = False
        one.breaker.tick()
        assert one.breaker.shut

    def test_what_it_has_lost_is_restored_before_anything_is_sent(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        one.redis._client.flushall()
        assert one.breaker.admission("orders") is None
        one.breaker.tick()
        assert one.breaker.shut
        assert one.redis._client.hget("kafka-delivery:cb:1:{default}:cluster:st", "state") == b"open"

    @pytest.fixture
    def hung(self, tmp_path: Path) -> Iterator[RealRedis]:
        with RealRedis(tmp_path, binary=valkey_binary(), options={"appendonly": "no"}) as server:
            yield server
            server.resume()

    def test_one_that_hangs_holds_up_nobody_for_long(self, hung: RealRedis) -> None:
        """Its own client gives up after a tenth of a second, and does not try again."""
        store = CircuitStore(RedisClient(Settings(redis_url=hung.url), REDIS_TIMEOUT_S), "default", RULES, "one")
        breaker = Breaker(store, RULES, STALL_S)

        def attached() -> bool:
            breaker.tick()
            return breaker._attached

        wait_until(attached, 10, "an answer within a tenth of a second")
        hung.pause()
        breaker.tick()
        assert not breaker._attached
        assert breaker.admission("orders") is not None


class TestManyTopics:
    def test_in_an_outage_none_of_them_is_counted_by_itself(self, one: Process) -> None:
        for n in range(500):
            admission = one.breaker.admission(f"topic{n}")
            one.breaker.failed(0 if admission is None else admission, f"topic{n}", TIMED_OUT)
        one.breaker.tick()
        assert one.breaker._topics == {}

    def test_no_more_than_can_be_looked_after(self, one: Process) -> None:
        one.succeeds()
        for n in range(500):
            admission = one.breaker.admission(f"topic{n}")
            assert admission is not None
            one.breaker.failed(admission, f"topic{n}", TOPICS_OWN)
        one.breaker.tick()
        assert len(one.breaker._topics) == MAX_TOPICS
        assert len(one.breaker._views) <= MAX_TOPICS + 1


class TestCost:
    def test_records_cost_no_calls(self, one: Process) -> None:
        """At a thousand a second, reported four times a second."""
        calls = int(one.redis._client.info("commandstats")["cmdstat_evalsha"]["calls"])
        for _ in range(400):
            for _ in range(250):
                admission = one.breaker.admission("orders")
                assert admission is not None
                one.breaker.delivered(admission, "orders")
            one.breaker.tick()
        made = int(one.redis._client.info("commandstats")["cmdstat_evalsha"]["calls"]) - calls
        assert made / 100_000 < 0.02
        assert made == 400

    def test_while_it_is_open_and_not_due_nothing_is_asked_for_records(self, one: Process) -> None:
        one.fails(DOWN, RULES.threshold)
        looks = one.redis.looks
        for _ in range(1_000):
            assert one.breaker.admission("orders") is None
        assert one.redis.looks == looks


def test_the_thread_reports_and_ends(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(redis_client)
    told: list[Any] = []
    monkeypatch.setattr(process.breaker, "tick", lambda: told.append(1))
    process.breaker.start()
    process.breaker.failed(1, "orders", DOWN)
    process.breaker.stop()
    _ended(process)
    assert len(told) >= 1
    assert redis_client.zscore("kafka-delivery:cb:1:{default}:workers", "one") is None
