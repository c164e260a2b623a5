# SPDX-License-Identifier: Apache-2.0
"""The control channel: ZeroMQ sockets that carry `kvxfer.protocol.messages`. One thread owns it; it knows no leases.

A ROUTER socket receives the messages of other endpoints; a DEALER socket per peer carries the messages of this one. ZeroMQ
reconnects by itself and queues messages meanwhile, so that a peer which starts late or restarts delays no other peer. Bytes
that are no message end as a counted refusal, and `kvxfer.channel.limits` bounds what one peer can take. With a secret, every
connection is authenticated both ways and encrypted (CurveZMQ, https://rfc.zeromq.org/spec/26), before its first message.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import time
import weakref
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85

from kvxfer import addresses
from kvxfer.channel import listener
from kvxfer.channel.base import Inbound, Unreachable
from kvxfer.channel.connections import Incoming, connection_limit
from kvxfer.channel.limits import ReplyBacklog, TokenBuckets, Verdict
from kvxfer.channel.outgoing import Outgoing
from kvxfer.channel.wakeup import WakeUp
from kvxfer.errors import ConfigError, WireError
from kvxfer.protocol import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvxfer.config import Settings
    from kvxfer.metrics import Metrics
    from kvxfer.secret import Secret

_ZAP = "inproc://zeromq.zap.01"
"""Socket at which ZeroMQ asks for authentication (https://rfc.zeromq.org/spec/27)."""

_MOST_PER_TURN = 256
"""Most messages to read from one socket before the others and the timers have their turn."""

_MOST_WAITING = 64
"""Most messages of one connection in the receive queue. Then the peer's queue fills up."""

_MOST_QUESTIONS = 8192
"""Most requests in the queue to one peer. They are short, and thousands of leases may have one for a busy peer."""

_MOST_BACKLOG_NBYTES = 1 << 20
"""Most bytes of replies that one peer has not read, beside the last reply. Further replies are dropped."""

_MOST_REPLIES = 512
"""Most replies in the queue to one peer. Further replies are dropped."""

_HANDSHAKE_MS = 10_000
"""Time limit of a handshake, after which ZeroMQ closes the connection."""

_KEEPALIVE = {zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 60, zmq.TCP_KEEPALIVE_INTVL: 15, zmq.TCP_KEEPALIVE_CNT: 4}
"""Connections to hosts that are gone end after two minutes; those to a frozen process stay."""

_LONGEST_WAIT_S = 3600.0

_HARD_LIMIT = 2
"""Multiple of the longest message above which ZeroMQ closes the connection before the message is in memory."""

_LEAST_FILES = 16
"""File descriptors that the sockets of a channel need before the first connection."""

_LEAST_HARD_LIMIT_NBYTES = 1 << 16
"""Least hard limit: more than a handshake needs."""


class ControlChannel:
    """The control channel over ZeroMQ sockets. Other threads may use only `wake` and the attributes.

    Args:
        bind: ``tcp://host:port``; port 0 takes a free one. A host name means all of its addresses that this machine has,
            ``localhost`` both loopback addresses, and ``*`` all addresses, IPv4 and IPv6.
        advertise: the host for the address to advertise, if it differs (bound to all interfaces, NAT).
        secret: the secret of all endpoints that may talk to each other.
        allow_unauthenticated: allow an address that other machines reach without a secret.

    Attributes:
        address: the address to advertise to peers; its host is an IP address unless ``advertise`` is a name.
        bound: the IP addresses that are bound; ``*`` for all.

    Raises:
        ConfigError: the address cannot be bound, or needs a secret; the message says why.
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
        _check_room(bind)
        self._context = zmq.Context()
        self._buckets = TokenBuckets(settings.max_messages_per_s)
        """Buckets by file descriptor of an incoming connection, or address of a peer."""
        self._wakeup: WakeUp | None = None
        self._poller = zmq.Poller()
        most = connection_limit(settings)
        self._outgoing = Outgoing(
            self._dealer,
            self._push,
            self._poller,
            _weak_call(self.wake),
            most_unmet=max(8, most // 2),
            silence_s=settings.peer_timeout_s / 3,
        )
        self._identities: dict[int, set[bytes]] = {}
        """ZeroMQ's identities of the connections that have sent a message, by file descriptor."""
        self._descriptors: dict[bytes, int] = {}
        """The reverse."""
        self._gone: list[bytes] = []
        self._replied: tuple[messages.Message | None, bytes] = None, b""
        """The last reply, and its encoding."""
        try:
            self._wakeup = WakeUp()
            self._context.set(zmq.MAX_SOCKETS, most + 16)
            self._router = self._context.socket(zmq.ROUTER)  # fails when the process is out of file descriptors
            host, port = addresses.parse_bind(bind)
            advertised = None if advertise is None else addresses.checked_host(advertise, f"advertise={advertise!r}")
            ips = [addresses.ANY] if host == addresses.ANY else addresses.resolve(host)
            if secret is None and not allow_unauthenticated:
                listener.require_secret(bind, ips)
            self._configure(self._router)
            self._router.setsockopt(zmq.BACKLOG, 1024)
            self._router.setsockopt(zmq.SNDHWM, _MOST_REPLIES)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # so that dropped replies can be counted
            self._zap = self._context.socket(zmq.REP)
            if secret is not None:
                self._zap.bind(_ZAP)  # before the first connection
                self._router.setsockopt(zmq.ZAP_DOMAIN, b"kvxfer")
                self._router.setsockopt(zmq.CURVE_SERVER, 1)
                self._router.setsockopt(zmq.CURVE_SECRETKEY, secret.listener.private)
            self._incoming = Incoming(self._router, settings, metrics, self._ended, secret=secret is not None)
            self._backlog = ReplyBacklog(max(_MOST_BACKLOG_NBYTES, self._limit), self._incoming.acknowledged_nbytes)
            bound, port = listener.listen(self._router, ips, port)
            self.bound: list[str] = bound
        except ConfigError:
            self.close()
            raise
        except (zmq.ZMQError, OSError, ValueError) as error:
            self.close()
            raise ConfigError(f"cannot listen on {bind}: {error}") from error
        self.address: str = listener.advertised_address(self.bound, port, advertised)
        self._incoming.address = self.address
        self.loopback: bool = all(map(addresses.is_loopback, self.bound))
        for readable in (self._router, self._incoming.monitor, self._zap, self._wakeup):
            self._poller.register(readable, zmq.POLLIN)

    def wake(self) -> None:
        """Make `receive` return soon. Any thread, and signal handlers."""
        wakeup = self._wakeup
        if wakeup is not None:
            wakeup.ring()

    def send(self, address: str, message: messages.Message) -> None:
        """Queue a message to the peer at ``address``; if its name cannot be resolved, `receive` reports that later.

        Raises:
            ConfigError: the address cannot be connected to.
        """
        if not self._outgoing.send(address, messages.encode(message)):
            self._refused("unmet")

    def reply(self, connection: bytes, message: messages.Message) -> None:
        """Queue a message on an incoming connection; lost if the peer has disconnected."""
        if message is not self._replied[0]:  # the same Welcome goes to all peers
            self._replied = message, messages.encode(message)
        descriptor = self._descriptors.get(connection)
        if descriptor is not None and not self._backlog.may_send(descriptor, len(self._replied[1])):
            self._refused("unsendable")
        else:
            self._push(self._router, [connection, self._replied[1]])

    def disconnect(self, address: str) -> None:
        """Close the connection to a peer, if there is one."""
        self._outgoing.disconnect(address)
        self._buckets.forget(address)

    def receive(self, timeout_s: float | None) -> Iterator[Inbound | Unreachable]:
        """Messages that arrive within ``timeout_s`` (None: no limit), and peers that cannot be reached.

        Returns early after a `wake`, and whenever connections are due for a check.
        """
        timeout_s = _LONGEST_WAIT_S if timeout_s is None else min(timeout_s, _LONGEST_WAIT_S)
        unreachable = [Unreachable(address, why) for address, why in self._outgoing.update()]
        unreachable += [
            Unreachable(address, f"no process listens at {address}", dead=True) for address in self._outgoing.refused()
        ]
        yield from unreachable
        timeout_s = 0.0 if unreachable else min(timeout_s, self._incoming.check(), self._outgoing.wait_s())
        timeout_ms = max(0, int(timeout_s * 1000) + 1)
        for readable, _ in self._poller.poll(timeout_ms):
            if readable is self._router:
                yield from self._drain(self._router, None)
            elif readable is self._incoming.monitor:
                self._incoming.read_events()
                gone, self._gone = self._gone, []
                for connection in gone:
                    yield Inbound(connection, None, gone=True)
            elif readable is self._zap:
                self._authenticate()
            elif not isinstance(readable, zmq.Socket):
                if self._wakeup is not None:
                    self._wakeup.clear()
            else:
                address = self._outgoing.address_of(readable)
                if address is not None:  # else it was closed in this call
                    yield from self._drain(readable, address)

    def close(self) -> None:
        """Close all sockets; queued messages have 0.2 s to leave."""
        self._outgoing.clear()
        wakeup, self._wakeup = self._wakeup, None
        if wakeup is not None:
            wakeup.close()
            with contextlib.suppress(KeyError):
                self._poller.unregister(wakeup)  # its descriptors are closed with the object
        self._context.destroy(linger=200)

    def _dealer(self, ipv6: bool) -> zmq.Socket[bytes]:
        dealer = self._context.socket(zmq.DEALER)
        self._configure(dealer)
        dealer.setsockopt(zmq.IPV6, int(ipv6))
        dealer.setsockopt(zmq.SNDHWM, _MOST_QUESTIONS)
        if self._secret is not None:
            dealer.setsockopt(zmq.CURVE_SERVERKEY, self._secret.listener.public)
            dealer.setsockopt(zmq.CURVE_PUBLICKEY, self._secret.caller.public)
            dealer.setsockopt(zmq.CURVE_SECRETKEY, self._secret.caller.private)
        return dealer

    def _configure(self, sock: zmq.Socket[bytes]) -> None:
        sock.setsockopt(zmq.MAXMSGSIZE, max(_HARD_LIMIT * self._limit, _LEAST_HARD_LIMIT_NBYTES))
        sock.setsockopt(zmq.RCVHWM, _MOST_WAITING)
        sock.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(option, value)
        sock.setsockopt(zmq.RECONNECT_IVL, 50)
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)

    def _push(self, sock: zmq.Socket[bytes], frames: list[bytes]) -> None:
        # A full queue means a peer that does not read; the protocol sends messages without an answer again.
        try:
            sock.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # else the peer has disconnected meanwhile
                self._refused("unsendable")

    def _drain(self, sock: zmq.Socket[bytes], address: str | None) -> Iterator[Inbound]:
        for _ in range(_MOST_PER_TURN):
            try:
                received = sock.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.ZMQError:
                return
            connection = _descriptor(received[-1]) if address is None else -1
            if connection >= 0:
                self._incoming.table.heard(connection)
                name = received[0].bytes
                self._identities.setdefault(connection, set()).add(name)
                self._descriptors[name] = connection
            verdict = self._buckets.take(address or connection, sum(map(len, received)), time.monotonic())
            if verdict is not Verdict.ACCEPT:
                self._refused("rate")
                if verdict is Verdict.CLOSE:
                    self._disconnect(connection if address is None else address)
            else:
                began = time.thread_time()
                frames = [frame.bytes for frame in received]
                inbound = self._decode(frames.pop(0) if address is None else address, frames)
                if address is not None:
                    # The work that follows from an answer is this side's own, so only the decoding is charged.
                    self._buckets.spend(address, time.thread_time() - began)
                    if inbound.message is not None:
                        self._outgoing.heard(sock)
                    yield inbound
                else:
                    yield inbound  # the caller answers it before the generator goes on
                    self._buckets.spend(connection, time.thread_time() - began)
            if sock.closed:
                return

    def _decode(self, source: bytes | str, frames: list[bytes]) -> Inbound:
        if len(frames) != 1:
            return Inbound(source, None, "garbage", f"a message has one frame, not {len(frames)}")
        if len(frames[0]) > self._limit:
            return Inbound(source, None, "oversized", f"{len(frames[0])} bytes are more than {self._limit}")
        try:
            return Inbound(source, messages.decode(frames[0]))
        except WireError as error:
            return Inbound(source, None, "garbage", str(error))

    def _authenticate(self) -> None:
        """Answer ZeroMQ's authentication requests: accept connections that have proved to hold the fleet's key."""
        for _ in range(_MOST_PER_TURN):
            try:
                version, question, _domain, _address, _identity, mechanism, *keys = self._zap.recv_multipart(
                    zmq.NOBLOCK
                )
            except zmq.ZMQError:
                return
            known = z85.decode(self._secret.caller.public) if self._secret is not None else b""
            good = mechanism == b"CURVE" and len(keys) == 1 and hmac.compare_digest(keys[0], known)
            status = (b"200", b"OK") if good else (b"400", b"unknown key")
            self._zap.send_multipart([version, question, *status, b"", b""])

    def _disconnect(self, peer: int | str) -> None:
        """Close the connection of a peer that sends too much."""
        if isinstance(peer, int):
            self._incoming.shut(peer, "flood")
            return
        self._refused("flood")
        self._outgoing.disconnect(peer)  # its bucket stays

    def _ended(self, connection: int) -> None:
        """Forget an incoming connection that has ended."""
        self._buckets.forget(connection)
        self._backlog.forget(connection)
        gone = self._identities.pop(connection, ())
        for name in gone:
            self._descriptors.pop(name, None)
        self._gone += gone

    def _refused(self, reason: str) -> None:
        self._metrics.count("kvxfer_refused_messages_total", reason=reason)


def _check_room(bind: str) -> None:
    """Raise ConfigError if too few file descriptors are free for a context: ZeroMQ would abort the process."""
    room: list[int] = []
    try:
        room.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(_LEAST_FILES))
    except OSError as error:
        raise ConfigError(f"cannot listen on {bind}: {error} (ulimit -n)") from error
    finally:
        for descriptor in room:
            os.close(descriptor)


def _descriptor(frame: zmq.Frame) -> int:
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:  # peers with the first version of ZeroMQ's protocol have none
        return -1


def _weak_call(method: Callable[[], object]) -> Callable[[], object]:
    """Wrap a method so that threads which may outlive its object do not keep the object alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        bound = reference()
        if bound is not None:
            bound()

    return call
