# SPDX-License-Identifier: Apache-2.0
"""Counters and histograms."""

from __future__ import annotations

import math
import re
import threading
from collections import defaultdict
from pathlib import Path

import pytest

from kvxfer.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metrics, zeros


def test_counting():
    """Labels make series, sums go over those that match, and a copy does not change any more."""
    metrics = Metrics()
    metrics.count("kvxfer_transfers_total", outcome="done")
    metrics.count("kvxfer_transfers_total", 2, outcome="LeaseEndedError")
    before = metrics.counters()
    metrics.count("kvxfer_transfers_total", outcome="done")
    assert metrics.value("kvxfer_transfers_total") == 4
    assert metrics.value("kvxfer_transfers_total", outcome="done") == 2
    assert metrics.value("kvxfer_transfers_total", outcome="never") == 0
    assert before["kvxfer_transfers_total"] == {(("outcome", "done"),): 1, (("outcome", "LeaseEndedError"),): 2}


@pytest.mark.parametrize("call", [lambda m: m.count("kvxfer_transfer_total"), lambda m: m.observe("seconds", 1)])
def test_unknown_names(call):
    """A name that is not declared cannot be counted."""
    with pytest.raises(KeyError):
        call(Metrics())


def test_every_digit_is_kept():
    """A byte counter past a million still shows each byte."""
    metrics = Metrics()
    metrics.count("kvxfer_bytes_total", 123_456_789_012)
    metrics.count("kvxfer_bytes_total", 1)
    assert metrics.value("kvxfer_bytes_total") == 123_456_789_013


def test_histograms():
    """Each bucket counts what is above the bound before it and not above its own; the sum is exact; a copy stays as it is."""
    metrics = Metrics()
    for value in (0.0005, 0.0006, 0.3, 100.0):
        metrics.observe("kvxfer_transfer_seconds", value)
    histogram = metrics.histograms()["kvxfer_transfer_seconds"]
    metrics.observe("kvxfer_transfer_seconds", 0.3)
    at = {bound: count for bound, count in zip((*histogram.buckets, math.inf), histogram.counts, strict=True) if count}
    assert at == {0.0005: 1, 0.001: 1, 0.5: 1, math.inf: 1}
    assert histogram.number == 4 and histogram.total == pytest.approx(100.3011)
    assert metrics.histograms()["kvxfer_transfer_seconds"].number == 5


def test_gauges():
    """A gauge has the value that was set last, and is gone when that is 0."""
    metrics = Metrics()
    metrics.gauge("kvxfer_link_info", 1, peer="a")
    metrics.gauge("kvxfer_link_info", 1, peer="b")
    metrics.gauge("kvxfer_link_info", 2, peer="b")
    metrics.gauge("kvxfer_link_info", 0, peer="a")
    assert metrics.gauges() == {"kvxfer_link_info": {(("peer", "b"),): 2}}


def test_series_can_be_exported():
    """Every name is one that Prometheus takes, counters end as its counters do, and each series has a sentence of help."""
    for name, help_ in [
        *COUNTERS.items(),
        *GAUGES.items(),
        *((name, help_) for name, (help_, _) in HISTOGRAMS.items()),
    ]:
        assert re.fullmatch(r"kvxfer_[a-z_]+", name) and name.endswith("_total") == (name in COUNTERS)
        assert help_[0].isupper() and help_.endswith(".")


def test_known_series_start_at_zero():
    """Each value of a label that the code names is exported as 0 from the start, since an alert misses a series' first count."""
    named = defaultdict(set)
    for path in (Path(__file__).resolve().parents[2] / "kvxfer").rglob("*.py"):
        for name, label, value in re.findall(r'count\("(kvxfer_\w+)", (\w+)="(\w+)"\)', path.read_text()):
            named[name].add((label, value))
    assert named["kvxfer_contacts_total"]
    for name, pairs in named.items():
        assert pairs <= {pair for ((pair),) in zeros(name)}, name
    assert {(("outcome", "done"),), (("outcome", "PeerTimeoutError"),)} <= set(zeros("kvxfer_transfers_total"))
    assert zeros("kvxfer_agent_resets_total") == {(): 0}
    assert zeros("kvxfer_link_bytes_total") == {}, "peers are not known from the start"


def test_threads_lose_no_count():
    """Counts of many threads add up."""
    metrics = Metrics()

    def count():
        for _ in range(2000):
            metrics.count("kvxfer_agent_resets_total")
            metrics.observe("kvxfer_descriptors", 3)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.value("kvxfer_agent_resets_total") == 8000
    assert metrics.histograms()["kvxfer_descriptors"].number == 8000
