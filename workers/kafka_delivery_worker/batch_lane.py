"""The short way of a plain batch: as a plain send's (see `lane`), for all of its records in one message.

The event loop hands the records to librdkafka itself. In a thread of the pool each delivery report would wait for the
interpreter's lock, and each record would be made twice: once to be validated, once to be sent.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Self

from celery.worker import state

from kafka_delivery.faults import QUEUE_FAULTS
from kafka_delivery.marks import FLEETING, mark_of

from .breaker import Admission
from .lane import Lane, LaneRequest, begun, lane_of
from .producer import Outgoing, Report
from .shape import is_too_large

log = logging.getLogger("kafka_delivery.lane")

MAX_RECORDS = 5_000
"""Of a batch that takes this way: librdkafka's buffer has to hold it beside what is in flight already."""


def strategy(task: Any, app: Any, consumer: Any) -> Any:
    """Named by `SendMany.Strategy`."""
    return lane_of(BatchLane, task, app, consumer)


@dataclass(slots=True, repr=False)
class Batch:
    """A batch in flight.

    Attributes:
        request: its message.
        ids, outgoings: of each record, in order.
        admissions: by topic.
        reports: by place of their record, in the order in which they came.
        counted: how many of these the circuits were told of.
    """

    request: LaneRequest
    ids: list[str]
    outgoings: list[Outgoing]
    admissions: dict[str, Admission]
    reports: dict[int, Report] = field(default_factory=dict)
    counted: int = 0

    def by_topic(self, places: Sequence[int]) -> dict[str, Sequence[int]]:
        """Places by the topic of their record."""
        if len(self.admissions) == 1:  # as nearly always
            return dict.fromkeys(self.admissions, places) if places else {}
        found: defaultdict[str, list[int]] = defaultdict(list)
        for place in places:
            found[self.outgoings[place].topic].append(place)
        return {**found}


class BatchLane(Lane):
    """What all plain batches of one worker have in common."""

    def __init__(self, task: Any, app: Any, consumer: Any, before: Self | None = None) -> None:
        super().__init__(task, app, consumer, before)
        self._batches: list[Batch] = before._batches if before else []

    def take(self, message: Any) -> bool:
        """Start a plain batch, or let it wait for room; False for what cannot be one, which is then untouched."""
        headers = message.headers
        if not headers.get("ignore_result") or any(mark_of(headers, mark) is not None for mark in FLEETING):
            return False
        request = LaneRequest(message, headers, self)
        state.task_reserved(request)  # a connection that breaks would give it back otherwise
        self.pool.when_room(partial(self._begin, request))
        return True

    def _begin(self, request: LaneRequest) -> None:
        message = request._message
        batch = self._batch(request)
        if batch is None:
            state.task_ready(request)
            self._consumer.celerys_way(message)
            return
        begun(request)
        try:
            if self.events and self._is_told(request._request_dict, request.started):
                self._announce(request)
            self.pool.launch_all(batch.outgoings, len(message.body), batch.reports.__setitem__)
        except QUEUE_FAULTS:  # events that Redis did not take
            state.task_ready(request)
            message.channel.give_back(message.delivery_tag)
            raise
        except Exception as fault:
            state.task_ready(request)
            self._consumer.failed_here(message, fault)
            return
        self._batches.append(batch)

    def _batch(self, request: LaneRequest) -> Batch | None:
        """The records; None where Celery's way must look at them, or finds the circuit open."""
        message = request._message
        try:
            if is_too_large(message):
                return None
            wires = self._plain(message, message.headers)
            if not wires or len(wires) > MAX_RECORDS:
                return None
            size = len(message.body)
            made = [self._outgoing(wire, wire[-1], size) for wire in wires]
        except Exception:  # Celery's way finds out what is wrong with it, and says so
            return None
        outgoings = [outgoing for outgoing in made if outgoing is not None]
        topics = {outgoing.topic for outgoing in outgoings}
        admissions = {topic: admission for topic in topics if (admission := self._breaker.admission(topic)) is not None}
        if len(outgoings) < len(made) or len(admissions) < len(topics):
            return None
        return Batch(request, [wire[-1] for wire in wires], outgoings, admissions)

    def settle(self) -> None:
        """Tell the circuits of the reports that came, and go on with the batches that have all of theirs."""
        for batch in self._batches[:]:
            self._tell_breaker(batch)
            if len(batch.reports) < len(batch.outgoings):
                continue
            self._batches.remove(batch)
            try:
                self._done(batch)
            except Exception:  # say, events that Redis did not take; that is not to hold up the others
                log.exception("lane.not_settled message_id=%s", batch.request.id)

    def _tell_breaker(self, batch: Batch) -> None:
        places = list(islice(batch.reports, batch.counted, None))
        batch.counted += len(places)
        for topic, own in batch.by_topic(places).items():
            self._engine.tell_breaker(batch.admissions[topic], topic, [batch.reports[place] for place in own])

    def _done(self, batch: Batch) -> None:
        request = batch.request
        self.pool.landed(len(batch.outgoings), len(request._message.body))
        state.task_ready(request)
        places = range(len(batch.outgoings))
        reports = [batch.reports[place] for place in places]
        if any(report.error is not None for report in reports):
            if not self.pool.stopping:  # else the end of the lease returns it to its queue
                self._go_on(request, reports)
            return
        request.acknowledge()
        self._succeeded(1)
        for topic, own in batch.by_topic(places).items():
            self._engine.delivered(topic, [(batch.ids[place], reports[place]) for place in own])
        if request.told:
            self._tell_success(request, f"{len(batch.outgoings)} records delivered")
