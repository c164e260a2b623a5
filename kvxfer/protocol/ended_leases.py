# SPDX-License-Identifier: Apache-2.0
"""Leases that have ended, remembered for a while so that repeated messages about them are answered alike. Pure, no I/O.

No safety depends on how long: bytes count by the check of their lease (`kvxfer.protocol.lease_board`), which no other lease has.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

_CONSUMERS = 64
_OF_ONE_CONSUMER = 512


class _Lease(Protocol):
    token: str


_L = TypeVar("_L", bound=_Lease)


class EndedLeases(Generic[_L]):
    """Ended leases by token: those that the engine announced, and apart from them tokens that only consumers ever named.

    A consumer that names many unknown tokens displaces its own, and none that the engine announced.

    Args:
        most: leases of the engine that are remembered; the oldest are forgotten first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._announced: OrderedDict[str, _L] = OrderedDict()
        self._named: dict[str, _L] = {}
        self._by_consumer: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()
        """Tokens of ``_named`` by the consumer's name, the consumer that was heard last at the end."""

    def __contains__(self, token: str) -> bool:
        return token in self._announced or token in self._named

    def __len__(self) -> int:
        return len(self._announced) + len(self._named)

    def get(self, token: str) -> _L | None:
        """The lease, if it is remembered."""
        return self._announced.get(token) or self._named.get(token)

    def add(self, lease: _L) -> None:
        """Remember a lease that the engine announced or published."""
        self._announced[lease.token] = lease
        while len(self._announced) > self._most:
            self._announced.popitem(last=False)

    def add_named(self, lease: _L, consumer: str) -> None:
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
