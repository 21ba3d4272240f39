"""At the very moment in which what follows a task is to be written, Redis refuses it: the message goes back, nothing is
told that is not true, and the repeat writes all of it.

Tasks run in this process through Celery's own tracer; what a worker's engine would do is a stand-in's.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from typing import Any

import kombu.exceptions
import pytest
import redis
from celery import chain, chord, group, signals, states
from celery.exceptions import Reject, Retry
from kombu.transport.redis import Channel

from kafka_delivery import RetriableError, app, dead_letter, names, send
from kafka_delivery.faults import is_publish_fault
from kafka_delivery_worker.embedded import Valkey
from one_task import TOPIC, Engine, ids, run, step, take, working


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as valkey:
        yield valkey


@pytest.fixture
def engine(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    with working(valkey.url, monkeypatch) as engine:
        yield engine


@pytest.fixture
def client(valkey: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as client:
        yield client


def full(client: redis.Redis) -> Callable[[], object]:
    client.config_set("maxmemory", 1)
    return lambda: client.config_set("maxmemory", 0)


def read_only(client: redis.Redis) -> Callable[[], object]:
    client.replicaof("127.0.0.1", "1")
    return lambda: client.replicaof("NO", "ONE")


def without_replicas(client: redis.Redis) -> Callable[[], object]:
    client.config_set("min-replicas-to-write", 1)
    return lambda: client.config_set("min-replicas-to-write", 0)


REFUSALS = [full, read_only, without_replicas]


def goes_back(ended: Any) -> bool:
    state, value = ended
    return bool(state == states.REJECTED and isinstance(value, Reject) and value.requeue)


@pytest.mark.parametrize("refuse", REFUSALS)
@pytest.mark.parametrize(
    ("begin", "follow"),
    [
        (lambda: step("a").apply_async(link=step("b")), ["b"]),
        (lambda: step("a").apply_async(link=[step("b"), step("c"), group(step("d"), step("e"))]), ["d", "e", "b", "c"]),
        (lambda: chain(step("a"), step("b"), step("c")).apply_async(), ["b"]),
        (lambda: chain(step("a"), group(step("b"), step("c"))).apply_async(), ["b", "c"]),
        (lambda: chain(step("a"), group(step("b"), step("c")), step("d")).apply_async(), ["b", "c"]),
    ],
    ids=["link", "links", "chain", "group", "group in chain"],
)
def test_what_follows_a_delivery(
    engine: Engine, client: redis.Redis, refuse: Any, begin: Any, follow: list[str]
) -> None:
    begin()
    message = take(client)
    lifts: list[Callable[[], object]] = []
    engine.at_delivery = lambda: lifts.append(refuse(client))
    ended = run(message)
    lifts[0]()
    assert goes_back(ended)
    assert engine.pauses == 1
    assert ids(client) == []
    engine.at_delivery = lambda: None
    assert run(message)[0] == states.SUCCESS
    assert sorted(ids(client)) == sorted(follow)
    assert engine.delivered == ["a", "a"]


@pytest.mark.parametrize("refuse", REFUSALS)
def test_a_wanted_result_is_stored_by_the_repeat(engine: Engine, client: redis.Redis, refuse: Any) -> None:
    result = step("a").apply_async(ignore_result=False)
    message = take(client)
    lifts: list[Callable[[], object]] = []
    engine.at_delivery = lambda: lifts.append(refuse(client))
    ended = run(message)
    lifts[0]()
    assert goes_back(ended)
    assert result.state == states.PENDING, "it did not fail"
    engine.at_delivery = lambda: None
    run(message)
    assert result.get(timeout=10)["message_id"] == "a"


@pytest.mark.parametrize("refuse", REFUSALS)
def test_a_retry_that_is_queued_stays_one(
    engine: Engine, client: redis.Redis, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the result has to wait cannot be stored. Celery would take that for the failure of the task."""
    result = step("a").apply_async(ignore_result=False, link_error=step("told"))
    message = take(client)
    engine.fail = RetriableError("FENCED_LEADER_EPOCH", TOPIC, "a", 74, "FENCED_LEADER_EPOCH", "topic")
    lifts: list[Callable[[], object]] = []
    engine.when_queued_again = lambda: lifts.append(refuse(client))
    state, value = run(message)
    lifts[0]()
    assert (state, type(value)) == (states.RETRY, Retry)
    assert result.state == states.PENDING
    assert ids(client) == ["a"]


@pytest.mark.parametrize("failure", [None, ZeroDivisionError("x")], ids=["delivered", "failed"])
def test_a_wanted_result_is_stored_once(
    engine: Engine, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, failure: Exception | None
) -> None:
    """Celery would store it once more after the body, where a refusal counts as a failure."""
    stored: list[str] = []
    store = app.backend.store_result

    def noted(task_id: str, result: Any, state: str, **more: Any) -> Any:
        stored.append(state)
        return store(task_id, result, state, **more)

    monkeypatch.setattr(app.backend, "store_result", noted, raising=False)
    step("a").apply_async(ignore_result=False)
    engine.fail = failure
    run(take(client))
    assert stored == [states.FAILURE if failure else states.SUCCESS]


def test_who_is_told_of_what_nobody_planned(engine: Engine, client: redis.Redis) -> None:
    """The record is parked, and then Redis refuses the errback: the repeat parks it again, and tells."""
    step("a").apply_async(link_error=step("told"))
    message = take(client)
    engine.fail = ZeroDivisionError("x")
    lifts: list[Callable[[], object]] = []
    engine.at_park = lambda: lifts.append(full(client))
    ended = run(message)
    lifts[0]()
    assert goes_back(ended)
    assert ids(client) == []
    engine.at_park = lambda: None
    assert run(message)[0] == states.FAILURE
    assert ids(client) == ["told"]


def test_of_what_nobody_planned_the_result_says_so(engine: Engine, client: redis.Redis) -> None:
    result = step("a").apply_async(ignore_result=False, link_error=step("told"))
    engine.fail = ZeroDivisionError("secret-payload")
    assert run(take(client))[0] == states.FAILURE
    assert engine.parked == [("a", None)]
    assert repr(result.result) == "KafkaDeliveryError('parked after an unexpected ZeroDivisionError')"
    assert "secret-payload" not in result.traceback
    assert ids(client) == ["told"]


class TestErrbacks:
    @pytest.mark.parametrize("refuse", REFUSALS)
    def test_after_its_dead_letter_was_handed_over(self, engine: Engine, client: redis.Redis, refuse: Any) -> None:
        """Redis refuses just after it: the repeat makes a second dead letter of the same id, and tells."""
        engine.refuse = {"a"}
        step("a").apply_async(link=step("never"), link_error=step("told"))
        message = take(client)
        lifts: list[Callable[[], object]] = []

        def handed_over(sender: Any = None, **_: Any) -> None:
            if sender == dead_letter.name and not lifts:
                lifts.append(refuse(client))

        signals.after_task_publish.connect(handed_over)
        try:
            ended = run(message)
        finally:
            signals.after_task_publish.disconnect(handed_over)
        lifts[0]()
        assert goes_back(ended)
        assert (ids(client), ids(client, names.DEAD_LETTER_QUEUE)) == ([], ["a-dlq"])
        assert run(message)[0] == states.FAILURE
        assert (ids(client), ids(client, names.DEAD_LETTER_QUEUE)) == (["told"], ["a-dlq", "a-dlq"])

    def test_nobody_is_told_of_a_failure_that_was_none(self, engine: Engine, client: redis.Redis) -> None:
        """The link is refused and the errback would not be: Celery's own way calls it."""
        step("a").apply_async(link=step("b"), link_error=step("told"))
        message = take(client)
        lifts: list[Callable[[], object]] = []
        engine.at_delivery = lambda: lifts.append(full(client))
        engine.at_pause = lambda: lifts[0]()
        ended = run(message)
        assert goes_back(ended)
        assert ids(client) == []


def _away(*_: Any, **__: Any) -> None:
    raise redis.exceptions.ConnectionError("it is away")


class TestChords:
    @pytest.mark.parametrize("refuse", REFUSALS)
    def test_a_part_that_cannot_be_counted(self, engine: Engine, client: redis.Redis, refuse: Any) -> None:
        chord([step("a"), step("b")], step("body")).apply_async()
        first, last = take(client), take(client)
        assert run(first)[0] == states.SUCCESS
        lifts: list[Callable[[], object]] = []
        engine.at_delivery = lambda: lifts.append(refuse(client))
        ended = run(last)
        lifts[0]()
        assert goes_back(ended)
        engine.at_delivery = lambda: None
        assert run(last)[0] == states.SUCCESS
        assert ids(client) == ["body"]

    def test_a_body_that_cannot_be_queued(
        self, engine: Engine, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last part is counted, and then the queue is full."""
        last = self._last_part(client)
        put = Channel._put

        def refused(*args: Any, **kwargs: Any) -> None:
            raise redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'")

        monkeypatch.setattr(Channel, "_put", refused)
        assert goes_back(run(last))
        monkeypatch.setattr(Channel, "_put", put)
        assert run(last)[0] == states.SUCCESS
        assert ids(client) == ["body"]
        assert run(last)[0] == states.SUCCESS, "a part that comes once more finds that all is done"
        assert ids(client) == ["body"]

    def test_redis_goes_away_before_its_body_is_queued(
        self, engine: Engine, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        last = self._last_part(client)

        with monkeypatch.context() as patch:
            patch.setattr(app.backend, "get", _away)  # by which Celery looks for the shape of the chord
            assert goes_back(run(last))
        assert run(last)[0] == states.SUCCESS
        assert ids(client) == ["body"]

    def test_redis_goes_away_when_its_body_is_queued(
        self, engine: Engine, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Celery cannot write down that the chord is done. It did not fail all the same, and is done by the repeat."""
        last = self._last_part(client, step("body").set(link_error=step("told")))

        with monkeypatch.context() as patch:
            patch.setattr(app.backend, "_chord_cleanup_script", _away, raising=False)
            assert goes_back(run(last))
        assert ids(client) == ["body"]
        assert run(last)[0] == states.SUCCESS
        assert ids(client) == ["body", "body"], "at least once, under the same id"

    def test_its_errbacks(self, engine: Engine, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        """A part is refused by Kafka, so the chord fails; who is to be told cannot be told at once."""
        engine.refuse = {"b"}
        body = step("body").set(link_error=[step("told")])
        chord([step("a"), step("b")], body).apply_async()
        first, last = take(client), take(client)
        run(first)
        put, tried = Channel._put, []

        def refused(channel: Any, queue: str, *args: Any, **kwargs: Any) -> None:
            if queue == names.DEAD_LETTER_QUEUE:
                put(channel, queue, *args, **kwargs)
            else:
                tried.append(queue)
                raise redis.exceptions.OutOfMemoryError("full")

        with monkeypatch.context() as patch:
            patch.setattr(Channel, "_put", refused)
            assert goes_back(run(last))
        assert tried
        assert run(last)[0] == states.FAILURE
        assert ids(client) == ["told"]

    def test_the_result_of_its_body(self, engine: Engine, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        """A part is refused by Kafka, so the chord fails; that cannot be stored at once."""
        engine.refuse = {"b"}
        result = chord([step("a"), step("b")], step("body").set(ignore_result=False)).apply_async()
        first, last = take(client), take(client)
        run(first)

        with monkeypatch.context() as patch:
            patch.setattr(app.backend, "fail_from_current_stack", _away, raising=False)
            assert goes_back(run(last))
        assert result.state == states.PENDING
        assert run(last)[0] == states.FAILURE
        assert result.state == states.FAILURE
        assert ids(client) == []

    @staticmethod
    def _last_part(client: redis.Redis, body: Any = None) -> dict[str, Any]:
        chord([step("a"), step("b")], body or step("body")).apply_async()
        first, last = take(client), take(client)
        assert run(first)[0] == states.SUCCESS
        return last

    def test_a_body_that_another_worker_was_about_to_queue(
        self, engine: Engine, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may have died: until its claim runs out the part comes again."""
        last = self._last_part(client)
        monkeypatch.setattr(app.backend, "_let_go", lambda ending: None, raising=False)
        with monkeypatch.context() as patch:
            patch.setattr(app.backend, "get", _away)
            assert goes_back(run(last))
        assert goes_back(run(last))
        assert ids(client) == []
        (claim,) = client.scan_iter("celery-taskset-meta-*.c")
        client.delete(claim)
        assert run(last)[0] == states.SUCCESS
        assert ids(client) == ["body"]


class TestFaultsThatStay:
    @pytest.mark.parametrize("link", [{"no": "signature"}, {"task": send.name, "args": ["no topic!", "v"]}])
    def test_a_callback_that_cannot_be_called_is_parked_with_its_record(
        self, engine: Engine, client: redis.Redis, link: dict[str, Any]
    ) -> None:
        """A message that came back for it would send the record for ever."""
        step("a").apply_async()
        message = take(client)
        body = json.loads(b64decode(message["body"]))
        body[2]["callbacks"] = [link]
        message["body"] = b64encode(json.dumps(body).encode()).decode()
        assert run(message)[0] == states.SUCCESS
        ((parked, why),) = engine.parked
        assert parked == "a"
        assert why is not None
        assert why.startswith("what was to follow it could not be queued: ")


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (redis.exceptions.ReadOnlyError("READONLY"), True),
        (kombu.exceptions.OperationalError("away"), True),
        (ConnectionResetError(), True),
        (kombu.exceptions.EncodeError("no JSON"), False),
        (TypeError("a typo"), False),
        (AttributeError("a typo", name="x", obj=None), False),
        (RuntimeError("a typo"), False),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else "",
)
def test_what_may_succeed_when_it_is_repeated(error: Exception, fault: bool) -> None:
    assert is_publish_fault(error) is fault


def test_a_connection_that_another_thread_took_away() -> None:
    """Kombu then looks for something in what is None."""
    from kombu.transport.virtual import Channel as AnyChannel

    with pytest.raises(AttributeError) as caught:
        AnyChannel.basic_publish(None, None, "", "")
    assert is_publish_fault(caught.value)
