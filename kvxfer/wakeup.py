# SPDX-License-Identifier: Apache-2.0
"""A file descriptor by which one thread calls another out of its poll, without giving the interpreter's lock away.

`socket.send` lets go of the lock while it is in the kernel, and the thread that it wakes is there to take it: the caller then
waits for all that this thread has to do, a millisecond in which it wanted to spend two microseconds. The kernel needs no
Python to set a byte down, so it is called with the lock held.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
from typing import Final

_libc: Final = ctypes.PyDLL(None)  # unlike CDLL, calls keep the lock
_libc.send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
_libc.send.restype = ctypes.c_ssize_t

_MOST: Final = 4096
_FLAGS: Final = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)


class WakeUp:
    """Any thread, and signal handlers, call `ring`; the one that polls calls the rest.

    The bytes in the kernel are all the state there is. A ring puts one there, whoever else rings or clears meanwhile, so none
    can be lost: what was rung for is done by the poller after a `clear` that came later, or the descriptor is readable.
    """

    def __init__(self) -> None:
        self._in, self._out = socket.socketpair()
        self._in.setblocking(False)
        self._out.setblocking(False)
        self._open = threading.RLock()  # a signal handler may ring while its thread does
        """Held while the descriptor is written to, so that it is not another file's by then."""

    def fileno(self) -> int:
        """Readable from `ring` to `clear`; -1 when closed."""
        return self._in.fileno()

    def ring(self) -> None:
        """Call it out of its poll. No effect if it is closed. Does not release the interpreter's lock."""
        with self._open:
            # Full: it is called already. Closed: nobody is left to call.
            _libc.send(self._out.fileno(), b"w", 1, _FLAGS)

    def clear(self) -> None:
        """Before it looks at what it was called for: what comes later rings again."""
        with contextlib.suppress(OSError):
            while len(self._in.recv(_MOST)) == _MOST:
                pass

    def close(self) -> None:
        """Nobody polls any more."""
        with self._open:
            self._in.close()
            self._out.close()
