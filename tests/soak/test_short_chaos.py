"""A minute of chaos, each kind of fault at least once: everything accepted is delivered, dead-lettered or parked, and
nothing is a dead letter or parked for what happened around it. Strangers' messages are parked, another installation is
not let in, and no circuit opens while Kafka is well.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from servers import have_real_kafka, have_real_redis, missing
from soak.chaos import foreign, plan, run, tracers
from soak.chaos.application import DEAD, FOLLOWED, LINK_ERROR, PARKED

OPTIONS = run.Options(seconds=35, seed=7, workers=2, rate=120, stock=False)


@pytest.mark.real
@pytest.mark.timeout(360)
def test_a_short_chaos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not have_real_kafka() or not have_real_redis():
        missing("java, redis-server, and Maven or TEST_KAFKA_LIB")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # logs of workers
    reporter = run.Reporter(OPTIONS)
    outcome = run.run(OPTIONS, reporter, tmp_path)
    run.show(outcome, reporter.console)

    assert outcome.problems() == []
    assert outcome.lost == 0
    assert outcome.account.wrongly_parked == []
    assert outcome.account.wrongly_dead == []
    assert outcome.account.changed == []
    assert outcome.account.vanished == []
    assert outcome.account.strayed.total() == 0
    assert outcome.opened_wrongly == []
    assert outcome.failed_commands == []
    assert outcome.left == {}
    assert outcome.idle_workers == 0
    assert outcome.account.not_accepted == 0
    assert {kind for _, kind, _ in outcome.faults} == set(plan.ALL)
    assert outcome.account.rows[DEAD]["dead-lettered"] > 0
    assert outcome.account.rows[PARKED]["parked"] > 0
    assert all(outcome.account.rows[kind]["delivered"] > 0 for kind in FOLLOWED)
    assert outcome.account.rows[LINK_ERROR]["dead-lettered"] > 0
    assert outcome.account.rows[foreign.COMPACT]["delivered"] > 0
    assert all(outcome.account.rows[kind]["parked"] > 0 for kind in (foreign.STRANGER, foreign.LARGE_STRANGER))
    assert outcome.account.compared > 0
    assert outcome.joined
    assert all(one.refused for one in outcome.joined)
    assert outcome.wrapped.keys() == tracers.WRAPS.keys(), "no client was wrapped, so this shows nothing of tracers"
    assert outcome.without_client > 0
    assert outcome.nested > 0
