# SPDX-License-Identifier: Apache-2.0
"""One rank of a producer as the consumer knows it: handshake, epoch, cache. Pure, no I/O."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from kvxfer.agents.description import described_name
from kvxfer.errors import HandshakeError, PeerInfoError
from kvxfer.protocol.messages import Hello, Welcome
from kvxfer.protocol.pacer import Pacer
from kvxfer.protocol.transitions import Transition, TransitionTable
from kvxfer.protocol.versions import SPOKEN, ProtocolVersions

if TYPE_CHECKING:
    from kvxfer.layout.spec import CacheSpec


_MOST_CHANGES = 4.0
"""Changes of its agent or epoch that a peer may tell unasked one after the other."""


@dataclass
class Identity:
    """Description of an endpoint in a handshake, as a producer or as a consumer.

    Attributes:
        epoch: random, per start; a message for another epoch was meant for a process that is gone.
        agent: name of the transfer adapter; ``agent_info`` its description, replaced when the agent is.
        addressable: the cache's memory can be read and written in place.
        slot_nbytes: largest chunk that this side can stage; 0 if none.
        casts: dtypes that its devices can turn into each other.
        addresses: of all ranks of its engine, in rank order; empty until they are known.
        writes: it can write into the memory of its consumers.
        spoken: versions of the protocol.
    """

    name: str
    epoch: str
    agent: str
    agent_info: bytes
    spec: CacheSpec
    addressable: bool = True
    slot_nbytes: int = 0
    casts: frozenset[str] = frozenset()
    addresses: tuple[str, ...] = ()
    writes: bool = False
    spoken: ProtocolVersions = SPOKEN


class PeerState(str, Enum):
    """State of the process at one control address, as a consumer knows it."""

    ABSENT = "absent"
    """No lease names the address."""
    UNKNOWN = "unknown"
    """Nothing is known of the process there, or not any more."""
    GREETED = "greeted"
    """A Hello was sent, and not answered yet."""
    MET = "met"
    """The process has introduced itself, and nothing since has put that in doubt."""
    REFUSED = "refused"
    """The process cannot be used; `Peer.error` says why."""


class PeerEvent(str, Enum):
    """Event of a peer."""

    NEED = "need"
    GREET = "greet"
    WELCOME = "welcome"
    REFUSE = "refuse"
    REJECT = "reject"
    NOT_INTRODUCED = "not introduced"
    CHANGE_TOO_OFTEN = "change too often"
    READ_FAIL = "read fail"
    IDLE = "idle"


_KNOWN = (PeerState.UNKNOWN, PeerState.GREETED, PeerState.MET, PeerState.REFUSED)

PEER_TRANSITIONS: TransitionTable[PeerState, PeerEvent] = TransitionTable(
    PeerState.ABSENT,
    (),
    Transition((PeerState.ABSENT,), PeerEvent.NEED, PeerState.UNKNOWN, "a lease names its address"),
    Transition(_KNOWN, PeerEvent.GREET, PeerState.GREETED, "something is to be asked / Hello"),
    Transition(_KNOWN, PeerEvent.WELCOME, PeerState.MET, "Welcome"),
    Transition((PeerState.GREETED,), PeerEvent.REFUSE, PeerState.REFUSED, "Refused (protocol, agent, ...)"),
    Transition(
        _KNOWN,
        PeerEvent.REJECT,
        PeerState.REFUSED,
        "Welcome that does not fit, address that cannot be reached, transfer agent of another peer",
    ),
    Transition((PeerState.MET,), PeerEvent.NOT_INTRODUCED, PeerState.GREETED, "Refused (stale_epoch, not_introduced)"),
    Transition((PeerState.MET,), PeerEvent.CHANGE_TOO_OFTEN, PeerState.UNKNOWN, "too many Welcomes unasked"),
    Transition(_KNOWN, PeerEvent.READ_FAIL, PeerState.UNKNOWN, "a read from it failed, retryably"),
    Transition(_KNOWN, PeerEvent.IDLE, PeerState.ABSENT, "no lease needed it for idle_peer_s"),
)


@dataclass(eq=False)
class Peer:
    """The endpoint at one control address. It survives restarts of the process there, whose ``epoch`` then changes.

    Attributes:
        rank: rank of its engine, by the lease that named it first or by its own word.
        pacer: how fast it is asked for grants and told of ends.
        name, epoch: of the process met last; empty before.
        agent_info, agent_name: of its transfer agent; empty before, and while it may not be used.
        confirmed: a lease expects an engine of this name there.
        spec: of its cache; None before.
        addressable, slot_nbytes, casts, addresses, writes: see `Identity`.
        protocol: version that both sides speak since they met; 0 before.
        error: why it cannot be used; None unless REFUSED.
        needed_by: engines that leases expect there, by the tokens of the leases, in the order in which they came.
        met_at, heard_at: when it introduced itself, and when it last said anything, on the caller's clock.
    """

    address: str
    rank: int = 0
    pacer: Pacer = field(default_factory=lambda: Pacer(5000.0))
    state: PeerState = PeerState.UNKNOWN
    name: str = ""
    epoch: str = ""
    agent_info: bytes = b""
    agent_name: str = ""
    confirmed: bool = False
    spec: CacheSpec | None = None
    addressable: bool = True
    slot_nbytes: int = 0
    casts: frozenset[str] = frozenset()
    addresses: tuple[str, ...] = ()
    writes: bool = False
    protocol: int = 0
    error: HandshakeError | None = None
    met_at: float = float("-inf")
    heard_at: float = float("-inf")
    greeted_at: float = float("-inf")
    complained_at: float = float("-inf")
    needed_by: dict[str, str] = field(default_factory=dict, repr=False)
    _changes: float = _MOST_CHANGES
    _changed_at: float = float("-inf")

    @property
    def is_met(self) -> bool:
        """The process has introduced itself, and nothing since has put that in doubt."""
        return self.state is PeerState.MET

    def step(self, event: PeerEvent) -> bool:
        """Change the state as the table says; False, and nothing changes, if it has no transition for this."""
        target = PEER_TRANSITIONS.after(self.state, event)
        self.state = self.state if target is None else target
        return target is not None

    def greet(self, me: Identity, now: float) -> Hello:
        """Begin a handshake, or repeat it; returns the message to send."""
        self.step(PeerEvent.GREET)
        self.greeted_at = now
        return Hello(
            protocol=me.spoken.lowest,
            highest=me.spoken.highest,
            name=me.name,
            epoch=me.epoch,
            rank=self.rank,
            agent=me.agent,
            consumer_rank=me.spec.rank,
            consumer_world=me.spec.world,
        )

    def welcomed(self, me: Identity, message: Welcome, now: float) -> str | None:
        """Take the answer of the peer.

        Returns:
            the epoch of the process known here before, if this is another one: whatever was agreed with it is void.
        """
        before = self.epoch if self.epoch and self.epoch != message.epoch else None
        if (self.name, self.epoch) != (message.name, message.epoch):
            self.confirmed = False
        self.name, self.epoch, self.met_at = message.name, message.epoch, now
        self.spec, self.addressable, self.slot_nbytes = message.spec, message.addressable, message.slot_nbytes
        self.casts, self.addresses = frozenset(message.casts), tuple(message.addresses)
        self.writes, self.protocol = message.writes, message.protocol
        self.agent_info, self.agent_name = message.agent_info, ""
        self.error = self._check(me, message) or self._check_agent(message)
        if self.error is None:
            self.step(PeerEvent.WELCOME)
        else:
            self.reject(self.error)
            self.agent_info, self.agent_name = b"", ""
        return before

    def changes_too_often(self, message: Welcome, now: float, every_s: float) -> bool:
        """Whether the peer has introduced itself unasked with another agent or epoch too often lately."""
        if (message.agent_info, message.epoch) == (self.agent_info, self.epoch):
            return False
        self._changes = min(_MOST_CHANGES, self._changes + (now - self._changed_at) / every_s)
        self._changed_at = now
        if self.state is not PeerState.GREETED and self._changes < 1.0:
            return True
        self._changes = max(0.0, self._changes - 1.0)
        return False

    def complaint(self, now: float) -> int:
        """Level at which to log what the peer does wrong: a warning once a second, so that no peer can fill a disk."""
        if now < self.complained_at + 1.0:
            return logging.DEBUG
        self.complained_at = now
        return logging.WARNING

    def reject(self, error: HandshakeError, event: PeerEvent = PeerEvent.REJECT) -> bool:
        """Note why this peer cannot be used. The next lease that needs it begins a new handshake. False if nothing changes."""
        rejected = self.step(event)
        self.error = error if rejected else self.error
        return rejected

    def _check_agent(self, message: Welcome) -> HandshakeError | None:
        """Check that the agent which the peer brings has a name of its own: it could otherwise replace that of another engine."""
        try:
            self.agent_name = described_name(message.agent_info)
        except PeerInfoError as error:
            return HandshakeError("agent", f"{message.name!r} brings no transfer agent that could be met: {error}")
        if not self.agent_name.startswith(f"{message.name}/{message.rank}/{message.epoch}/"):
            return HandshakeError("agent", f"{message.name!r} brings {self.agent_name!r}, which is no agent of its own")
        return None

    def _check(self, me: Identity, message: Welcome) -> HandshakeError | None:
        name = message.name
        if not name.isprintable():
            return HandshakeError("identity", f"the name of the engine there is not printable: {name!r}")
        if message.protocol not in me.spoken:
            why = f"{name!r} answers by protocol {message.protocol}, this side speaks {me.spoken}"
            return HandshakeError("protocol", why)
        if message.agent != me.agent:
            return HandshakeError("agent", f"{name!r} moves bytes by {message.agent!r}, this side by {me.agent!r}")
        if (message.rank, message.spec.rank) != (self.rank, self.rank):
            return HandshakeError("rank", f"{name!r} is rank {message.rank}, not rank {self.rank}")
        return None
