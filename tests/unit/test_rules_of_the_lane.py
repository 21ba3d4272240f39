"""Which sends take the short way through a worker, and what becomes of those that failed there, rule by rule.

The worker around the lane is a stand-in: its pool, its breaker and its channel note what they are told.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from celery.worker import state
from confluent_kafka import KafkaError

from kafka_delivery.names import DEFERRALS, DEFERRED_EVENT, PROBE, RELEASED
from kafka_delivery.record import MAX_TIMESTAMP_MS, Record
from kafka_delivery_worker import lane as module
from kafka_delivery_worker.lane import WATCHED, Lane, _is_due, _watched
from kafka_delivery_worker.producer import Outgoing, Report
from stand_ins import Circuits

ID = "0197-m"
NOW_MS = 1_700_000_000_000
REJECTED, TOPIC_FULL, TOPIC_FEW, CLUSTER = 10, 19, 3, -195
"""Codes of a record's own fault, of two of a topic's (with all retries, with few), and of the cluster's."""


def wire(**changes: Any) -> list[Any]:
    """A record as our own `encode` writes it; changes go by the names of its parts."""
    names = ("version", "cluster", "topic", "value", "key", "headers", "partition", "timestamp_ms", "message_id")
    parts = dict(
        zip(names, Record("orders", "x", "k", timestamp=NOW_MS, message_id=ID).to_wire("default"), strict=True)
    )
    return list({**parts, **changes}.values())


def headers(**changes: Any) -> dict[str, Any]:
    return {
        "id": ID, "task": "kafka_delivery.send", "ignore_result": True, "expires": None, "stamped_headers": None,
        "eta": None, "timelimit": [None, None], "retries": 0, **changes,
    }  # fmt: skip


class Channel:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def give_back(self, tag: str) -> None:
        self.told.append(("give_back", tag))

    def put_aside(self, tag: str, topic: str) -> None:
        self.told.append(("put_aside", tag, topic))


class Message:
    """A message of the transport."""

    def __init__(self, args: Any = None, kwargs: Any = None, embed: Any = None, **changes: Any) -> None:
        self.headers = headers(**changes)
        self.body = json.dumps([[wire()] if args is None else args, kwargs or {}, embed])
        self.content_type = "application/json"
        self.delivery_tag = "tag"
        self.channel = Channel()
        self.acked = 0

    def ack(self) -> None:
        self.acked += 1


class Pool:
    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.stopping = False
        self.max_in_flight = 150
        self.fault: BaseException | None = None

    def launch(self, outgoing: Outgoing, size: int, reported: Any, request: Any) -> None:
        if self.fault:
            raise self.fault
        self.launched.append((outgoing, size, request))


class Worker:
    """A lane, and what is around it."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.admitted: list[Any] = []
        self.admission: Any = 7
        self.sent_again: list[Any] = []
        self.gone_on: list[Any] = []
        self.events: list[Any] = []
        made = object.__new__(Lane)
        made.task, made._name = SimpleNamespace(name="send", max_retries=5), "send"
        made.app, made.pool = None, self.pool
        made.hostname, made.pid, made.events = "w", 1, False
        made._reports, made._reported = {}, lambda request, report: None
        made._owed = [0, 0]
        made._consumer = SimpleNamespace(task_buckets={"send": None})
        made._breaker = cast("Any", Circuits(admission=self._admit, shut=False, shut_topics=set()))
        made._engine = cast("Any", SimpleNamespace(sent_again=lambda *told: self.sent_again.append(told)))
        made.eventer = SimpleNamespace(send=lambda kind, **fields: self.events.append((kind, fields)), groups=None)
        made._cluster, made._topics, made._small = "default", {"orders"}, 1_000
        made._go_on = lambda request, reports: self.gone_on.append((request, reports))  # type: ignore[method-assign]
        self.lane = made

    def _admit(self, topic: str, probe: Any, released: bool) -> Any:
        self.admitted.append((topic, probe, released))
        return self.admission

    def plain(self, message: Message) -> bool:
        """Whether the short way is open to a message, as far as Celery is concerned."""
        return self.lane._plain(message, message.headers) is not None

    def outgoing(self, size: int = 10, **changes: Any) -> Outgoing | None:
        return self.lane._outgoing(wire(**changes), ID, size)

    def send(self, message: Message) -> Any:
        assert self.lane.take(message)
        ((_, _, request),) = self.pool.launched
        return request


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    yield
    state.requests.clear()
    state.active_requests.clear()
    state.revoked.discard(ID)


class TestTaken:
    def test_a_plain_send_is_started(self, worker: Worker) -> None:
        message = Message()
        request = worker.send(message)
        ((outgoing, size, _),) = worker.pool.launched
        assert (outgoing.topic, outgoing.value, outgoing.key, outgoing.timestamp_ms) == ("orders", b"x", b"k", NOW_MS)
        assert (size, request.size) == (len(message.body), len(message.body))
        assert (request.topic, request.admission) == ("orders", 7)
        assert state.requests[ID] is request
        assert worker.admitted == [("orders", None, False)]

    def test_a_probe_and_what_was_put_aside_are_admitted_as_such(self, worker: Worker) -> None:
        worker.lane.take(Message(**{PROBE: "cluster|t", RELEASED: True}))
        assert worker.admitted == [("orders", "cluster|t", True)]

    def test_one_that_is_not_admitted_is_left_to_the_consumer(self, worker: Worker) -> None:
        worker.admission = None
        assert not worker.lane.take(Message())
        assert worker.pool.launched == []

    @pytest.mark.parametrize(
        "message",
        [Message(ignore_result=False), Message([wire(message_id="another")]), Message([wire(topic="")]), Message([7])],
        ids=["a result is wanted", "another id", "no topic", "no wire"],
    )
    def test_anything_else_is_left_to_celery(self, worker: Worker, message: Message) -> None:
        assert not worker.lane.take(message)
        assert worker.admitted == []

    def test_one_that_cannot_be_started_leaves_nothing_behind(self, worker: Worker) -> None:
        worker.pool.fault = OSError()
        with pytest.raises(OSError):  # noqa: PT011
            worker.lane.take(Message())
        assert ID not in state.requests


class TestPlain:
    def test_nothing_is_asked_of_celery(self, worker: Worker) -> None:
        assert worker.lane._plain(Message(), headers()) == wire()

    @pytest.mark.parametrize(
        "changes",
        [
            {"ignore_result": False},
            {"expires": "2100-01-01T00:00:00+00:00"},
            {"stamped_headers": ["x"]},
            {"eta": "2100-01-01T00:00:00+00:00"},
            {"timelimit": [10, None]},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_something_is_asked_in_a_header(self, worker: Worker, changes: dict[str, Any]) -> None:
        assert not worker.plain(Message(**changes))

    @pytest.mark.parametrize("timelimit", [None, [], [None, None]])
    def test_no_limit_of_time_is_none(self, worker: Worker, timelimit: Any) -> None:
        assert worker.plain(Message(timelimit=timelimit))

    def test_a_time_that_has_come_is_none(self, worker: Worker) -> None:
        assert worker.plain(Message(eta="2020-01-01T00:00:00+00:00"))

    @pytest.mark.parametrize(
        ("args", "kwargs", "embed", "plain"),
        [
            ([wire()], {}, {}, True),
            ([wire()], {}, None, True),
            ([wire()], {}, {"callbacks": None, "chain": None}, True),
            ([wire()], {}, {"callbacks": ["one"], "chain": None}, False),
            ([wire()], {"topic": "orders"}, {}, False),
            ([], {}, {}, False),
            (["orders", "x"], {}, {}, False),
        ],
    )
    def test_a_call_has_one_argument_and_no_links(
        self, worker: Worker, args: Any, kwargs: Any, embed: Any, plain: bool
    ) -> None:
        assert worker.plain(Message(args, kwargs, embed)) is plain

    def test_no_other_content_is(self, worker: Worker) -> None:
        message = Message()
        message.content_type = "application/x-yaml"
        assert not worker.plain(message)

    def test_a_limit_of_its_rate_is_celerys(self, worker: Worker) -> None:
        worker.lane._consumer.task_buckets["send"] = object()
        assert not worker.plain(Message())

    def test_a_revoked_one_is_celerys(self, worker: Worker) -> None:
        state.revoked.add(ID)
        assert not worker.plain(Message())

    @pytest.mark.parametrize("signal", WATCHED, ids=lambda signal: str(signal.name))
    def test_each_is_celerys_while_somebody_listens(self, worker: Worker, signal: Any) -> None:
        def listener(**_: Any) -> None: ...

        assert not _watched()
        signal.connect(listener)
        try:
            assert _watched()
            assert not worker.plain(Message())
        finally:
            signal.disconnect(listener)

    def test_a_time_is_due_once_it_is_past(self) -> None:
        now = datetime.now(UTC)
        assert _is_due((now - timedelta(seconds=1)).isoformat())
        assert not _is_due((now + timedelta(seconds=60)).isoformat())


class TestOutgoing:
    def test_a_wire_of_ours_is_a_record(self, worker: Worker) -> None:
        found = worker.outgoing(partition=3)
        assert found == Outgoing("orders", b"x", b"k", [("message-id", ID)], 3, NOW_MS)

    def test_no_key_is_none(self, worker: Worker) -> None:
        found = worker.outgoing(key=None)
        assert found is not None
        assert found.key is None

    @pytest.mark.parametrize(
        "changes", [{"version": 2}, {"cluster": "other"}, {"message_id": "another"}], ids=lambda c: next(iter(c))
    )
    def test_one_for_somebody_else_is_none(self, worker: Worker, changes: dict[str, Any]) -> None:
        assert worker.outgoing(**changes) is None

    @pytest.mark.parametrize("timestamp_ms", [0, -1, MAX_TIMESTAMP_MS + 1, True, 1.5, "1", None])
    def test_a_time_that_is_none_is_celerys(self, worker: Worker, timestamp_ms: Any) -> None:
        assert worker.outgoing(timestamp_ms=timestamp_ms) is None

    @pytest.mark.parametrize("timestamp_ms", [1, MAX_TIMESTAMP_MS])
    def test_any_other_time_is_fine(self, worker: Worker, timestamp_ms: int) -> None:
        assert worker.outgoing(timestamp_ms=timestamp_ms) is not None

    @pytest.mark.parametrize("partition", [-1, 2**31, True, "1", 1.0])
    def test_a_partition_that_is_none_is_celerys(self, worker: Worker, partition: Any) -> None:
        assert worker.outgoing(partition=partition) is None

    @pytest.mark.parametrize("partition", [0, 2**31 - 1, None])
    def test_any_other_partition_is_fine(self, worker: Worker, partition: Any) -> None:
        assert worker.outgoing(partition=partition) is not None

    def test_an_id_that_is_none_is_celerys(self, worker: Worker) -> None:
        assert worker.lane._outgoing(wire(message_id=""), "", 10) is None

    @pytest.fixture
    def validated(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Topics of records that were validated as a whole."""
        found: list[str] = []

        class Validated(Record):
            @classmethod
            def from_wire(cls, wire: list[Any], cluster: str) -> Record:
                found.append(wire[2])
                return Record.from_wire(wire, cluster)

        monkeypatch.setattr(module, "Record", Validated)
        return found

    def test_one_for_a_topic_that_is_known_is_not_validated_again(self, worker: Worker, validated: list[str]) -> None:
        worker.outgoing(size=1_000)
        assert validated == []

    def test_a_topic_is_known_once_a_record_was_validated(self, worker: Worker, validated: list[str]) -> None:
        worker.outgoing(topic="payments")
        worker.outgoing(topic="payments")
        assert validated == ["payments"]

    def test_headers_and_size_are_validated(self, worker: Worker, validated: list[str]) -> None:
        found = worker.outgoing(headers=[["a", "b"]])
        worker.outgoing(size=1_001)
        assert validated == ["orders", "orders"]
        assert found is not None
        assert ("a", b"b") in found.headers


class TestReport:
    def report(self, code: int) -> Report:
        return Report(KafkaError(code))

    def test_of_an_arrival_acknowledges(self, worker: Worker) -> None:
        message = Message()
        worker.lane._goes_on(worker.send(message), Report(None, None, 1, 2, 3))
        assert message.acked == 1
        assert (worker.gone_on, worker.events) == ([], [])
        assert ID not in state.requests

    def test_of_an_arrival_is_told_where_its_start_was(self, worker: Worker) -> None:
        request = worker.send(Message())
        request.told = True
        worker.lane._goes_on(request, Report(None, None, 1, 2, 3))
        ((kind, fields),) = worker.events
        assert (kind, fields["result"]) == ("task-succeeded", "{'topic': 'orders', 'partition': 1, 'offset': 2}")

    def test_of_a_failure_goes_on_as_a_task(self, worker: Worker) -> None:
        message = Message()
        request, report = worker.send(message), self.report(REJECTED)
        worker.lane._goes_on(request, report)
        assert worker.gone_on == [(request, [report])]
        assert (message.acked, message.channel.told) == (0, [])

    def test_in_a_worker_that_stops_is_left_to_the_end_of_the_lease(self, worker: Worker) -> None:
        message = Message()
        request = worker.send(message)
        worker.pool.stopping = True
        worker.lane._goes_on(request, self.report(REJECTED))
        assert (worker.gone_on, message.acked, message.channel.told) == ([], 0, [])

    @pytest.mark.parametrize("code", [CLUSTER, TOPIC_FULL, TOPIC_FEW, REJECTED])
    def test_goes_on_while_no_circuit_is_open(self, worker: Worker, code: int) -> None:
        worker.lane._goes_on(worker.send(Message()), self.report(code))
        assert len(worker.gone_on) == 1

    @pytest.mark.parametrize("code", [TOPIC_FEW, REJECTED])
    def test_of_another_fault_goes_on_while_the_cluster_is_away(self, worker: Worker, code: int) -> None:
        worker.lane._breaker.shut = True  # type: ignore[misc]
        worker.lane._goes_on(worker.send(Message()), self.report(code))
        assert len(worker.gone_on) == 1

    @pytest.mark.parametrize(("code", "name"), [(CLUSTER, "_TRANSPORT"), (TOPIC_FULL, "NOT_ENOUGH_REPLICAS")])
    def test_of_the_clusters_or_a_topics_fault_waits_while_the_cluster_is_away(
        self, worker: Worker, code: int, name: str
    ) -> None:
        worker.lane._breaker.shut = True  # type: ignore[misc]
        message = Message(retries=2)
        worker.lane._goes_on(worker.send(message), self.report(code))
        assert message.channel.told == [("give_back", "tag")]
        ((outcome, error, retries),) = worker.sent_again
        assert (outcome, error.name, retries) == ("deferred", name, 2)
        assert (worker.gone_on, worker.events, worker.lane._owed) == ([], [], [0, 0])

    @pytest.mark.parametrize("retries", [0, None])
    def test_of_a_first_attempt_is_told_as_that(self, worker: Worker, retries: Any) -> None:
        worker.lane._breaker.shut = True  # type: ignore[misc]
        worker.lane._goes_on(worker.send(Message(retries=retries)), self.report(CLUSTER))
        assert worker.sent_again[0][2] == 0

    @pytest.mark.parametrize(
        ("code", "waits"), [(CLUSTER, True), (TOPIC_FULL, True), (TOPIC_FEW, False), (REJECTED, False)]
    )
    def test_waits_while_its_topic_is_in_trouble(self, worker: Worker, code: int, waits: bool) -> None:
        worker.lane._breaker.shut_topics.add("orders")  # type: ignore[attr-defined]
        message = Message()
        worker.lane._goes_on(worker.send(message), self.report(code))
        assert (message.channel.told == [("put_aside", "tag", "orders")]) is waits
        assert len(worker.gone_on) == (not waits)

    def test_goes_on_while_another_topic_is_in_trouble(self, worker: Worker) -> None:
        worker.lane._breaker.shut_topics.add("payments")  # type: ignore[attr-defined]
        worker.lane._goes_on(worker.send(Message()), self.report(TOPIC_FULL))
        assert len(worker.gone_on) == 1

    @pytest.mark.parametrize(("shut", "owed"), [(True, [150, 0]), (False, [0, 150])])
    def test_of_what_waits_is_told_with_its_beginning(self, worker: Worker, shut: bool, owed: list[int]) -> None:
        request = worker.send(Message())
        worker.lane.events = True
        worker.lane._breaker.shut = shut  # type: ignore[misc]
        worker.lane._breaker.shut_topics.add("orders")  # type: ignore[attr-defined]
        worker.lane._goes_on(request, self.report(CLUSTER))
        assert [kind for kind, _ in worker.events] == ["task-received", "task-started", DEFERRED_EVENT]
        assert worker.lane._owed == owed

    def test_of_what_waits_is_not_told_twice(self, worker: Worker) -> None:
        request = worker.send(Message(**{DEFERRALS: 1}))
        request.told = worker.lane.events = True
        worker.lane._breaker.shut = True  # type: ignore[misc]
        worker.lane._goes_on(request, self.report(CLUSTER))
        assert [kind for kind, _ in worker.events] == [DEFERRED_EVENT]
