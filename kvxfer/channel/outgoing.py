# SPDX-License-Identifier: Apache-2.0
"""Connections that go out of a control channel, by the address of the peer: a DEALER each, to a numeric address.

A host name may mean several numeric addresses, of which one leads to the peer, and another one after a restart. So each of them
is connected to; the first that is heard from stays, and the others are closed. If what is said to a peer is not answered for a
while, its name is looked up again and each of its addresses is tried again.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import zmq

from kvxfer import addresses
from kvxfer.channel.listening import AGAIN_S, NAMED_S, Watch
from kvxfer.channel.resolver import Resolver
from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

_SILENCE_S = 1.0
"""A peer with a name that has not answered for so long is looked for at each of its addresses."""

_PATIENCE_S = 2.0
"""A peer that was never heard from keeps its connection for so long when another one needs the place."""

_MOST_QUEUED = 64
"""Messages to a peer whose name is being looked up. More are dropped; what matters is sent again."""


@dataclass(eq=False)
class _Route:
    """How one peer is reached.

    Attributes:
        sockets: by number; more than one while it is not known which of them leads to the peer.
        begun: when it was needed first.
        heard: a message has come from it.
        unanswered_since: when the first of the messages was sent that it has not answered; None if there is none.
        queued: messages for when there are sockets.
    """

    address: str
    host: str
    port: int
    begun: float
    named: bool
    sockets: dict[str, zmq.Socket[bytes]] = field(default_factory=dict)
    heard: bool = False
    unanswered_since: float | None = None
    queued: list[bytes] = field(default_factory=list)
    watch: Watch | None = None
    """Whether somebody listens there, while it does not answer."""


class Outgoing:
    """Peers by their address. Used by the thread that owns the channel.

    Args:
        make: makes a DEALER for numbers of IPv6 or not, with all its options; raises ZMQError.
        push: gives frames to a socket.
        poller: of the owning thread, which sockets are registered with.
        tell: makes the owning thread call `look` soon; called by other threads.
        most_unmet: peers at once that were never heard from. A lease may name any address, and each takes file descriptors.
    """

    def __init__(
        self,
        make: Callable[[bool], zmq.Socket[bytes]],
        push: Callable[[zmq.Socket[bytes], list[bytes]], object],
        poller: zmq.Poller,
        tell: Callable[[], object],
        most_unmet: int,
    ) -> None:
        self._make = make
        self._push = push
        self._poller = poller
        self._most_unmet = most_unmet
        self._resolver = Resolver(tell)
        self._routes: dict[str, _Route] = {}
        self._unmet: dict[str, _Route] = {}
        """Those that were never heard from, oldest first."""
        self._unresolved: dict[str, _Route] = {}
        """Those without a socket, whose names are being looked up."""
        self._by_socket: dict[zmq.Socket[bytes], _Route] = {}
        self._retry_at = float("inf")
        """When a peer with a name may have been silent for too long."""
        self._watch_at = float("inf")
        """When to look whether somebody listens where a peer does not answer."""

    def send(self, address: str, data: bytes) -> bool:
        """Send a message to a peer, or queue it while its name is looked up.

        Returns:
            False: it was dropped, for there are too many peers that do not answer.

        Raises:
            ConfigError: the peer cannot be connected to; the message says why.
        """
        route = self._routes.get(address)
        if route is None:
            route = self._begin(address)
            if route is None:
                return False
        now = time.monotonic()
        if route.named and route.unanswered_since is None:
            self._silent_from(route, now)
        if route.watch is None:
            looked_up = addresses.numbers(route.host) is None
            route.watch = Watch(now, NAMED_S if looked_up else AGAIN_S)
            self._watch_at = min(self._watch_at, route.watch.due)
        if route.sockets:
            for each in list(route.sockets.values()):
                self._push(each, [data])
        elif len(route.queued) < _MOST_QUEUED:
            route.queued.append(data)
        return True

    def address_of(self, sock: zmq.Socket[bytes]) -> str | None:
        """Of the peer that a socket leads to; None of any other socket."""
        route = self._by_socket.get(sock)
        return None if route is None else route.address

    def heard(self, sock: zmq.Socket[bytes]) -> None:
        """A message of the peer came by this socket: it leads there."""
        route = self._by_socket.get(sock)
        if route is None:
            return
        route.unanswered_since = None
        self._watch_no_more(route)
        if not route.heard:
            route.heard = True
            self._unmet.pop(route.address, None)
        if len(route.sockets) > 1:
            for number, each in list(route.sockets.items()):
                if each is not sock:
                    self._close(route, number)

    def look(self) -> list[tuple[str, str]]:
        """Connect to peers whose names were looked up, and look again for those that are silent.

        Returns:
            addresses that cannot be connected to, and why: they are as if nothing had been sent to them.
        """
        failed: list[tuple[str, str]] = []
        for route in list(self._unresolved.values()):
            try:
                self._connect(route)
            except ConfigError as error:
                self.hangup(route.address)
                failed.append((route.address, str(error)))
                continue
            if route.sockets:
                self._silent_from(route, time.monotonic())
                queued, route.queued = route.queued, []
                for data in queued:
                    for each in route.sockets.values():
                        self._push(each, [data])
        now = time.monotonic()
        if now >= self._retry_at:
            self._look_again(now)
        return failed

    def dead(self) -> list[str]:
        """Addresses of peers that do not answer and where nobody listens, as the operating system says for some time now."""
        now = time.monotonic()
        found: list[str] = []
        if now < self._watch_at:
            return found
        self._watch_at = float("inf")
        for route in self._routes.values():
            if route.watch is None or not route.sockets:
                continue
            if now >= route.watch.due and route.watch.look(route.sockets, route.port, now):
                found.append(route.address)
            self._watch_at = min(self._watch_at, route.watch.due)
        return found

    def wait_s(self) -> float:
        """For how long `look` need not be called, unless ``tell`` asks for it."""
        at = min((self._resolver.due_at(route.host) for route in self._unresolved.values()), default=float("inf"))
        return max(0.0, min(at, self._retry_at, self._watch_at) - time.monotonic())

    def hangup(self, address: str) -> None:
        """Close the connections to a peer, if there are some."""
        route = self._routes.pop(address, None)
        if route is not None:
            self._unmet.pop(address, None)
            self._unresolved.pop(address, None)
            self._watch_no_more(route)
            for number in list(route.sockets):
                self._close(route, number)

    def clear(self) -> None:
        """Forget all. Sockets are closed with their context."""
        for route in self._routes.values():
            self._watch_no_more(route)
        for each in (self._routes, self._unmet, self._unresolved, self._by_socket):
            each.clear()

    # -- inside -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _watch_no_more(route: _Route) -> None:
        if route.watch is not None:
            route.watch.close()
            route.watch = None

    def _begin(self, address: str) -> _Route | None:
        host, port = addresses.parse(address)
        if not self._make_room():
            return None
        route = _Route(address, host, port, time.monotonic(), addresses.numbers(host) != [host])
        self._connect(route)  # raises before anything is kept
        self._routes[address] = self._unmet[address] = route
        return route

    def _make_room(self) -> bool:
        """A peer that was never heard from gives its place to another one after a while."""
        if len(self._unmet) < self._most_unmet:
            return True
        oldest = next(iter(self._unmet.values()))
        if time.monotonic() < oldest.begun + _PATIENCE_S:
            return False
        self.hangup(oldest.address)
        return True

    def _connect(self, route: _Route) -> None:
        """A socket for each number of a peer that has none yet; none while its name is being looked up. Raises ConfigError."""
        numbers = self._resolver.numbers(route.host)
        if numbers is None:
            self._unresolved[route.address] = route
            return
        self._unresolved.pop(route.address, None)
        new = [number for number in numbers if number not in route.sockets]
        for old in [number for number in route.sockets if number not in numbers]:
            if len(route.sockets) + len(new) > addresses.MOST_NUMBERS:
                self._close(route, old)
        for number in new:
            try:
                self._open(route, number)
            except (zmq.ZMQError, ValueError, TypeError) as error:
                if not route.sockets:
                    raise ConfigError(f"cannot connect to {route.address!r}: {error}") from error

    def _open(self, route: _Route, number: str) -> None:
        sock = self._make(addresses.is_ipv6(number))  # fails when this process is out of sockets
        try:
            sock.connect(addresses.join(number, route.port))
        except BaseException:
            sock.close(0)
            raise
        route.sockets[number] = sock
        self._by_socket[sock] = route
        self._poller.register(sock, zmq.POLLIN)

    def _close(self, route: _Route, number: str) -> None:
        sock = route.sockets.pop(number)
        del self._by_socket[sock]
        self._poller.unregister(sock)
        sock.close(0)

    def _silent_from(self, route: _Route, now: float) -> None:
        route.unanswered_since = now
        self._retry_at = min(self._retry_at, now + _SILENCE_S)

    def _look_again(self, now: float) -> None:
        self._retry_at = float("inf")
        for route in self._routes.values():
            if route.unanswered_since is None or not route.sockets:
                continue
            if now < route.unanswered_since + _SILENCE_S:
                self._silent_from(route, route.unanswered_since)
                continue
            with contextlib.suppress(ConfigError):  # what was found before may still lead there
                self._connect(route)
            self._unresolved.pop(route.address, None)
            self._silent_from(route, now)
