"""The pages that are made from the code say what the code says, and the README stays short and true."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert spec is not None
assert spec.loader is not None
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == generate.PAGES[name](), "run `make docs`"


def test_scaling_shows_a_whole_run() -> None:
    found = json.loads(generate.RESULTS.read_text())
    names = {row["name"] for row in found["rows"]}
    assert found["faults"] == []
    assert {"single", "redis-cpu", "delay", "bulk", "workers-2", "value-100000", "topics-64"} <= names
    assert found["setup"]["seconds"] / found["setup"]["passes"] < 300, (
        "a pass of `make bench` takes five minutes at most"
    )


def test_what_a_peak_needs() -> None:
    """Worked out by hand: 8,000 sends a second by a worker; 10 us of Redis for a write and 4 us for a claim."""
    assert generate.workers(8_000, 8_000) == 2
    assert generate.workers(8_001, 8_000) == 3
    assert generate.servers(50_000, 14) == 1  # 0.7 s of its core a second, which is what is wanted at most
    assert generate.servers(50_001, 14) == 2
    found = {
        "rows": [
            {"name": "single", "ours": 8_000, "more": {"our_worker_us": 100, "our_redis_bytes": 1_500}},
            {"name": "redis-cpu", "ours": 4.0},
            {"name": "delay", "more": {"our_redis_us": 10.0}},
            {"name": "bulk", "more": {"our_redis_us": 1.0}},
        ]
    }
    text = "\n".join(generate.arithmetic(found))
    assert "one core / 100 us = 10,000" in text
    assert "**A second Redis** is needed above 50,000 sends a second, or above 140,000" in text
    assert "is 5.4 GB" in text
    assert "| 100,000 | 14 | 10 | 1.4 | 2 | 1 |" in text


def test_the_readme_is_under_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name)
def test_settings_that_are_named_exist(page: Path) -> None:
    from kafka_delivery.settings import Settings

    for name in re.findall(r"KAFKA_DELIVERY_([A-Z_]*[A-Z])", page.read_text()):
        assert name.lower() in Settings.__dataclass_fields__, name


def promises() -> list[tuple[str, list[str], list[str]]]:
    """The table of docs/guarantees.md: promise, what `make test` shows of it, and what takes longer."""
    text = (ROOT / "docs" / "guarantees.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text.partition("\n## ")[0], re.MULTILINE)
    return [(promise, re.findall("`([^`]+)`", fast), re.findall("`([^`]+)`", full)) for promise, fast, full in rows[1:]]


@pytest.mark.parametrize(("promise", "fast", "full"), promises(), ids=lambda one: one if isinstance(one, str) else "")
def test_each_promise_has_its_tests(promise: str, fast: list[str], full: list[str]) -> None:
    assert fast or full
    for name in fast + full:
        assert name.startswith("make ") or (ROOT / "tests" / name).exists(), name
    for name in fast:
        if name.startswith("scenarios/"):
            assert "pytest.mark.smoke" in (ROOT / "tests" / name).read_text(), f"`make test` runs nothing of {name}"


def test_only_chaos_takes_longer_than_make_test_waits() -> None:
    assert [promise for promise, fast, _ in promises() if not fast] == [
        "everything that can go wrong at once, for twenty minutes, loses nothing"
    ]


def test_tests_that_other_pages_name_exist() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`(tests/[\w/.]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
