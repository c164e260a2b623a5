# SPDX-License-Identifier: Apache-2.0
"""The control channel: ZeroMQ sockets that carry `kvxfer.wire` messages. One thread owns it; it knows no leases.

A ROUTER takes what other endpoints say to this one; a DEALER per peer carries what this one asks. ZeroMQ reconnects
by itself and keeps a queue meanwhile, so a peer that is not up yet, or is restarted, costs nobody else anything.
Whatever strangers send to the port ends as a counted refusal, and none has more of this endpoint than `kvxfer.admission` lets
it. With a secret every connection is authenticated both ways and
encrypted (CurveZMQ, https://rfc.zeromq.org/spec/26), and one that is not never reaches a message.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import zmq
from zmq.utils import z85

from kvxfer import wire
from kvxfer.admission import Buckets, Verdict
from kvxfer.errors import ConfigError, WireError
from kvxfer.incoming import Incoming, most_connections
from kvxfer.wakeup import WakeUp

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvxfer.config import Settings
    from kvxfer.metrics import Metrics
    from kvxfer.secret import Secret

_ZAP = "inproc://zeromq.zap.01"
"""Where ZeroMQ asks who may connect (https://rfc.zeromq.org/spec/27)."""

_MOST_PER_TURN = 256
"""Messages taken from one socket before the others and the timers get their turn."""

_MOST_WAITING = 64
"""Messages of one connection that wait to be taken. A peer that sends more waits."""

_MOST_REPLIES = 512
"""Replies that wait for one peer to take them. What is more is dropped."""

_HANDSHAKE_MS = 10_000
"""A connection that has not proved itself by then is closed by ZeroMQ."""

_KEEPALIVE = {zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 60, zmq.TCP_KEEPALIVE_INTVL: 15, zmq.TCP_KEEPALIVE_CNT: 4}
"""Connections of hosts that are gone end after two minutes; a frozen process keeps its own."""

_LONGEST_WAIT_S = 3600.0
_LAST_PORT = 65_535

_HARD_LIMIT = 2
"""Times the longest message: ZeroMQ itself drops a connection that sends more at once, before it is in memory."""

_LEAST_HARD_LIMIT_NBYTES = 1 << 16
"""What a handshake needs, and more."""


@dataclass(frozen=True)
class Inbound:
    """Something arrived. ``source`` is a connection (bytes) of the ROUTER or the address (str) of a peer.

    ``message`` is None if it was garbage: then ``reason`` is a word to count it by and ``why`` a sentence.
    """

    source: bytes | str
    message: wire.Message | None
    reason: str = ""
    why: str = ""


class Channel(Protocol):
    """What an endpoint needs of its control channel. One thread owns it; only `wake` and the attributes are for others.

    Attributes:
        address: where peers find it.
        loopback: it listens where only processes of this machine can connect.
    """

    address: str
    loopback: bool

    def wake(self) -> None:
        """Make `receive` return soon."""

    def send(self, address: str, message: wire.Message) -> None:
        """Queue a message to the peer at ``address``. Raises ConfigError: it cannot be connected to."""

    def reply(self, connection: bytes, message: wire.Message) -> None:
        """Queue a message on a connection that came in."""

    def hangup(self, address: str) -> None:
        """Close the connection to a peer, if there is one."""

    def receive(self, timeout_s: float | None) -> Iterable[Inbound]:
        """What arrives within ``timeout_s``."""

    def close(self) -> None:
        """End it."""


class ControlChannel:
    """Sockets of one endpoint. Only `wake` and `address` may be used by other threads.

    Args:
        bind: ``tcp://host:port``; port 0 takes a free one. A host name is resolved.
        advertise: host by which peers reach it, if that differs (bound to all interfaces, NAT).
        secret: of all endpoints that may talk to each other.
        allow_unauthenticated: an address that other machines reach may be bound without one.

    Raises:
        ConfigError: the address cannot be bound, or not without a secret; the message says why.
    """

    def __init__(
        self,
        bind: str,
        settings: Settings,
        metrics: Metrics,
        advertise: str | None = None,
        *,
        secret: Secret | None = None,
        allow_unauthenticated: bool = False,
    ) -> None:
        self._limit = settings.max_message_nbytes
        self._metrics = metrics
        self._secret = secret
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, most_connections(settings) + 16)
        self._router = self._context.socket(zmq.ROUTER)
        self._buckets = Buckets(settings.max_messages_per_s)
        """By file descriptor of a connection that came in, or address of a peer."""
        self._dealers: dict[str, zmq.Socket[bytes]] = {}
        self._addresses: dict[zmq.Socket[bytes], str] = {}
        self._wakeup = WakeUp()
        try:
            resolved = _resolved(bind)
            if secret is None and not allow_unauthenticated:
                _refuse_strangers(bind, resolved)
            self._configure(self._router, ipv6="[" in resolved)
            self._router.setsockopt(zmq.BACKLOG, 1024)
            self._router.setsockopt(zmq.SNDHWM, _MOST_REPLIES)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply that is dropped is counted
            self._zap = self._context.socket(zmq.REP)
            if secret is not None:
                self._zap.bind(_ZAP)  # before anybody can connect
                self._router.setsockopt(zmq.ZAP_DOMAIN, b"kvxfer")
                self._router.setsockopt(zmq.CURVE_SERVER, 1)
                self._router.setsockopt(zmq.CURVE_SECRETKEY, secret.listener.private)
            self._incoming = Incoming(self._router, settings, metrics, self._buckets.forget, secret=secret is not None)
            self._router.bind(resolved)
            self._incoming.address = bound = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        except ConfigError:
            self.close()
            raise
        except (zmq.ZMQError, OSError, ValueError) as error:
            self.close()
            raise ConfigError(f"cannot listen on {bind}: {error}") from error
        self.address: str = _advertised(bound, advertise)
        self.loopback: bool = _is_loopback(resolved)
        self._poller = zmq.Poller()
        for readable in (self._router, self._incoming.monitor, self._zap, self._wakeup):
            self._poller.register(readable, zmq.POLLIN)

    def wake(self) -> None:
        """Make `receive` return soon. Any thread."""
        self._wakeup.ring()

    def send(self, address: str, message: wire.Message) -> None:
        """Queue a message to the peer at ``address``.

        Raises:
            ConfigError: it is no address that can be connected to.
        """
        dealer = self._dealers.get(address)
        if dealer is None:
            try:
                dealer = self._context.socket(zmq.DEALER)  # fails when this process is out of sockets
                self._configure(dealer)
                if self._secret is not None:
                    dealer.setsockopt(zmq.CURVE_SERVERKEY, self._secret.listener.public)
                    dealer.setsockopt(zmq.CURVE_PUBLICKEY, self._secret.caller.public)
                    dealer.setsockopt(zmq.CURVE_SECRETKEY, self._secret.caller.private)
                dealer.connect(address)
            except (zmq.ZMQError, ValueError, TypeError) as error:
                if dealer is not None:
                    dealer.close(0)
                raise ConfigError(f"cannot connect to {address!r}: {error}") from error
            self._dealers[address], self._addresses[dealer] = dealer, address
            self._poller.register(dealer, zmq.POLLIN)
        self._push(dealer, [wire.encode(message)])

    def reply(self, connection: bytes, message: wire.Message) -> None:
        """Queue a message on a connection that came in; lost if the peer has gone."""
        self._push(self._router, [connection, wire.encode(message)])

    def hangup(self, address: str) -> None:
        """Close the connection to a peer, if there is one."""
        dealer = self._dealers.pop(address, None)
        self._buckets.forget(address)
        if dealer is not None:
            del self._addresses[dealer]
            self._poller.unregister(dealer)
            dealer.close(0)

    def receive(self, timeout_s: float | None) -> Iterator[Inbound]:
        """What arrives within ``timeout_s`` (None: wait until something does), or nothing after a `wake`.

        Returns earlier with nothing where ``timeout_s`` is longer than anybody needs.
        """
        timeout_s = _LONGEST_WAIT_S if timeout_s is None else min(timeout_s, _LONGEST_WAIT_S)
        timeout_s = min(timeout_s, self._incoming.look())
        timeout_ms = max(0, int(timeout_s * 1000) + 1)
        for readable, _ in self._poller.poll(timeout_ms):
            if readable is self._router:
                yield from self._drain(self._router, None)
            elif readable is self._incoming.monitor:
                self._incoming.follow()
            elif readable is self._zap:
                self._admit()
            elif readable in self._addresses:
                yield from self._drain(readable, self._addresses[readable])
            else:
                self._wakeup.clear()

    def close(self) -> None:
        """Close every socket; what was queued last still has a moment to leave."""
        self._dealers.clear()
        self._addresses.clear()
        self._wakeup.close()
        self._context.destroy(linger=200)

    def _configure(self, sock: zmq.Socket[bytes], *, ipv6: bool = True) -> None:
        # A listener with it would call its IPv4 addresses [::ffff:1.2.3.4].
        sock.setsockopt(zmq.IPV6, int(ipv6))
        sock.setsockopt(zmq.MAXMSGSIZE, max(_HARD_LIMIT * self._limit, _LEAST_HARD_LIMIT_NBYTES))
        sock.setsockopt(zmq.RCVHWM, _MOST_WAITING)
        sock.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(option, value)
        sock.setsockopt(zmq.RECONNECT_IVL, 50)
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)

    def _push(self, sock: zmq.Socket[bytes], frames: list[bytes]) -> None:
        # A full queue means a peer that does not take what it is sent; what matters is sent again anyway.
        try:
            sock.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # it has hung up meanwhile
                self._refused("unsendable")

    def _drain(self, sock: zmq.Socket[bytes], address: str | None) -> Iterator[Inbound]:
        for _ in range(_MOST_PER_TURN):
            try:
                received = sock.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.ZMQError:
                return
            connection = _descriptor(received[-1]) if address is None else -1
            if connection >= 0:
                self._incoming.places.heard(connection)
            verdict = self._buckets.take(address or connection, sum(map(len, received)), time.monotonic())
            if verdict is not Verdict.TAKE:
                self._refused("rate")
                if verdict is Verdict.CUT:
                    self._cut(connection if address is None else address)
            else:
                frames = [frame.bytes for frame in received]
                source: bytes | str = frames.pop(0) if address is None else address
                yield self._decode(source, frames)
            if sock.closed:
                return

    def _decode(self, source: bytes | str, frames: list[bytes]) -> Inbound:
        if len(frames) != 1:
            return Inbound(source, None, "garbage", f"a message has one frame, not {len(frames)}")
        if len(frames[0]) > self._limit:
            return Inbound(source, None, "oversized", f"{len(frames[0])} bytes are more than {self._limit}")
        try:
            return Inbound(source, wire.decode(frames[0]))
        except WireError as error:
            return Inbound(source, None, "garbage", str(error))

    def _admit(self) -> None:
        """Answer ZeroMQ's questions who may connect: whoever proved to have the key of those that connect."""
        for _ in range(_MOST_PER_TURN):
            try:
                version, question, _domain, _address, _identity, mechanism, *keys = self._zap.recv_multipart(
                    zmq.NOBLOCK
                )
            except zmq.ZMQError:
                return
            known = z85.decode(self._secret.caller.public) if self._secret is not None else b""
            good = mechanism == b"CURVE" and len(keys) == 1 and hmac.compare_digest(keys[0], known)
            status = (b"200", b"OK") if good else (b"400", b"not one of us")
            self._zap.send_multipart([version, question, *status, b"", b""])

    def _cut(self, peer: int | str) -> None:
        """Hang up on somebody who says too much."""
        if isinstance(peer, int):
            self._incoming.cut(peer, "flood")
            return
        self._refused("flood")
        self.hangup(peer)

    def _refused(self, reason: str) -> None:
        self._metrics.count("kvxfer_refused_messages_total", reason=reason)


def _descriptor(frame: zmq.Frame) -> int:
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:  # a peer of ZeroMQ's first protocol has none
        return -1


def _resolved(bind: str) -> str:
    """ZeroMQ binds numbers and interfaces, people write names."""
    scheme, _, rest = bind.partition("://")
    host, colon, port = rest.rpartition(":")
    if scheme != "tcp" or not colon or not port.isdecimal() or int(port) > _LAST_PORT:
        raise ConfigError(f"a control address is tcp://host:port, not {bind!r}")
    host = host.strip("[]")
    if host in ("*", ""):
        return f"tcp://*:{port}"
    found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    family, *_, sockaddr = min(found, key=lambda f: f[0] != socket.AF_INET)
    literal = f"[{sockaddr[0]}]" if family == socket.AF_INET6 else str(sockaddr[0])
    return f"tcp://{literal}:{port}"


def _is_loopback(resolved: str) -> bool:
    host = resolved.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    return host != "*" and ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _refuse_strangers(bind: str, resolved: str) -> None:
    if not _is_loopback(resolved):
        raise ConfigError(
            f"{bind} can be reached from other machines, and without a secret whoever reaches it may ask for KV: set "
            "KVXFER_SECRET_FILE to a file that holds the same secret on all servers, or allow_unauthenticated "
            "(KVXFER_ALLOW_UNAUTHENTICATED=1) in a network where everybody may"
        )


def _advertised(bound: str, advertise: str | None) -> str:
    host, _, port = bound.removeprefix("tcp://").rpartition(":")
    if advertise is not None:
        host = f"[{advertise}]" if ":" in advertise and not advertise.startswith("[") else advertise
    elif host in ("0.0.0.0", "[::]", "*"):  # noqa: S104 - compared, not bound
        host = _own_address()
    return f"tcp://{host}:{port}"


def _own_address() -> str:
    """The address of the interface that the default route uses; no packet is sent to find it."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1, never a real host
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
