# SPDX-License-Identifier: Apache-2.0
"""Settings of the sockets on which an engine listens, for which Mooncake has none of its own."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_SHORT = struct.pack("ll", 0, 5_000)
"""5 ms as the kernel's struct timeval."""
_CUT = struct.pack("ii", 1, 0)
"""A struct linger that makes close() reset the connection."""


def confine_to_loopback(ports: Collection[int]) -> bool:
    """Let only this machine connect to these ports; False if the kernel refuses."""
    confined = set()
    for port, ours in _sockets_on(ports):
        if not _listens(ours):
            continue
        try:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        except OSError:
            return False
        confined.add(port)
    return confined == set(ports)


def prepare_end(rpc_port: int, ports: Collection[int]) -> None:
    """Let an engine end at once, and leave its ports free.

    The thread that waits for connections on ``rpc_port`` sleeps for up to a second, and the end of the engine waits for it
    while it holds the interpreter's lock: it is woken. Connections to ``ports`` are cut instead of closed in order, which
    would keep the ports for a minute.
    """
    for port, ours in _sockets_on({rpc_port, *ports}):
        with suppress(OSError):
            if not _listens(ours):
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CUT)
                if port == rpc_port:
                    ours.shutdown(socket.SHUT_RDWR)
            elif port == rpc_port:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SHORT)
                socket.create_connection(("127.0.0.1", port), 0.2).close()


def _sockets_on(ports: Collection[int]) -> Iterator[tuple[int, socket.socket]]:
    """This process's TCP sockets whose own port is one of these, each as a duplicate that is closed afterwards."""
    try:
        descriptors = os.listdir("/proc/self/fd")  # noqa: PTH208 - numbers, not paths
    except OSError:
        return
    for descriptor in descriptors:
        duplicate = _duplicate(int(descriptor))
        if duplicate is None:
            continue
        with duplicate:
            try:
                own = duplicate.getsockname()
            except OSError:
                continue
            if isinstance(own, tuple) and len(own) > 1 and own[1] in ports:
                yield own[1], duplicate


def _duplicate(descriptor: int) -> socket.socket | None:
    try:
        number = os.dup(descriptor)
    except OSError:
        return None  # closed meanwhile
    try:
        return socket.socket(fileno=number)
    except OSError:
        os.close(number)  # no socket
        return None


def _listens(ours: socket.socket) -> bool:
    return bool(ours.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
