"""When silence about a topic is the topic's own trouble, rule by rule, with the time as an argument."""

from __future__ import annotations

import pytest

from kafka_delivery_worker.breaker.silence import ANSWER_S, OVERTAKEN_S, Silences

STALL_S, UNKNOWN_S = 5.0, 3.0
LASTS_S = STALL_S + OVERTAKEN_S
NOBODY: frozenset[str] = frozenset()


class Broker:
    """What answers for the cluster: whether it does, and what it was asked."""

    def __init__(self, answers: bool = True) -> None:
        self.answers = answers
        self.asked: list[tuple[str, float]] = []

    def __call__(self, topic: str, within_s: float) -> bool:
        self.asked.append((topic, within_s))
        return self.answers


def silent(*ticks: float, arrived: bool = False, answers: Broker | None = None) -> Silences:
    """Listen at these moments, while `orders` has records in flight and nothing is heard of it."""
    made = Silences(STALL_S, UNKNOWN_S)
    for now in ticks:
        made.listen(now, ["orders"], NOBODY, arrived, answers)
    return made


def test_the_times_in_seconds() -> None:
    assert (OVERTAKEN_S, ANSWER_S) == (2.0, 1.0)


def test_others_overtake_it_once_it_has_lasted_for_a_while() -> None:
    assert silent(100.0, 101.9, arrived=True).overtaken == set()
    assert silent(100.0, 102.0, arrived=True).overtaken == {"orders"}


def test_nothing_overtakes_it_while_nothing_arrives() -> None:
    assert silent(100.0, 150.0).overtaken == set()


def test_a_report_ends_it() -> None:
    made = silent(100.0, 102.0, arrived=True)
    made.listen(103.0, ["orders"], {"orders"}, True, None)
    assert made.overtaken == set()
    made.listen(104.9, ["orders"], NOBODY, True, None)
    assert made.overtaken == set(), "it begins anew"


def test_it_ends_with_the_last_record_in_flight() -> None:
    made = silent(100.0, 102.0, arrived=True)
    made.listen(103.0, [], NOBODY, True, None)
    made.listen(104.0, ["orders"], NOBODY, True, None)
    assert made.overtaken == set()


def test_one_that_lasts_goes_on_from_its_beginning() -> None:
    made = silent(100.0, 102.0, 104.0, 106.9, arrived=True)
    assert made.stalled(106.9) == {}
    assert made.stalled(107.0) == {"orders": "no report for 7 s, while others arrive"}


def test_it_is_trouble_when_it_has_been_overtaken_for_a_while() -> None:
    made = silent(100.0)
    made.listen(110.0, ["orders"], NOBODY, True, None)
    assert made.stalled(111.9) == {}
    assert made.stalled(112.0) != {}


def test_it_counts_from_when_it_was_overtaken_first() -> None:
    made = silent(100.0)
    for now in (110.0, 111.0, 112.0):
        made.listen(now, ["orders"], NOBODY, True, None)
    assert made.stalled(112.0) != {}


def test_silence_that_nothing_overtakes_is_the_clusters() -> None:
    assert silent(100.0, 150.0).stalled(200.0) == {}


def test_a_topic_that_may_be_missing_gets_more_time() -> None:
    made = Silences(STALL_S, STALL_S + 3)
    for now in (100.0, 102.0):
        made.listen(now, ["orders"], NOBODY, True, None)
    assert made.stalled(109.9) == {}
    assert made.stalled(110.0) == {"orders": "no report for 10 s, while others arrive"}


class TestAsking:
    def test_a_broker_is_asked_when_the_silence_has_lasted(self) -> None:
        broker = Broker()
        assert silent(100.0, 104.9, answers=broker).overtaken == set()
        assert broker.asked == []
        assert silent(100.0, 105.0, answers=broker).overtaken == {"orders"}
        assert broker.asked == [("orders", ANSWER_S)]

    def test_none_is_asked_when_something_arrived(self) -> None:
        broker = Broker()
        silent(100.0, 105.0, arrived=True, answers=broker)
        assert broker.asked == []

    def test_one_that_does_not_answer_shows_nothing(self) -> None:
        assert silent(100.0, 105.0, answers=Broker(False)).overtaken == set()

    def test_it_is_asked_once_in_a_while(self) -> None:
        broker = Broker(False)
        silent(100.0, 105.0, 109.9, answers=broker)
        assert len(broker.asked) == 1
        silent(100.0, 105.0, 110.0, answers=broker)
        assert len(broker.asked) == 3

    def test_it_is_not_asked_about_a_topic_that_is_known_to_be_overtaken(self) -> None:
        broker = Broker()
        silent(100.0, 105.0, 110.0, answers=broker)
        assert len(broker.asked) == 1

    @pytest.mark.parametrize("now", [0.0, 0.5])
    def test_it_is_asked_at_the_very_beginning_of_the_clock(self, now: float) -> None:
        broker = Broker()
        silent(now - STALL_S, now, answers=broker)
        assert len(broker.asked) == 1
