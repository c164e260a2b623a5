# SPDX-License-Identifier: Apache-2.0
"""Whether somebody listens at a TCP port, asked of the operating system: a process that has died is known at once by that.

ZeroMQ connects again and again and says nothing of it, so a peer that does not answer is asked about besides. A frozen process
listens as before, and of a host that is gone nobody tells: for those there are time-outs.
"""

from __future__ import annotations

import errno
import select
import socket
from typing import TYPE_CHECKING

from kvxfer import addresses

if TYPE_CHECKING:
    from collections.abc import Iterable

FIRST_S = 0.15
"""After a message was sent that has no answer yet, look for the first time."""
AGAIN_S = 0.4
"""A port that was refused has to be refused again so much later: a server that is restarted may listen by then."""
NAMED_S = 5.0
"""A port at a host with a name has to be refused for so long: its process may come back, or up, at another address of the name."""
REST_S = 2.0
"""Pause after somebody was found to listen."""
_SOON_S = 0.02
_LONGEST_S = 1.0
"""A connection that is not made by then says nothing."""
_REFUSED = frozenset({errno.ECONNREFUSED, errno.ECONNRESET})


class Watch:
    """Looks at one peer for as long as it does not answer. Used by the thread that owns the channel.

    Args:
        patience_s: how long the port has to be refused.

    Attributes:
        due: when to call `look` next, on the monotonic clock.
    """

    def __init__(self, now: float, patience_s: float = AGAIN_S) -> None:
        self.due: float = now + FIRST_S
        self._patience_s = patience_s
        self._pending: list[_Attempt] = []
        self._until = 0.0
        self._refused_since: float | None = None
        """When it was refused for the first time without an end since."""

    def look(self, numbers: Iterable[str], port: int, now: float) -> bool:
        """Go on; True if nobody listens at any of these addresses, now as some time ago."""
        if not self._pending:
            self._pending = [_Attempt(number, port) for number in numbers]
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
        """Give up what is under way."""
        for attempt in self._pending:
            attempt.close()
        self._pending = []


class _Attempt:
    """A connection that is being made, and is not wanted."""

    def __init__(self, number: str, port: int) -> None:
        family = socket.AF_INET6 if addresses.is_ipv6(number) else socket.AF_INET
        self._sock: socket.socket | None = None
        self._code: int | None = None
        try:
            self._sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            code = self._sock.connect_ex((number, port))
        except OSError as error:  # out of files: then nothing is found out
            code = error.errno or errno.EMFILE
        if code != errno.EINPROGRESS:
            self._code = code

    def outcome(self) -> int | None:
        """0 if somebody listens, else why the connection was not made; None if that is not decided yet."""
        if self._code is None and self._sock is not None:
            poll = select.poll()  # select knows no descriptors above 1023
            poll.register(self._sock, select.POLLOUT)
            if poll.poll(0):
                self._code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return self._code

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
