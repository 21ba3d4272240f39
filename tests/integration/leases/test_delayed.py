"""A message with a time in the future waits in Redis, comes back when it is due, and never early."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import redis

from integration.leases.workers import (
    NOTHING,
    OTHER,
    QUEUE,
    Worker,
    delayed,
    delayed_pass,
    in_future,
    message,
    now,
    publish,
)
from kafka_delivery import names
from servers import AnyRedis

FUTURE = {
    "+00:00": lambda: in_future(3600).isoformat(),
    "no fraction": lambda: in_future(3600).replace(microsecond=0).isoformat(),
    "milliseconds": lambda: in_future(3600).isoformat(timespec="milliseconds"),
    "Z": lambda: in_future(3600).replace(tzinfo=None).isoformat() + "Z",
    "naive": lambda: in_future(3600).replace(tzinfo=None).isoformat(),
    "blank": lambda: in_future(3600).isoformat(" "),
    "+05:30": lambda: in_future(3600, timezone(timedelta(hours=5, minutes=30))).isoformat(),
    "-0800": lambda: in_future(3600, timezone(timedelta(hours=-8))).strftime("%Y-%m-%dT%H:%M:%S%z"),
    "+14:00": lambda: in_future(3600, timezone(timedelta(hours=14))).isoformat(),
}


PAST: dict[str, Callable[[], str]] = {
    "past": lambda: in_future(-1).isoformat(),
    "+14:00": lambda: in_future(-1, timezone(timedelta(hours=14))).isoformat(),
    "-12:00": lambda: in_future(-1, timezone(timedelta(hours=-12))).isoformat(),
    "long ago": lambda: "1969-12-31T23:59:59Z",
}


NOT_UNDERSTOOD = (
    "", "never", "2999", "2999-01-01", "2999-01-01T00:00", "2999-13-01T00:00:00Z", "2999-00-01T00:00:00Z",
    "2999-02-29T00:00:00Z", "2999-04-31T00:00:00Z", "2999-01-00T00:00:00Z", "2999-01-01T24:00:00Z",
    "2999-01-01T00:60:00Z", "2999-01-01T00:00:60Z", "9999-12-31T23:59:59-14:00", "29990-01-01T00:00:00Z",
    "2999-01-01T00:00:00 Europe/Berlin", "2999-01-01T00:00:00+1", "20990101T000000Z", 'a"b', "2999-01-01T00:00:00Z" * 3,
)  # fmt: skip


class TestDelayed:
    @pytest.mark.parametrize("form", FUTURE)
    def test_a_future_one_waits_in_the_delayed_set(self, client: AnyRedis, form: str) -> None:
        began = now(client)
        eta = FUTURE[form]()
        late, soon = publish(client, message(1, eta=eta), message(2))
        published = now(client)
        worker = Worker(client)
        answer = worker.claim()
        assert answer.items == [soon]
        assert delayed(client) == [late]
        (score,) = client.zmscore(names.DELAYED + QUEUE, [late])
        cut_off = 1 if "." in eta else 1001
        assert began + 3_600_000 - cut_off <= score <= published + 3_600_000
        assert score - now(client) <= answer.next_due <= score - published

    @pytest.mark.parametrize("form", PAST)
    def test_a_past_one_is_due(self, client: redis.Redis, form: str) -> None:
        sent = publish(client, message(1, eta=PAST[form]()), message(2))
        assert Worker(client).claim().items == sent

    @pytest.mark.parametrize("eta", NOT_UNDERSTOOD)
    def test_one_that_is_not_understood_is_left_to_celery(self, client: redis.Redis, eta: str) -> None:
        """Else it would wait for ever, or for a time that Celery does not mean."""
        sent = publish(client, message(1, eta=eta), message(2))
        assert Worker(client).claim().items == sent

    def test_the_days_of_a_long_time_are_counted_right(self, client: AnyRedis) -> None:
        days = [
            datetime(y, m, d, tzinfo=UTC)
            for y in (2096, 2099, 2100, 2101, 2400)
            for m, d in ((2, 28), (3, 1), (12, 31))
        ]
        days += [datetime(2096, 2, 29, 1, 2, 3, 456000, tzinfo=UTC), datetime(2400, 2, 29, tzinfo=UTC)]
        publish(client, *(message(day, eta=day.isoformat()) for day in days))
        assert Worker(client).claim().items == []
        scores = dict(client.zrange(names.DELAYED + QUEUE, 0, -1, withscores=True))
        assert scores == {message(day, eta=day.isoformat()): day.timestamp() * 1000 for day in days}

    def test_they_come_back_when_due_in_the_order_in_which_they_are_due(self, client: redis.Redis) -> None:
        at = [in_future(seconds).isoformat() for seconds in (3600.6, 3600.2, 3600.4, 7200)]
        sent = publish(client, *(message(n, eta=eta) for n, eta in enumerate(at)))
        worker = Worker(client)
        assert worker.claim().status == NOTHING
        delayed_pass(client, 3_601_000)
        assert worker.claim().items == [sent[1], sent[2], sent[0]]
        assert delayed(client) == [sent[3]]
        assert worker.holds == [sent[1], sent[2], sent[0]]

    def test_never_early(self, client: redis.Redis) -> None:
        eta = in_future(0.1)
        publish(client, message(1, eta=eta.isoformat()))
        worker = Worker(client)
        while not worker.claim().items:
            pass
        assert now(client) / 1000 >= eta.timestamp() - 0.001

    def test_what_is_due_is_claimed_before_what_was_queued_since(self, client: redis.Redis) -> None:
        (due,) = publish(client, message("due", eta=in_future(3600).isoformat()))
        worker = Worker(client)
        assert worker.claim().items == []
        (new,) = publish(client, message("new"))
        delayed_pass(client, 3_601_000)
        assert worker.claim().items == [due, new]

    def test_each_list_has_a_set_of_its_own(self, client: redis.Redis) -> None:
        eta = in_future(60).isoformat()
        publish(client, message(1, eta=eta))
        publish(client, message(2, eta=eta), queue=OTHER)
        Worker(client).claim(5, (QUEUE, OTHER))
        assert (delayed(client), delayed(client, OTHER)) == ([message(1, eta=eta)], [message(2, eta=eta)])

    def test_a_million_of_them_do_not_hold_redis_up(self, client: redis.Redis) -> None:
        """One claim puts a thousand aside; the script would else run for seconds, in which Redis serves nobody."""
        eta = in_future(3600).isoformat()
        publish(client, *(message(n, eta=eta) for n in range(2500)), message("last"))
        worker = Worker(client)
        assert worker.claim().items == []
        assert 1000 <= client.zcard(names.DELAYED + QUEUE) < 1050
        claimed = [worker.claim().items for _ in range(2)]
        assert claimed == [[], [message("last")]]
        assert client.zcard(names.DELAYED + QUEUE) == 2500

    @pytest.mark.parametrize(
        "more",
        [
            {"argsrepr": """('"eta": "2999-01-01T00:00:00Z"',)"""},
            {"argsrepr": 'topic "eta": "2999-01-01T00:00:00+00:00", '},
            {"stamps": {"eta": "2999-01-01T00:00:00+00:00"}},
            {"x-trace": {"eta": "2999-01-01T00:00:00+00:00"}},
        ],
    )
    def test_only_celerys_own_header_says_when(self, client: redis.Redis, more: dict[str, Any]) -> None:
        sent = publish(client, message(1, **more))
        assert Worker(client).claim().items == sent

    def test_a_body_that_is_not_encoded_says_nothing_either(self, client: redis.Redis) -> None:
        body = json.dumps([["topic", {"eta": "2999-01-01T00:00:00+00:00"}], {}, {}])
        raw = json.loads(message(1)) | {"body": body}
        sent = publish(client, json.dumps(raw).encode())
        assert Worker(client).claim().items == sent
