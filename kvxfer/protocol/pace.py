# SPDX-License-Identifier: Apache-2.0
"""When messages to one peer may be sent. Pure: no clock of its own."""

from __future__ import annotations

FIRST_SHARE = 1 / 10
"""Of a second's worth is what a new connection may say at once, so that to connect again pays for nobody."""


class Pace:
    """When messages to one peer may be sent, so that its `TokenBucket` of the same rate takes them all, and what else is said to it.

    Args:
        per_s: messages a second that the peer takes.
    """

    def __init__(self, per_s: float) -> None:
        self._apart_s = 2.0 / per_s
        self._ahead_s = FIRST_SHARE / 2 * per_s * self._apart_s
        self._next = float("-inf")

    def reserve(self, now: float) -> float:
        """The time at which one more may be sent; some at once, and then one after the other."""
        at = max(now, self._next - self._ahead_s)
        self._next = max(self._next, now) + self._apart_s
        return at

    def repeat_s(self, number: int) -> float:
        """How long to wait before ``number`` questions are repeated, so that they take an eighth of what the peer takes."""
        return number * self._apart_s * 4
