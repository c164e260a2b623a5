# SPDX-License-Identifier: Apache-2.0
"""How many chunks of a transfer are under way at a time: as many as keep its slowest leg busy. Pure, no clock of its own.

A chunk has up to three legs (out of a device, over the wire, into a device) and messages between them. The slowest leg sets the
pace at which chunks end. Alone, a chunk takes as long as all legs and messages together: so many as end in that time have to be
under way for the slowest leg never to wait, and one more, whose turn is next. Where there are too few, they set the pace by
themselves, and one more is found to be needed each time, until there are enough.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

_FEWEST: Final = 3
"""One on the slowest leg, one that waits for it, and one on its way: threads and messages are late at times."""
_TO_BEGIN_WITH: Final = 4
"""One for each leg and one more: right where messages take no time."""
_REMEMBERED: Final = 8
"""Transfers, and chunks of one at least. Several ends may be noticed at once, so a pace is that of several."""


def depth(alone_s: float, pace_s: float, most: int) -> int:
    """How many chunks are needed at a time.

    Args:
        alone_s: that a chunk takes from when it is asked for to its end, when nothing else is under way.
        pace_s: from the end of a chunk to that of the next one.
        most: no more than these.
    """
    if alone_s <= 0 or alone_s > pace_s * most:
        return most if alone_s > 0 else min(_TO_BEGIN_WITH, most)
    return min(most, max(_FEWEST, math.ceil(alone_s / pace_s) + 1))


class Depth:
    """Of the transfers from one peer, each of which goes on with what those before have found. Data thread only.

    Attributes:
        most: by setting.
        number: chunks of one transfer that are to be under way at a time.
    """

    def __init__(self, most: int) -> None:
        self.most: int = most
        self.number: int = min(_TO_BEGIN_WITH, most)
        self._alone: deque[float] = deque(maxlen=_REMEMBERED)

    def alone(self, seconds: float) -> None:
        """The first chunk of a transfer took so long. What else the machine did can only have made it longer."""
        self._alone.append(seconds)

    def pace(self, seconds: float) -> None:
        """Chunks of a transfer, of which enough were there, end so far from each other."""
        if self._alone:
            self.number = depth(min(self._alone), seconds, self.most)


class Ends:
    """When the chunks of one transfer begin and end.

    Args:
        depth: is told.
    """

    def __init__(self, depth: Depth) -> None:
        self._depth = depth
        self._first: float | None = None
        self._last: deque[float] = deque()

    def begun(self, now: float) -> None:
        """A chunk is asked for."""
        if self._first is None:
            self._first = now

    def ended(self, now: float) -> None:
        """A chunk has come to its end."""
        if not self._last and self._first is not None:
            self._depth.alone(now - self._first)
        self._last.append(now)
        # Too few come in bursts, with a gap after each: only over all that are under way at a time is the pace their own.
        several = max(_REMEMBERED, self._depth.number)
        while len(self._last) > several + 1:
            self._last.popleft()
        if len(self._last) == several + 1:
            self._depth.pace((now - self._last[0]) / several)
