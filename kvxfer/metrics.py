# SPDX-License-Identifier: Apache-2.0
"""Counters and histograms of one endpoint, for any engine to read."""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Labels = tuple[tuple[str, str], ...]

SECONDS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
COUNT_BUCKETS = tuple(float(4**i) for i in range(11))
NBYTES_BUCKETS = tuple(float(4**i) for i in range(5, 19))

# Every series, with its meaning: a name that is not here cannot be counted by a slip of the pen.
COUNTERS = {
    "kvxfer_transfers_total": "Reads that ended, by outcome (done, or the error's name).",
    "kvxfer_bytes_total": "KV bytes read into this cache.",
    "kvxfer_partial_bytes_total": "Of these, those that were here before their prefill had ended.",
    "kvxfer_leases_total": "Leases of this producer that ended, by end (read, unread, expired, revoked).",
    "kvxfer_refused_messages_total": "Control messages refused, by reason.",
    "kvxfer_handshakes_total": "Handshakes this side asked for, by outcome.",
    "kvxfer_agent_resets_total": "Times the transfer agent was torn down to stop late writes.",
    "kvxfer_contacts_total": "First contacts with the fabrics of peers, by outcome (answered, failed, silent), and agents made anew for silent ones (renewed).",
    "kvxfer_events_dropped_total": "Done and Failed events dropped because poll() has never been called.",
    "kvxfer_slot_revocations_total": "Leases revoked because their reader kept staging slots for which others waited.",
    "kvxfer_internal_errors_total": "Faults of kvxfer itself that were caught; each is a bug worth reporting.",
}
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "kvxfer_transfer_seconds": ("Time from the read call until the bytes were in place and fenced.", SECONDS_BUCKETS),
    "kvxfer_transfer_nbytes": ("Bytes of one read.", NBYTES_BUCKETS),
    "kvxfer_descriptors": ("Descriptors of one read, after merging.", COUNT_BUCKETS),
}


@dataclass
class Histogram:
    """Observations of one series.

    Attributes:
        buckets: upper bounds, ascending.
        counts: observations in each bucket, and last those above all bounds; empty before the first one.
        total, number: sum and number of all observations.
    """

    buckets: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0
    number: int = 0

    def observe(self, value: float) -> None:
        """Add one observation."""
        if not self.counts:
            self.counts = [0] * (len(self.buckets) + 1)
        self.counts[bisect.bisect_left(self.buckets, value)] += 1
        self.total += value
        self.number += 1


_PATIENCE_S = 0.5


class Metrics:
    """What one endpoint counted since it was made. Any thread, and signal handlers, may call any method.

    A signal handler may interrupt the thread that has the lock, and wait for another one that wants to count: so nobody waits
    for the lock for long, and what could not be counted then is counted by the next who reads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._late: deque[Callable[[], None]] = deque()
        self._counters: dict[str, dict[Labels, float]] = {name: {} for name in COUNTERS}
        self._histograms = {name: Histogram(buckets) for name, (_, buckets) in HISTOGRAMS.items()}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter of `COUNTERS`."""
        key = tuple(sorted(labels.items()))
        if self._lock.acquire(timeout=_PATIENCE_S):
            try:
                self._add(name, key, amount)
            finally:
                self._lock.release()
        else:
            self._late.append(lambda: self._add(name, key, amount))

    def _add(self, name: str, key: Labels, amount: float) -> None:
        series = self._counters[name]
        series[key] = series.get(key, 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Add to a histogram of `HISTOGRAMS`."""
        if self._lock.acquire(timeout=_PATIENCE_S):
            try:
                self._histograms[name].observe(value)
            finally:
                self._lock.release()
        else:
            self._late.append(lambda: self._histograms[name].observe(value))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        held = self._lock.acquire(timeout=_PATIENCE_S)
        try:
            while held and self._late:
                self._late.popleft()()
            yield
        finally:
            if held:
                self._lock.release()

    def counters(self) -> dict[str, dict[Labels, float]]:
        """A copy: series name -> labels -> value."""
        with self._reading():
            return {name: dict(series) for name, series in self._counters.items()}

    def value(self, name: str, **labels: str) -> float:
        """Sum of a counter over all series that carry these labels."""
        wanted = set(labels.items())
        return sum(v for key, v in self.counters()[name].items() if wanted <= set(key))

    def histograms(self) -> dict[str, Histogram]:
        """A copy: series name -> its observations."""
        with self._reading():
            return {name: replace(each, counts=list(each.counts)) for name, each in self._histograms.items()}
