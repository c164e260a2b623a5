# SPDX-License-Identifier: Apache-2.0
"""What pages tell an operator to look for is what the code says: metrics, labels, lines of the log and sentences of refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvxfer.errors import names_of_errors
from kvxfer_serving.refusals import RefusalReason
from kvxfer_vllm import stats

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
SOURCES = "".join(
    path.read_text(encoding="utf-8")
    for folder in ("kvxfer/channel", "kvxfer/runtime", "integrations/kvxfer_vllm", "adapters/kvxfer_nixl")
    for path in (ROOT / folder).glob("*.py")
)
NAMES = {*stats.SERIES, *stats.COUNTERS, *stats.LABELLED, *stats.LINK_COUNTERS, *stats.LINK_GAUGES}
LEADING = {"failed", "refused", "transfer", "expired", "unread", "agent", "internal", "hook", "local"}
"""First words of metrics that troubleshooting names without their prefix."""


def test_metrics_that_pages_name_exist():
    """Every ``vllm:kvxfer_...`` of a page is a metric of the connector, and troubleshooting's short names are, too."""
    named = {
        (page, re.sub(r"_(total|count|sum|bucket)$", "", name))
        for page, text in PAGES.items()
        for name in re.findall(r"vllm:kvxfer_([a-z_]+[a-z])", text)
    }
    short = re.findall(r"`(\w+?)(?:_count)?(?:\{reason=[^`]*)?`", PAGES["troubleshooting.md"])
    named |= {("troubleshooting.md", name) for name in short if "_" in name and name.split("_")[0] in LEADING}
    assert len(named) > 25
    assert {(page, name) for page, name in named if name not in NAMES} == set()


def test_reasons_that_pages_name_exist():
    """Every label ``reason`` of a failed transfer is an error, of refused parameters a reason."""
    text = "".join(PAGES.values())
    failed = set(re.findall(r"failed_transfers(?:_total)?\{reason=\"(\w+)\"", text))
    refused = set(re.findall(r"refused_params(?:_total)?\{reason=\"(\w+)\"", text))
    assert {"PeerTimeoutError", "LeaseEndedError"} <= failed <= set(names_of_errors())
    assert {"no_lease", "other_prompt"} <= refused <= {reason.value for reason in RefusalReason}


@pytest.mark.parametrize(
    ("page", "line", "in_the_code"),
    [
        ("verify.md", "rank 0 listens at tcp://", "rank %d listens at %s"),
        ("verify.md", "first transfer from", "first transfer from"),
        ("troubleshooting.md", "can be reached from other machines, and without a secret", None),
        ("troubleshooting.md", "cannot listen on tcp://", "cannot listen on {bind}: "),
        ("troubleshooting.md", "KvxferConnector does not support", None),
        ("troubleshooting.md", "fate-shared link", None),
    ],
)
def test_lines_to_look_for_are_those_of_the_code(page, line, in_the_code):
    """A line that a page tells to look for is written by the code."""
    assert line in PAGES[page]
    assert (in_the_code or line) in SOURCES
