"""The circuit breaker of a worker process: whether records may be sent now.

The circuits are the fleet's, in Redis; this is one process's view of them, and its contribution. A record costs an
integer while they are closed: outcomes are counted here and reported a few times a second, by a thread that learns in
the same step how all circuits are. When Redis is away the process goes by a circuit of its own, with the same rules.

A process may also be the only one that fails, say for its host's network. Then the fleet's circuit stays closed, and
the process pauses itself: its own circuit opens, and the others get the queue.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from time import monotonic

from confluent_kafka import KafkaError

from kafka_delivery import settings
from kafka_delivery.circuits import CLOSED
from kafka_delivery.disposition import Circuit
from kafka_delivery.faults import QUEUE_FAULTS
from kafka_delivery.names import CLUSTER_SCOPE, TOPIC_SCOPE
from kafka_delivery.redis_client import RedisClient

from ..classify import Scope, verdict
from ..standstill import NO_ANSWER, Standstill
from .attendance import Attendance
from .outcomes import LOCAL, Admission, Probe, Tally, count_failure, count_ok, of_probe
from .own_pause import OwnPause
from .probes import SEEK_PAUSE_S, Probes, Settled
from .rules import LocalCircuit, Rules
from .silence import Silences
from .stall import Stall
from .store import CircuitStore, Counted, View

log = logging.getLogger("kafka_delivery.breaker")

__all__ = ["Admission", "Breaker", "Probe", "current"]

REDIS_TIMEOUT_S = 5.0
"""Of the breaker's own client: a Redis that is slow is no Redis that is away. Only its thread waits so long, and of the
records that meet an open circuit the one which asks for its probe."""

FIRST_LOOK_S = 3.0
"""Longest wait for Redis before a process takes its first record; if it knows nothing by then, it finds out."""

STOP_S = 3.0
"""How long the end of a process waits for the last report."""

BUSY_S, QUIET_S = 0.25, 1.0
"""How often outcomes are reported, and how often a worker looks without any."""

PROBE_GRACE_S = 5.0
"""How much longer than a probe may take its lease lasts: only a worker that died loses one. And where Redis is slow, so
many round trips more: one is waited for before it is claimed, one claims it, one is under way before one settles it."""

PROBE_TRIPS = 4

MAX_TOPICS = 100
"""Whose outcomes a process counts by themselves at a time; more in trouble at once are the cluster's trouble."""

OK_S = 2.0
"""As long as something has arrived within this time, a timeout may be its topic's own."""

WORKER = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"  # in containers, names and pids are often equal
"""Of this process and the children that it forks: they share a host, and fail together."""


class Breaker:
    """This process's part of the breaker.

    `admission`, `delivered` and `failed` may be called by any thread; everything else happens in the breaker's own,
    or in `tick` where there is none.

    Args:
        store: the fleet's circuits.
        rules: of all circuits.
        stall_s: seconds without a report, with records in flight, that count as an outage; also what a probe may take.
        unknown_s: after which librdkafka says of a topic that it does not exist, which opens nothing.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        store: CircuitStore,
        rules: Rules,
        stall_s: float,
        unknown_s: float = 0.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._store = store
        self._rules = rules
        self._stall_s = stall_s
        self._clock = clock
        self._lock = threading.Lock()
        self._generation = 1
        self._sure_from = 0
        """The generation from which on a record that times out has not done so in a gap."""
        self.attendance = Attendance(clock, self._gap)
        """The clock by which Kafka's silence is judged."""
        self._cluster = Tally()
        self._topics: dict[str, Tally] = {}
        self._views: dict[str, View] = {CLUSTER_SCOPE: View(CLUSTER_SCOPE)}
        self._viewed_at = clock()
        self._attached = True
        self._trip_s = 0.0
        """What Redis took for its last answer."""
        self.local = LocalCircuit(rules)
        self.standstill = Standstill(clock)
        self._own_pause = OwnPause(self.standstill, store)
        self._shut = False
        self.shut_topics: frozenset[str] = frozenset()
        self.in_flight: Callable[[], Mapping[str, int]] = dict
        """Records of this process without a report, by topic."""
        self.stuck = 0
        """Records in flight for topics whose circuits are open."""
        self._stall = Stall(stall_s)
        self._heard: set[str] = set()
        self._arrived = False
        self._silences = Silences(stall_s, unknown_s)
        self.answers: Callable[[str, float], bool] = lambda topic, timeout_s: False
        """Whether any broker says within a time what it knows of a topic."""
        self._failed_at = -QUIET_S
        self._ok_at = -OK_S
        self._claimed_by: Callable[[], None] | None = None
        self._wake = threading.Event()
        self._probes = Probes(stall_s, clock, lambda: self.attendance.now, self._wake.set)
        self._asking = threading.Lock()
        self._looked = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -- records
    def admission(
        self, topic: str, mark: str | None = None, *, released: bool = False, begin: bool = True
    ) -> Admission | None:
        """Whether a record for `topic` may be sent now; costs no round trip.

        Args:
            topic: where it goes.
            mark: of the probe that it is, if it is one.
            released: it comes from the list in which it waited for its topic's circuit; Redis knew better than this
                process does.
            begin: whether it is sent then.
        """
        held_back = topic in self.shut_topics and not released
        if mark is not None:
            probe = Probe.of(mark)
            if held_back and probe.of_cluster and not self._probes.tries_all():
                return None  # it would fail for its topic
            if begin:
                if probe.of_cluster:
                    self._probes.found()
                self.begun(mark, topic)
            return probe
        if self._shut or held_back:
            return None
        return self._generation

    def begun(self, mark: str, topic: str = "") -> None:
        """A probe is being sent, here or by a child of this process."""
        self._probes.begin(Probe.of(mark), topic)

    def not_sent(self, mark: str) -> None:
        """The message of a probe was none that could be sent: it says nothing, and the next one may."""
        self._probes.drop(Probe.of(mark))

    def ask(self, topic: str) -> Admission | None:
        """As `admission`, for who claims nothing: a round trip may make this record the probe that is due."""
        if self._claimed_by is not None or self._own_pause.why:
            return None
        if not self._asking.acquire(blocking=False):  # of many threads one, and no other waits for its answer
            return None
        probe: Probe | None = None
        try:
            if self.local.state != CLOSED:
                if self.local.due(self._now_ms()) and not self._probes:
                    probe = self._begin_local()
            elif self._attached:
                scope = CLUSTER_SCOPE if self._shut else TOPIC_SCOPE + topic
                if self._remaining_s(scope) <= 0 and self._probes.may_seek(scope):
                    probe = self._admitted(scope)
        finally:
            self._asking.release()
        if probe is not None:
            self.begun(probe.mark, topic)
        return probe

    def delivered(self, admission: Admission, topic: str, records: int = 1) -> None:
        """A record is in the log, or so many that were sent under the same admission."""
        with self._lock:
            self._stall.heard(records)
            self._stall.arrived()
            self._heard.add(topic)
            self._arrived = True
            if self.standstill.failures:
                self.standstill.succeeded()
            if isinstance(admission, Probe):
                if self._probes.report(admission, "ok"):
                    return
                admission = 0  # of an earlier time
            count_ok(self._cluster, admission, records)
            if self._topics and (tally := self._topics.get(topic)):
                count_ok(tally, admission, records)

    def failed(self, admission: Admission, topic: str, code: int) -> None:
        """A record is not in the log, with that code of Kafka's. What counts for whom is in the table of codes."""
        found = verdict(code)
        cluster = found.scope is Scope.CLUSTER
        answered = found.of_topic
        # A timeout hides its cause, which may be one partition's; report.lua asks whether others succeed.
        of_topic = answered or code == KafkaError._MSG_TIMED_OUT
        with self._lock:
            if code < 0 and self._gave_up_in_a_gap(admission):
                return
            self._stall.heard()
            self._heard.add(topic)
            if isinstance(admission, Probe):
                outcome = of_probe(admission, found.scope, answered, of_topic, code > 0)
                self._probes.report(admission, outcome, f"a probe failed: {found.name}")
                return
            # Of a topic whose circuit is open it is known what a timeout hides.
            if cluster and not (of_topic and topic in self.shut_topics):
                count_failure(self._cluster, admission)
            elif answered and code > 0:  # a broker said so: the cluster is there
                count_ok(self._cluster, admission)
            tally = self._topics.get(topic)
            if of_topic and tally is None and self._may_be_its_own(answered):
                tally = self._topics[topic] = Tally()
            if of_topic and tally is not None:
                count_failure(tally, admission)
        now = self._clock()
        if (cluster or of_topic) and now - self._failed_at >= QUIET_S:
            self._wake.set()
        self._failed_at = now

    def _may_be_its_own(self, answered: bool) -> bool:
        """Whether a topic's failure is worth a count of its own: not where nothing arrives at all."""
        arrives = answered or self._cluster.ok > 0 or self.attendance.now - self._ok_at < OK_S
        return arrives and not self._shut and len(self._topics) < MAX_TOPICS

    def _gave_up_in_a_gap(self, admission: Admission) -> bool:
        """Whether a record that librdkafka itself gave up may have timed out because this process stood still.

        It is no evidence then, and no sign of life either. What a broker says counts whenever it is read.
        """
        if self.attendance.in_gap:
            self._no_failure_of_before_counts()
        if isinstance(admission, Probe):
            return self._probes.give_up(admission)
        return admission < self._sure_from

    def _gap(self) -> None:
        with self._lock:
            self._no_failure_of_before_counts()

    def _no_failure_of_before_counts(self) -> None:
        self._generation += 1
        self._sure_from = self._generation
        self._probes.doubt()

    def broker_error(self, code: int) -> None:
        """librdkafka says that something is wrong with its brokers."""
        if code == KafkaError._ALL_BROKERS_DOWN and self._stall.brokers_down(self.attendance.now):
            self._wake.set()

    @property
    def shut(self) -> bool:
        """Whether this process sends nothing but probes."""
        return self._shut

    @property
    def paused(self) -> bool:
        """Whether it does so by itself, whatever the fleet does."""
        return self.local.state != CLOSED or bool(self._own_pause.why)

    @property
    def view_age_s(self) -> float:
        """Seconds since Redis last said how the circuits are."""
        return self._clock() - self._viewed_at

    @property
    def rules(self) -> Rules:
        """What it goes by; those of all workers should be the same."""
        return self._rules

    def is_shut(self, topic: str) -> bool:
        """Whether records for `topic` wait."""
        return self._shut or topic in self.shut_topics

    def circuit(self, topic: str) -> Circuit:
        """The outermost open circuit that a record for `topic` has to pass."""
        if self._shut:
            return Circuit.CLUSTER
        return Circuit.TOPIC if topic in self.shut_topics else Circuit.CLOSED

    # -- this process's own faults
    def stand_still(self, why: str, message_id: str = "") -> None:
        """A record failed by the fault of this process, which pauses if that goes on."""
        self.standstill.failed(why, message_id)
        self._apply()

    def client(self, which: str, missing: str) -> None:
        """Whether there is a Kafka client, see `Standstill.client`."""
        self.standstill.client(which, missing)
        self._stall.first_answer(self.attendance.now, missing=missing == NO_ANSWER)
        self._apply()
        self._wake.set()

    def retry_after(self, topic: str) -> float:
        """Seconds until records for `topic` are worth another look; at least one where single ones are tried."""
        if self._shut:
            fleet = self._remaining_s(CLUSTER_SCOPE) if self._views[CLUSTER_SCOPE].shut else 0.0
            alone = (self.local.till - self._now_ms()) / 1000 if self.local.state != CLOSED else 0.0
            left = max(fleet, alone, self.standstill.remaining_s)
        else:
            left = self._remaining_s(TOPIC_SCOPE + topic)
        return min(max(1.0, left), self._rules.max_open_ms / 1000)

    # -- probes, for who claims records
    def claim_by(self, wake: Callable[[], None]) -> None:
        """Say that `take_probe` will be called; `wake`, in any thread, when there may be something new."""
        self._claimed_by = wake

    @property
    def has_probe(self) -> bool:
        """Whether one was granted and is to be claimed."""
        return self._probes.granted is not None

    def take_probe(self) -> Probe | None:
        """A probe that was granted and is to be claimed now."""
        return self._probes.take()

    def unused(self, probe: Probe) -> None:
        """There was no record to send."""
        self._probes.pause(probe.scope, SEEK_PAUSE_S)
        self._probes.drop(probe)

    @property
    def probed(self) -> Counter[str]:
        """Probes of this process by what became of them: ok, fail or ignore."""
        return self._probes.outcomes

    # -- the breaker's own thread
    def start(self) -> None:
        """Report and look from a thread of this process; wait a moment for its first look."""
        self._thread = threading.Thread(target=self._run, name="kafka-delivery-breaker", daemon=True)
        self._thread.start()
        self._looked.wait(FIRST_LOOK_S)

    def stop(self) -> None:
        """Report what is left; a probe that has no report yet is another worker's to send."""
        self._stop.set()
        self._probes.drop_all()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(STOP_S)

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stop.is_set()
            try:
                self.tick()
            except Exception:  # without this thread nothing would ever open or close again
                log.exception("breaker.tick_failed")
            self._looked.set()
            if not last:
                counted = self._cluster.ok or self._cluster.fail or self._topics
                self._wake.wait(BUSY_S if counted else self._quiet_s())
                self._wake.clear()
        self._leave()

    def _leave(self) -> None:
        if self._claimed_by is not None:
            with suppress(*QUEUE_FAULTS):  # then it is taken for alive for another five seconds
                self._store.leave()
                self._own_pause.end()

    def _quiet_s(self) -> float:
        """Seconds until something is due, a second at most."""
        due = [self._remaining_s(scope) for scope, view in self._views.items() if view.shut and self._attached]
        if self.local.state != CLOSED:
            due.append((self.local.till - self._now_ms()) / 1000)
        due.append(self.standstill.remaining_s)
        return min([QUIET_S, *(max(0.01, left) for left in due if left > 0)])

    def tick(self) -> None:
        """Report, learn, judge, and ask for a probe that is due."""
        self.attendance.tick()
        in_flight = self.in_flight()
        stalled = self._stalled(in_flight)
        own = self.shut_topics | self._silences.overtaken
        hard = self._stall.why(self.attendance.now, sum(in_flight.values()) - _of(own, in_flight))
        with self._lock:
            cluster = self._cluster.take()
            topics = {topic: tally.take() for topic, tally in self._topics.items()}
            self._forget_quiet_topics()
        if cluster[0]:
            self._ok_at = self.attendance.now
        settled = self._settle_local()
        tripped = self.local.report(self._now_ms(), cluster[0], cluster[1], bool(cluster[2]), hard)
        if cluster[3]:
            self.local.arrived(self._now_ms())
        alive = 0
        try:
            while settled:
                probe, outcome, why = settled[0]
                _, view = self._store.settle(*probe, outcome, why)
                _log_change(view)
                settled.pop(0)
            asked_at = self._clock()
            alive, views = self._store.report(self._counted(cluster, topics, hard, stalled))
            self._trip_s = self._clock() - asked_at
        except Exception as error:  # whatever it is: nobody's circuit is known then
            self._probes.keep(settled)  # may be repeated, and tells nothing wrong if it is
            self._detach(error)
        else:
            self._adopt(views)
            self._own_pause.tell()
        self._judge_alone(tripped, alive)
        self._apply()
        self._probes.expire(self.shut_topics)
        self._seek_probe()
        self.stuck = _of(self.shut_topics, in_flight)

    def _counted(
        self,
        cluster: tuple[int, int, int, int],
        topics: dict[str, tuple[int, int, int, int]],
        hard: str,
        stalled: dict[str, str],
    ) -> list[Counted]:
        counted = []
        nothing = (0, 0, 0, 0)
        known = {CLUSTER_SCOPE: (cluster, hard)}
        for topic in topics | stalled:
            known[TOPIC_SCOPE + topic] = topics.get(topic, nothing), stalled.get(topic, "")
        # What Redis may have lost is told it again, whether there is anything to count or not; also that it is well.
        known |= {scope: (nothing, "") for scope, view in self._views.items() if view.epoch and scope not in known}
        passed = int((self._clock() - self._viewed_at) * 1000)
        for scope, ((ok, fail, row, late), why) in known.items():
            view = self._views.get(scope) or View(scope)
            open_ms = max(0, view.remaining_ms - passed) if view.state != CLOSED else -1
            forced_ms = max(1, view.forced_ms - passed) if view.forced_ms else 0
            circuit = (open_ms, view.trips, view.forced, forced_ms)
            counted.append(Counted(scope, view.epoch, ok, fail, row, late, why, *circuit))
        return counted

    def _adopt(self, views: list[View]) -> None:
        if not self._attached:
            self._attached = True
            self.local.reset()
            log.warning("breaker.attached")
        before, self._views = self._views, {view.scope: view for view in views}
        self._viewed_at = self._clock()
        for view in views:
            old = before.get(view.scope) or View(view.scope)
            _log_change(view)
            if (old.epoch, old.shut) != (view.epoch, view.shut):
                self._begin_anew(view.scope)

    def _begin_anew(self, scope: str) -> None:
        """What was sent before says nothing about this circuit as it is now."""
        if scope == CLUSTER_SCOPE:
            self.local.reset()
            self._stall.begin_anew()
        with self._lock:
            self._generation += 1
            topic = scope.removeprefix(TOPIC_SCOPE)
            tally = self._cluster if scope == CLUSTER_SCOPE else self._topics.get(topic)
            if tally is None:
                tally = self._topics[topic] = Tally()
            tally.since = self._generation
            tally.ok = tally.fail = tally.row = 0

    def _forget_quiet_topics(self) -> None:
        quiet = [
            topic
            for topic, tally in self._topics.items()
            if tally.quiet * BUSY_S > 6 * self._rules.window_ms / 1000 and topic not in self.shut_topics
        ]
        for topic in quiet:
            del self._topics[topic]

    def _detach(self, error: Exception) -> None:
        if not self._attached:
            return
        self._attached = False
        unexpected = None if isinstance(error, QUEUE_FAULTS) else error
        log.warning("breaker.detached error=%s shut=%s", type(error).__name__, self._shut, exc_info=unexpected)
        view = self._views[CLUSTER_SCOPE]
        if view.shut:  # what was known holds until its time, then one record shows
            till = self._now_ms() + 1000 * self._remaining_s(CLUSTER_SCOPE)
            self.local.open(self._now_ms(), "last known before Redis went away", till)

    def _judge_alone(self, tripped: bool, alive: int) -> None:
        """The process's own circuit is for when the fleet's cannot be known, or knows better."""
        fleet = self._views[CLUSTER_SCOPE]
        if self._attached and (fleet.shut or fleet.forced or (tripped and alive < 2)):
            self.local.reset()
        elif tripped and self.local.state != CLOSED:
            log.warning("circuit.paused scope=%s attached=%s why=%r", LOCAL, self._attached, self.local.why)

    def _stalled(self, in_flight: Mapping[str, int]) -> dict[str, str]:
        """Topics that are silent while others' records arrive, and why that is trouble."""
        now = self.attendance.now
        with self._lock:
            heard, self._heard = self._heard, set()
            arrived, self._arrived = self._arrived, False
        answers = None if self._shut or self._stop.is_set() else self.answers
        self._silences.listen(now, in_flight.keys(), heard | self.shut_topics, arrived, answers)
        return self._silences.stalled(now)

    def _apply(self) -> None:
        self._own_pause.look()
        fleet = self._attached and self._views[CLUSTER_SCOPE].shut
        shut = self.local.state != CLOSED or fleet or bool(self._own_pause.why)
        topics = frozenset(
            view.scope.removeprefix(TOPIC_SCOPE)
            for view in self._views.values()
            if view.scope != CLUSTER_SCOPE and view.shut and (self._attached or self._remaining_s(view.scope) > 0)
        )
        changed = (shut, topics) != (self._shut, self.shut_topics)
        self._shut, self.shut_topics = shut, topics
        if changed and self._claimed_by is not None:
            self._claimed_by()

    # -- probes
    def _seek_probe(self) -> None:
        probes = self._probes
        if self._own_pause.why:  # it could send none; another worker may
            probe = probes.take()
            if probe is not None:
                probes.drop(probe)
            return
        if probes.granted is not None and probes.granted.scope == LOCAL and self.local.state == CLOSED:
            probes.withdraw(probes.granted)  # the fleet knows better by now
        if self._claimed_by is None or probes.granted is not None or self._stop.is_set():
            return
        if self.local.due(self._now_ms()) and not probes and probes.may_seek(LOCAL):
            probes.granted = self._begin_local()
        elif self._attached:
            for scope, view in self._views.items():
                wanted = view.shut and not view.forced and (scope == CLUSTER_SCOPE or not self._shut)
                if wanted and self._remaining_s(scope) <= 0 and probes.may_seek(scope):
                    probes.granted = probes.granted or self._admitted(scope)
        if probes.granted is not None:
            self._claimed_by()

    def _begin_local(self) -> Probe:
        self.local.begin()
        return self._probes.grant(Probe(LOCAL, uuid.uuid4().hex), self._claim_s)

    def _admitted(self, scope: str) -> Probe | None:
        probe = self._probes.wanted(scope)
        try:
            answer, view = self._store.admit(*probe, self._lease_ms)
        except QUEUE_FAULTS:
            self._probes.pause(scope, BUSY_S)  # each record would wait for it
            return None
        _log_change(view)
        self._probes.answered(probe)
        if answer == "probe":
            return self._probes.grant(probe, self._claim_s)
        self._probes.pause(scope, BUSY_S)
        self._wake.set()  # it is not as we thought
        return None

    def _settle_local(self) -> list[Settled]:
        """Settle the probes of the process's own circuit; return the fleet's."""
        settled = self._probes.take_settled()
        for probe, outcome, _ in settled:
            if probe.scope == LOCAL and outcome != "ignore":
                self.local.settle(self._now_ms(), outcome == "ok")
        return [one for one in settled if one[0].scope != LOCAL]

    @property
    def _lease_ms(self) -> int:
        return int((self._stall_s + PROBE_GRACE_S + PROBE_TRIPS * self._trip_s) * 1000)

    @property
    def _claim_s(self) -> float:
        """How long a probe may wait for its record to be claimed."""
        return self._stall_s + PROBE_TRIPS * self._trip_s

    def _remaining_s(self, scope: str) -> float:
        """Seconds until the fleet's circuit is due, as it was last seen."""
        view = self._views.get(scope)
        if view is None:
            return 0.0
        if view.forced and not view.forced_ms:
            return float("inf")
        left = view.forced_ms if view.forced else view.remaining_ms
        return left / 1000 - (self._clock() - self._viewed_at)

    def _now_ms(self) -> float:
        return self._clock() * 1000


def _of(topics: Set[str], in_flight: Mapping[str, int]) -> int:
    """What is in flight for these topics."""
    return sum(in_flight.get(topic, 0) for topic in topics)


def _log_change(view: View) -> None:
    """One line of the fleet's logs for each change of a circuit: by the process whose call to Redis made it."""
    if view.changed:
        log.warning(
            "circuit.%s scope=%s trips=%d forced=%s why=%r",
            view.state, view.scope, view.trips, view.forced or "no", view.why,
        )  # fmt: skip


_breaker: Breaker | None = None
_pid: int | None = None
_making = threading.Lock()


def current() -> Breaker:
    """The breaker of this process; made and started on first use, and anew after a fork."""
    global _breaker, _pid
    if _breaker is None or _pid != os.getpid():
        with _making:
            if _breaker is None or _pid != os.getpid():
                s = settings.current()
                rules = Rules.of(s)
                store = CircuitStore(RedisClient(s, REDIS_TIMEOUT_S), s.cluster, rules, WORKER)
                made = Breaker(store, rules, s.stall_s, s.topic_propagation_ms / 1000)
                made.start()
                _breaker, _pid = made, os.getpid()
    return _breaker
