# SPDX-License-Identifier: Apache-2.0
"""Places that reads borrow one at a time (chunks of the arena, cells of the board), and who waits for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvxfer.runtime.staging import FairQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvxfer.runtime.read_task import Leg, Reading

    Waiting = tuple[Leg, Callable[[int], None]]


class Supply:
    """Lends places of one kind to the legs of reads, whose reads take turns. Data thread only.

    Args:
        take: a free place, or None.
        give: a place is free again.
    """

    def __init__(self, take: Callable[[], int | None], give: Callable[[int], None]) -> None:
        self._take = take
        self._give = give
        self._waiting: FairQueue[Waiting] = FairQueue()
        self._lent: dict[Reading, set[int]] = {}

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    def ask(self, leg: Leg, then: Callable[[int], None]) -> None:
        """Wait for a place."""
        self._waiting.put(leg.reading, (leg, then))

    def served(self) -> Iterator[tuple[Leg, Callable[[int], None], int]]:
        """Each that waits, with the place that it now has, for as long as there are any. What it does may ask for more."""
        while self._waiting:
            place = self._take()
            if place is None:
                return
            leg, then = self._waiting.take()
            self._lent.setdefault(leg.reading, set()).add(place)
            yield leg, then, place

    def give_back(self, leg: Leg, place: int) -> None:
        """A leg needs it no more."""
        self._lent[leg.reading].remove(place)
        self._give(place)

    def drop(self, reading: Reading) -> None:
        """It waits no more, and keeps what it has: something may still be written there."""
        self._waiting.drop(reading)

    def release(self, reading: Reading) -> None:
        """It is over: it waits no more, and all that it has is free again."""
        self.drop(reading)
        for place in self._lent.pop(reading, ()):
            self._give(place)
