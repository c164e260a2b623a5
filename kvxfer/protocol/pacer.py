# SPDX-License-Identifier: Apache-2.0
"""Times at which messages to one peer may be sent. Pure: no clock of its own."""

from __future__ import annotations

FIRST_SHARE = 1 / 10
"""Share of a second's messages that a new connection may send at once, so that connecting again gains nothing."""


class Pacer:
    """Times for messages to one peer, at half the rate that its `TokenBucket` takes: the other half is for all other messages.

    Args:
        per_s: messages a second that the peer takes.
    """

    def __init__(self, per_s: float) -> None:
        self._interval_s = 2.0 / per_s
        self._ahead_s = FIRST_SHARE / 2 * per_s * self._interval_s
        self._next = float("-inf")

    def reserve(self, now: float) -> float:
        """The time at which one more message may be sent: some at once, and then one per interval."""
        at = max(now, self._next - self._ahead_s)
        self._next = max(self._next, now) + self._interval_s
        return at

    def repeat_s(self, number: int) -> float:
        """Time to wait before ``number`` questions are repeated, so that they take an eighth of what the peer takes."""
        return number * self._interval_s * 4
