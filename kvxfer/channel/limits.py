# SPDX-License-Identifier: Apache-2.0
"""Limits of a control channel per peer: connections, messages, memory. Pure: no sockets, no clock of its own.

Messages above the rate are dropped; a peer that goes on sending loses its connection. A well-behaved peer loses nothing by
that: ZeroMQ reconnects, and the protocol sends messages without an answer again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvxfer.protocol.pacer import FIRST_SHARE

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

UNIT_NBYTES = 4096
"""Bytes of a message that count as one message, since decoding takes time by length."""

CPU_SHARE = 1 / 2
"""Greatest share of the control thread's processor time for messages of one connection."""

_SILENT_SHARE = 8
"""One of so many connections may always be one that has sent no message yet."""

MOST_UNFINISHED_NBYTES = 64 << 20
"""Most bytes of a message that has not ended. ZeroMQ limits the size of a frame, not the number of frames of a message."""


class Verdict(Enum):
    """Fate of a message: ACCEPT it, DROP it, or CLOSE its connection."""

    ACCEPT = "accept"
    DROP = "drop"
    CLOSE = "close"


class TokenBucket:
    """Rate limit of one peer: a burst of one second's messages, refilled at ``per_s``. Dropped messages count, too.

    Args:
        asked: this side connects to the peer and asks for its messages; else a new connection begins with a smaller burst.
    """

    def __init__(self, per_s: float, now: float, *, asked: bool = False) -> None:
        self._per_s = per_s
        self._left = per_s if asked else per_s * FIRST_SHARE
        self._left_s = CPU_SHARE
        self._at = now

    def spend(self, seconds: float) -> None:
        """Charge the processor time that an accepted message took.

        A peer whose messages are dropped for their processor time keeps its connection: it cannot know the cost.
        """
        self._left_s = max(self._left_s - seconds, -2 * CPU_SHARE)

    def take(self, nbytes: int, now: float) -> Verdict:
        """Charge one message. A peer that is one second's messages in debt is to be disconnected."""
        self._left = min(self._left + (now - self._at) * self._per_s, self._per_s) - (1 + nbytes // UNIT_NBYTES)
        self._left_s = min(self._left_s + (now - self._at) * CPU_SHARE, CPU_SHARE)
        self._at = now
        if self._left >= 0:
            return Verdict.ACCEPT if self._left_s >= 0 else Verdict.DROP
        return Verdict.DROP if self._left > -self._per_s else Verdict.CLOSE


class ReplyBacklog:
    """Bytes of replies that each connection has not acknowledged, to bound the replies to a peer that reads none.

    Args:
        most: bytes of one connection above which further replies are dropped.
        acknowledged: bytes that the other end of a connection has acknowledged so far; None where the system does not tell.
    """

    def __init__(self, most: int, acknowledged: Callable[[int], int | None]) -> None:
        self._most = most
        self._acknowledged = acknowledged
        self._waiting: dict[int, tuple[int, int]] = {}
        """Unacknowledged bytes by connection, and the bytes that were acknowledged when they were last counted."""

    def may_send(self, key: int, nbytes: int) -> bool:
        """Count a reply of so many bytes; False, and nothing is counted, if too many are unacknowledged."""
        waiting, before = self._waiting.get(key, (0, 0))
        if waiting > self._most // 2:
            now = self._acknowledged(key)
            waiting, before = (0, before) if now is None else (max(0, waiting - (now - before)), now)
        allowed = waiting <= self._most
        self._waiting[key] = waiting + (nbytes if allowed else 0), before
        return allowed

    def forget(self, key: int) -> None:
        """Forget a connection that has ended."""
        self._waiting.pop(key, None)


class TokenBuckets:
    """A token bucket for each peer.

    The key is the address of a peer that this side connects to, or the file descriptor of an incoming connection. Messages of
    unknown origin share one bucket.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._buckets: dict[Hashable, TokenBucket] = {}

    def take(self, key: Hashable, nbytes: int, now: float) -> Verdict:
        """See `TokenBucket.take`."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(self._per_s, now, asked=isinstance(key, str))
        return bucket.take(nbytes, now)

    def spend(self, key: Hashable, seconds: float) -> None:
        """See `TokenBucket.spend`."""
        bucket = self._buckets.get(key)
        if bucket is not None:
            bucket.spend(seconds)

    def forget(self, key: Hashable) -> None:
        """Forget a peer that has disconnected."""
        self._buckets.pop(key, None)


@dataclass
class _Connection:
    """One incoming connection.

    Attributes:
        taken: a complete message has come since the last check.
        finished_nbytes: bytes that had arrived at the last check after a complete message.
    """

    taken: bool = False
    finished_nbytes: int = 0


class ConnectionTable:
    """Incoming connections by file descriptor; at most ``most`` stay.

    When there are more, one is closed: the oldest without any message, or, where hardly any of these are left, the one whose
    last message is the oldest. So silent connections cannot take the places of active peers.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._silent: OrderedDict[int, _Connection] = OrderedDict()
        self._heard: OrderedDict[int, _Connection] = OrderedDict()
        self._shut: set[int] = set()
        """Connections that were shut down and whose end ZeroMQ has not reported yet."""

    def __len__(self) -> int:
        return len(self._silent) + len(self._heard)

    def __iter__(self) -> Iterator[int]:
        return iter([*self._silent, *self._heard])

    def accepted(self, connection: int) -> int | None:
        """Add a connection.

        Returns:
            the connection to shut down for it, if there are too many.
        """
        self._shut.discard(connection)
        # ZeroMQ may report the first message of a connection before the connection.
        if connection not in self._heard:
            self._silent[connection] = _Connection()
        if len(self) <= self.most:
            return None
        newcomers = len(self._silent) * _SILENT_SHARE > self.most or not self._heard
        return next(iter(self._silent if newcomers else self._heard))

    def heard(self, connection: int) -> None:
        """Note a message of a connection."""
        entry = self._heard.get(connection)
        if entry is not None:
            self._heard.move_to_end(connection)
        elif connection in self._shut:
            return
        else:
            entry = self._heard[connection] = self._silent.get(connection, _Connection())
            if connection in self._silent:
                del self._silent[connection]
        entry.taken = True

    def unfinished_nbytes(self, connection: int, received_nbytes: int) -> int:
        """Upper bound of the bytes that have arrived of a message that has not ended.

        Args:
            received_nbytes: all bytes that have arrived on this connection.
        """
        entry = self._heard.get(connection) or self._silent.get(connection)
        if entry is None:
            return 0
        if entry.taken:
            entry.taken, entry.finished_nbytes = False, received_nbytes
        return received_nbytes - entry.finished_nbytes

    def shut(self, connection: int) -> None:
        """Remove a connection that is being shut down."""
        if connection in self._silent or connection in self._heard:
            self.gone(connection)
            self._shut.add(connection)

    def gone(self, connection: int) -> bool:
        """Remove a connection that has ended. True if it had sent a message or was shut down by this side."""
        if connection in self._shut:
            self._shut.discard(connection)
            return True
        expected = connection in self._heard
        for connections in (self._silent, self._heard):
            connections.pop(connection, None)
        return expected
