# SPDX-License-Identifier: Apache-2.0
"""One rank of a producer as the consumer knows it: handshake, epoch, cache. Pure, no I/O."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from kvxfer.errors import HandshakeError
from kvxfer.wire import PROTOCOL, Hello, Welcome

if TYPE_CHECKING:
    from kvxfer.layout import CacheSpec


@dataclass
class Identity:
    """Who this endpoint is: the part of a handshake that both halves send.

    Attributes:
        epoch: random, per start; a message for another epoch was meant for a process that is gone.
        agent: name of the transfer adapter; ``agent_info`` its description, replaced when the agent is.
        addressable: the cache's memory can be read and written in place.
        slot_nbytes: largest chunk that this side can stage; 0 if none.
        casts: dtypes that its devices can turn into each other.
        addresses: of all ranks of its engine, in rank order; empty until they are known.
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


class PeerState(str, Enum):
    """UNKNOWN until greeted, GREETED until answered; MET, or REFUSED with ``Peer.error``."""

    UNKNOWN = "unknown"
    GREETED = "greeted"
    MET = "met"
    REFUSED = "refused"


@dataclass
class Peer:
    """The endpoint at one control address. Survives restarts of the process there, whose ``epoch`` then changes.

    Attributes:
        rank: that it is expected to be, by the lease that named it first or by its own word.
        name, epoch, agent_info: of the process met last; empty before.
        spec: of its cache; None before.
        addressable, slot_nbytes, casts, addresses: see `Identity`.
        error: why it cannot be used; None unless REFUSED.
        needed_by: tokens of the leases for which it is known, in the order in which they came.
        met_at, heard_at: on the caller's clock; when it introduced itself, and when it last said anything.
    """

    address: str
    rank: int = 0
    state: PeerState = PeerState.UNKNOWN
    name: str = ""
    epoch: str = ""
    agent_info: bytes = b""
    spec: CacheSpec | None = None
    addressable: bool = True
    slot_nbytes: int = 0
    casts: frozenset[str] = frozenset()
    addresses: tuple[str, ...] = ()
    error: HandshakeError | None = None
    met_at: float = float("-inf")
    heard_at: float = float("-inf")
    greeted_at: float = float("-inf")
    complained_at: float = float("-inf")
    needed_by: dict[str, None] = field(default_factory=dict)

    @property
    def is_met(self) -> bool:
        """It introduced itself, and nothing since has put that in doubt."""
        return self.state is PeerState.MET

    def greet(self, me: Identity, now: float) -> Hello:
        """Begin a handshake, or repeat it; the message to send."""
        self.state, self.greeted_at = PeerState.GREETED, now
        return Hello(
            protocol=PROTOCOL,
            name=me.name,
            epoch=me.epoch,
            rank=self.rank,
            agent=me.agent,
            reader=me.spec.rank,
            readers=me.spec.world,
        )

    def welcomed(self, me: Identity, message: Welcome, now: float) -> str | None:
        """The peer answered.

        Returns:
            the epoch of the process known here before, if this is another one: whatever was agreed with it is void.
        """
        before = self.epoch if self.epoch and self.epoch != message.epoch else None
        self.name, self.epoch, self.agent_info, self.met_at = message.name, message.epoch, message.agent_info, now
        self.spec, self.addressable, self.slot_nbytes = message.spec, message.addressable, message.slot_nbytes
        self.casts, self.addresses = frozenset(message.casts), tuple(message.addresses)
        self.error = self._check(me, message)
        self.state = PeerState.MET if self.error is None else PeerState.REFUSED
        return before

    def complaint(self, now: float) -> int:
        """Level at which to log what it does wrong: a warning once a second, so that nobody can fill a disk."""
        if now < self.complained_at + 1.0:
            return logging.DEBUG
        self.complained_at = now
        return logging.WARNING

    def refused(self, error: HandshakeError) -> None:
        """The peer will not be met; the next thing asked of it begins a new handshake."""
        self.state, self.error = PeerState.REFUSED, error

    def _check(self, me: Identity, message: Welcome) -> HandshakeError | None:
        name = message.name
        if message.protocol != PROTOCOL:
            return HandshakeError("protocol", f"{name!r} speaks protocol {message.protocol}, this side {PROTOCOL}")
        if message.agent != me.agent:
            return HandshakeError("agent", f"{name!r} moves bytes by {message.agent!r}, this side by {me.agent!r}")
        if (message.rank, message.spec.rank) != (self.rank, self.rank):
            return HandshakeError("rank", f"{name!r} is rank {message.rank}, wanted is rank {self.rank}")
        return None
