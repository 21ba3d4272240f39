"""The short way of a send: what its report brings about, and what Celery's state says meanwhile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state
from confluent_kafka import KafkaError

from kafka_delivery import app, send
from kafka_delivery_worker import batch_lane, lane
from kafka_delivery_worker.failures import Failed
from kafka_delivery_worker.producer import Outgoing, Report
from stand_ins import Circuits

OUTGOING = Outgoing("topic", b"", None, [], None, 1)


class TestLane:
    @pytest.fixture
    def ours(self) -> lane.Lane:
        ours = object.__new__(lane.Lane)
        ours.events = False
        ours.pid = 1
        nothing = dict.fromkeys(("sent_again", "tell_breaker", "delivered"), lambda *_: None)
        ours._engine = SimpleNamespace(  # type: ignore[assignment]
            outcomes={}, failed_here=lambda *_: Failed(), **nothing
        )
        ours._breaker = Circuits(shut=False, shut_topics=set())  # type: ignore[assignment]
        ours._reports = {}
        ours._reported = ours._reports.__setitem__
        ours._consumer = SimpleNamespace(call_soon_ack=lambda *_: None, on_task_message=set())
        ours.pool = SimpleNamespace(stopping=False, landed=lambda *_: None)
        ours.app = ours.hostname = ours.eventer = None
        ours.task = send
        return ours

    @pytest.fixture
    def sent(self) -> SimpleNamespace:
        """A message, and what was done with it."""
        done: list[str] = []
        return SimpleNamespace(
            headers={"id": "one", "task": send.name}, properties={}, delivery_info={}, delivery_tag="1.1:q", done=done,
            ack_log_error=None, reject_log_error=None, acknowledged=False, ack=lambda: done.append("ack"),
            reject=lambda requeue: done.append(f"reject requeue={requeue}"),
        )  # fmt: skip

    def fail(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")

    def failed(self, ours: lane.Lane, sent: SimpleNamespace) -> None:
        self.reported(ours, sent, Report(KafkaError(KafkaError._MSG_TIMED_OUT)))
        ours.settle()

    def reported(self, ours: lane.Lane, sent: SimpleNamespace, report: Report) -> lane.LaneRequest:
        request = lane.LaneRequest(sent, sent.headers, ours)
        request.topic, request.admission, request.size = "topic", 1, 10
        lane.begun(request)
        ours._reports[request] = report
        return request

    def test_a_failed_send_that_cannot_go_on_goes_back(self, ours: lane.Lane, sent: SimpleNamespace) -> None:
        ours._resume = self.fail
        self.failed(ours, sent)
        assert sent.done == ["reject requeue=True"]
        assert ours._engine.outcomes == {}

    def test_the_outcome_of_one_that_goes_on_is_its_messages(self, ours: lane.Lane, sent: SimpleNamespace) -> None:
        """Not its id's: the same id may be in flight for another topic."""
        ours._resume = lambda *_: None
        self.failed(ours, sent)
        assert ours._engine.outcomes.keys() == {"1.1:q"}

    def test_while_the_worker_stops_a_failed_send_is_left_to_the_end_of_the_lease(
        self, ours: lane.Lane, sent: SimpleNamespace
    ) -> None:
        ours.pool.stopping = True
        ours._resume = self.fail
        self.failed(ours, sent)
        assert sent.done == []

    def test_in_an_outage_it_waits_in_redis_and_no_thread_is_troubled(
        self, ours: lane.Lane, sent: SimpleNamespace
    ) -> None:
        """A thousand that time out together would cost a thousand tasks, and their memory."""
        ours._resume = self.fail
        sent.channel = SimpleNamespace(
            give_back=lambda tag: sent.done.append(f"back {tag}"), put_aside=lambda *what: sent.done.append(what)
        )
        ours._breaker.shut = True  # type: ignore[misc]
        self.failed(ours, sent)
        ours._breaker.shut = False  # type: ignore[misc]
        ours._breaker.shut_topics = {"topic"}  # type: ignore[assignment]
        self.failed(ours, sent)
        assert sent.done == ["back 1.1:q", ("1.1:q", "topic")]
        ours._breaker.shut_topics = {"another"}  # type: ignore[assignment]
        self.failed(ours, sent)
        assert sent.done[2:] == ["reject requeue=True"], "it went Celery's way"

    def test_all_reports_of_a_poll_are_told_at_once_by_what_they_were_sent_under(
        self, ours: lane.Lane, sent: SimpleNamespace
    ) -> None:
        told: list[Any] = []
        ours._engine.tell_breaker = lambda *what: told.append(what)  # type: ignore[method-assign]
        ours._engine.delivered = lambda *what: told.append(what)  # type: ignore[method-assign]
        ours.pool.landed = lambda *what: told.append(what)
        ours._resume = self.fail
        good, bad = Report(None, None, 0, 7, 1), Report(KafkaError(KafkaError._MSG_TIMED_OUT))
        for number, report in enumerate((good, bad, good)):
            sent.headers = {"id": str(number), "task": send.name}
            self.reported(ours, sent, report)
        self.reported(ours, sent, good).admission = 2
        ours.settle()
        assert told == [
            (3, 30), (1, "topic", [good, bad, good]), ("topic", [("0", good), ("2", good)]),
            (1, 10), (2, "topic", [good]), ("topic", [("2", good)]),
        ]  # fmt: skip
        assert sorted(sent.done) == ["ack", "ack", "ack", "reject requeue=True"]
        ours.settle()
        assert len(told) == 6

    def test_events_that_redis_does_not_take_hold_up_no_other_send(
        self, ours: lane.Lane, sent: SimpleNamespace
    ) -> None:
        ours.eventer = SimpleNamespace(send=self.fail)
        for number in range(2):
            sent.headers = {"id": str(number), "task": send.name}
            self.reported(ours, sent, Report(None)).told = True
        ours.settle()
        assert sent.done == ["ack", "ack"]
        assert (state.requests, len(state.active_requests)) == ({}, 0)

    def test_what_an_earlier_connection_sent_is_settled_by_the_lane_of_the_next(
        self, ours: lane.Lane, sent: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The pool knows only the lanes of the connection that it has."""

        def current() -> SimpleNamespace:
            return SimpleNamespace(**vars(ours._engine), breaker=None)

        monkeypatch.setattr("kafka_delivery_worker.engine.current", current)
        monkeypatch.setattr("celery.worker.strategy.default", lambda *_: "strategy")
        ours.pool.lanes = {}
        consumer_ = SimpleNamespace(pool=ours.pool, hostname="", event_dispatcher=None)
        for kind in (lane.Lane, batch_lane.BatchLane):
            assert lane.lane_of(kind, send, app, consumer_) == "strategy"
            before = ours.pool.lanes[send.name]
            request = self.reported(before, sent, Report(None))
            record = Outgoing("topic", b"", None, [], None, 1)
            if isinstance(before, batch_lane.BatchLane):
                sent.body = b""
                batch = batch_lane.Batch(request, ["one"], [record], {"topic": 1}, {0: Report(None)})
                before._batches.append(batch)
            lane.lane_of(kind, send, app, consumer_)
            assert ours.pool.lanes[send.name] is not before
            ours.pool.lanes[send.name].settle()
            assert (sent.done.pop(), sent.done, state.requests) == ("ack", [], {})
            ours.pool.lanes.clear()

    def test_one_that_cannot_be_launched_is_not_active(self, ours: lane.Lane, sent: SimpleNamespace) -> None:
        ours.pool.launch = self.fail
        with pytest.raises(RuntimeError):
            ours._start(sent, sent.headers, OUTGOING, 1, 10)
        assert (state.requests, len(state.active_requests), len(state.reserved_requests)) == ({}, 0, 0)

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_batch_tells_the_circuits_poll_by_poll_and_is_done_with_its_last_report(
        self, ours: lane.Lane, sent: SimpleNamespace, fails: bool
    ) -> None:
        """Where one failed, it is the task that counts the others, which would be counted twice otherwise."""
        told: list[Any] = []
        of_batches = object.__new__(batch_lane.BatchLane)
        of_batches.__dict__.update(vars(ours))
        ours._engine.tell_breaker = lambda *what: told.append(what)  # type: ignore[method-assign]
        ours._engine.delivered = lambda *what: told.append(what)  # type: ignore[method-assign]
        of_batches._resume = lambda *_: told.append([*ours._engine.outcomes["1.1:q"]])
        sent.body = b"four"
        ours.pool.landed = lambda *what: told.append(what)
        topics, good = ["a", "b", "a"], Report(None)
        last = Report(KafkaError(KafkaError._MSG_TIMED_OUT)) if fails else good
        request = lane.LaneRequest(sent, sent.headers, ours)
        lane.begun(request)
        records = [Outgoing(topic, b"", None, [], None, 1) for topic in topics]
        batch = batch_lane.Batch(request, ["0", "1", "2"], records, {"a": 1, "b": 2})
        of_batches._batches = [batch]
        of_batches.settle()
        assert told == []
        batch.reports |= {2: good, 1: good}
        of_batches.settle()
        assert told == [(1, "a", [good]), (2, "b", [good])]
        assert request in state.active_requests
        told.clear()
        batch.reports[0] = last
        of_batches.settle()
        of_batches.settle()
        assert told[:2] == [(1, "a", [last]), (3, 4)]
        assert told[2:] == (
            [[last, good, good]] if fails else [("a", [("0", last), ("2", good)]), ("b", [("1", good)])]
        )
        assert sent.done == ([] if fails else ["ack"])
        assert (state.requests, len(state.active_requests), of_batches._batches) == ({}, 0, [])
