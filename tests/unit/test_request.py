"""A request that is due does not wait for Celery's timer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import kombu
import pytest

from kafka_delivery import app, send
from kafka_delivery_worker import request


class TestRequest:
    @pytest.mark.parametrize(("countdown", "waits"), [(-1, False), (60, True)])
    def test_what_is_due_does_not_wait_for_celerys_timer(self, countdown: float, waits: bool) -> None:
        """That one does ten a turn; a topic that refuses thousands of records has thousands of retries due at once."""
        eta = (datetime.now(UTC) + timedelta(seconds=countdown)).isoformat()
        sent = kombu.Message(
            body='[[[2, "", "t", "v"]], {}, {}]', content_type="application/json", content_encoding="utf-8",
            headers={"id": "one", "task": send.name, "eta": eta}, delivery_info={},
        )  # fmt: skip
        made = request.Request(sent, app=app, task=send, headers=sent.headers, body=sent.body, decoded=False, utc=True)
        assert (made.eta is not None) is waits
        assert made.request_dict["eta"] == eta
