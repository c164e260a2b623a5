# SPDX-License-Identifier: Apache-2.0
"""The control channel: ZeroMQ sockets that carry `kvxfer.protocol.messages` messages. One thread owns it; it knows no leases.

A ROUTER takes what other endpoints say to this one; a DEALER per peer carries what this one asks. ZeroMQ reconnects
by itself and keeps a queue meanwhile, so a peer that is not up yet, or is restarted, costs nobody else anything.
Whatever strangers send to the port ends as a counted refusal, and none has more of this endpoint than `kvxfer.channel.limits` lets
it. With a secret every connection is authenticated both ways and
encrypted (CurveZMQ, https://rfc.zeromq.org/spec/26), and one that is not never reaches a message.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import zmq
from zmq.utils import z85

from kvxfer import addresses
from kvxfer.channel import listener
from kvxfer.channel.connections import Incoming, most_connections
from kvxfer.channel.limits import Buckets, Untaken, Verdict
from kvxfer.channel.outgoing import Outgoing
from kvxfer.channel.wakeup import WakeUp
from kvxfer.errors import ConfigError, WireError
from kvxfer.protocol import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvxfer.config import Settings
    from kvxfer.metrics import Metrics
    from kvxfer.secret import Secret

_ZAP = "inproc://zeromq.zap.01"
"""Where ZeroMQ asks who may connect (https://rfc.zeromq.org/spec/27)."""

_MOST_PER_TURN = 256
"""Messages taken from one socket before the others and the timers get their turn."""

_MOST_WAITING = 64
"""Messages of one connection that wait to be taken. A peer that sends more waits."""

_MOST_QUESTIONS = 8192
"""Messages that wait for one peer to take them, which are short. Thousands of leases may ask a peer that is busy."""

_MOST_UNTAKEN_NBYTES = 1 << 20
"""Of replies that wait for one peer to take them, beside the last one. What is more is dropped."""

_MOST_REPLIES = 512
"""Replies that wait for one peer to take them. What is more is dropped."""

_HANDSHAKE_MS = 10_000
"""A connection that has not proved itself by then is closed by ZeroMQ."""

_KEEPALIVE = {zmq.TCP_KEEPALIVE: 1, zmq.TCP_KEEPALIVE_IDLE: 60, zmq.TCP_KEEPALIVE_INTVL: 15, zmq.TCP_KEEPALIVE_CNT: 4}
"""Connections of hosts that are gone end after two minutes; a frozen process keeps its own."""

_LONGEST_WAIT_S = 3600.0

_HARD_LIMIT = 2
"""Times the longest message: ZeroMQ itself drops a connection that sends more at once, before it is in memory."""

_LEAST_FILES = 16
"""What the sockets of a channel take of the process's files, before anybody connects."""

_LEAST_HARD_LIMIT_NBYTES = 1 << 16
"""What a handshake needs, and more."""


@dataclass(frozen=True)
class Inbound:
    """Something arrived. ``source`` is a connection (bytes) of the ROUTER or the address (str) of a peer.

    ``message`` is None if it was garbage: then ``reason`` is a word to count it by and ``why`` a sentence. ``gone``: no message
    came but the end of the connection.
    """

    source: bytes | str
    message: messages.Message | None
    reason: str = ""
    why: str = ""
    gone: bool = False


@dataclass(frozen=True)
class Unreachable:
    """A peer that something was sent to cannot be connected to, as its name cannot be resolved; ``why`` is a sentence.

    Attributes:
        dead: it can be named, but nobody listens there.
    """

    address: str
    why: str
    dead: bool = False


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

    def send(self, address: str, message: messages.Message) -> None:
        """Queue a message to the peer at ``address``. Raises ConfigError: it cannot be connected to."""

    def reply(self, connection: bytes, message: messages.Message) -> None:
        """Queue a message on a connection that came in."""

    def hangup(self, address: str) -> None:
        """Close the connection to a peer, if there is one."""

    def receive(self, timeout_s: float | None) -> Iterable[Inbound | Unreachable]:
        """What arrives within ``timeout_s``, and what was found out of peers meanwhile."""

    def close(self) -> None:
        """End it."""


class ControlChannel:
    """Sockets of one endpoint. Only `wake` and `address` may be used by other threads.

    Args:
        bind: ``tcp://host:port``; port 0 takes a free one. A host name means all of its addresses that are this machine's,
            ``localhost`` both loopback addresses, and ``*`` all addresses of both families.
        advertise: host by which peers reach it, if that differs (bound to all interfaces, NAT).
        secret: of all endpoints that may talk to each other.
        allow_unauthenticated: an address that other machines reach may be bound without one.

    Attributes:
        address: where peers find it, a number unless ``advertise`` is a name.
        bound: the numbers that it listens on; ``*`` if that is all.

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
        _check_room(bind)
        self._context = zmq.Context()
        self._buckets = Buckets(settings.max_messages_per_s)
        """By file descriptor of a connection that came in, or address of a peer."""
        self._wakeup: WakeUp | None = None
        self._poller = zmq.Poller()
        most = most_connections(settings)
        self._outgoing = Outgoing(self._dealer, self._push, self._poller, _weakly(self.wake), max(8, most // 2))
        self._spoken: dict[int, set[bytes]] = {}
        """By file descriptor, ZeroMQ's names of the connections that a message came by."""
        self._descriptors: dict[bytes, int] = {}
        """The reverse."""
        self._gone: list[bytes] = []
        self._replied: tuple[messages.Message | None, bytes] = None, b""
        """The last reply, and how it is encoded."""
        try:
            self._wakeup = WakeUp()
            self._context.set(zmq.MAX_SOCKETS, most + 16)
            self._router = self._context.socket(zmq.ROUTER)  # fails when this process is out of files
            host, port = addresses.parse_bind(bind)
            advertised = None if advertise is None else addresses.checked_host(advertise, f"advertise={advertise!r}")
            numbers = [addresses.ANY] if host == addresses.ANY else addresses.resolve(host)
            if secret is None and not allow_unauthenticated:
                listener.refuse_strangers(bind, numbers)
            self._configure(self._router)
            self._router.setsockopt(zmq.BACKLOG, 1024)
            self._router.setsockopt(zmq.SNDHWM, _MOST_REPLIES)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply that is dropped is counted
            self._zap = self._context.socket(zmq.REP)
            if secret is not None:
                self._zap.bind(_ZAP)  # before anybody can connect
                self._router.setsockopt(zmq.ZAP_DOMAIN, b"kvxfer")
                self._router.setsockopt(zmq.CURVE_SERVER, 1)
                self._router.setsockopt(zmq.CURVE_SECRETKEY, secret.listener.private)
            self._incoming = Incoming(self._router, settings, metrics, self._ended, secret=secret is not None)
            self._untaken = Untaken(max(_MOST_UNTAKEN_NBYTES, self._limit), self._incoming.acknowledged_nbytes)
            bound, port = listener.listen(self._router, numbers, port)
            self.bound: list[str] = bound
        except ConfigError:
            self.close()
            raise
        except (zmq.ZMQError, OSError, ValueError) as error:
            self.close()
            raise ConfigError(f"cannot listen on {bind}: {error}") from error
        self.address: str = listener.told(self.bound, port, advertised)
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
        """Queue a message to the peer at ``address``; if its name cannot be resolved, `receive` tells that later.

        Raises:
            ConfigError: it is no address that can be connected to.
        """
        if not self._outgoing.send(address, messages.encode(message)):
            self._refused("unmet")

    def reply(self, connection: bytes, message: messages.Message) -> None:
        """Queue a message on a connection that came in; lost if the peer has gone."""
        if message is not self._replied[0]:  # a Welcome is the same for all that greet
            self._replied = message, messages.encode(message)
        descriptor = self._descriptors.get(connection)
        if descriptor is not None and not self._untaken.may_send(descriptor, len(self._replied[1])):
            self._refused("unsendable")
        else:
            self._push(self._router, [connection, self._replied[1]])

    def hangup(self, address: str) -> None:
        """Close the connection to a peer, if there is one."""
        self._outgoing.hangup(address)
        self._buckets.forget(address)

    def receive(self, timeout_s: float | None) -> Iterator[Inbound | Unreachable]:
        """What arrives within ``timeout_s`` (None: wait until something does), or nothing after a `wake`.

        Returns earlier with nothing where ``timeout_s`` is longer than anybody needs.
        """
        timeout_s = _LONGEST_WAIT_S if timeout_s is None else min(timeout_s, _LONGEST_WAIT_S)
        unreachable = [Unreachable(address, why) for address, why in self._outgoing.look()]
        unreachable += [
            Unreachable(address, f"nobody listens at {address}", dead=True) for address in self._outgoing.dead()
        ]
        yield from unreachable
        timeout_s = 0.0 if unreachable else min(timeout_s, self._incoming.look(), self._outgoing.wait_s())
        timeout_ms = max(0, int(timeout_s * 1000) + 1)
        for readable, _ in self._poller.poll(timeout_ms):
            if readable is self._router:
                yield from self._drain(self._router, None)
            elif readable is self._incoming.monitor:
                self._incoming.follow()
                gone, self._gone = self._gone, []
                for connection in gone:
                    yield Inbound(connection, None, gone=True)
            elif readable is self._zap:
                self._admit()
            elif not isinstance(readable, zmq.Socket):
                if self._wakeup is not None:
                    self._wakeup.clear()
            else:
                address = self._outgoing.address_of(readable)
                if address is not None:  # else it was closed in this turn
                    yield from self._drain(readable, address)

    def close(self) -> None:
        """Close every socket; what was queued last still has a moment to leave."""
        self._outgoing.clear()
        wakeup, self._wakeup = self._wakeup, None
        if wakeup is not None:
            wakeup.close()
            with contextlib.suppress(KeyError):
                self._poller.unregister(wakeup)  # its files are closed when nobody refers to it any more
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
                name = received[0].bytes
                self._spoken.setdefault(connection, set()).add(name)
                self._descriptors[name] = connection
            verdict = self._buckets.take(address or connection, sum(map(len, received)), time.monotonic())
            if verdict is not Verdict.TAKE:
                self._refused("rate")
                if verdict is Verdict.CUT:
                    self._cut(connection if address is None else address)
            else:
                began = time.thread_time()
                frames = [frame.bytes for frame in received]
                inbound = self._decode(frames.pop(0) if address is None else address, frames)
                if address is not None:
                    # What follows from the answer is what this side asked for.
                    self._buckets.spend(address, time.thread_time() - began)
                    if inbound.message is not None:
                        self._outgoing.heard(sock)
                    yield inbound
                else:
                    yield inbound  # and by then it has been answered
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
        self._outgoing.hangup(peer)  # and what it has said counts on

    def _ended(self, connection: int) -> None:
        """One that came in."""
        self._buckets.forget(connection)
        self._untaken.forget(connection)
        gone = self._spoken.pop(connection, ())
        for name in gone:
            self._descriptors.pop(name, None)
        self._gone += gone

    def _refused(self, reason: str) -> None:
        self._metrics.count("kvxfer_refused_messages_total", reason=reason)


def _check_room(bind: str) -> None:
    """ZeroMQ ends the process if it finds no room for the first files of a context. Raises ConfigError."""
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
    except zmq.ZMQError:  # a peer of ZeroMQ's first protocol has none
        return -1


def _weakly(method: Callable[[], object]) -> Callable[[], object]:
    """A method to be called by threads that outlive its object: they do not keep that alive, and then nothing is called."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        bound = reference()
        if bound is not None:
            bound()

    return call
