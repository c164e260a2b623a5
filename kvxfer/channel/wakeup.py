# SPDX-License-Identifier: Apache-2.0
"""Wake-up of a polling thread through a file descriptor, without releasing the interpreter's lock.

`socket.send` releases the lock during the system call, and the thread that it wakes takes it. The caller then waits until that
thread releases it again: about a millisecond, for a call of two microseconds. So `ring` calls ``send`` of the C library with
the lock held.
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
    """Wake-up of one polling thread. Any thread, and signal handlers, may call `ring`; only the polling thread calls the rest.

    The bytes in the kernel are the only state. Each ring writes one byte, whatever other threads do and even if an exception
    interrupts the caller. So no wake-up is lost: either the polling thread clears later and then looks at its queue, or the
    descriptor is readable. The descriptors stay open as long as this object, so that a late ring never writes to another file
    with the same number.
    """

    def __init__(self) -> None:
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
        self._in, self._out = (end.detach() for end in ends)
        self._closed = False

    def fileno(self) -> int:
        """File descriptor that is readable from `ring` to `clear`; -1 when closed."""
        return -1 if self._closed else self._in

    def ring(self) -> None:
        """Wake the polling thread. No effect when closed. Does not release the interpreter's lock."""
        if not self._closed:
            _libc.send(self._out, b"w", 1, _FLAGS)  # fails if the socket is full, and then the thread wakes anyway

    def clear(self) -> None:
        """Make the descriptor unreadable. The polling thread calls this before it looks at its queue."""
        with contextlib.suppress(OSError):
            while len(os.read(self._in, _MOST)) == _MOST:
                pass

    def close(self) -> None:
        """End the polling; later rings have no effect."""
        self._closed = True

    def __del__(self) -> None:
        for descriptor in (getattr(self, "_in", -1), getattr(self, "_out", -1)):
            with contextlib.suppress(OSError):
                os.close(descriptor)
