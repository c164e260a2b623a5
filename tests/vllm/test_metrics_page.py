# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/metrics.md agree with the code: names, labels and types."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer.metrics import COUNTERS, GAUGES, HISTOGRAMS
from kvxfer.runtime.links import LinkUse
from kvxfer_vllm import stats

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def _table(heading: str) -> dict[str, tuple[list[str], str]]:
    """Labels and type of each metric in the table under a heading."""
    (section,) = [part for part in PAGE.split("\n## ") if part.startswith(heading)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "| `" in line]
    return {
        row[0].strip("`"): ([label.strip("` ") for label in row[1].split(",") if label], row[2])
        for row in rows
        if len(row) == 4 and row[0].startswith("`")
    }


def _labels_in_the_code() -> dict[str, set[str]]:
    """Labels with which the core counts each of its series."""
    found = defaultdict(set)
    for path in (ROOT / "kvxfer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = node.args[0].value
                if name in COUNTERS or name in GAUGES:
                    for keyword in node.keywords:
                        found[name].update([keyword.arg] if keyword.arg else LinkUse._fields)
    return found


def test_vllms_metrics_are_listed():
    """Each metric vllm:kvxfer_* stands in the table with its labels and its type, and no other."""
    expected = {name: ([], "histogram") for name in stats.SERIES} | {name: ([], "counter") for name in stats.COUNTERS}
    expected |= {name: ([label], "counter") for name, (_, label, _) in stats.LABELLED.items()}
    expected |= {name: (list(LinkUse._fields), "counter") for name in stats.LINK_COUNTERS}
    expected |= {name: (list(LinkUse._fields), "gauge") for name in stats.LINK_GAUGES}
    assert _table("vLLM") == expected


def test_an_endpoints_metrics_are_listed():
    """Each series of an endpoint stands in the table with its type and the labels by which the core counts, and no other."""
    listed = _table("Endpoints")
    assert {name: kind for name, (_, kind) in listed.items()} == (
        dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(HISTOGRAMS, "histogram")
    )
    labels = _labels_in_the_code()
    assert {name: set(given) for name, (given, _) in listed.items()} == {name: labels[name] for name in listed}
