# SPDX-License-Identifier: Apache-2.0
"""Leases that have ended, remembered for a while so that repeated messages about them are answered alike. Pure, no I/O.

Nothing depends on how long: what a reader was given counts by the check of its lease (`kvxfer.fence`), which no other offering has.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvxfer.leases import Lease

_CONSUMERS = 64
_OF_ONE_CONSUMER = 512


class EndedLeases:
    """Ended leases by token: those that the engine announced, and apart from them tokens that only consumers ever named.

    A consumer that names many unknown tokens displaces its own, and none that the engine announced.

    Args:
        most: leases of the engine that are remembered; the oldest are forgotten first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._announced: OrderedDict[str, Lease] = OrderedDict()
        self._named: dict[str, Lease] = {}
        self._by_consumer: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()
        """Tokens of ``_named`` by the consumer's name, the consumer that was heard last at the end."""

    def __contains__(self, token: str) -> bool:
        return token in self._announced or token in self._named

    def __len__(self) -> int:
        return len(self._announced) + len(self._named)

    def get(self, token: str) -> Lease | None:
        """The lease, if it is remembered."""
        return self._announced.get(token) or self._named.get(token)

    def add(self, lease: Lease) -> None:
        """Remember a lease that the engine announced or offered."""
        self._announced[lease.token] = lease
        while len(self._announced) > self._most:
            self._announced.popitem(last=False)

    def add_named(self, lease: Lease, consumer: str) -> None:
        """Remember a lease that only this consumer ever named."""
        if lease.token in self._named:
            return
        tokens = self._by_consumer.setdefault(consumer, OrderedDict())
        self._by_consumer.move_to_end(consumer)
        self._named[lease.token] = lease
        tokens[lease.token] = None
        if len(tokens) > _OF_ONE_CONSUMER:
            del self._named[tokens.popitem(last=False)[0]]
        if len(self._by_consumer) > _CONSUMERS:
            for token in self._by_consumer.popitem(last=False)[1]:
                del self._named[token]
