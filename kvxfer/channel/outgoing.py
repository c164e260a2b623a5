# SPDX-License-Identifier: Apache-2.0
"""Outgoing connections of a control channel, by the address of the peer: a DEALER socket for each IP address.

A host name may have several IP addresses; one of them leads to the peer, and another one after a restart. So the channel
connects to all of them, keeps the first that answers, and closes the others. If the peer does not answer for a while, the
channel looks its name up again and tries all of its addresses again.

A connection can be dead although neither end has noticed: a firewall or a load balancer has forgotten it. TCP finds that out after
a quarter of an hour. So if a peer does not answer for a while, the channel also opens a second connection to it, and keeps the
one over which the peer answers.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import zmq

from kvxfer import addresses
from kvxfer.channel.port_watch import AGAIN_S, NAMED_S, PortWatch
from kvxfer.channel.resolver import Resolver
from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

_SILENCE_S = 1.0
"""Time without an answer after which all addresses of a peer's host name are tried again."""

_LONGEST_SILENCE_S = 60.0
"""Longest time between two new connections to a peer that does not answer."""

_UNMET_S = 2.0
"""Time that a peer which has never answered keeps its connection when another peer needs the place."""

_MOST_QUEUED = 64
"""Most messages to a peer during the look-up of its name. More are dropped; the protocol sends messages again."""


@dataclass(eq=False)
class _Route:
    """Connections to one peer.

    Attributes:
        begun: time of the first message to the peer.
        named: the host is a name with possibly several IP addresses.
        sockets: with the IP address of each; several while it is unknown which of them leads to the peer.
        heard: the peer has sent a message.
        unanswered_since: time of the first message without an answer, or of the last look-up since; None if there is none.
        second_at: time to open a second connection; None if every message was answered. ``patience_s`` after the one before.
        queued: messages that wait for the look-up of the name.
        watch: probe of the port while the peer does not answer.
    """

    address: str
    host: str
    port: int
    begun: float
    named: bool
    patience_s: float
    sockets: dict[zmq.Socket[bytes], str] = field(default_factory=dict)
    heard: bool = False
    unanswered_since: float | None = None
    second_at: float | None = None
    queued: list[bytes] = field(default_factory=list)
    watch: PortWatch | None = None


class Outgoing:
    """Outgoing connections by address of the peer. Used by the thread that owns the channel.

    Args:
        make: makes a DEALER with all its options, for IPv6 or not; raises ZMQError.
        push: gives frames to a socket.
        poller: poller of the owning thread, for the sockets.
        notify: makes the owning thread call `update` soon; called by other threads.
        most_unmet: most peers at once that have never answered. A lease may name any address, and each takes file descriptors.
        silence_s: time without an answer after which a second connection is opened; twice as long each time from then on.
    """

    def __init__(
        self,
        make: Callable[[bool], zmq.Socket[bytes]],
        push: Callable[[zmq.Socket[bytes], list[bytes]], object],
        poller: zmq.Poller,
        notify: Callable[[], object],
        most_unmet: int,
        silence_s: float,
    ) -> None:
        self._make = make
        self._push = push
        self._poller = poller
        self._most_unmet = most_unmet
        self._silence_s = silence_s
        self._resolver = Resolver(notify)
        self._routes: dict[str, _Route] = {}
        self._unmet: dict[str, _Route] = {}
        """Peers that have never answered, oldest first."""
        self._unresolved: dict[str, _Route] = {}
        """Peers without a socket, whose names are being looked up."""
        self._by_socket: dict[zmq.Socket[bytes], _Route] = {}
        self._retry_at = float("inf")
        """Time of the next retry of a peer that does not answer."""
        self._watch_at = float("inf")
        """Time of the next probe of a port."""

    def send(self, address: str, data: bytes) -> bool:
        """Send a message to a peer, or queue it during the look-up of its name.

        Returns:
            False if the message was dropped because too many peers do not answer.

        Raises:
            ConfigError: the address cannot be connected to; the message says why.
        """
        route = self._routes.get(address)
        if route is None:
            route = self._begin(address)
            if route is None:
                return False
        now = time.monotonic()
        if route.named and route.unanswered_since is None:
            self._wait_from(route, now)
        if route.second_at is None:
            self._open_second_at(route, now + route.patience_s)
        if route.watch is None:
            looked_up = addresses.known_ips(route.host) is None
            route.watch = PortWatch(now, NAMED_S if looked_up else AGAIN_S)
            self._watch_at = min(self._watch_at, route.watch.due)
        if route.sockets:
            for each in list(route.sockets):
                self._push(each, [data])
        elif len(route.queued) < _MOST_QUEUED:
            route.queued.append(data)
        return True

    def address_of(self, sock: zmq.Socket[bytes]) -> str | None:
        """Address of the peer that a socket leads to; None for any other socket."""
        route = self._by_socket.get(sock)
        return None if route is None else route.address

    def heard(self, sock: zmq.Socket[bytes]) -> None:
        """Note a message on this socket, which so leads to the peer; close the peer's other sockets."""
        route = self._by_socket.get(sock)
        if route is None:
            return
        route.unanswered_since = route.second_at = None
        route.patience_s = self._silence_s
        self._stop_watch(route)
        if not route.heard:
            route.heard = True
            self._unmet.pop(route.address, None)
        if len(route.sockets) > 1:
            for each in list(route.sockets):
                if each is not sock:
                    self._close(route, each)

    def update(self) -> list[tuple[str, str]]:
        """Connect to peers whose names are resolved, and retry those that do not answer.

        Returns:
            addresses that cannot be connected to, with the reason; they are forgotten.
        """
        failed: list[tuple[str, str]] = []
        for route in list(self._unresolved.values()):
            try:
                self._connect(route)
            except ConfigError as error:
                self.disconnect(route.address)
                failed.append((route.address, str(error)))
                continue
            if route.sockets:
                self._wait_from(route, time.monotonic())
                queued, route.queued = route.queued, []
                for data in queued:
                    for each in route.sockets:
                        self._push(each, [data])
        now = time.monotonic()
        if now >= self._retry_at:
            self._retry(now)
        return failed

    def refused(self) -> list[str]:
        """Addresses of peers that do not answer and whose ports have refused connections for some time."""
        now = time.monotonic()
        found: list[str] = []
        if now < self._watch_at:
            return found
        self._watch_at = float("inf")
        for route in self._routes.values():
            if route.watch is None or not route.sockets:
                continue
            if now >= route.watch.due and route.watch.check(set(route.sockets.values()), route.port, now):
                found.append(route.address)
            self._watch_at = min(self._watch_at, route.watch.due)
        return found

    def wait_s(self) -> float:
        """Seconds until `update` or `refused` has something to do, unless ``notify`` is called before."""
        at = min((self._resolver.due_at(route.host) for route in self._unresolved.values()), default=float("inf"))
        return max(0.0, min(at, self._retry_at, self._watch_at) - time.monotonic())

    def disconnect(self, address: str) -> None:
        """Close the connections to a peer, if there are any."""
        route = self._routes.pop(address, None)
        if route is not None:
            self._unmet.pop(address, None)
            self._unresolved.pop(address, None)
            self._stop_watch(route)
            for each in list(route.sockets):
                self._close(route, each)

    def clear(self) -> None:
        """Forget all peers. Their sockets are closed with their context."""
        for route in self._routes.values():
            self._stop_watch(route)
        for each in (self._routes, self._unmet, self._unresolved, self._by_socket):
            each.clear()

    @staticmethod
    def _stop_watch(route: _Route) -> None:
        if route.watch is not None:
            route.watch.close()
            route.watch = None

    def _begin(self, address: str) -> _Route | None:
        host, port = addresses.parse(address)
        if not self._make_room():
            return None
        named = addresses.known_ips(host) != [host]
        route = _Route(address, host, port, time.monotonic(), named, self._silence_s)
        self._connect(route)  # may raise, and then the route is not kept
        self._routes[address] = self._unmet[address] = route
        return route

    def _make_room(self) -> bool:
        """Whether there is room for one more peer; disconnect one that has not answered for a while if need be."""
        if len(self._unmet) < self._most_unmet:
            return True
        oldest = next(iter(self._unmet.values()))
        if time.monotonic() < oldest.begun + _UNMET_S:
            return False
        self.disconnect(oldest.address)
        return True

    def _connect(self, route: _Route) -> None:
        """Open a socket for each IP address that has none; none during the look-up of the name. Raises ConfigError."""
        ips = self._resolver.ips(route.host)
        if ips is None:
            self._unresolved[route.address] = route
            return
        self._unresolved.pop(route.address, None)
        new = [ip for ip in ips if ip not in route.sockets.values()]
        for old in [each for each, ip in route.sockets.items() if ip not in ips]:
            if len(route.sockets) + len(new) > addresses.MOST_IPS:
                self._close(route, old)
        for ip in new:
            try:
                self._open(route, ip)
            except (zmq.ZMQError, ValueError, TypeError) as error:
                if not route.sockets:
                    raise ConfigError(f"cannot connect to {route.address!r}: {error}") from error

    def _open(self, route: _Route, ip: str) -> None:
        sock = self._make(addresses.is_ipv6(ip))  # fails when this process is out of sockets
        try:
            sock.connect(addresses.join(ip, route.port))
        except BaseException:
            sock.close(0)
            raise
        route.sockets[sock] = ip
        self._by_socket[sock] = route
        self._poller.register(sock, zmq.POLLIN)

    def _close(self, route: _Route, sock: zmq.Socket[bytes]) -> None:
        del route.sockets[sock]
        del self._by_socket[sock]
        self._poller.unregister(sock)
        sock.close(0)

    def _wait_from(self, route: _Route, now: float) -> None:
        route.unanswered_since = now
        self._retry_at = min(self._retry_at, now + _SILENCE_S)

    def _open_second_at(self, route: _Route, at: float) -> None:
        route.second_at = at
        self._retry_at = min(self._retry_at, at)

    def _retry(self, now: float) -> None:
        self._retry_at = float("inf")
        for route in self._routes.values():
            if route.sockets and route.unanswered_since is not None:
                self._look_up_again(route, route.unanswered_since, now)
            if route.second_at is not None:
                self._open_second(route, route.second_at, now)

    def _look_up_again(self, route: _Route, since: float, now: float) -> None:
        if now < since + _SILENCE_S:
            self._wait_from(route, since)
            return
        with contextlib.suppress(ConfigError):  # the addresses found before may still work
            self._connect(route)
        self._unresolved.pop(route.address, None)
        self._wait_from(route, now)

    def _open_second(self, route: _Route, at: float, now: float) -> None:
        """Open a second connection to each IP address. The first one stays: the peer may only be slow, or paused."""
        if now < at or not route.sockets:  # it has none while its name is looked up
            self._open_second_at(route, at if now < at else now + _SILENCE_S)
            return
        route.patience_s = max(self._silence_s, min(2 * route.patience_s, _LONGEST_SILENCE_S))
        first = {ip: sock for sock, ip in reversed(route.sockets.items())}
        for sock in [each for each, ip in route.sockets.items() if each is not first[ip]]:
            self._close(route, sock)  # the second one of the time before
        for ip in first:
            with contextlib.suppress(zmq.ZMQError):  # this process is out of sockets
                self._open(route, ip)
        self._open_second_at(route, now + route.patience_s)
