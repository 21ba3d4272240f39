"""A process that is at fault itself stands still, says why, and goes on by itself."""

from __future__ import annotations

import pytest

from kafka_delivery_worker import standstill
from kafka_delivery_worker.standstill import FAILURES, LONGEST_PAUSE_S, MAKING, Standstill


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def process(clock: Clock) -> Standstill:
    return Standstill(clock)


def fail(process: Standstill, times: int, first: int = 0) -> None:
    for number in range(first, first + times):
        process.failed("TypeError", f"message-{number}")


class TestFailures:
    def test_a_few_stop_nothing(self, process: Standstill) -> None:
        fail(process, FAILURES - 1)
        assert (process.why, process.reason, process.remaining_s) == ("", "", 0.0)

    def test_in_a_row_they_stop_the_process_for_a_while(self, process: Standstill, clock: Clock) -> None:
        fail(process, FAILURES)
        assert (process.why, process.reason, process.remaining_s) == ("TypeError", "failures", 1.0)
        clock.now += 0.9
        assert process.why
        clock.now += 0.1
        assert (process.why, process.reason, process.remaining_s) == ("", "", 0.0)

    def test_each_further_one_doubles_the_pause(self, process: Standstill, clock: Clock) -> None:
        pauses = []
        fail(process, FAILURES - 1)
        for number in range(9):
            fail(process, 1, first=10 + number)
            pauses.append(process.remaining_s)
            clock.now += process.remaining_s
        assert pauses == [1, 2, 4, 8, 16, 32, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]

    def test_what_was_in_flight_when_the_pause_began_does_not_count(self, process: Standstill, clock: Clock) -> None:
        fail(process, 100)
        assert (process.failures, process.remaining_s) == (FAILURES, 1.0)

    def test_one_message_that_fails_again_and_again_stops_nothing(self, process: Standstill) -> None:
        for _ in range(10):
            process.failed("TypeError", "one")
        assert (process.failures, process.why) == (1, "")

    def test_those_of_no_message_count(self, process: Standstill) -> None:
        for _ in range(FAILURES):
            process.failed("ProducerError")
        assert process.why == "ProducerError"

    def test_a_success_ends_the_row(self, process: Standstill) -> None:
        fail(process, FAILURES)
        process.succeeded()
        assert (process.why, process.failures) == ("", 0)
        fail(process, FAILURES - 1)
        assert process.why == ""
        fail(process, 1, first=FAILURES - 2)  # the one that failed last
        assert process.why == ""

    def test_the_message_that_failed_last_may_begin_a_new_row(self, process: Standstill) -> None:
        process.failed("TypeError", "one")
        process.succeeded()
        process.failed("TypeError", "one")
        assert process.failures == 1


class TestClient:
    def test_without_one_the_process_stands_still_until_there_is_one(self, process: Standstill, clock: Clock) -> None:
        process.client("main", "ssl.key.location: No such file")
        assert process.why == "there is no Kafka client: ssl.key.location: No such file"
        assert (process.reason, process.remaining_s) == ("client", standstill.NO_CLIENT_S)
        clock.now += 3600
        assert process.why
        process.client("main", "")
        assert (process.why, process.reason, process.remaining_s) == ("", "", 0.0)
        process.client("main", "")

    def test_any_that_is_missing_counts(self, process: Standstill) -> None:
        process.client("main", "one reason")
        process.client("other", "another reason")
        process.client("main", "")
        assert process.why.endswith("another reason")

    def test_it_comes_before_failures(self, process: Standstill) -> None:
        fail(process, FAILURES)
        process.client("main", "why")
        assert process.reason == "client"

    def test_waiting_for_the_first_one_is_no_trouble(self, process: Standstill) -> None:
        assert not process.begins
        process.client("main", MAKING)
        assert (process.begins, process.reason) == (True, "client")
        process.client("main", "RuntimeError")
        assert not process.begins
