# SPDX-License-Identifier: Apache-2.0
"""The producers that a consumer knows: handshakes, refusals, routes of their KV, and retirement. Pure, no I/O.

A peer is known as long as some lease needs it, and for a while after that. It is met before anything is asked of it, and met
again when it was restarted, when a read from it failed, or when it says that it does not know us.
"""

from __future__ import annotations

import logging
from enum import Enum
from typing import TYPE_CHECKING, Any

from kvxfer.errors import HandshakeError, IncompatibleError, printable
from kvxfer.protocol.actions import Action, ForgetAgent, Hangup, SendTo
from kvxfer.protocol.grants import most_ids
from kvxfer.protocol.messages import REFUSAL_CODES
from kvxfer.protocol.pacer import Pacer
from kvxfer.protocol.peer import Peer, PeerEvent, PeerState
from kvxfer.protocol.timers import Timers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.config import Settings
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.messages import Refused, Welcome
    from kvxfer.protocol.peer import Identity

    Routes = Callable[[Sequence[Peer]], Sequence[Any]]

_log = logging.getLogger(__name__)

_CATCH_UP_RETRIES = 4
"""After a pause of this process no peer counts as silent for this many ``retry_interval_s``."""


class Welcomed(str, Enum):
    """Effect of a `Welcome`: NOTHING, the peer is MET now, or another process is met and the one before was LOST."""

    NOTHING = "nothing"
    MET = "met"
    LOST = "lost"


class Peers:
    """Peers by their control address.

    Args:
        routes: how KV travels from these peers, all ranks of one producer, to this side; raises IncompatibleError.
    """

    def __init__(
        self, identity: Identity, settings: Settings, metrics: Metrics, out: list[Action], routes: Routes
    ) -> None:
        self._me = identity
        self.most_ids: int = most_ids(identity.spec)
        """Most block ids that this side takes of one lease."""
        self._settings = settings
        self._metrics = metrics
        self._out = out
        self._routes = routes
        self.by_address: dict[str, Peer] = {}
        self._known_routes: dict[tuple[tuple[str, str], ...], Sequence[Any] | IncompatibleError] = {}
        """Routes by address and epoch of each rank."""
        self._bearers: dict[str, list[Peer]] = {}
        """Peers by the name of the transfer agent that they bring: several only where one engine is known by several addresses."""
        self._retirements = Timers()
        """Times by address, of peers that no lease needs."""

    def in_use(self) -> dict[str, int]:
        """See `Endpoint.in_use`."""
        return {"peers": len(self.by_address), "peer_timers": len(self._retirements)}

    def need(self, address: str, rank: int, token: str, owner: str) -> Peer:
        """The peer at an address, for a lease that expects this rank of that engine there."""
        peer = self.by_address.get(address)
        if peer is None:
            pacer = Pacer(self._settings.max_messages_per_s)
            peer = self.by_address[address] = Peer(address, rank, pacer, PeerState.ABSENT)
            peer.step(PeerEvent.NEED)
        peer.needed_by[token] = owner
        self._retirements.cancel(address)
        return peer

    def need_no_more(self, peer: Peer, token: str, now: float) -> None:
        """Note that a lease needs a peer no more. A peer that no lease needs is forgotten after ``idle_peer_s``."""
        peer.needed_by.pop(token, None)
        if not peer.needed_by:
            # An address at which no peer was ever met is not worth a socket.
            self._retirements.set(peer.address, now + (self._settings.idle_peer_s if peer.name else 0.0))

    def tick(self, now: float) -> None:
        """Forget peers whose time has come."""
        for address in self._retirements.due(now):
            peer = self.by_address.pop(address)
            peer.step(PeerEvent.IDLE)
            self._forget_routes(peer)
            self._out.append(Hangup(address))
            self._leave_agent(peer, peer.agent_name, peer.agent_info)

    def was_paused(self, now: float, late_s: float) -> None:
        """Do not count ``late_s``, in which this process did not run, as silence of peers: what they said meanwhile is still to be read.

        No more is allowed for, so that a machine that is late all the time notices in the end that a peer is silent.
        """
        settings = self._settings
        least = (
            now - settings.peer_timeout_s + min(_CATCH_UP_RETRIES * settings.retry_interval_s, settings.peer_timeout_s)
        )
        for peer in self.by_address.values():
            peer.heard_at = min(max(peer.heard_at + late_s, least), now)

    def next_deadline(self) -> float | None:
        """Time at which `tick` has something to do next, or earlier; None if never."""
        return self._retirements.next_at()

    # -- handshakes -------------------------------------------------------------------------------------------------

    def greet(self, peer: Peer, now: float) -> None:
        """Begin a handshake now."""
        self._out.append(SendTo(peer.address, peer.greet(self._me, now)))

    def meet(self, peer: Peer, now: float) -> None:
        """Greet a peer that was not greeted a moment ago."""
        if peer.state is not PeerState.GREETED or now >= peer.greeted_at + self._settings.retry_interval_s:
            self.greet(peer, now)

    def welcomed(self, peer: Peer, message: Welcome, now: float) -> Welcomed:
        """Take the introduction of a peer, asked or not."""
        if peer.changes_too_often(message, now, self._settings.retry_interval_s):
            self._metrics.count("kvxfer_refused_messages_total", reason="rate")
            peer.step(PeerEvent.CHANGE_TOO_OFTEN)  # it is asked again when a lease needs it
            return Welcomed.NOTHING
        old_name, old_agent, repeated = peer.agent_name, peer.agent_info, peer.is_met
        gone = peer.welcomed(self._me, message, now)
        if old_agent != peer.agent_info:
            self._leave_agent(peer, old_name, old_agent)
            self._take_agent(peer, now)
        self._metrics.count("kvxfer_handshakes_total", outcome="met" if peer.error is None else peer.error.code)
        if gone is not None:
            what = "%r at %s was restarted (epoch %r, before %r)"
            _log.log(peer.complaint(now), what, peer.name, peer.address, peer.epoch, gone)
            self._forget_routes(peer)
            return Welcomed.LOST
        if peer.is_met and not repeated and peer.protocol < self._me.spoken.highest:
            what = "%r at %s speaks protocol %d with this side, which speaks %s"
            _log.info(what, peer.name, peer.address, peer.protocol, self._me.spoken)
        # A busy producer answers each Hello of a long wait. That must not multiply all questions.
        return Welcomed.NOTHING if repeated and peer.is_met else Welcomed.MET

    def refused(self, peer: Peer, message: Refused, now: float) -> bool:
        """Take a refusal of a peer; True if it will not be met."""
        code = message.code
        if code in ("stale_epoch", "not_introduced"):
            # The peer was restarted, or it forgot us. Its Welcome tells which. A peer that says so to everything is not asked faster.
            # Otherwise each lease greets again when it is due.
            if peer.step(PeerEvent.NOT_INTRODUCED) and now >= peer.greeted_at + self._settings.retry_interval_s:
                self.greet(peer, now)
        elif code == "rank" and message.rank is not None:
            # Some lease names the peer for another rank than its own. Leases that name it rightly ask again when they are due.
            if peer.state is PeerState.GREETED:
                peer.rank = message.rank
        elif peer.reject(self._refusal(peer, message), PeerEvent.REFUSE):
            self._metrics.count("kvxfer_handshakes_total", outcome=code if code in REFUSAL_CODES else "other")
            return True
        else:
            _log.log(peer.complaint(now), "%s refused a message: %r: %r", peer.address, code, message.reason)
        return False

    def _refusal(self, peer: Peer, message: Refused) -> HandshakeError:
        code, why = printable(message.code), f"{peer.address} refused: {printable(message.reason)}"
        if code == "protocol":
            why += f" (this side speaks protocol {self._me.spoken})"  # an older producer names its own version only
        return HandshakeError(code, why)

    # -- what they have ---------------------------------------------------------------------------------------------

    def routes(self, peers: Sequence[Peer]) -> Sequence[Any]:
        """Routes by which the KV of each of these peers travels, found once for each set of processes.

        Raises:
            IncompatibleError: their caches cannot be read into ours.
        """
        key = tuple((peer.address, peer.epoch) for peer in peers)
        known = self._known_routes.get(key)
        if known is None:
            try:
                known = self._routes(peers)
            except IncompatibleError as error:
                self._metrics.count("kvxfer_handshakes_total", outcome="incompatible")
                known = error
            self._known_routes[key] = known
        if isinstance(known, IncompatibleError):
            raise IncompatibleError(known.axis, str(known))  # not the same one: its traceback would grow with each read
        return known

    def _take_agent(self, peer: Peer, now: float) -> None:
        """Note the agent that a peer brings. One agent has one description: the first, or that of the engine that a lease names."""
        if not peer.agent_name:
            return
        bearers = self._bearers.setdefault(peer.agent_name, [])
        others = [other for other in bearers if other.agent_info != peer.agent_info]
        if any(other.confirmed for other in others) or (others and peer.name not in peer.needed_by.values()):
            self._refuse_agent(peer, others[0], now)
            return
        bearers.append(peer)
        for other in others:
            self._leave_agent(other, other.agent_name, other.agent_info)
            self._refuse_agent(other, peer, now)

    def _refuse_agent(self, peer: Peer, rival: Peer, now: float) -> None:
        why = f"{peer.address} brings {peer.agent_name!r}, of which {rival.address} has brought another description"
        _log.log(peer.complaint(now), "%s", why)
        peer.reject(HandshakeError("agent", why))
        peer.agent_info, peer.agent_name = b"", ""

    def _leave_agent(self, peer: Peer, name: str, agent_info: bytes) -> None:
        """Forget the agent of a peer that has another one now or is forgotten, unless another peer has that agent."""
        bearers = self._bearers.get(name, [])
        if peer in bearers:
            bearers.remove(peer)
        if not bearers:
            self._bearers.pop(name, None)
        if agent_info and not any(other.agent_info == agent_info for other in bearers):
            self._out.append(ForgetAgent(agent_info))

    def _forget_routes(self, peer: Peer) -> None:
        for key in [key for key in self._known_routes if any(address == peer.address for address, _ in key)]:
            del self._known_routes[key]
