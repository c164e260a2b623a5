# SPDX-License-Identifier: Apache-2.0
"""One lease at its consumer: the states, what leads from one to the next, and the share at each rank of its producer. Pure, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from kvxfer.errors import BlockError, HandshakeError, KvxferError
from kvxfer.layout.block_table import BlockTable, check_tables, ids_from_wire
from kvxfer.protocol.actions import Source, StartRead
from kvxfer.protocol.grants import Assembly
from kvxfer.protocol.transitions import Transition, TransitionTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.layout.block_table import CheckedTable
    from kvxfer.protocol.lease_ref import LeaseRef
    from kvxfer.protocol.messages import Grant, StageChunk, StopWrite, Write
    from kvxfer.protocol.peer import Peer
    from kvxfer.protocol.transfer import Transfer

_SHORTEST_RENEWAL_S = 0.02


class HeldLeaseState(str, Enum):
    """State of a lease at its consumer."""

    ABSENT = "absent"
    """The consumer does not hold the lease."""
    WAITING = "waiting"
    """Some rank of the producer has not granted all of its blocks."""
    GRANTED = "granted"
    """All ranks have granted all of their blocks, and no read has begun."""
    READING = "reading"
    """The data thread reads the blocks."""
    RELEASING = "releasing"
    """The blocks are not needed any more, and some rank has not answered to that yet."""
    FAILED = "failed"
    """The lease failed before the engine asked to read it, and a read fails at once."""


class HeldLeaseEvent(str, Enum):
    """Event of a lease at its consumer."""

    ACQUIRE = "acquire"
    GRANT_ALL = "grant all"
    BEGIN_READ = "begin read"
    CLAIM_READ = "claim read"
    END_READ = "end read"
    RELEASE = "release"
    FAIL_UNREAD = "fail unread"
    FAIL_READ = "fail with a read"
    TIME_OUT = "time out"
    ALL_RELEASED = "all released"
    DISCARD = "discard"


_S, _E = HeldLeaseState, HeldLeaseEvent
_UNREAD = (_S.WAITING, _S.GRANTED)
_OVER = (_S.RELEASING, _S.FAILED)

HELD_LEASE_TRANSITIONS: TransitionTable[HeldLeaseState, HeldLeaseEvent] = TransitionTable(
    _S.ABSENT,
    (),
    Transition((_S.ABSENT,), _E.ACQUIRE, _S.WAITING, "acquire, read, or release / Acquire"),
    Transition((_S.WAITING,), _E.GRANT_ALL, _S.GRANTED, "complete Grants of all ranks"),
    Transition(_UNREAD, _E.BEGIN_READ, _S.READING, "read, and some Grant of each rank"),
    Transition((_S.GRANTED, _S.FAILED), _E.CLAIM_READ, _S.READING, "read, claimed by the engine's thread"),
    Transition((_S.READING,), _E.END_READ, _S.RELEASING, "the read has ended / Done or Failed, Release"),
    Transition((*_UNREAD, _S.FAILED), _E.RELEASE, _S.RELEASING, "release / Release"),
    Transition(_UNREAD, _E.FAIL_UNREAD, _S.FAILED, "refusal, Revoked, restart, incompatible cache, without a read"),
    Transition((*_UNREAD, _S.FAILED), _E.FAIL_READ, _S.RELEASING, "the same with a read, silence, deadline / Failed"),
    Transition(_UNREAD, _E.TIME_OUT, _S.RELEASING, "unread_lease_s / Release"),
    Transition((_S.RELEASING,), _E.TIME_OUT, _S.ABSENT, "lease_s"),
    Transition((_S.FAILED,), _E.TIME_OUT, _S.ABSENT, "unread_lease_s"),
    Transition((_S.RELEASING,), _E.ALL_RELEASED, _S.ABSENT, "Released by all ranks"),
    Transition((*_UNREAD, _S.READING, *_OVER), _E.DISCARD, _S.ABSENT, "close, fault of kvxfer"),
)


@dataclass(eq=False)
class RankLease:
    """A lease at one rank of its producer.

    Attributes:
        grant: blocks of the rank that are readable, once some are.
        released: nothing more is to be said to the rank.
        ask_at: when to send the next message to the rank; ``turn_at`` its turn among all messages to that peer, if it waits for it.
        batches: block ids of a grant of which more are to come.
    """

    peer: Peer
    grant: Grant | None = None
    released: bool = False
    ask_at: float = 0.0
    turn_at: float | None = None
    tables: Sequence[CheckedTable] | None = field(default=None, repr=False)
    batches: Assembly = field(default_factory=lambda: Assembly(1 << 22), repr=False)
    wants_more: bool = False

    @property
    def complete(self) -> bool:
        """All blocks of the rank are granted."""
        return self.grant is not None and self.grant.complete

    def granted(self, grant: Grant, now: float) -> bool:
        """Take a grant of the rank; False if it has nothing new, or more is to be asked for (`wants_more`).

        Raises:
            BlockError: see `Assembly.add`.
        """
        known = self.grant
        if known is not None and known.complete and known.check == grant.check:
            return False
        self.wants_more = False
        if grant.more or grant.skip or grant.runs:
            before = sum(self.batches.have)
            whole = self.batches.add(grant)
            if whole is None:
                # A rank that grants nothing new is not asked as fast as it answers.
                self.wants_more, grew = True, sum(self.batches.have) > before
                self.ask_at = now if grew else min(self.ask_at, now + _SHORTEST_RENEWAL_S)
                return False
            grant = whole
        if known is not None and known.check == grant.check:
            more = sum(map(len, grant.blocks)) > sum(map(len, known.blocks))
            if not (grant.complete or more):
                return False
        self.grant, self.tables = grant, None
        return True

    def leased(self) -> Sequence[CheckedTable]:
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
            self.tables = check_tables(spec, given, "leased")
        return self.tables

    def renew_at(self, now: float) -> float:
        """Time of the next renewal: three in the time that a lease has, of which two may be lost; at most one each 20 ms."""
        return now + max(self.grant.ttl_s / 3 if self.grant is not None else 0.0, _SHORTEST_RENEWAL_S)


@dataclass(eq=False)
class Asked:
    """A chunk or a write that a read asked for, or the end of a write, and that is not there yet.

    Attributes:
        again_at: when to ask again.
        sent_at: when the message itself was sent last.
    """

    message: StageChunk | Write | StopWrite
    since: float
    again_at: float
    sent_at: float


AskedKey = tuple[int, str, int]
"""Rank, name of the message, number."""


@dataclass(eq=False)
class HeldLease:
    """One lease held by this consumer. `HeldLeases` changes it.

    Attributes:
        rank_leases: one for each rank of the producer, in rank order; only the first until that rank was met.
        routes: how the part of each rank travels, once all ranks were met.
        asked: what the read waits for, by rank, kind of the message, and number.
    """

    ref: LeaseRef
    since: float
    deadline: float
    rank_leases: list[RankLease]
    state: HeldLeaseState = HeldLeaseState.ABSENT
    routes: Sequence[Any] | None = None
    transfer: Transfer | None = None
    error: KvxferError | None = None
    read: bool = False
    asked: dict[AskedKey, Asked] = field(default_factory=dict)

    def step(self, event: HeldLeaseEvent) -> bool:
        """Change the state as the table says; False, and nothing changes, if it has no transition for this."""
        target = HELD_LEASE_TRANSITIONS.after(self.state, event)
        self.state = self.state if target is None else target
        return target is not None

    @property
    def is_unread(self) -> bool:
        """The lease lives, and no read of it has begun."""
        return self.state in _UNREAD

    @property
    def is_over(self) -> bool:
        """The blocks are not needed any more, or cannot be read."""
        return self.state in _OVER

    @property
    def addresses(self) -> Sequence[str]:
        """Control addresses of all ranks of the producer, as far as they are known."""
        told = self.ref.addresses
        if len(told) == 1 and self.rank_leases:
            return self.rank_leases[0].peer.addresses or told
        return told

    @property
    def spread(self) -> bool:
        """Every rank of the producer is known."""
        return len(self.rank_leases) == len(self.addresses)

    @property
    def met(self) -> bool:
        """Every rank of the producer was met."""
        return self.spread and all(rank_lease.peer.is_met for rank_lease in self.rank_leases)

    @property
    def granted(self) -> bool:
        """Every rank of the producer has granted all of its blocks."""
        return self.spread and all(rank_lease.complete for rank_lease in self.rank_leases)

    @property
    def readable(self) -> bool:
        """Every rank of the producer has granted some of its blocks."""
        return self.spread and all(rank_lease.grant is not None for rank_lease in self.rank_leases)

    @property
    def may_begin(self) -> bool:
        """A read of the lease could begin."""
        return self.is_unread and self.readable and self.met and self.routes is not None

    @property
    def waits(self) -> bool:
        """A read of the lease is under way, and waits for a grant or a chunk."""
        return self.state is HeldLeaseState.READING and (bool(self.asked) or not self.granted)

    def asks_writes(self, number: int) -> bool:
        """Whether the read waits for something that one rank writes."""
        return any(source == number and kind != "StageChunk" for source, kind, _ in self.asked)

    def at_rank_of(self, peer: Peer) -> RankLease | None:
        """The share of the lease at one peer, if it has one there."""
        return next((rank_lease for rank_lease in self.rank_leases if rank_lease.peer is peer), None)

    def waits_for(self) -> list[tuple[RankLease, float]]:
        """Ranks for which the read waits (to be met, for a grant, for a chunk), with the time at which it began to wait."""
        if self.transfer is None or self.is_over:
            return []
        if self.state is HeldLeaseState.READING:
            since = {
                i: self.transfer.started for i, rank_lease in enumerate(self.rank_leases) if not rank_lease.complete
            }
            for (source, _, _), asked in self.asked.items():
                since.setdefault(source, asked.since)
            return [(self.rank_leases[source], at) for source, at in since.items()]
        waiting = self.state is HeldLeaseState.WAITING
        started = self.transfer.started
        return [(c, started) for c in self.rank_leases if not c.peer.is_met or (waiting and not c.complete)]

    def mistake(self, rank_lease: RankLease) -> HandshakeError | None:
        """Reason why a peer that was met is not the rank of the engine that the lease names; None if it is."""
        peer, ref, number = rank_lease.peer, self.ref, self.rank_leases.index(rank_lease)
        if peer.name != ref.producer:
            return HandshakeError("identity", f"{peer.address} is {peer.name!r}, the lease is {ref.producer!r}'s")
        if peer.rank != number:
            why = f"{peer.address} is rank {peer.rank} of {peer.name!r}, and rank {number} for the lease"
            return HandshakeError("rank", why)
        if peer.spec is not None and peer.spec.world != len(self.addresses):
            why = f"{peer.name!r} has {peer.spec.world} ranks, the lease names {len(self.addresses)}"
            return HandshakeError("rank", why)
        return None

    def job(self, transfer: Transfer) -> StartRead | None:
        """Job for the data thread to read the lease; None before every rank has granted something.

        Raises:
            BlockError: what a rank has granted are no blocks of its cache.
        """
        if not self.readable:
            return None
        sources = [self.source(number) for number in range(len(self.rank_leases))]
        return StartRead(transfer, [source for source in sources if source is not None])

    def source(self, number: int) -> Source | None:
        """Blocks that one rank has granted, as a read needs them; None if this side needs nothing of it. Raises BlockError as `job`."""
        rank_lease = self.rank_leases[number]
        grant, route = rank_lease.grant, self.routes[number] if self.routes is not None else None
        if grant is None or route is None:
            return None
        peer, tables = rank_lease.peer, rank_lease.leased()
        return Source(
            number, peer.agent_info, route, tables, grant.cell, grant.check, grant.complete, peer.epoch, peer.writes
        )
