"""What becomes of a process's probes, by a clock of the test's. Their use: tests/integration/breaker."""

from __future__ import annotations

import pytest

from kafka_delivery.names import CLUSTER_SCOPE
from kafka_delivery_worker.breaker.outcomes import Probe
from kafka_delivery_worker.breaker.probes import HELD_BACK_S, Probes

TAKES_S = 10.0
NOTHING: frozenset[str] = frozenset()
PROBE = Probe(CLUSTER_SCOPE, "one")
OF_TOPIC = Probe("topic:orders", "one")


class Watched(Probes):
    """Probes, the time they go by, and how often they said that one is concluded."""

    def __init__(self) -> None:
        self.now = 100.0
        self.said = 0
        super().__init__(TAKES_S, lambda: self.now, lambda: self.now, self._say)

    def _say(self) -> None:
        self.said += 1

    def became(self) -> list[tuple[Probe, str]]:
        return [(probe, outcome) for probe, outcome, _ in self.take_settled()]


@pytest.fixture
def probes() -> Watched:
    return Watched()


def test_each_is_concluded_once(probes: Watched) -> None:
    probes.grant(PROBE, TAKES_S)
    probes.begin(PROBE, "orders")
    assert probes.report(PROBE, "ok")
    assert not probes.report(PROBE, "fail"), "it is evidence as any other then"
    probes.now += TAKES_S
    probes.expire(NOTHING)
    assert (probes.became(), probes.said, len(probes)) == ([(PROBE, "ok")], 1, 0)
    assert probes.outcomes == {"ok": 1}


def test_one_without_a_report_has_failed_if_it_was_sent(probes: Watched) -> None:
    probes.granted = probes.grant(PROBE, TAKES_S)
    probes.grant(OF_TOPIC, TAKES_S)
    probes.begin(OF_TOPIC, "orders")
    probes.now += TAKES_S - 0.1
    probes.expire(NOTHING)
    assert len(probes) == 2
    probes.now += 0.1
    probes.expire(NOTHING)
    assert probes.became() == [(PROBE, "ignore"), (OF_TOPIC, "fail")]
    assert probes.take() is None, "nobody claims a record for one that is over"


def test_one_of_the_cluster_says_nothing_where_its_topic_is_in_trouble(probes: Watched) -> None:
    for probe in PROBE, OF_TOPIC:
        probes.begin(probe, "orders")
    probes.begin(PROBE, "")  # by a child that does not know where it goes
    probes.now += HELD_BACK_S - 0.1
    probes.expire({"orders"})
    assert probes.became() == [], "it may arrive yet"
    probes.now += 0.1
    probes.expire({"orders"})
    assert probes.became() == [(PROBE, "ignore")]


@pytest.mark.parametrize("end", ["report", "drop"])
def test_what_it_was_sent_for_is_forgotten_with_it(probes: Watched, end: str) -> None:
    probes.begin(PROBE, "orders")
    if end == "report":
        assert probes.report(PROBE, "ok")
    else:
        probes.drop(PROBE)
    probes.grant(PROBE, TAKES_S)
    probes.now += HELD_BACK_S
    probes.expire({"orders"})
    assert len(probes) == 1


def test_one_that_is_not_needed_is_not_waited_for(probes: Watched) -> None:
    probes.granted = probes.grant(PROBE, TAKES_S)
    probes.withdraw(PROBE)
    assert (len(probes), probes.take(), probes.became()) == (0, None, [])


def test_topics_in_trouble_are_tried_where_nothing_else_comes(probes: Watched) -> None:
    assert not probes.tries_all()
    probes.now += HELD_BACK_S
    assert probes.tries_all()
    probes.found()
    assert not probes.tries_all()


def test_an_answer_that_was_lost_is_asked_for_again(probes: Watched) -> None:
    lost = probes.wanted(CLUSTER_SCOPE)
    assert probes.wanted(CLUSTER_SCOPE) == lost
    probes.answered(lost)
    second = probes.wanted(CLUSTER_SCOPE)
    assert second != lost
    probes.drop(second)  # a child of this process sent it
    assert probes.wanted(CLUSTER_SCOPE) != second


def test_what_could_not_be_settled_stays_in_its_order(probes: Watched) -> None:
    probes.drop(PROBE)
    probes.drop(OF_TOPIC)
    taken = probes.take_settled()
    probes.drop(Probe(CLUSTER_SCOPE, "later"))
    probes.keep(taken)
    assert [probe for probe, _ in probes.became()] == [PROBE, OF_TOPIC, Probe(CLUSTER_SCOPE, "later")]


def test_none_is_asked_for_in_a_pause(probes: Watched) -> None:
    probes.pause(CLUSTER_SCOPE, 2)
    assert (probes.may_seek(CLUSTER_SCOPE), probes.may_seek("topic:orders")) == (False, True)
    probes.now += 2
    assert probes.may_seek(CLUSTER_SCOPE)
