# SPDX-License-Identifier: Apache-2.0
"""How much of a control channel one peer may take: connections, messages, memory. Pure: no sockets, no clock of its own.

Whoever goes on after a warning that it cannot miss, that its messages are dropped, loses its connection. That harms no peer of
ours: ZeroMQ connects again by itself, and what matters is said again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvxfer.protocol.pace import FIRST_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

UNIT_NBYTES = 4096
"""A message counts once for each so many bytes of it: to decode takes time by length."""

CPU_SHARE = 1 / 2
"""Of the control thread's processor time may go to messages of one connection."""

_NEWCOMERS_SHARE = 8
"""One place of so many is for connections that have not said anything yet, however many others there are."""

MOST_UNFINISHED_NBYTES = 64 << 20
"""Of a message that has begun to arrive and does not end. ZeroMQ bounds frames, and neither their number nor their sum."""


class Verdict(Enum):
    """What is to be done with a message: TAKE it, DROP it, or CUT the connection that it came by."""

    TAKE = "take"
    DROP = "drop"
    CUT = "cut"


class Bucket:
    """How much one peer may still say: so much a second, a second's worth at once. What is dropped counts too.

    Args:
        asked: it is one that this side connects to, and answers what it is asked; else a new connection may say less at once.
    """

    def __init__(self, per_s: float, now: float, *, asked: bool = False) -> None:
        self._per_s = per_s
        self._left = per_s if asked else per_s * FIRST_SHARE
        self._left_s = CPU_SHARE
        self._at = now

    def spend(self, seconds: float) -> None:
        """A message that was taken has cost so much of the thread's time.

        What is dropped for that does not get a peer cut: it cannot know what its messages cost.
        """
        self._left_s = max(self._left_s - seconds, -2 * CPU_SHARE)

    def take(self, nbytes: int, now: float) -> Verdict:
        """A message has come. A peer that is a second's worth in debt is cut."""
        self._left = min(self._left + (now - self._at) * self._per_s, self._per_s) - (1 + nbytes // UNIT_NBYTES)
        self._left_s = min(self._left_s + (now - self._at) * CPU_SHARE, CPU_SHARE)
        self._at = now
        if self._left >= 0:
            return Verdict.TAKE if self._left_s >= 0 else Verdict.DROP
        return Verdict.DROP if self._left > -self._per_s else Verdict.CUT


class Untaken:
    """How many bytes of replies each connection has not taken yet, so that one which takes none is not answered without end.

    Args:
        most: bytes that may wait for one connection; a reply is begun while no more than these do.
        acknowledged: bytes that the other end of a connection has acknowledged so far; None where the system does not say.
    """

    def __init__(self, most: int, acknowledged: Callable[[int], int | None]) -> None:
        self._most = most
        self._acknowledged = acknowledged
        self._waiting: dict[int, tuple[int, int]] = {}
        """By connection, bytes that wait, and what was acknowledged when that was last looked at."""

    def may_send(self, key: int, nbytes: int) -> bool:
        """Count a reply of so many bytes, unless too many wait already."""
        waiting, before = self._waiting.get(key, (0, 0))
        if waiting > self._most // 2:
            now = self._acknowledged(key)
            waiting, before = (0, before) if now is None else (max(0, waiting - (now - before)), now)
        allowed = waiting <= self._most
        self._waiting[key] = waiting + (nbytes if allowed else 0), before
        return allowed

    def forget(self, key: int) -> None:
        """The connection has ended."""
        self._waiting.pop(key, None)


class Buckets:
    """A bucket for each peer.

    ``key`` names one: the address of a peer that this side connects to, or the number of a connection that came in. Messages whose
    sender cannot be told share one.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._buckets: dict[Hashable, Bucket] = {}

    def take(self, key: Hashable, nbytes: int, now: float) -> Verdict:
        """See `Bucket.take`."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(self._per_s, now, asked=isinstance(key, str))
        return bucket.take(nbytes, now)

    def spend(self, key: Hashable, seconds: float) -> None:
        """See `Bucket.spend`."""
        bucket = self._buckets.get(key)
        if bucket is not None:
            bucket.spend(seconds)

    def forget(self, key: Hashable) -> None:
        """The peer has gone."""
        self._buckets.pop(key, None)


@dataclass
class _Place:
    """One connection.

    Attributes:
        taken: a message of it came since it was last looked at.
        finished_nbytes: what had arrived by it when that was last so.
    """

    taken: bool = False
    finished_nbytes: int = 0


class Places:
    """Connections that came in, by the number that the operating system gives each; at most ``most`` stay.

    When there are more, one has to go: the oldest of those that never said anything, unless hardly any of these are left; then
    the one that was silent for longest. So a stranger has no place for long while others come, and a peer that speaks keeps its.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._silent: OrderedDict[int, _Place] = OrderedDict()
        self._heard: OrderedDict[int, _Place] = OrderedDict()
        self._cut: set[int] = set()
        """Hung up on; their end has not been told yet."""

    def __len__(self) -> int:
        return len(self._silent) + len(self._heard)

    def __iter__(self) -> Iterator[int]:
        return iter([*self._silent, *self._heard])

    def accepted(self, connection: int) -> int | None:
        """A connection has come in.

        Returns:
            the one to be cut for it, if one has to be.
        """
        self._cut.discard(connection)
        # Its first message may have been told before it was.
        if connection not in self._heard:
            self._silent[connection] = _Place()
        if len(self) <= self.most:
            return None
        newcomers = len(self._silent) * _NEWCOMERS_SHARE > self.most or not self._heard
        return next(iter(self._silent if newcomers else self._heard))

    def heard(self, connection: int) -> None:
        """A message has come by it."""
        place = self._heard.get(connection)
        if place is not None:
            self._heard.move_to_end(connection)
        elif connection in self._cut:
            return
        else:
            place = self._heard[connection] = self._silent.get(connection, _Place())
            if connection in self._silent:
                del self._silent[connection]
        place.taken = True

    def unfinished_nbytes(self, connection: int, received_nbytes: int) -> int:
        """How much has arrived of a message that has not ended, at the most. What came beside ends of messages does not count.

        Args:
            received_nbytes: by this connection, since it was made.
        """
        place = self._heard.get(connection) or self._silent.get(connection)
        if place is None:
            return 0
        if place.taken:
            place.taken, place.finished_nbytes = False, received_nbytes
        return received_nbytes - place.finished_nbytes

    def cut(self, connection: int) -> None:
        """It is hung up on, and takes no place any more."""
        if connection in self._silent or connection in self._heard:
            self.gone(connection)
            self._cut.add(connection)

    def gone(self, connection: int) -> bool:
        """It has ended. True if that was no surprise: it had said something, or was cut."""
        if connection in self._cut:
            self._cut.discard(connection)
            return True
        stranger = connection not in self._heard
        for places in (self._silent, self._heard):
            if connection in places:
                del places[connection]
        return not stranger
