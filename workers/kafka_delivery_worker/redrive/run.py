"""A run over a backlog: dead letters sent again as ordinary sends, or discarded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from time import monotonic, sleep
from typing import Any

from celery.result import denied_join_result
from celery.states import READY_STATES, SUCCESS
from confluent_kafka import KafkaException
from redis.exceptions import RedisError

from kafka_delivery import app, send
from kafka_delivery.circuits import CLOSED, read
from kafka_delivery.errors import DeliveryError, EnqueueError, ParkingFullError
from kafka_delivery.faults import said_by
from kafka_delivery.marks import marked
from kafka_delivery.names import CLUSTER_SCOPE, REDRIVES, REVIVED, TOPIC_SCOPE
from kafka_delivery.record import Record
from kafka_delivery.redis_client import RedisClient
from kafka_delivery.settings import Settings
from kafka_delivery.tracing import passed_on

from ..broadcast import Broadcast
from ..counts import Counts
from ..dead_letter import DeadLetter
from ..envelopes import written_by
from ..parked_items import Reason, of_record
from ..parking import ParkingStore, Times
from ..run_lock import RunLock
from .backlog import Backlog, Span
from .done import RedriveError, script
from .ledger import Ledger
from .selection import PARK, Selection

log = logging.getLogger("kafka_delivery.redrive")

IN_FLIGHT = 200
"""Records whose outcome is not known yet: enough for a thousand a second, few enough to count duplicates by hand."""

COLLECT_S = 0.05
"""Between two looks for outcomes; for each look Redis is asked once."""

LOST_S = 5.0
"""A record that is under way for so long may have been parked on the way, of which no result tells."""

SILENCE_S = 300.0
"""With a closed circuit, no outcome for so long means that nobody works on the queue: retries take less. As long it is
waited for a Kafka that sends no more dead letters."""

STOPPING_S = 10.0
"""After a signal, for the outcomes of what is under way."""

NO_REASON = Reason(kind="", error_class="", error_message="")
"""Of an item that is only made to know where it would lie."""

REFUSED_IN_A_ROW = 50
"""So many refusals without a delivery between them: the cause is still there, and each round uses up a redrive."""


@dataclass(slots=True)
class Result:
    """What became of a run.

    Attributes:
        delivered: in their topics.
        refused: dead letters again, at the end of the topic.
        parked: sent too often before, or parked by a worker.
        left: chosen, and not sent all the same.
        in_flight: sent, and their outcomes not known when the run ended: they wait still, and are sent again.
        stopped: why it ended before its end, or "".
    """

    sent: int = 0
    delivered: int = 0
    refused: int = 0
    parked: int = 0
    left: int = 0
    in_flight: int = 0
    stopped: str = ""

    @property
    def done(self) -> int:
        """Dead letters that do not wait any more."""
        return self.delivered + self.refused + self.parked


class Redrive:
    """One run over a backlog.

    Args:
        settings: of the workers that it relies on.
        redis: the queue and results.
        store: takes what was redriven too often.
        backlog: where the dead letters are.
        lock: on the dead-letter topic, held by the caller.
        store_lock: on the parking store, the same; only with it is `whole` looked at.
        selection: which of them, and where they go.
        whole: dead letters that are parked instead, see `whole.letters`.
        rate: sends a second at most; None for as many as the workers take.
        limit: so many at most.
        stop: set by a signal.
        keep_going: also after REFUSED_IN_A_ROW.
        tell: called with the result so far, and what is waited for if it is.
    """

    def __init__(
        self,
        settings: Settings,
        redis: RedisClient,
        store: ParkingStore,
        backlog: Backlog,
        lock: RunLock,
        selection: Selection,
        whole: Iterable[DeadLetter] = (),
        store_lock: RunLock | None = None,
        *,
        rate: float | None,
        limit: int | None,
        stop: Broadcast,
        keep_going: bool,
        tell: Callable[[Result, str], None],
    ) -> None:
        self._settings, self._redis, self._backlog, self._lock = settings, redis, backlog, lock
        self._selection, self._rate, self._limit = selection, rate, limit
        self._stop, self._keep_going, self._tell = stop, keep_going, tell
        self._store, self._store_lock = store, store_lock
        self._whole = whole if store_lock is not None else ()
        self._publish = redis.client.register_script(script("send"))
        self._counts = Counts(redis, settings.counts_interval_s)
        self._flying: dict[str, _Sent] = {}
        self._in_a_row = 0
        self._news_at = self._open_at = monotonic()
        self._asked_at = self._due = 0.0
        self.result = Result()

    def run(self, spans: Sequence[Span]) -> Result:
        """Send what is chosen of `spans`; return what became of it.

        Raises:
            NotAloneError: another command may have its lock; nothing more is sent.
            RedriveError, RedisError, KafkaException: it cannot go on. What is done is done; what is not, waits.
        """
        self._ledger = Ledger(self._backlog, self._lock, spans, self._store, self._store_lock)
        taken = 0
        try:
            for letter in chain(self._letters(spans), self._whole):
                self._collect()
                if self._must_stop() or (self._limit is not None and taken >= self._limit):
                    break
                if letter is None:
                    continue
                fate = self._selection.fate(letter)
                if fate.record is None:  # it is left where it is
                    self._leave(letter, chosen=bool(fate.why))
                    continue
                if not self._make_room(letter):
                    break
                taken += 1
                self._ledger.take(letter)
                act = self._park if fate.what == PARK else self._send
                act(letter, fate.record)
            self._wait_for(lambda: not self._flying)
            self._settle_down()
            not_moved = self._ledger.end()
            self.result.stopped = self.result.stopped or not_moved
        finally:
            self.result.in_flight = len(self._flying)
            self._counts.stop()
        return self.result

    def _letters(self, spans: Sequence[Span]) -> Iterator[DeadLetter | None]:
        """Those of `spans`, as far as they can be read: what is under way then is waited for all the same."""
        try:
            yield from self._backlog.letters(spans, patience_s=SILENCE_S)
        except KafkaException as error:
            self.result.stopped = f"Kafka: {error.args[0].str()}"
        except RedriveError as error:
            self.result.stopped = str(error)

    # -- one letter
    def _leave(self, letter: DeadLetter, chosen: bool) -> None:
        self._ledger.leave(letter)
        self.result.left += chosen

    def _send(self, letter: DeadLetter, record: Record) -> None:
        key = app.backend.get_key_for_task(record.id)
        places = of_record(record, NO_REASON).places
        (parked_at,) = self._store.parked_at([places])
        self._flying[record.id] = _Sent(letter, record.topic, key, places, parked_at, monotonic())
        headers = marked({REVIVED: True, REDRIVES: letter.redrive_count + 1})

        def publish(producer: Any) -> None:
            options = {} if producer is None else {"producer": producer}
            # Nothing is subscribed to: outcomes are looked up, many at once.
            with denied_join_result(), passed_on():
                send.apply_async((record,), ignore_result=False, headers=headers, **options)

        # The result of an earlier send goes, which would tell that one's outcome.
        try:
            if self._settings.queue_on_redis:
                self._put(letter, [key], written_by(publish))
            else:
                self._put(letter, [key], ())
                publish(None)
        except EnqueueError as error:
            self.result.stopped = f"the queue did not confirm a record ({error.reason})"
        except RedisError as error:  # whether it is queued is unknown: it counts as under way
            self.result.stopped = f"the queue did not confirm a record ({said_by(error)})"
        self.result.sent += 1

    def _put(self, letter: DeadLetter, results: Sequence[str], messages: Sequence[tuple[str, str]]) -> None:
        """Queue messages and drop results, in one step, as long as the lock holds.

        Raises:
            NotAloneError: the lock is lost; nothing is done.
            RedisError: Redis refused, or did not answer.
        """
        lock = self._ledger.lock_of(letter)
        keys = [lock.key, *results, *(self._redis.prefix + queue for queue, _ in messages)]
        if not self._publish(keys, [lock.token, len(results), *(message for _, message in messages)]):
            raise lock.lost()

    def _park(self, letter: DeadLetter, record: Record) -> None:
        reason = Reason(
            kind="redriven",
            error_class=letter.error_class,
            error_code=letter.error_code,
            error_message=f"{letter.error_message}; sent again {letter.redrive_count} times, refused each time",
        )
        item = of_record(record, reason, retries=letter.retry_count, redrives=letter.redrive_count)
        try:
            self._store.park(item, self._ledger.lock_of(letter))
        except ParkingFullError as error:
            self.result.stopped = str(error)
            return  # it waits where it is
        self._counts.add("parked", letter.topic or "")
        self.result.parked += 1
        self._ledger.done([letter])

    # -- outcomes
    def _make_room(self, letter: DeadLetter) -> bool:
        """Wait until the next one may be sent; False if it may not."""
        if self._rate:
            # What was missed in a pause is not made up for, but for a second of it.
            self._due = max(self._due, monotonic() - 1.0) + 1 / self._rate

        def room() -> bool:
            size = sum(sent.letter.size for sent in self._flying.values()) + letter.size
            return (
                monotonic() >= self._due
                and len(self._flying) < IN_FLIGHT
                and (size <= self._settings.max_in_flight_bytes or not self._flying)
                and letter.message_id not in self._flying  # it died twice: one after the other, or results would mix
            )

        return self._wait_for(room)

    def _wait_for(self, condition: Callable[[], bool]) -> bool:
        while not condition():
            self._collect()
            if self._must_stop():
                return False
            self._stop.wait(COLLECT_S)
        return True

    def _settle_down(self) -> None:
        """After a signal or a reason to stop: what is under way may end."""
        deadline = monotonic() + STOPPING_S
        while self._flying and monotonic() < deadline:
            self._collect()
            sleep(COLLECT_S)

    def _collect(self) -> None:
        """See what became of the records under way; once in COLLECT_S."""
        now = monotonic()
        if now - self._asked_at < COLLECT_S:
            return
        self._asked_at = now
        self._backlog.done.check(self._lock)  # a process that was stopped for a while may have lost it
        if self._flying:
            flying = list(self._flying.values())
            stored = self._redis.client.mget([sent.key for sent in flying])
            ended = [sent for sent, meta in zip(flying, stored, strict=True) if meta and self._ends(meta)]
            ended += self._parked_on_the_way([sent for sent in flying if sent not in ended and now - sent.at > LOST_S])
            if ended:
                self._news_at = now
                self._ledger.done([sent.letter for sent in ended])
                self._put(ended[0].letter, [sent.key for sent in ended], ())
                for sent in ended:
                    del self._flying[sent.letter.message_id]
        else:
            self._news_at = now
        self._tell(self.result, self._waits_for())

    def _ends(self, stored: bytes) -> bool:
        meta = app.backend.decode_result(stored)
        if meta["status"] not in READY_STATES:
            return False
        if meta["status"] == SUCCESS:
            self.result.delivered += 1
            self._in_a_row = 0
        elif _is_dead_again(meta["result"]):
            self.result.refused += 1
            self._in_a_row += 1
        else:
            self.result.parked += 1
        return True

    def _parked_on_the_way(self, late: list[_Sent]) -> list[_Sent]:
        now = self._store.parked_at([sent.places for sent in late])
        found = [sent for sent, times in zip(late, now, strict=True) if _is_newer(times, sent.parked_at)]
        self.result.parked += len(found)
        return found

    def _must_stop(self) -> bool:
        if self._stop.sent:
            self.result.stopped = self.result.stopped or "it was told to"
        elif self._in_a_row >= REFUSED_IN_A_ROW and not self._keep_going:
            self.result.stopped = (
                f"{self._in_a_row} in a row were refused again: the cause is still there (--keep-going goes on)"
            )
        elif self._flying and self._silent_s() > SILENCE_S and not self._is_known_to_wait():
            self.result.stopped = f"no outcome for {SILENCE_S:.0f} s: does a worker run?"
        return bool(self.result.stopped)

    def _waits_for(self) -> str:
        """Why nothing moves, where that is known."""
        if not self._flying or monotonic() - self._news_at < LOST_S:
            return ""
        return "the circuit is open" if self._is_known_to_wait() else "no outcome yet: retries? or does no worker run?"

    def _is_known_to_wait(self) -> bool:
        """Whether the circuit explains the silence; then it is waited for."""
        topics = {sent.topic for sent in self._flying.values()}
        scopes = [CLUSTER_SCOPE, *(TOPIC_SCOPE + topic for topic in topics)]
        known = any(one.state != CLOSED for one in read(self._redis, self._settings.cluster, scopes))
        if known:
            self._open_at = monotonic()
        return known

    def _silent_s(self) -> float:
        """Since the last outcome, or since a circuit was last seen open: when it has closed, outcomes take a moment."""
        return monotonic() - max(self._news_at, self._open_at)


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """A record whose outcome is not known yet.

    Attributes:
        letter: its dead letter.
        topic: where it goes.
        key: of its result.
        places: ids under which it lies if it is parked: its own, or one beside it if that is another content's.
        parked_at: when something was parked under each of these before.
        at: when it was sent.
    """

    letter: DeadLetter
    topic: str
    key: str
    places: tuple[str, str]
    parked_at: Times
    at: float


def _is_newer(times: Times, before: Times) -> bool:
    return any(now not in (None, then) for now, then in zip(times, before, strict=True))


def _is_dead_again(result: Any) -> bool:
    """Whether a send failed for what makes a dead letter; anything else was parked."""
    return isinstance(result, DeliveryError)


def discard(
    backlog: Backlog,
    lock: RunLock,
    spans: Sequence[Span],
    selection: Callable[[DeadLetter], bool],
    store: ParkingStore,
    *,
    limit: int | None,
    audit: Mapping[str, Any],
    stop: Broadcast,
    tell: Callable[[int], None],
) -> int:
    """Let dead letters wait no more, without sending them; return how many. Kafka keeps them as long as it does.

    Raises:
        NotAloneError, RedriveError, RedisError, KafkaException: it cannot go on. What is discarded is discarded.
    """
    ledger = Ledger(backlog, lock, spans, store)
    batch: list[DeadLetter] = []
    total = 0
    for letter in backlog.letters(spans):
        if stop.sent or (limit is not None and total + len(batch) >= limit):
            break
        if letter is not None and selection(letter):
            ledger.take(letter)
            batch.append(letter)
        elif letter is not None:
            ledger.leave(letter)
        if len(batch) >= IN_FLIGHT or (letter is None and batch):
            ledger.done(batch, audit)
            total += len(batch)
            batch = []
            tell(total)
    ledger.done(batch, audit if batch else None)
    if not_moved := ledger.end():
        log.warning("redrive.not_committed error=%r", not_moved)
    tell(total + len(batch))
    return total + len(batch)
