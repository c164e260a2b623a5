# SPDX-License-Identifier: Apache-2.0
"""Connections that came in to a control channel, as ZeroMQ's monitor tells of them: counted, looked at, and shut when need be.

ZeroMQ has no bound on their number, nor on what it keeps of a message that has not ended, and no call that closes one. So they
are shut by their file descriptors, which its monitor names.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import stat
import struct
import time
from collections import deque
from typing import TYPE_CHECKING

import zmq
from zmq.utils.monitor import recv_monitor_message

from kvxfer.channel.limits import MOST_UNFINISHED_NBYTES, Places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvxfer.config import Settings
    from kvxfer.metrics import Metrics

_log = logging.getLogger(__name__)

_STRANGERS = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH
)

_MOST_PER_TURN = 256

_LOOK_S = 1.0
"""How often connections are looked at, as long as there are some."""

_CUT = {
    "connections": "there were more than max_connections or a quarter of `ulimit -n` allow",
    "flood": "it went on to say more than max_messages_per_s",
    "oversized": "it sends a message without end",
}
"""Why somebody is hung up on, by the word that it is counted by."""

_ACKNOWLEDGED_RECEIVED = struct.Struct("=120xQQ")
"""``tcpi_bytes_acked`` and ``tcpi_bytes_received`` in Linux' ``struct tcp_info`` (linux/tcp.h), since 4.1."""


class Incoming:
    """Connections of one listening socket, by their file descriptors. Used by the thread that owns the socket.

    Args:
        router: not bound yet, so that none is missed.
        secret: connections have to prove that they have it, so that one which fails is counted as a stranger's.
        gone: called with the descriptor of each connection that ended.

    Attributes:
        address: to which ``router`` was bound, once it is.
        monitor: readable when `follow` has something to do.
    """

    def __init__(
        self,
        router: zmq.Socket[bytes],
        settings: Settings,
        metrics: Metrics,
        gone: Callable[[int], object],
        *,
        secret: bool,
    ) -> None:
        self.address: str = ""
        self._metrics = metrics
        self._gone = gone
        self._secret = secret
        self.places: Places = Places(most_connections(settings))
        self._strangers_gone: deque[str] = deque()
        """Why connections were refused whose end has not been told yet."""
        self._warned: set[str] = set()
        self._look_at = 0.0
        self.monitor: zmq.Socket[bytes] = router.get_monitor_socket(
            _STRANGERS | zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED | zmq.Event.ACCEPT_FAILED
        )

    def follow(self) -> None:
        """What became of connections that came in."""
        for _ in range(_MOST_PER_TURN):
            try:
                event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            kind, connection = event["event"], event["value"]
            if kind & _STRANGERS:
                self._strangers_gone.append(self._stranger(connection))  # its end comes next
            elif kind == zmq.Event.ACCEPT_FAILED:
                self._count("no_descriptor")
            elif kind == zmq.Event.ACCEPTED:
                one_too_many = self.places.accepted(connection)
                if one_too_many is not None:
                    self.cut(one_too_many, "connections")
            else:
                self._gone(connection)
                # Without one whole message: no ZeroMQ, or cut off, or dropped for what it sent.
                reason = self._strangers_gone.popleft() if self._strangers_gone else "no_message"
                if not self.places.gone(connection):
                    self._count(reason)

    def look(self) -> float:
        """Cut connections by which a message comes that does not end. Returns for how long they need not be looked at again."""
        now = time.monotonic()
        if not self.places:
            self._look_at = now + _LOOK_S
            return float("inf")
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            for connection in self.places:
                with _ours(connection, self.address) as sock:
                    transferred = _transferred_nbytes(sock) if sock is not None else None
                    received_nbytes = transferred[1] if transferred is not None else 0
                if self.places.unfinished_nbytes(connection, received_nbytes) > MOST_UNFINISHED_NBYTES:
                    self.cut(connection, "oversized")
        return self._look_at - now

    def acknowledged_nbytes(self, connection: int) -> int | None:
        """What the other end of a connection has taken of what was sent to it; None where the system does not say."""
        with _ours(connection, self.address) as sock:
            transferred = _transferred_nbytes(sock) if sock is not None else None
        return None if transferred is None else transferred[0]

    def cut(self, connection: int, reason: str) -> None:
        """Hang up on somebody, whom ZeroMQ connects again if it is a peer's. Counted by ``reason``."""
        self._count(reason)
        self._warn_once(reason, f"hung up on a connection: {_CUT[reason]}")
        self.places.cut(connection)
        with _ours(connection, self.address) as sock:
            if sock is None:
                self.places.gone(connection)
            else:
                with contextlib.suppress(OSError):  # it has hung up itself
                    sock.shutdown(socket.SHUT_RDWR)

    def _count(self, reason: str) -> None:
        self._metrics.count("kvxfer_refused_messages_total", reason=reason)

    def _warn_once(self, reason: str, what: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            _log.warning("%s: %s; further ones are only counted", self.address, what)

    def _stranger(self, value: int) -> str:
        # With a secret it does not matter what else is wrong with who does not have it.
        if not self._secret and value != zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return "not_zmtp"
        other = "has another secret, or none" if self._secret else "has a secret, and this side has none"
        self._warn_once("unauthenticated", f"somebody who tries to connect {other}")
        return "unauthenticated"


def most_connections(settings: Settings) -> int:
    """A process without file descriptors can do nothing at all. One that goes out takes two."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return settings.max_connections if descriptors < 0 else min(settings.max_connections, max(8, descriptors // 4))


@contextlib.contextmanager
def _ours(descriptor: int, address: str) -> Iterator[socket.socket | None]:
    """A connection that came in at the port of ``address``, by its descriptor; None if that was closed meanwhile, and may be anything by now.

    It is duplicated before it is looked at, so that ZeroMQ's thread cannot close what was found to be ours.
    """
    with contextlib.ExitStack() as stack:
        ours, port = None, address.rpartition(":")[2]
        with contextlib.suppress(OSError, IndexError):
            duplicate = os.dup(descriptor)
            stack.callback(os.close, duplicate)
            if stat.S_ISSOCK(os.fstat(duplicate).st_mode):
                sock = socket.socket(fileno=duplicate)
                stack.pop_all()
                stack.enter_context(sock)
                if sock.type == socket.SOCK_STREAM and str(sock.getsockname()[1]) == port:
                    ours = sock
        yield ours


def _transferred_nbytes(sock: socket.socket) -> tuple[int, int] | None:
    """Bytes that the other end of a TCP connection has acknowledged, and that arrived from it; None where the system does not say."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        acknowledged, received = _ACKNOWLEDGED_RECEIVED.unpack_from(info)
        return int(acknowledged), int(received)
    except (OSError, struct.error, AttributeError):
        return None
