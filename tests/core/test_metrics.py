# SPDX-License-Identifier: Apache-2.0
"""Counters, histograms and their Prometheus text."""

from __future__ import annotations

import re
import threading

import pytest

from kvxfer.metrics import COUNTERS, HISTOGRAMS, Metrics


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


def test_every_digit_is_printed():
    """A byte counter past a million still shows each byte."""
    metrics = Metrics()
    metrics.count("kvxfer_bytes_total", 123_456_789_012)
    metrics.count("kvxfer_bytes_total", 1)
    assert "\nkvxfer_bytes_total 123456789013\n" in metrics.prometheus_text()


def test_histograms_are_cumulative():
    """Each bucket counts what is not above its bound; the last one counts all; the sum is exact."""
    metrics = Metrics()
    for value in (0.0005, 0.0006, 0.3, 100.0):
        metrics.observe("kvxfer_transfer_seconds", value)
    text = metrics.prometheus_text()
    counts = [int(n) for n in re.findall(r'kvxfer_transfer_seconds_bucket\{le="[^"]+"\} (\d+)', text)]
    assert counts == sorted(counts) and counts[0] == 1 and counts[1] == 2 and counts[-2:] == [3, 4]
    assert 'le="+Inf"} 4' in text and "kvxfer_transfer_seconds_count 4" in text
    assert float(re.search(r"kvxfer_transfer_seconds_sum (\S+)", text)[1]) == pytest.approx(100.3011)


def test_the_text_is_prometheus():
    """Every line is a comment or a sample, every series has help and type, and labels are escaped."""
    metrics = Metrics()
    metrics.count("kvxfer_refused_messages_total", reason='a "quoted"\nback\\slash')
    text = metrics.prometheus_text()
    sample = r'[a-z_]+(\{[a-z_]+="(?:[^"\\\n]|\\.)*"(,[a-z_]+="(?:[^"\\\n]|\\.)*")*\})? \S+'
    assert text.endswith("\n")
    for line in text.splitlines():
        assert line.startswith("# ") or re.fullmatch(sample, line), line
    for name in (*COUNTERS, *HISTOGRAMS):
        assert f"# HELP {name} " in text and f"# TYPE {name} " in text
    assert r'reason="a \"quoted\"\nback\\slash"' in text


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
    assert "kvxfer_descriptors_count 8000" in metrics.prometheus_text()
