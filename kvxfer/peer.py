# SPDX-License-Identifier: Apache-2.0
"""A producer as the consumer knows it: handshake, epoch, and the plan between its cache and ours. Pure, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvxfer.errors import HandshakeError, IncompatibleError, KvxferError, LayoutError
from kvxfer.plan import TransferPlan, plan
from kvxfer.wire import PROTOCOL, Hello, Welcome

if TYPE_CHECKING:
    from kvxfer.layout import CacheSpec


@dataclass
class Identity:
    """Who this endpoint is: the part of a handshake that both halves send.

    Attributes:
        epoch: random, per start; a message for another epoch was meant for a process that is gone.
        agent: name of the transfer adapter; ``agent_info`` its description, replaced when the agent is.
    """

    name: str
    epoch: str
    agent: str
    agent_info: bytes
    spec: CacheSpec


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
        name, epoch, agent_info: of the process met last; empty before.
        plan: from its cache to ours; None unless MET.
        error: why it cannot be used; None unless REFUSED.
        met_at, heard_at: on the caller's clock; when it introduced itself, and when it last said anything.
    """

    address: str
    state: PeerState = PeerState.UNKNOWN
    name: str = ""
    epoch: str = ""
    agent_info: bytes = b""
    plan: TransferPlan | None = None
    error: KvxferError | None = None
    met_at: float = float("-inf")
    heard_at: float = float("-inf")
    greeted_at: float = float("-inf")

    @property
    def is_met(self) -> bool:
        """It introduced itself, and nothing since has put that in doubt."""
        return self.state is PeerState.MET

    def greet(self, me: Identity, now: float) -> Hello:
        """Begin a handshake, or repeat it; the message to send."""
        self.state, self.greeted_at = PeerState.GREETED, now
        return Hello(protocol=PROTOCOL, name=me.name, epoch=me.epoch, rank=me.spec.rank, agent=me.agent)

    def welcomed(self, me: Identity, message: Welcome, now: float) -> str | None:
        """The peer answered.

        Returns:
            the epoch of the process known here before, if this is another one: whatever was agreed with it is void.
        """
        before = self.epoch if self.epoch and self.epoch != message.epoch else None
        changed = message.epoch != self.epoch or message.agent_info != self.agent_info
        self.name, self.epoch, self.agent_info, self.met_at = message.name, message.epoch, message.agent_info, now
        if changed or self.plan is None:
            self.plan, self.error = None, None
            try:
                _check(me, message)
                self.plan = plan(message.spec, me.spec)
            except (IncompatibleError, HandshakeError, LayoutError) as error:
                self.error = error
        self.state = PeerState.MET if self.error is None else PeerState.REFUSED
        return before

    def refused(self, error: KvxferError) -> None:
        """The peer will not be met; the next thing asked of it begins a new handshake."""
        self.state, self.error, self.plan = PeerState.REFUSED, error, None


def _check(me: Identity, message: Welcome) -> None:
    if message.protocol != PROTOCOL:
        raise HandshakeError("protocol", f"{message.name!r} speaks protocol {message.protocol}, this side {PROTOCOL}")
    if message.agent != me.agent:
        raise HandshakeError("agent", f"{message.name!r} moves bytes by {message.agent!r}, this side by {me.agent!r}")
    if message.rank != me.spec.rank:
        raise HandshakeError("rank", f"{message.name!r} is rank {message.rank}, wanted is rank {me.spec.rank}")
