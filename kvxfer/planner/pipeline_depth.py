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
_KNOWN: Final = 3
"""Transfers that have to agree before what chunks take counts as known: the first one touches memory, and loads programs."""
_FEWEST_ENDS: Final = 2
"""Of a transfer that says something about the pace of its chunks, if not how many of them there should be."""


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
    """Of chunks of one size from one peer: each transfer goes on with what those before have found. Data thread only.

    Attributes:
        most: by setting.
        number: chunks of one transfer that are to be under way at a time.
    """

    def __init__(self, most: int) -> None:
        self.most: int = most
        self.number: int = min(_TO_BEGIN_WITH, most)
        self._alone: deque[float] = deque(maxlen=_REMEMBERED)
        self._paces: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def alone_s(self) -> float | None:
        """What a chunk takes when nothing else is under way, if that is known: what else the machine did can only add to it."""
        return min(self._alone) if len(self._alone) >= _KNOWN else None

    @property
    def pace_s(self) -> float | None:
        """From the end of a chunk to that of the next, if that is known.

        Of several transfers the first quartile, for the same reason; the least may be that of ends that were noticed together.
        """
        return sorted(self._paces)[len(self._paces) // 4] if len(self._paces) >= _KNOWN else None

    def alone(self, seconds: float) -> None:
        """The first chunk of a transfer took so long."""
        self._alone.append(seconds)

    def pace(self, seconds: float) -> None:
        """Chunks of a transfer, of which enough were there, end so far from each other."""
        if self._alone:
            self.number = depth(min(self._alone), seconds, self.most)

    def over(self, pace_s: float) -> None:
        """A transfer has ended, whose chunks ended so far from each other."""
        self._paces.append(pace_s)

    def forget(self) -> None:
        """What was measured is too old to be believed."""
        self._alone.clear()
        self._paces.clear()


class Ends:
    """When the chunks of one transfer begin and end. Tells a `Depth`, where they are as large as its chunks are.

    Args:
        depth: is told.
    """

    def __init__(self, depth: Depth) -> None:
        self._depth = depth
        self._begun = self._ended = 0
        self._whole = False
        self._first_begin = self._first_end = 0.0
        self._last: deque[float] = deque()

    def begun(self, now: float, *, whole: bool = True) -> None:
        """A chunk is asked for: a ``whole`` one, or one much smaller than chunks of this size are."""
        if not self._begun:
            self._first_begin, self._whole = now, whole
        self._begun += 1

    def ended(self, now: float) -> None:
        """A chunk has come to its end."""
        self._ended += 1
        if self._ended == 1:
            self._first_end = now
            if self._whole:
                self._depth.alone(now - self._first_begin)
        self._last.append(now)
        # Too few come in bursts, with a gap after each: only over all that are under way at a time is the pace their own.
        several = max(_REMEMBERED, self._depth.number)
        while len(self._last) > several + 1:
            self._last.popleft()
        if len(self._last) == several + 1:
            self._depth.pace((now - self._last[0]) / several)

    def over(self) -> None:
        """No more will come."""
        if self._whole and self._ended >= _FEWEST_ENDS:
            self._depth.over((self._last[-1] - self._first_end) / (self._ended - 1))
