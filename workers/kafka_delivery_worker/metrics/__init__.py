"""What Prometheus may ask: of each worker process on a port of its own, of the fleet through the exporter.

A worker keeps plain numbers while it works (`Meters`) and makes metrics of them when it is asked; where metrics are
off it keeps none. What all workers have in common lies in Redis and is asked for by one exporter (`fleet`): a sum over
workers of it would count it once for each.
"""

from __future__ import annotations

from .meters import Meters

__all__ = ["Meters"]
