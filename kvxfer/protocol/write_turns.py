# SPDX-License-Identifier: Apache-2.0
"""Turns of the writes that consumers ask a producer for, so that none of them takes all of it. Pure, no I/O.

One rule: each consumer that has or wants writes under way gets an equal share of `max_write_spans` and of `MOST_NBYTES`, and its writes begin
in the order of their numbers, as far as they fit into its share; the first one always fits. Of a write that has to wait only its number
and its size are kept: when its turn has come the consumer is asked for its spans (`SendWrite`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvxfer.protocol.actions import WriteKey

if TYPE_CHECKING:
    from kvxfer.protocol.actions import PackKey
    from kvxfer.protocol.lease import ConsumerRank

MOST_WRITES = 64
"""Most writes of one rank of a consumer under way at once."""
MOST_NBYTES = 1 << 38
"""Most bytes under way for all consumers together."""
MOST_WAITING = 1024
"""Most writes of one rank of a consumer that wait for their turn; more are not noted, and asked for again later."""


@dataclass(eq=False)
class _Asked:
    """A write that a consumer has asked for, with its size.

    Attributes:
        share: the lease and rank that it belongs to.
        called: the consumer was asked for the spans of it.
    """

    share: PackKey
    spans: int
    nbytes: int
    called: bool = False


class WriteTurns:
    """Writes under way, and those that wait for their turn.

    Args:
        max_spans: of all writes under way together.
    """

    def __init__(self, max_spans: int) -> None:
        self._max_spans = max_spans
        self._running: dict[ConsumerRank, dict[int, _Asked]] = {}
        self._waiting: dict[ConsumerRank, dict[int, _Asked]] = {}

    def __len__(self) -> int:
        """Number of writes that wait."""
        return sum(map(len, list(self._waiting.values())))

    @property
    def spans(self) -> int:
        """Spans of all writes under way."""
        return sum(each.spans for mine in self._running.values() for each in mine.values())

    def take(self, key: WriteKey, share: PackKey, spans: int, nbytes: int) -> bool:
        """Note a write: True if it is its turn, and it is under way from now on; otherwise it waits."""
        consumer, number = key
        waiting = self._waiting.setdefault(consumer, {})
        asked = _Asked(share, spans, nbytes)
        first = not any(other < number for other in waiting)
        fits = first and self._fits(consumer, [asked])
        if fits:
            waiting.pop(number, None)
            self._running.setdefault(consumer, {})[number] = asked
        elif number in waiting or len(waiting) < MOST_WAITING:
            waiting[number] = asked
        if not waiting:
            del self._waiting[consumer]
        return fits

    def is_wanted(self, key: WriteKey) -> bool:
        """Whether the spans of a write that is not under way are wanted: it never arrived, or its turn has come."""
        waiting = self._waiting.get(key.consumer, {})
        asked = waiting.get(key.number)
        return len(waiting) < MOST_WAITING if asked is None else asked.called

    def over(self, key: WriteKey) -> None:
        """Note that a write is not under way any more, and does not wait either."""
        for of in (self._running, self._waiting):
            mine = of.get(key.consumer, {})
            mine.pop(key.number, None)
            if not mine:
                of.pop(key.consumer, None)

    def drop(self, share: PackKey, below: float = math.inf) -> None:
        """Forget what waits of one rank's share of a lease, as far as its numbers are below this."""
        for consumer, waiting in list(self._waiting.items()):
            for number in [n for n, each in waiting.items() if each.share == share and n < below]:
                self.over(WriteKey(consumer, number))

    def calls(self, *, again: ConsumerRank | None = None) -> list[tuple[WriteKey, PackKey]]:
        """Writes whose turn has come and whose spans are to be asked for now, with their leases.

        Args:
            again: a consumer that may have missed the call for its first one.
        """
        found = []
        for consumer, waiting in self._waiting.items():
            room: list[_Asked] = []
            for number in sorted(waiting):
                room.append(waiting[number])
                if not self._fits(consumer, room):
                    break
                if not waiting[number].called or (consumer == again and len(room) == 1):
                    waiting[number].called = True
                    found.append((WriteKey(consumer, number), waiting[number].share))
        return found

    def _fits(self, consumer: ConsumerRank, more: list[_Asked]) -> bool:
        """Whether these fit into a consumer's share, with what it has under way."""
        all_ = [*self._running.get(consumer, {}).values(), *more]
        shares = len(self._running.keys() | self._waiting.keys() | {consumer})
        return len(all_) == 1 or (
            len(all_) <= MOST_WRITES
            and sum(each.spans for each in all_) <= self._max_spans // shares
            and sum(each.nbytes for each in all_) <= MOST_NBYTES // shares
        )
