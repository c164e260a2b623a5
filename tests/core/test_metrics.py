# SPDX-License-Identifier: Apache-2.0
"""Counters and histograms."""

from __future__ import annotations

import threading

import pytest

from kvxfer.metrics import Metrics


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
def test_a_slip_of_the_pen(call):
    """A name that is not declared cannot be counted."""
    with pytest.raises(KeyError):
        call(Metrics())


def test_every_byte_is_counted():
    """A byte counter past a million still counts each byte."""
    metrics = Metrics()
    metrics.count("kvxfer_bytes_total", 123_456_789_012)
    metrics.count("kvxfer_bytes_total", 1)
    assert metrics.value("kvxfer_bytes_total") == 123_456_789_013


def test_histograms():
    """A bucket counts what is above the bound before it and not above its own, the last one the rest; a copy does not change any more."""
    metrics = Metrics()
    assert metrics.histograms()["kvxfer_transfer_seconds"].number == 0
    for value in (0.0005, 0.0006, 0.3, 100.0):
        metrics.observe("kvxfer_transfer_seconds", value)
    found = metrics.histograms()["kvxfer_transfer_seconds"]
    metrics.observe("kvxfer_transfer_seconds", 1.0)
    assert found.counts[:2] == [1, 1] and found.counts[-1] == 1 and sum(found.counts) == found.number == 4
    assert found.counts[found.buckets.index(0.5)] == 1
    assert len(found.counts) == len(found.buckets) + 1
    assert found.total == pytest.approx(100.3011)


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
