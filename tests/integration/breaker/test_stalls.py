"""Silence is an outage where nothing arrives, and a topic's own trouble where others' records do."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError

from integration.breaker.processes import DOWN, RECORDS_OWN, RULES, STALL_S, TIMED_OUT, TOPICS_OWN, Process
from kafka_delivery_worker.breaker.silence import Silences


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
