"""What an application may want to hear of."""

from __future__ import annotations

from django.dispatch import Signal

record_not_queued = Signal()
"""Sent when records of `delay_on_commit` could not be queued after the commit: Redis was away, or full.

The transaction is committed, and the request goes on; an application may keep the records and send them later, which
is safe with the message ids that they have.

Arguments:
    sender: the class of the task.
    records: the `Record`s of the call.
    error: the `EnqueueError`.
    using: the alias of the database.
"""
