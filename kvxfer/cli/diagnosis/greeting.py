# SPDX-License-Identifier: Apache-2.0
"""A look at what listens at a TCP address, by the first bytes that it says: ZeroMQ with or without a secret, or something else.

ZeroMQ's greeting has 64 bytes: a signature, a version, and the name of the mechanism by which it authenticates
(https://rfc.zeromq.org/spec/23, section "Version Negotiation").
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass

_SIGNATURE = b"\xff" + b"\0" * 8 + b"\x7f"
_BEGIN = _SIGNATURE + b"\x03"
"""Greeting up to the version: ZeroMQ answers with the whole of its own, and has no mechanism to refuse yet."""
_END_OF_REQUEST = b"\r\n\r\n"
"""End of a request in text protocols such as HTTP, upon which a server answers."""
_MECHANISM = slice(12, 32)
_PATIENCE_S = 1.0


@dataclass(frozen=True)
class Listener:
    """The program that answered.

    Attributes:
        connect_s: time of the TCP handshake.
        mechanism: ZeroMQ's, ``NULL`` without a secret and ``CURVE`` with one; empty if it is not ZeroMQ.
        said: the first bytes that it said, if it is not ZeroMQ.
    """

    connect_s: float
    mechanism: str = ""
    said: bytes = b""


def listen_to(ip: str, port: int, timeout_s: float) -> Listener:
    """Connect to a port, greet it as ZeroMQ does, and see what it says.

    Raises:
        OSError: nothing accepts connections there.
    """
    begin = time.monotonic()
    with socket.create_connection((ip, port), timeout=timeout_s) as peer:
        connect_s = time.monotonic() - begin
        peer.settimeout(min(timeout_s, _PATIENCE_S))
        heard = _say(peer, _BEGIN) or _say(peer, _END_OF_REQUEST)
    if heard[:1] == _SIGNATURE[:1] and heard[9:10] == _SIGNATURE[9:10] and len(heard) >= _MECHANISM.stop:
        return Listener(connect_s, heard[_MECHANISM].rstrip(b"\0").decode("ascii", "replace"))
    return Listener(connect_s, said=heard[:64])


def _say(peer: socket.socket, words: bytes) -> bytes:
    """Send some bytes; returns what comes back until there is enough of it, or no more in time."""
    heard = b""
    with contextlib.suppress(OSError):  # it may hang up, or say nothing
        peer.sendall(words)
        while len(heard) < _MECHANISM.stop and (chunk := peer.recv(256)):
            heard += chunk
            if heard[:1] != _SIGNATURE[:1]:
                break
    return heard
