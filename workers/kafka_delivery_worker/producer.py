"""One Kafka client per process; a record is delivered when its own delivery report says so.

librdkafka does the work: batches, order, its own resends, idempotence. This module adds what it leaves to its users:
a report for every record come what may, back-pressure instead of an error when its buffer is full, the reason behind
a timeout, and a new client when one has failed for good or when its certificates were renewed.

A thread makes the clients, since that may fail or hang for reasons of its own: a file that is not there, a token
server that is away. `client` says what can go wrong. No record is charged for it.

Concurrency: `produce` may be called from any thread; reports arrive in whichever thread polls, mostly the producer's
own, so `on_report` must not block.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import monotonic, time
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException

from kafka_delivery.errors import SettingsError
from kafka_delivery.names import REDRIVE_COUNT
from kafka_delivery.record import Record
from kafka_delivery.settings import DEAD_LETTER_HEADROOM_BYTES, Settings

from .classify import Kind, verdict
from .client import (
    OAUTH_CB,
    SURROUNDINGS,
    Connection,
    NotMadeError,
    TokenSource,
    connect,
    identities,
    kafka_id,
    own_class,
)
from .dotted import load
from .standstill import NO_ANSWER

log = logging.getLogger("kafka_delivery.producer")

POLL_S = 0.5
"""How long the polling thread sleeps in librdkafka, which wakes it for a report; only closing waits for it."""

MAX_RESENDS = 2
"""How often a record is handed to a new client by itself. A client that fails at once would otherwise loop."""

LOST_REPORT_WAIT_S = 1.0
"""After a client failed and was purged, its reports are there within milliseconds; what is missing is lost."""

MISSING = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC)

CHECK_TOKEN_S = 2.0
"""Longest wait for a token when a worker starts, which goes on without one, and in `doctor`."""

MECHANISM = ("sasl.mechanism", "sasl.mechanisms")
"""librdkafka has two names for it."""

REPEATED_ERROR_S = 30.0
"""A broker that is down is reported every two seconds; the same error is logged once in this time."""

FIRST_CLIENT_S = 10.0
"""Longest wait of a record for a client, in threads that hold up nobody else."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Between two tries to make a client; it doubles."""

LOOK_S = 10.0
"""How often the files of the client are looked at, and which Kafka it is connected to."""

ASK_S, LONGEST_ASK_S = 1.0, 30.0
"""How long a question to Kafka for its id may take, in seconds. While Kafka is away, one follows the other. Those of a
new client have twice as long each time: a Kafka that is slow is no Kafka that is away."""

RETIRED_POLL_S = 0.05
"""How long a poll of a client that takes no new records waits for a report."""

RETIRED_S = 1.0
"""A client that takes no new records stays at least so long: a thread may be about to hand it one."""

RETIRED_GRACE_S = 5.0
"""A client that takes no new records stays at most this much longer than a record may take."""

new_tuple = tuple.__new__
"""Makes a NamedTuple without its own constructor, which is a Python function: there are two for each record."""


class Outgoing(NamedTuple):
    """A record as librdkafka takes it."""

    topic: str
    value: bytes | None
    key: bytes | None
    headers: list[tuple[str, str | bytes | None]]
    partition: int | None
    timestamp_ms: int

    @classmethod
    def of(cls, record: Record, redrives: int = 0) -> Outgoing:
        """`record`, for its own topic; with `redrives`, how often it was sent again from its dead-letter topic."""
        headers: list[tuple[str, str | bytes | None]] = [*record.kafka_headers]
        if redrives:
            headers.insert(1, (REDRIVE_COUNT, str(redrives)))  # before the record's own of that name, if it has one
        return cls(record.topic, record.value_bytes, record.key_bytes, headers, record.partition, record.timestamp_ms)

    def __repr__(self) -> str:
        return f"Outgoing(topic={self.topic!r})"


class Report(NamedTuple):
    """What became of a record.

    Attributes:
        error: None when it is in the log.
        cause: for a timeout, the last error of a broker while the record waited: the timeout itself says nothing.
        partition, offset, timestamp_ms: where and when, if it is in the log.
    """

    error: KafkaError | None
    cause: KafkaError | None = None
    partition: int | None = None
    offset: int | None = None
    timestamp_ms: int | None = None


class NoClientError(Exception):
    """Raised by `Producer.produce` when there is no client now. Nothing was handed over, and no report will come.

    The text is a short reason without secrets.
    """


class _Pending:
    """A record between `produce` and its report, which librdkafka delivers by calling this."""

    __slots__ = ("connection", "on_report", "outgoing", "producer", "resends", "what")

    def __init__(
        self,
        producer: Producer,
        outgoing: Outgoing,
        on_report: Callable[..., None],
        what: tuple[Any, ...],
        resends: int = 0,
    ) -> None:
        self.producer = producer
        self.outgoing = outgoing
        self.on_report = on_report
        self.what = what
        self.connection: Connection | None = None
        self.resends = resends

    def __call__(self, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            self.producer._failed(self, error, message.latency())
            return
        where = (None, None, message.partition(), message.offset(), message.timestamp()[1])
        self.producer._finish(self, new_tuple(Report, where))


class Producer:
    """A librdkafka producer whose client is made by a thread, from the first record on or after `start`.

    Args:
        settings: of the worker.
        on_error: called with the code of each error of the client itself or of its brokers.
        on_failure: called with topic and code of each record that is reported as failed.
        on_client: called by the thread that makes clients, with "" as soon as there is one, and with the reason after
            each try that failed. Where that thread cannot be started, the thread that needs a client calls it.
        on_collected: called after each look at the reports by a thread of the producer's own; who calls `serve` knows.
        admit: called by that thread with the id of the Kafka that a client is connected to, before it takes a record,
            and now and then later. It raises `NotMadeError` if no record must reach that Kafka.
        **properties: librdkafka properties that differ from them.
    """

    def __init__(
        self,
        settings: Settings,
        on_error: Callable[[int], None] | None = None,
        on_failure: Callable[[str, int], None] | None = None,
        on_client: Callable[[str], None] | None = None,
        on_collected: Callable[[], None] = lambda: None,
        admit: Callable[[str], None] | None = None,
        **properties: Any,
    ) -> None:
        self._told = on_error
        self._admit = admit
        self._candidate: Connection | None = None
        """A client of which it is not known yet which Kafka it is connected to."""
        self._asking = threading.Lock()
        """Held while the client that takes records is asked which Kafka it is, and while clients are ended. A candidate
        is ended by the thread that asks it."""
        self._ask_s = ASK_S
        """How long the next question may take."""
        self._doubtful = False
        """All brokers were away since that was known, so it may be another one."""
        self._on_failure = on_failure
        self._on_client = on_client
        self._on_collected = on_collected
        self._properties = librdkafka_properties(settings) | properties
        function = self._properties.pop("oauth_cb", None)
        self._tokens = None if function is None else TokenSource(function)
        self._drained_s = settings.message_timeout_ms / 1000 + RETIRED_GRACE_S
        self._changed = threading.Condition(threading.RLock())
        """Guards all of this. Notified when there is another client, or none is wanted any more."""
        self._made: Connection | None = None
        """The client that takes records."""
        self._retired: dict[Connection, float] = {}
        """Clients that take no more records, and since when."""
        self._waiting: list[tuple[_Pending, int]] = []
        """Records of a failed client that wait for the next one, and what is reported of them if there is none."""
        self._wait_till = 0.0
        self._wanted = False
        self._failing = False
        """The last try to make a client failed."""
        self._missing = ""
        self._maker: threading.Thread | None = None
        self._failed_at = -FIRST_PAUSE_S
        self._pending: set[_Pending] = set()
        self._closing = False
        self._wake: Callable[[], None] | None = None
        self._last_error: tuple[float, KafkaError] | None = None
        self._logged: dict[int, float] = {}
        self.replaced = 0
        self.waited_s = 0.0
        """For room in the client's buffer."""

    def start(self) -> None:
        """Let a thread make the client, unless there is one. The thread tries until it has one; this does not wait."""
        with self._changed:
            if self._made is not None or self._closing:
                return
            self._wanted = True
            self._changed.notify_all()
            if self._maker is not None or monotonic() - self._failed_at < FIRST_PAUSE_S:
                return
            maker = threading.Thread(target=self._keep_client, name="kafka-delivery-client", daemon=True)
            try:
                maker.start()
                self._maker = maker
                return
            except RuntimeError as error:  # `serve`, or the next record, tries again
                why = f"no thread to make it: {type(error).__name__}"
        self._not_made(why)

    def wait_for_client(self, timeout_s: float) -> None:
        """Wait until there is a client, or until a try to make one has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._made is not None or self._failing or self._closing, timeout_s)

    def produce(self, outgoing: Outgoing, on_report: Callable[..., None], *what: Any) -> None:
        """Hand a record over. Waits while the buffer is full.

        Args:
            outgoing: the record.
            on_report: called once, with `what` and then the `Report`.
            what: tells its reports apart; a function made for each record would cost more than the call.

        Raises:
            NoClientError: there is no client. A caller that polls by itself gets this at once; other threads wait up
                to `FIRST_CLIENT_S` seconds for a client first.
        """
        pending = _Pending(self, outgoing, on_report, what)
        self._pending.add(pending)
        try:
            self._hand_over(pending)
        except BaseException:  # nothing was handed over, and no report will come
            self._pending.discard(pending)
            raise

    def poll_by_caller(self, wake: Callable[[], None]) -> None:
        """Say, before `start` and the first record, that the caller will `serve` while records are in flight.

        Args:
            wake: called, in any thread, for each record that is handed over.
        """
        self._wake = wake

    def serve(self, timeout_s: float) -> None:
        """Collect reports for up to `timeout_s`; they are delivered in this thread."""
        made = self._made
        if made is None:
            if self._wanted and self._maker is None:
                self.start()  # there was no thread for it
            if self._waiting and monotonic() >= self._wait_till:
                self._drop_waiting()
            return
        failure = self._serve(made, partial(made.client.poll, timeout_s))
        if failure is not None:
            self._replace(made, failure)

    def answers(self, topic: str, timeout_s: float) -> bool:
        """Whether any broker says within `timeout_s` what it knows of a topic; it is not created by asking."""
        made = self._made
        try:
            return made is not None and bool(made.client.list_topics(topic, timeout_s))
        except (KafkaException, RuntimeError):  # it cannot be reached, or the client was closed meanwhile
            return False

    def lacks(self, topic: str, timeout_s: float) -> bool:
        """Whether the cluster says, within `timeout_s`, that there is no such topic; it is not created by asking."""
        try:
            error = self._current().client.list_topics(topic, timeout_s).topics[topic].error
        except (NoClientError, KafkaException, RuntimeError):
            return False  # it cannot be reached, or the client was closed meanwhile
        return error is not None and error.code() in MISSING

    @property
    def has_client(self) -> bool:
        """Whether records can be handed over now."""
        return self._made is not None

    @property
    def missing(self) -> str:
        """Why there is no client; "" if there is one, or if the first one is being made."""
        return "" if self._made is not None else self._missing

    @property
    def in_flight(self) -> int:
        """Records without a report yet."""
        return len(self._pending)

    def in_flight_by_topic(self) -> Counter[str]:
        """The same for each topic."""
        return Counter(one.outgoing.topic for one in list(self._pending))

    @property
    def bytes_in_flight(self) -> int:
        """Of their keys and values."""
        return sum(len(one.outgoing.value or b"") + len(one.outgoing.key or b"") for one in list(self._pending))

    def give_back(self) -> None:
        """Take no more records, and report those in flight as purged. For those Kafka has already, that is unknown."""
        with self._changed:  # no client is installed any more
            self._closing = True
        for connection in self._connections():
            self._serve(connection, connection.client.purge)
        self._drop_waiting()

    def close(self, timeout_s: float) -> None:
        """Deliver what is in flight within `timeout_s`, report the rest as purged, and end the client.

        Waits no longer for a client that is being made: one that appears too late is closed by the thread that made it.
        """
        deadline = monotonic() + timeout_s
        if not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or not self._waiting, timeout_s)
            for connection in self._connections():
                self._serve(connection, partial(connection.client.flush, max(0.0, deadline - monotonic())))
        self.give_back()
        connections = self._connections()
        for connection in connections:
            self._serve(connection, partial(connection.client.flush, LOST_REPORT_WAIT_S))
        for pending in self._pending.copy():
            self._finish(pending, Report(KafkaError(KafkaError._PURGE_INFLIGHT)))
        with self._asking:
            for connection in connections:
                self._serve(connection, connection.close)
        with self._changed:
            self._retired.clear()
            self._changed.notify_all()

    # -- handing over
    def _hand_over(self, pending: _Pending) -> None:
        while pending in self._pending:  # another thread may find that its client has failed, and send it again
            if self._closing:
                self._finish(pending, Report(KafkaError(KafkaError._PURGE_QUEUE)))
                return
            made = pending.connection = self._made or self._current()
            topic, value, key, headers, partition, timestamp_ms = pending.outgoing
            try:  # all by position: names would double what the call costs
                made.produce(
                    topic, value, key, -1 if partition is None else partition, pending, None, timestamp_ms, headers
                )
                if self._wake is not None:
                    self._wake()
                return
            except BufferError:
                since = monotonic()
                self._serve(made, partial(made.client.poll, 0.1))  # back-pressure: reports make room
                with self._changed:
                    self.waited_s += monotonic() - since
            except KafkaException as failure:
                error: KafkaError = failure.args[0]
                if error.code() == KafkaError._UNKNOWN_TOPIC:
                    # It remembers what a broker said. Whether a record gets that code or the broker's is chance; under
                    # two names half of them would be missing from a summary, a filter, an alert.
                    error = KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)
                if verdict(error.code()).kind is not Kind.FATAL:
                    self._finish(pending, Report(error))
                    return
                pending.connection = None  # this one is sent again here
                self._replace(made, error)
                pending.resends += 1
                if pending.resends > MAX_RESENDS:
                    self._finish(pending, Report(error))
            except RuntimeError:  # closed meanwhile, in another thread
                self._closed(made)

    def _current(self) -> Connection:
        """The client that takes records; it is waited for where nobody else is held up.

        Raises:
            NoClientError: there is none.
        """
        self.start()
        with self._changed:
            if self._wake is None and threading.current_thread() is not self._maker:
                self._changed.wait_for(
                    lambda: self._closing or self._made is not None or self._maker is None, FIRST_CLIENT_S
                )
            if self._made is None:
                raise NoClientError(self._missing or "the client is being made")
            return self._made

    def _resend(self, pending: _Pending, error: KafkaError, maybe_sent: bool) -> None:
        """Send it again as a new one, once, whichever threads ask for it; a late report is then nobody's.

        Raises nothing: it runs in whichever thread polls.
        """
        if pending.resends >= MAX_RESENDS:
            self._finish(pending, Report(error))
            return
        again = _Pending(self, pending.outgoing, pending.on_report, pending.what, pending.resends + 1)
        self._pending.add(again)  # first: the record is in flight all the time
        if self._take(pending):
            self._send_or_wait(again, KafkaError._PURGE_INFLIGHT if maybe_sent else KafkaError._PURGE_QUEUE)
        else:
            self._pending.discard(again)

    def _send_or_wait(self, pending: _Pending, unsent: int) -> None:
        """Hand it to the client, or let it wait for one that is about to be made.

        Args:
            pending: the record.
            unsent: what is reported of it when there is no client; the fault is this process's then.
        """
        while True:
            try:
                if self._made is not None:
                    self._hand_over(pending)
                    return
            except NoClientError:
                pass
            except Exception as error:
                log.error("producer.not_resent error=%s", type(error).__name__)
                self._finish(pending, Report(KafkaError(unsent)))
                return
            with self._changed:
                if self._made is not None and not self._closing:
                    continue  # it appeared meanwhile
                waits = not self._closing and not self._failing
                if waits:
                    if not self._waiting:
                        self._wait_till = monotonic() + FIRST_CLIENT_S
                    self._waiting.append((pending, unsent))
            break
        self.start()
        if not waits:
            self._finish(pending, Report(KafkaError(unsent)))

    def _drop_waiting(self) -> None:
        """Report the records that wait for a client as not sent, and let all threads look that wait for one."""
        with self._changed:
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for pending, code in waiting:
            self._finish(pending, Report(KafkaError(code)))

    # -- making clients, in a thread
    def _keep_client(self) -> None:
        """Make a client when one is wanted, look after its files, and end those that take no more records."""
        pause_s, look_at = FIRST_PAUSE_S, 0.0
        while not self._closing or self._retired:
            try:
                made = self._made
                if self._closing:
                    pass  # `close` ends the clients
                elif made is None and self._wanted:
                    if self._make():
                        pause_s, look_at = FIRST_PAUSE_S, monotonic() + LOOK_S
                    else:
                        self._pause(pause_s)
                        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                elif made is not None:
                    due = monotonic() >= look_at
                    if due:
                        self._renew(made)
                        look_at = monotonic() + LOOK_S
                    if due or self._doubtful:
                        self._look_again()
                self._serve_retired()
                self._idle(look_at)
            except Exception:  # without this thread there would never be a client again
                log.exception("producer.maker_failed")
                self._pause(LONGEST_PAUSE_S)
        self._drop_candidate()

    def _idle(self, look_at: float) -> None:
        """Wait until there is something to do."""
        with self._changed:
            if not (self._retired or self._closing or self._doubtful or (self._made is None and self._wanted)):
                self._changed.wait(None if self._made is None else max(0.0, look_at - monotonic()))

    def _pause(self, pause_s: float) -> None:
        """Wait before the next try; not when the producer is closing."""
        end = monotonic() + pause_s
        while not self._closing and (left := end - monotonic()) > 0:
            self._serve_retired()
            with self._changed:
                if not self._retired:
                    self._changed.wait_for(lambda: self._closing or bool(self._retired), left)

    def _make(self) -> bool:
        """Make a client; whether there is one now, or one that only waits for Kafka's answer."""
        try:
            if self._candidate is None:
                self._candidate = self._connect()
            if not self._is_admitted(self._candidate):
                if not self._closing:
                    self._not_made(NO_ANSWER)
                return True  # the answer was waited for: no pause
            if self._candidate.failed:
                raise NotMadeError("the client has failed")
        except NotMadeError as error:
            self._drop_candidate()
            self._not_made(str(error))
            return False
        fresh, self._candidate = self._candidate, None
        self._install(fresh)
        return True

    def _drop_candidate(self) -> None:
        candidate, self._candidate = self._candidate, None
        if candidate is not None:
            candidate.current = False
            candidate.close()

    # -- which Kafka it is
    def _is_admitted(self, connection: Connection) -> bool:
        """Whether a client may take records; False while Kafka does not say which one it is.

        Until then it must not get any: librdkafka would send them as soon as it is connected, wherever that is.

        Raises:
            NotMadeError: it is the wrong Kafka, or nobody knows.
        """
        if self._admit is None:
            return True
        asked = monotonic()
        here, failure = self._ask_again(connection) if connection is self._made else self._ask(connection)
        if failure is not None and connection is self._made:
            self._replace(connection, failure)
            return False
        if failure is not None:
            raise NotMadeError(f"the client has failed: {failure.name()}")
        if here is None:
            self._pause(max(0.0, asked + ASK_S - monotonic()))
            return False
        self._ask_s = ASK_S
        self._admit(here)
        return True

    def _ask(self, connection: Connection) -> tuple[str | None, KafkaError | None]:
        """Return the id of a client's Kafka, None without an answer, and the error if the client has failed."""
        timeout_s, self._ask_s = self._ask_s, min(2 * self._ask_s, LONGEST_ASK_S)
        return self._asked(connection, timeout_s)

    def _ask_again(self, connection: Connection) -> tuple[str | None, KafkaError | None]:
        """The same of the client that takes records, which must not end meanwhile, and soon where it has to."""
        with self._asking:
            return (None, None) if self._closing else self._asked(connection, ASK_S)

    def _asked(self, connection: Connection, timeout_s: float) -> tuple[str | None, KafkaError | None]:
        try:
            return kafka_id(connection.client, timeout_s), None
        except KafkaException:
            return None, self._serve(connection, partial(connection.client.poll, 0))  # what its brokers say

    def _look_again(self) -> None:
        """Look whether Kafka is still the same. Another one may have come up in its place, or another be meant now."""
        made, doubtful = self._made, self._doubtful
        self._doubtful = False  # first: brokers that go away meanwhile are noticed
        if made is None:
            return
        try:
            if not self._is_admitted(made):
                self._doubtful |= doubtful
            return
        except NotMadeError as error:
            why = str(error)
        with self._changed:
            if self._made is not made or self._closing:
                return
            made.current, self._made, self._wanted = False, None, True
            self._retired[made] = monotonic()
        self._not_made(why)  # before its records are reported: nothing is claimed any more
        self._serve(made, made.client.purge)

    def _connect(self) -> Connection:
        """A new client, and what polls it.

        Raises:
            NotMadeError: it cannot be made now.
        """
        own: list[Connection] = []
        connection = connect(
            self._properties,
            lambda error: self._on_error(error, alone=bool(own) and not own[0].current),
            self._tokens,
        )
        own.append(connection)
        if self._wake is None:
            polling = threading.Thread(
                target=self._poll, args=(connection,), name="kafka-delivery-reports", daemon=True
            )
            try:
                polling.start()
            except RuntimeError as error:
                connection.close()
                raise NotMadeError(f"no thread to poll it: {type(error).__name__}") from None
        return connection

    def _install(self, fresh: Connection) -> None:
        """Let new records take this client. One that takes them now keeps what it has until its reports are there."""
        waiting: list[tuple[_Pending, int]] = []
        with self._changed:
            before, late = self._made, self._closing
            if not late:
                self._made, self._missing, self._failing, self._wanted = fresh, "", False, False
                if before is not None:
                    before.current = False
                    self._retired[before] = monotonic()
                waiting, self._waiting = self._waiting, []
                self._changed.notify_all()
        if late:
            fresh.current = False
            fresh.close()
        elif before is None:
            log.info("producer.ready")
            self._tell("")
        for pending, unsent in waiting:
            self._send_or_wait(pending, unsent)

    def _not_made(self, why: str) -> None:
        with self._changed:
            self._missing, self._failing, self._failed_at = why, True, monotonic()
            self._changed.notify_all()
        if why != NO_ANSWER:
            log.warning("producer.no_client reason=%r", why)
        self._tell(why)
        self._drop_waiting()

    def _tell(self, why: str) -> None:
        if self._on_client is not None:
            try:
                self._on_client(why)
            except Exception:
                log.exception("producer.on_client_failed")

    def _renew(self, made: Connection) -> None:
        """Make a new client if the files of this one have changed; keep this one if that fails."""
        now = identities(self._properties)
        changed = ",".join(name for name in now if now[name] != made.files[name])
        if not changed:
            return
        fresh = None
        try:
            fresh = self._connect()
            if not self._is_admitted(fresh):
                raise NotMadeError(NO_ANSWER)  # with these files, or at all
        except NotMadeError as error:  # half of a pair, perhaps: the other half is on its way
            log.warning("producer.not_renewed changed=%s reason=%r", changed, str(error))
            if fresh is not None:
                fresh.current = False
                fresh.close()
            return
        log.info("producer.renewed changed=%s in_flight=%d", changed, len(self._pending))
        self._install(fresh)

    def _serve_retired(self) -> None:
        """Collect reports of clients that take no more records, and end those that hold none."""
        for connection, since in list(self._retired.items()):
            failure = self._serve(connection, partial(connection.client.poll, RETIRED_POLL_S))
            if failure is not None:
                self._replace(connection, failure)
            if self._closing:
                continue  # `close` does the rest
            age_s = monotonic() - since
            if age_s > self._drained_s:
                self._serve(connection, connection.client.purge)
                self._serve(connection, partial(connection.client.flush, LOST_REPORT_WAIT_S))
            elif not connection.failed and (age_s < RETIRED_S or self._held_by(connection)):
                continue
            with self._changed:
                if self._closing:
                    continue
                del self._retired[connection]
            self._serve(connection, connection.close)
            for pending in self._held_by(connection):  # their reports are lost
                self._resend(pending, KafkaError(KafkaError._PURGE_INFLIGHT), maybe_sent=True)

    def _connections(self) -> list[Connection]:
        with self._changed:
            return [*([] if self._made is None else [self._made]), *self._retired]

    def _held_by(self, connection: Connection) -> list[_Pending]:
        return [pending for pending in self._pending.copy() if pending.connection is connection]

    # -- polling, and clients that fail
    def _poll(self, connection: Connection) -> None:
        while connection.current and (self._pending or not self._closing):
            failure = self._serve(connection, partial(connection.client.poll, POLL_S))
            self._on_collected()
            if failure is not None:
                self._replace(connection, failure)

    def _serve(self, connection: Connection, call: Callable[[], Any]) -> KafkaError | None:
        """Let librdkafka call back. Returns the error if it has failed for good, which it raises here.

        When a report is due in the same moment, its callback runs with that exception pending and dies of it with a
        SystemError; `_replace` finds its record (confluent-kafka-python, error_cb).
        """
        try:
            call()
        except KafkaException as failure:
            error: KafkaError = failure.args[0]
            if error.fatal() or verdict(error.code()).kind is Kind.FATAL:
                return error
            log.warning("producer.poll_failed code=%s", error.name())
        except SystemError:
            return KafkaError(KafkaError._FATAL)
        except RuntimeError:
            self._closed(connection)
        return None

    def _closed(self, connection: Connection) -> None:
        """Another thread has closed it: as one that takes no more records, or with the producer."""
        if connection.current:
            self._closing = True

    def _replace(self, connection: Connection, error: KafkaError) -> None:
        """Drop a client that has failed, once, and send again what it held.

        The next one is made for these records, or for the next record; without any there is none, so that a client
        which fails at once (say, for want of a permission) is not made again and again.
        """
        with self._changed:
            if connection.failed or self._closing:
                return
            connection.failed, connection.current = True, False
            if self._made is connection:
                self._made = None
                self._missing = f"the last client has failed: {error.name()}"
            self.replaced += 1
        log.error("producer.replaced code=%s in_flight=%d", error.name(), len(self._pending))
        self._serve(connection, connection.client.purge)
        deadline = monotonic() + LOST_REPORT_WAIT_S
        while len(connection.client) and monotonic() < deadline:
            self._serve(connection, partial(connection.client.flush, 0.1))
        for pending in self._held_by(connection):
            self._resend(pending, error, maybe_sent=True)
        with self._changed:
            self._retired.setdefault(connection, monotonic())
            self._changed.notify_all()

    # -- reports
    def _failed(self, pending: _Pending, error: KafkaError, waited_s: float | None) -> None:
        connection = pending.connection
        if connection is not None and connection.failed and not self._closing:
            self._resend(pending, error, verdict(error.code()).duplicate)
            return
        cause = None
        if error.code() == KafkaError._MSG_TIMED_OUT and self._last_error:
            at, last = self._last_error
            cause = last if at >= monotonic() - (waited_s or 0) else None
        self._finish(pending, Report(error, cause))

    def _finish(self, pending: _Pending, report: Report) -> None:
        if not self._take(pending):
            return
        try:
            if report.error is not None and self._on_failure is not None:
                self._on_failure(pending.outgoing.topic, report.error.code())
            pending.on_report(*pending.what, report)
        except Exception:  # it would end the polling, and librdkafka would be taken for broken
            log.exception("producer.report_failed")

    def _take(self, pending: _Pending) -> bool:
        """Whether it is in flight, which it is no longer then; of several threads one is told so."""
        try:
            self._pending.remove(pending)
        except KeyError:
            return False
        return True

    def _on_error(self, error: KafkaError, alone: bool) -> None:
        """Note an error of a client or its brokers.

        Args:
            error: what happened.
            alone: the client takes no more records, so its error says nothing of the one that does.
        """
        now = monotonic()
        if not alone:
            self._last_error = (now, error)
            if error.code() == KafkaError._ALL_BROKERS_DOWN:
                self._doubtful = True
                with self._changed:
                    self._changed.notify_all()  # the thread that looks
            if self._told is not None:
                self._told(error.code())
        if now - self._logged.get(error.code(), -REPEATED_ERROR_S) >= REPEATED_ERROR_S:
            self._logged[error.code()] = now
            log.warning("producer.error code=%s detail=%r", error.name(), error.str())


def librdkafka_properties(s: Settings) -> dict[str, Any]:
    """The client's configuration. What the owner of the worker may not change comes last."""
    properties: dict[str, Any] = {
        "client.id": "kafka-delivery",
        "partitioner": "murmur2_random",  # keys land where Java's producer puts them
        "compression.type": "lz4",
        "socket.keepalive.enable": True,
        "reconnect.backoff.max.ms": 2_000,  # librdkafka's 10 s would be added to every outage
        "queue.buffering.max.messages": 20_000,  # the queue in Redis is the buffer
        # What is stuck besides, and at least one record with its neighbours; never what makes the event loop wait.
        "queue.buffering.max.kbytes": max(65_536, 2 * max(s.max_in_flight_bytes, s.max_record_bytes) // 1024),
        "allow.auto.create.topics": False,  # a typo is an error, not a topic
        **s.producer,
        "bootstrap.servers": s.bootstrap_servers,
        "acks": "all",
        "enable.idempotence": True,
        "linger.ms": s.linger_ms,
        "request.timeout.ms": s.request_timeout_ms,
        "message.timeout.ms": s.message_timeout_ms,
        "topic.metadata.propagation.max.ms": s.topic_propagation_ms,
        "message.max.bytes": s.max_record_bytes + DEAD_LETTER_HEADROOM_BYTES,
    }
    if s.oauth_cb:
        properties["oauth_cb"] = load("KAFKA_DELIVERY_OAUTH_CB", s.oauth_cb)
    return properties


def check_properties(s: Settings) -> str:
    """Ask librdkafka whether it knows and accepts all properties, without connecting anywhere.

    Returns:
        What is not there now, though the settings may be right: a file, a token, a plugin, threads. "" if a client can
        be made.

    Raises:
        SettingsError: a setting is wrong; the text names the property, never its value.
    """
    properties = librdkafka_properties(s) | {"log_level": 0}
    del properties["bootstrap.servers"]
    function = properties.pop("oauth_cb", None)
    if function is not None and "OAUTHBEARER" not in (str(s.producer.get(name)).upper() for name in MECHANISM):
        raise SettingsError(f"{OAUTH_CB}: it is of use with sasl.mechanism OAUTHBEARER only; set that, or remove it")
    try:
        source = None if function is None else TokenSource(function)
        connect(properties, _ignore, source, CHECK_TOKEN_S).close()
    except NotMadeError as error:
        missing = str(error)
    else:
        return ""
    # Whose fault is that? What needs nothing but the properties themselves tells.
    rest = {name: value for name, value in properties.items() if name not in SURROUNDINGS}
    if function is not None:
        rest["oauth_cb"] = lambda _: ("token", time() + 3600)
    try:
        own_class()(rest)
    except KafkaException as error:
        if error.args[0].code() == KafkaError._CRIT_SYS_RESOURCE:
            return missing
        # librdkafka quotes the value of some; the name is enough to find it.
        named = re.search(r'property[: ]+"([^"]+)"', error.args[0].str())
        what = f"{named[1]} is unknown or has a value that it does not take" if named else error.args[0].name()
        raise _refused(f"librdkafka refuses it: {what}") from None
    except (TypeError, ValueError) as error:
        raise _refused(f"{type(error).__name__}: a property has the wrong type") from None
    except (RuntimeError, MemoryError, OSError):
        return missing
    return missing


def ask_for_id(s: Settings, timeout_s: float) -> str:
    """Return the id of the Kafka that the settings name; "" if it has none.

    Raises:
        NotMadeError: no client can be made now, or no broker answers within `timeout_s`.
    """
    properties = librdkafka_properties(s) | {"log_level": 0}
    function = properties.pop("oauth_cb", None)
    asking = connect(properties, _ignore, None if function is None else TokenSource(function), CHECK_TOKEN_S)
    try:
        return kafka_id(asking.client, timeout_s)
    except KafkaException:
        raise NotMadeError(NO_ANSWER) from None
    finally:
        asking.close()


def _refused(why: str) -> SettingsError:
    return SettingsError(f"KAFKA_DELIVERY_PRODUCER: {why}")


def _ignore(error: KafkaError) -> None:
    """A client that connects nowhere has nothing to say."""
