# SPDX-License-Identifier: Apache-2.0
"""Timers, one per key. Pure: the clock is the caller's."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SLACK = 64


class Timers:
    """Times at which keys are due, at most one for each; a new time replaces the old one.

    Costs O(log n) amortised for n keys, and memory for at most about twice as many entries as there are keys: entries that
    were replaced or cancelled are removed, so that a process may run for months.
    """

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._at)

    @property
    def entries(self) -> int:
        """Entries that are kept: those of keys, and those that were replaced or cancelled and are not removed yet."""
        return len(self._heap)

    def set(self, key: str, at: float) -> None:
        """Make ``key`` due at ``at``, and at no other time."""
        if self._at.get(key) == at:
            return
        self._at[key] = at
        heapq.heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._at) + _SLACK:
            self._heap = [(at, key) for key, at in self._at.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: str) -> None:
        """Make ``key`` never due. Harmless for one that is not set."""
        self._at.pop(key, None)

    def due(self, now: float) -> Iterator[str]:
        """Take out the keys whose time has come, in order; also those set meanwhile."""
        while self._heap and self._heap[0][0] <= now:
            at, key = heapq.heappop(self._heap)
            if self._at.get(key) == at:
                del self._at[key]
                yield key

    def next_at(self) -> float | None:
        """Time at which something is due next; None if nothing is."""
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
