# SPDX-License-Identifier: Apache-2.0
"""Counters, gauges and histograms of one endpoint, for the engine to export."""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvxfer.errors import names_of_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Labels = tuple[tuple[str, str], ...]

SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
COUNT_BUCKETS = tuple(float(4**i) for i in range(11))
NBYTES_BUCKETS = tuple(float(4**i) for i in range(5, 19))

# All series with their help texts. Other names cannot be counted.
COUNTERS = {
    "kvxfer_transfers_total": "Reads that ended, by outcome (done, or the error's name).",
    "kvxfer_bytes_total": "KV bytes read into this cache.",
    "kvxfer_partial_bytes_total": "KV bytes that arrived before the prefill of their request had ended.",
    "kvxfer_leases_total": "Leases of this producer that ended, by end (read, unread, expired, revoked).",
    "kvxfer_refused_messages_total": "Control messages refused, by reason.",
    "kvxfer_handshakes_total": "Handshakes that this endpoint began, by outcome.",
    "kvxfer_agent_resets_total": "Times that the transfer agent was replaced to stop late writes.",
    "kvxfer_contacts_total": "First transfers from peers, by outcome (answered, failed, silent), and agents replaced because peers were silent (renewed) or a connection was lost right after it was made (lost).",
    "kvxfer_sources_total": "Sources of reads, by what moves their bytes (read: this side reads; write: the producer writes).",
    "kvxfer_link_bytes_total": "KV bytes read into this cache, by peer (control address of its engine), link, what moves them (read or write) and route.",
    "kvxfer_write_waits_total": "Writes that had to wait for their turn (setting max_write_spans).",
    "kvxfer_writes_total": "Writes that consumers asked this producer for, by end (done, failed, refused).",
    "kvxfer_events_dropped_total": "Done and Failed events dropped because poll() was never called.",
    "kvxfer_slot_revocations_total": "Leases revoked because their consumer kept staging slots that other consumers waited for.",
    "kvxfer_internal_errors_total": "Faults of kvxfer itself that were caught; please report each as a bug.",
}
LABEL_VALUES: dict[str, tuple[str, tuple[str, ...]]] = {
    "kvxfer_transfers_total": ("outcome", ("done", *names_of_errors())),
    "kvxfer_leases_total": ("end", ("read", "unread", "expired", "revoked")),
    "kvxfer_refused_messages_total": (
        "reason",
        (
            *(
                "unauthenticated",
                "not_zmtp",
                "connections",
                "flood",
                "oversized",
                "rate",
                "unsendable",
                "unmet",
                "garbage",
            ),
            *(
                "unexpected",
                "protocol",
                "stale_epoch",
                "not_introduced",
                "rank",
                "agent",
                "unknown_lease",
                "ended_lease",
            ),
            *("taken_lease", "staging"),
        ),
    ),
    "kvxfer_handshakes_total": (
        "outcome",
        ("met", "incompatible", "identity", "agent", "protocol", "rank", "garbage", "address", "other"),
    ),
    "kvxfer_contacts_total": ("outcome", ("answered", "failed", "silent", "renewed", "lost")),
    "kvxfer_sources_total": ("by", ("read", "write")),
    "kvxfer_link_bytes_total": ("peer", ()),
    "kvxfer_writes_total": ("end", ("done", "failed", "refused")),
    "kvxfer_internal_errors_total": ("where", ("control", "data")),
}
"""A label of a counter, and its values that are exported as 0 before the first count: an alert sees an increase only between two
samples of a series. Other values may come."""

GAUGES = {
    "kvxfer_link_info": "Link, mover of the bytes (read or write) and route of the last transfer from a peer, as labels of the value 1.",
}
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "kvxfer_transfer_seconds": (
        "Time from the call of read until the bytes are in place and the lease is checked.",
        SECONDS_BUCKETS,
    ),
    "kvxfer_transfer_nbytes": ("Bytes of one read.", NBYTES_BUCKETS),
    "kvxfer_descriptors": ("Descriptors of one read, after neighbours were merged.", COUNT_BUCKETS),
}


@dataclass
class Histogram:
    """Observations of one series.

    Attributes:
        buckets: upper bounds.
        counts: observations per bucket, not cumulative; the last is above all bounds.
        total: sum of the observations.
        number: of observations.
    """

    buckets: tuple[float, ...]
    counts: list[int]
    total: float = 0.0
    number: int = 0

    def observe(self, value: float) -> None:
        """Add one observation."""
        self.counts[bisect.bisect_left(self.buckets, value)] += 1
        self.total += value
        self.number += 1


_LOCK_S = 0.5


def zeros(name: str) -> dict[Labels, float]:
    """Series of a counter that are exported from the start, all 0."""
    label, values = LABEL_VALUES.get(name, ("", ()))
    return {((label, value),): 0.0 for value in values} if label else {(): 0.0}


class Metrics:
    """Counters, gauges and histograms of one endpoint since it was made. Any thread, and signal handlers, may call any method.

    A signal handler may interrupt the thread that has the lock, and wait for another thread that counts. So a thread waits for
    the lock for a limited time; a count that misses it is added by the next call that reads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._late: deque[Callable[[], None]] = deque()
        self._counters: dict[str, dict[Labels, float]] = {name: {} for name in COUNTERS}
        self._gauges: dict[str, dict[Labels, float]] = {name: {} for name in GAUGES}
        self._histograms = {
            name: Histogram(buckets, [0] * (len(buckets) + 1)) for name, (_, buckets) in HISTOGRAMS.items()
        }

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter of `COUNTERS`."""
        key = tuple(sorted(labels.items()))
        if self._lock.acquire(timeout=_LOCK_S):
            try:
                self._add(name, key, amount)
            finally:
                self._lock.release()
        else:
            self._late.append(lambda: self._add(name, key, amount))

    def _add(self, name: str, key: Labels, amount: float) -> None:
        series = self._counters[name]
        series[key] = series.get(key, 0) + amount

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge of `GAUGES`; one of value 0 is forgotten. One thread sets a gauge."""
        key = tuple(sorted(labels.items()))
        if self._lock.acquire(timeout=_LOCK_S):
            try:
                self._set(name, key, value)
            finally:
                self._lock.release()
        else:
            self._late.append(lambda: self._set(name, key, value))

    def _set(self, name: str, key: Labels, value: float) -> None:
        series = self._gauges[name]
        if value:
            series[key] = value
        else:
            series.pop(key, None)

    def observe(self, name: str, value: float) -> None:
        """Add to a histogram of `HISTOGRAMS`."""
        if self._lock.acquire(timeout=_LOCK_S):
            try:
                self._histograms[name].observe(value)
            finally:
                self._lock.release()
        else:
            self._late.append(lambda: self._histograms[name].observe(value))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        held = self._lock.acquire(timeout=_LOCK_S)
        try:
            while held and self._late:
                self._late.popleft()()
            yield
        finally:
            if held:
                self._lock.release()

    def counters(self) -> dict[str, dict[Labels, float]]:
        """Copy of all counters: series name -> labels -> value."""
        with self._reading():
            return {name: dict(series) for name, series in self._counters.items()}

    def gauges(self) -> dict[str, dict[Labels, float]]:
        """Copy of all gauges: series name -> labels -> value."""
        with self._reading():
            return {name: dict(series) for name, series in self._gauges.items()}

    def value(self, name: str, **labels: str) -> float:
        """Sum of a counter over all series with these labels."""
        wanted = set(labels.items())
        return sum(v for key, v in self.counters()[name].items() if wanted <= set(key))

    def histograms(self) -> dict[str, Histogram]:
        """Copies of all histograms, by name."""
        with self._reading():
            return {name: replace(each, counts=list(each.counts)) for name, each in self._histograms.items()}
