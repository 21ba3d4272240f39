"""The dashboard and the alerts ask for what there is, and every alert says where to read on.

What there is, is what the catalogue says; that workers and the exporter tell just that is held by
scenarios/test_metrics_ports.py and integration/test_metrics_of_the_fleet.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from kafka_delivery_worker.metrics.catalogue import FAMILIES, FLEET, WORKER

ROOT = Path(__file__).parents[2]
ALERTS, ALERTS_TEST = (ROOT / "deploy" / "prometheus" / name for name in ("alerts.yml", "alerts.test.yml"))
DASHBOARD = ROOT / "deploy" / "grafana" / "kafka-delivery.json"
PAGE = ROOT / "docs" / "monitoring.md"

PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes"}
"""prometheus_client's own."""

WIDTH = 24
"""Columns of a dashboard in Grafana."""


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> Iterator[str]:
    """All that is asked of Prometheus."""
    for rule in rules():
        yield rule["expr"]
    for panel in panels():
        for target in panel.get("targets", []):
            yield target["expr"]
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]
    for group in yaml.safe_load(ALERTS_TEST.read_text())["tests"]:
        for series in group["input_series"]:
            yield series["series"]


def known() -> set[str]:
    """The names that samples have."""
    names = set(PROCESS)
    for metric in (*WORKER, *FLEET):
        parts = {"summary": ("", "_sum", "_count"), "histogram": ("_bucket", "_sum", "_count")}.get(metric.kind, ("",))
        names |= {metric.name + part for part in parts}
    return names


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_what_is_asked_for_exists(expression: str) -> None:
    asked = set(re.findall(r"\b(?:kafka_delivery|process)_[a-z_0-9]+", expression))
    assert asked
    assert asked <= known()


@pytest.mark.parametrize("metric", [*WORKER, *FLEET], ids=lambda metric: str(metric.name))
def test_each_metric_is_named_by_the_conventions(metric: Any) -> None:
    assert metric.kind in FAMILIES
    assert re.fullmatch(r"kafka_delivery_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.help[0].isupper() or metric.help[0].isdigit()


@pytest.mark.parametrize("metric", [*WORKER, *FLEET], ids=lambda metric: str(metric.name))
def test_each_metric_is_on_the_dashboard_or_in_an_alert(metric: Any) -> None:
    """But for those that are for other readers."""
    elsewhere = {"kafka_delivery_due_messages"}  # part of the backlog, for who wants to know it apart
    asked = " ".join(expressions())
    assert (re.search(rf"\b{metric.name}(?:_bucket|_sum|_count)?\b", asked) is None) == (metric.name in elsewhere)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_each_alert_says_how_bad_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert page == "docs/monitoring.md"
    assert anchor == rule["alert"].lower()
    assert f"\n### {rule['alert']}\n" in PAGE.read_text()


def test_no_paragraph_is_about_an_alert_that_is_gone() -> None:
    assert re.findall(r"\n### (KafkaDelivery\w+)", PAGE.read_text()) == [rule["alert"] for rule in rules()]


class TestDashboard:
    def test_each_panel_has_a_place_of_its_own(self) -> None:
        places = [panel["gridPos"] for panel in panels()]
        assert all(place["x"] >= 0 and place["x"] + place["w"] <= WIDTH for place in places)
        for one, other in combinations(places, 2):
            assert (
                one["x"] + one["w"] <= other["x"]
                or other["x"] + other["w"] <= one["x"]
                or one["y"] + one["h"] <= other["y"]
                or other["y"] + other["h"] <= one["y"]
            ), (one, other)
        ids = [panel["id"] for panel in panels()]
        assert len(set(ids)) == len(ids)

    def test_each_panel_says_what_it_shows(self) -> None:
        for panel in panels():
            assert panel["title"]
            if panel["type"] != "row":
                assert panel["description"].endswith(".")
                assert panel["fieldConfig"]["defaults"]["unit"]

    def test_it_works_with_any_prometheus(self) -> None:
        dashboard = json.loads(DASHBOARD.read_text())
        assert {"id", "iteration"}.isdisjoint(dashboard), "of somebody's own Grafana"
        assert "datasource" in [variable["name"] for variable in dashboard["templating"]["list"]]
        for panel in panels():
            for target in panel.get("targets", []):
                assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            refs = [target["refId"] for target in panel.get("targets", [])]
            assert len(set(refs)) == len(refs)

    def test_what_is_not_known_now_is_shown_as_such(self) -> None:
        """And neither as well, in green, nor as it was when it was last known."""
        for panel in panels():
            if panel["type"] == "stat":
                assert all(target["instant"] and not target["range"] for target in panel["targets"])
                special = [one for one in panel["fieldConfig"]["defaults"]["mappings"] if one["type"] == "special"]
                assert [one["options"]["match"] for one in special] == ["null+nan"]
