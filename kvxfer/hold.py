# SPDX-License-Identifier: Apache-2.0
"""One lease as its consumer holds it: a claim at each rank of the producer, and what there is to read. Pure, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from kvxfer.actions import Source, StartRead
from kvxfer.blocks import BlockTable, ids_from_wire, tables
from kvxfer.errors import BlockError, HandshakeError, KvxferError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.blocks import Table
    from kvxfer.lease import LeaseRef
    from kvxfer.peer import Peer
    from kvxfer.route import Router
    from kvxfer.segment import Span
    from kvxfer.transfer import Transfer
    from kvxfer.wire import Grant, Stage

_SHORTEST_RENEWAL_S = 0.02


class HoldState(str, Enum):
    """See the diagram of `kvxfer.consumer`. ENDED is a hold that failed before anybody asked to read it."""

    WAITING = "waiting"
    GRANTED = "granted"
    READING = "reading"
    SETTLING = "settling"
    ENDED = "ended"


@dataclass(eq=False)
class Claim:
    """A lease at one rank of its producer.

    Attributes:
        grant: the blocks there, once they are readable.
        settled: nothing more is to be said to that rank.
        ask_at: when to say the next thing to it.
    """

    peer: Peer
    grant: Grant | None = None
    settled: bool = False
    ask_at: float = 0.0
    tables: Sequence[Table] | None = field(default=None, repr=False)

    def leased(self) -> Sequence[Table]:
        """The block tables that the rank granted, checked once.

        Raises:
            BlockError: they are not blocks of its cache.
        """
        if self.tables is None:
            grant, spec = self.grant, self.peer.spec
            if grant is None or spec is None:
                raise BlockError(f"{self.peer.address} has granted nothing")
            firsts = grant.first_tokens or [0] * len(grant.blocks)
            if len(firsts) != len(grant.blocks):
                raise BlockError(f"{len(grant.blocks)} lists of leased blocks have {len(firsts)} beginnings")
            given = [BlockTable(ids_from_wire(ids), first) for ids, first in zip(grant.blocks, firsts, strict=True)]
            self.tables = tables(spec, given, "leased")
        return self.tables

    def renew_at(self, now: float) -> float:
        """Three renewals in the time a lease has: two may be lost. Not more often, whatever a producer grants."""
        return now + max(self.grant.ttl_s / 3 if self.grant is not None else 0.0, _SHORTEST_RENEWAL_S)


@dataclass(eq=False)
class Asked:
    """A chunk that was asked for and is not there yet."""

    message: Stage
    since: float
    again_at: float


@dataclass(eq=False)
class Hold:
    """One lease held by this consumer.

    Attributes:
        claims: one for each rank of the producer, in rank order; only the first until that rank was met.
        routers: how the part of each rank travels, once all ranks were met.
        asked: chunks that the read waits for, by rank and number.
    """

    ref: LeaseRef
    since: float
    deadline: float
    claims: list[Claim]
    state: HoldState = HoldState.WAITING
    routers: Sequence[Router] | None = None
    transfer: Transfer | None = None
    error: KvxferError | None = None
    read: bool = False
    asked: dict[tuple[int, int], Asked] = field(default_factory=dict)

    @property
    def spread(self) -> bool:
        """Every rank of the producer is known."""
        return len(self.claims) == len(self.ref.addresses)

    @property
    def met(self) -> bool:
        """Every rank of the producer was met."""
        return self.spread and all(claim.peer.is_met for claim in self.claims)

    @property
    def granted(self) -> bool:
        """Every rank of the producer has granted it."""
        return self.spread and all(claim.grant is not None for claim in self.claims)

    def claim_at(self, peer: Peer) -> Claim | None:
        """The claim at one rank, if it is this lease's."""
        return next((claim for claim in self.claims if claim.peer is peer), None)

    def waits_for(self) -> list[tuple[Claim, float]]:
        """Of which ranks a read wants something, and since when: to be met, a grant, a chunk."""
        if self.transfer is None or self.state in (HoldState.SETTLING, HoldState.ENDED):
            return []
        if self.state is HoldState.READING:
            since: dict[int, float] = {}
            for (source, _), asked in self.asked.items():
                since.setdefault(source, asked.since)
            return [(self.claims[source], at) for source, at in since.items()]
        waiting = self.state is HoldState.WAITING
        started = self.transfer.started
        return [(c, started) for c in self.claims if not c.peer.is_met or (waiting and c.grant is None)]

    def mistake(self, claim: Claim) -> HandshakeError | None:
        """Why a peer that was met is not who the lease says that lives there."""
        peer, ref, number = claim.peer, self.ref, self.claims.index(claim)
        if peer.name != ref.owner:
            return HandshakeError("identity", f"{peer.address} is {peer.name!r}, the lease is {ref.owner!r}'s")
        if peer.rank != number:
            why = f"{peer.address} is rank {peer.rank} of {peer.name!r}, and rank {number} for the lease"
            return HandshakeError("rank", why)
        if peer.spec is not None and peer.spec.world != len(ref.addresses):
            why = f"{peer.name!r} has {peer.spec.world} ranks, the lease names {len(ref.addresses)}"
            return HandshakeError("rank", why)
        return None

    def job(self, transfer: Transfer) -> StartRead | None:
        """What the data thread needs to read it; None before it is granted.

        Raises:
            BlockError: the read does not fit the lease.
        """
        if self.routers is None or not self.granted:
            return None
        sources = []
        spans: dict[int, Span] = {}
        for number, (claim, router) in enumerate(zip(self.claims, self.routers, strict=True)):
            grant = claim.grant
            if grant is None or not router.part.overlaps:
                continue
            match = router.part.match_tables(claim.leased(), transfer.into, transfer.tokens)
            for group in router.part.target_groups:
                if match.tokens[group] != spans.setdefault(group, match.tokens[group]):
                    raise BlockError(f"the ranks of {claim.peer.name!r} have leased different tokens")
            sources.append(Source(number, claim.peer.agent_info, router, match, grant.cell))
        return StartRead(transfer, sources)
