"""Dead letters on their way back: sent again as ordinary sends, or discarded, and never twice by running it twice.

A record counts as done when its outcome is known: delivered, refused again (it is a dead letter once more, at the end
of the topic), or parked. Until then at most `IN_FLIGHT` records are under way, and that is what a run that is killed
may send twice, under the same message ids.
"""

from .backlog import Backlog, Cluster, Span
from .done import RedriveError, history
from .run import IN_FLIGHT, Redrive, Result, discard
from .selection import Plan, Selection, plan
from .whole import letters as whole_letters

__all__ = [
    "IN_FLIGHT",
    "Backlog",
    "Cluster",
    "Plan",
    "Redrive",
    "RedriveError",
    "Result",
    "Selection",
    "Span",
    "discard",
    "history",
    "plan",
    "whole_letters",
]
