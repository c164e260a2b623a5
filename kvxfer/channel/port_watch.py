# SPDX-License-Identifier: Apache-2.0
"""Probe of a peer's TCP port: a refused connection shows at once that the peer's process has died.

ZeroMQ reconnects without a report of refused connections, so the channel probes the port of a peer that does not answer. A
frozen process still listens, and a host that is gone refuses nothing: time-outs find those.
"""

from __future__ import annotations

import errno
import select
import socket
from typing import TYPE_CHECKING

from kvxfer import addresses

if TYPE_CHECKING:
    from collections.abc import Iterable

FIRST_S = 0.1
"""Time from an unanswered message to the first probe."""
AGAIN_S = 0.25
"""Time for which a port must be refused, since a restarted server may listen by then."""
NAMED_S = 5.0
"""The same for a host name: the process may start again at another address of the name."""
REST_S = 2.0
"""Pause after a probe that found a listener."""
_SOON_S = 0.02
_LONGEST_S = 1.0
"""Time limit of a probe; a connection that is not made by then proves nothing."""
_REFUSED = frozenset({errno.ECONNREFUSED, errno.ECONNRESET})


class PortWatch:
    """Probes of one peer that does not answer. Used by the thread that owns the channel.

    Args:
        patience_s: time for which the port must be refused.

    Attributes:
        due: time of the next call of `check`, on the monotonic clock.
    """

    def __init__(self, now: float, patience_s: float = AGAIN_S) -> None:
        self.due: float = now + FIRST_S
        self._patience_s = patience_s
        self._pending: list[_Attempt] = []
        self._until = 0.0
        self._refused_since: float | None = None
        """Time since which each probe was refused."""

    def check(self, ips: Iterable[str], port: int, now: float) -> bool:
        """Begin or continue a probe; True if all addresses have refused connections for ``patience_s``."""
        if not self._pending:
            self._pending = [_Attempt(ip, port) for ip in ips]
            self._until = now + _LONGEST_S
            self.due = now + (_SOON_S if self._pending else REST_S)
            return False
        outcomes = [attempt.outcome() for attempt in self._pending]
        if None in outcomes and now < self._until:
            self.due = now + _SOON_S
            return False
        self.close()
        refused = all(outcome in _REFUSED for outcome in outcomes)
        if not refused:
            self._refused_since, self.due = None, now + REST_S
            return False
        since = self._refused_since = now if self._refused_since is None else self._refused_since
        self.due = now + AGAIN_S
        return now >= since + self._patience_s

    def close(self) -> None:
        """End the probe that is under way."""
        for attempt in self._pending:
            attempt.close()
        self._pending = []


class _Attempt:
    """One connection attempt of a probe."""

    def __init__(self, ip: str, port: int) -> None:
        family = socket.AF_INET6 if addresses.is_ipv6(ip) else socket.AF_INET
        self._sock: socket.socket | None = None
        self._code: int | None = None
        try:
            self._sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            code = self._sock.connect_ex((ip, port))
        except OSError as error:  # out of file descriptors: the probe finds nothing
            code = error.errno or errno.EMFILE
        if code != errno.EINPROGRESS:
            self._code = code

    def outcome(self) -> int | None:
        """0 if the connection was made, else the error number; None while it is not decided."""
        if self._code is None and self._sock is not None:
            poll = select.poll()  # select cannot take descriptors above 1023
            poll.register(self._sock, select.POLLOUT)
            if poll.poll(0):
                self._code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return self._code

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
