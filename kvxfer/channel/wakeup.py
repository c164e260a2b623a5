# SPDX-License-Identifier: Apache-2.0
"""A file descriptor by which one thread calls another out of its poll, without giving the interpreter's lock away.

`socket.send` lets go of the lock while it is in the kernel, and the thread that it wakes is there to take it: the caller then
waits for all that this thread has to do, a millisecond in which it wanted to spend two microseconds. The kernel needs no
Python to set a byte down, so it is called with the lock held.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from typing import Final

_libc: Final = ctypes.PyDLL(None)  # unlike CDLL, calls keep the lock
_libc.send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
_libc.send.restype = ctypes.c_ssize_t

_MOST: Final = 4096
_FLAGS: Final = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)


class WakeUp:
    """Any thread, and signal handlers, call `ring`; the one that polls calls the rest.

    The bytes in the kernel are all the state there is. A ring puts one there, whoever else rings or clears meanwhile and
    whatever exception strikes it, so none can be lost: what was rung for is done by the poller after a `clear` that came later,
    or the descriptor is readable. The descriptors are closed with this object, and not before, so that a ring that comes late
    never writes to another file of the same number.
    """

    def __init__(self) -> None:
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
        self._in, self._out = (end.detach() for end in ends)
        self._closed = False

    def fileno(self) -> int:
        """Readable from `ring` to `clear`; -1 when closed."""
        return -1 if self._closed else self._in

    def ring(self) -> None:
        """Call it out of its poll. No effect if it is closed. Does not release the interpreter's lock."""
        if not self._closed:
            _libc.send(self._out, b"w", 1, _FLAGS)  # full: it is called already

    def clear(self) -> None:
        """Before it looks at what it was called for: what comes later rings again."""
        with contextlib.suppress(OSError):
            while len(os.read(self._in, _MOST)) == _MOST:
                pass

    def close(self) -> None:
        """Nobody polls any more."""
        self._closed = True

    def __del__(self) -> None:
        for descriptor in (getattr(self, "_in", -1), getattr(self, "_out", -1)):
            with contextlib.suppress(OSError):
                os.close(descriptor)
