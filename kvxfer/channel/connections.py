# SPDX-License-Identifier: Apache-2.0
"""Incoming connections of a control channel, as ZeroMQ's monitor reports them: counted, checked, and shut down if need be.

ZeroMQ limits neither the number of connections nor the bytes that it keeps of a message that has not ended, and has no call
that closes one connection. So this module shuts connections down by their file descriptors, which the monitor reports.
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

from kvxfer.channel.limits import MOST_UNFINISHED_NBYTES, ConnectionTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvxfer.config import Settings
    from kvxfer.metrics import Metrics

_log = logging.getLogger(__name__)

_HANDSHAKE_FAILED = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH
)

_MOST_PER_TURN = 256

_LOOK_S = 1.0
"""Time between two checks of the connections."""

_REASONS = {
    "connections": "there were more than max_connections or a quarter of `ulimit -n` allow",
    "flood": "it sent far more than max_messages_per_s",
    "oversized": "it sent a message without end",
}
"""Reasons to shut a connection down, by the label that counts them."""

_ACKNOWLEDGED_RECEIVED = struct.Struct("=120xQQ")
"""``tcpi_bytes_acked`` and ``tcpi_bytes_received`` in Linux' ``struct tcp_info`` (linux/tcp.h), since 4.1."""


class Incoming:
    """Incoming connections of one socket, by their file descriptors. Used by the thread that owns the socket.

    Args:
        router: the socket, not bound yet, so that no connection is missed.
        gone: called with the descriptor of each connection that has ended.
        secret: connections must authenticate; those that fail are counted as unauthenticated.

    Attributes:
        address: the address that ``router`` is bound to, once it is bound.
        table: the connections that are open.
        monitor: readable when `read_events` has something to do.
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
        self.table: ConnectionTable = ConnectionTable(connection_limit(settings))
        self._failures: deque[str] = deque()
        """Reasons of failed handshakes whose disconnection ZeroMQ has not reported yet."""
        self._warned: set[str] = set()
        self._look_at = 0.0
        self.monitor: zmq.Socket[bytes] = router.get_monitor_socket(
            _HANDSHAKE_FAILED | zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED | zmq.Event.ACCEPT_FAILED
        )

    def read_events(self) -> None:
        """Read the monitor's events: connections, failed handshakes, disconnections."""
        for _ in range(_MOST_PER_TURN):
            try:
                event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            kind, connection = event["event"], event["value"]
            if kind & _HANDSHAKE_FAILED:
                self._failures.append(self._failure(connection))  # the disconnection comes next
            elif kind == zmq.Event.ACCEPT_FAILED:
                self._count("no_descriptor")
            elif kind == zmq.Event.ACCEPTED:
                one_too_many = self.table.accepted(connection)
                if one_too_many is not None:
                    self.shut(one_too_many, "connections")
            else:
                self._gone(connection)
                # It sent no complete message: another protocol, a broken connection, or one that ZeroMQ closed.
                reason = self._failures.popleft() if self._failures else "no_message"
                if not self.table.gone(connection):
                    self._count(reason)

    def check(self) -> float:
        """Shut down connections with a message that does not end. Returns the time until the next check is due."""
        now = time.monotonic()
        if not self.table:
            self._look_at = now + _LOOK_S
            return float("inf")
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            for connection in self.table:
                with duplicate(connection, self.address) as sock:
                    transferred = _transferred_nbytes(sock) if sock is not None else None
                    received_nbytes = transferred[1] if transferred is not None else 0
                if self.table.unfinished_nbytes(connection, received_nbytes) > MOST_UNFINISHED_NBYTES:
                    self.shut(connection, "oversized")
        return self._look_at - now

    def acknowledged_nbytes(self, connection: int) -> int | None:
        """Bytes that the other end of a connection has acknowledged; None where the system does not tell."""
        with duplicate(connection, self.address) as sock:
            transferred = _transferred_nbytes(sock) if sock is not None else None
        return None if transferred is None else transferred[0]

    def shut(self, connection: int, reason: str) -> None:
        """Shut a connection down, and count it by ``reason``. A peer's ZeroMQ connects again."""
        self._count(reason)
        self._warn_once(reason, f"shut down a connection: {_REASONS[reason]}")
        self.table.shut(connection)
        with duplicate(connection, self.address) as sock:
            if sock is None:
                self.table.gone(connection)
            else:
                with contextlib.suppress(OSError):  # the other end has closed it
                    sock.shutdown(socket.SHUT_RDWR)

    def _count(self, reason: str) -> None:
        self._metrics.count("kvxfer_refused_messages_total", reason=reason)

    def _warn_once(self, reason: str, what: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            _log.warning("%s: %s; further ones are only counted", self.address, what)

    def _failure(self, value: int) -> str:
        # With a secret, each failed handshake counts as unauthenticated, whatever else is wrong with it.
        if not self._secret and value != zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return "not_zmtp"
        other = "has another secret, or none" if self._secret else "has a secret, and this side has none"
        self._warn_once("unauthenticated", f"refused a connection: the other end {other}")
        return "unauthenticated"


def connection_limit(settings: Settings) -> int:
    """Most incoming connections: ``max_connections``, and at most a quarter of the process's file descriptors.

    An outgoing connection takes two file descriptors.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return settings.max_connections if descriptors < 0 else min(settings.max_connections, max(8, descriptors // 4))


@contextlib.contextmanager
def duplicate(descriptor: int, address: str) -> Iterator[socket.socket | None]:
    """Duplicate of an incoming connection's socket; None if the descriptor is no connection to the port of ``address`` any more.

    The descriptor is duplicated before it is checked, so that ZeroMQ's thread cannot close the checked one.
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
    """Bytes of a TCP connection that the other end has acknowledged, and bytes that have arrived; None where unknown."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        acknowledged, received = _ACKNOWLEDGED_RECEIVED.unpack_from(info)
        return int(acknowledged), int(received)
    except (OSError, struct.error, AttributeError):
        return None
