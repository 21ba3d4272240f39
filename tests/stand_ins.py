"""Stand-ins for parts of a worker, for tests of one part alone."""

from __future__ import annotations

from types import SimpleNamespace

from kafka_delivery.disposition import Circuit


class Circuits(SimpleNamespace):
    """A breaker whose circuits a test sets: `shut` is the cluster's, `shut_topics` are those of topics."""

    shut: bool
    shut_topics: set[str]

    def circuit(self, topic: str) -> Circuit:
        """As the breaker's."""
        if self.shut:
            return Circuit.CLUSTER
        return Circuit.TOPIC if topic in self.shut_topics else Circuit.CLOSED
