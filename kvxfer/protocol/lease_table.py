# SPDX-License-Identifier: Apache-2.0
"""The leases of a producer: who may read which blocks, until when. Pure: no I/O, no clock of its own.

::

    WANTED --announce--> ANNOUNCED --offer--> OPEN --open--> ACTIVE --settle--> SETTLED
       |                  |  (seal)            |               |
       +------------------+-- withdraw --------+-- revoke -----+--------------> REVOKED
       +-- rendezvous_timeout_s -------+-- announce_s ------+-- lease_s ----+--------------> EXPIRED

A lease is announced when its token is handed out (before prefill has finished), offered when its blocks are complete
(from then its time runs), and active once a consumer has opened it. While prefill runs, blocks may be sealed: they are
complete and can be read already, and more follow. Where both sides can tell the token by themselves, the consumer may
come before the producer has announced it: then it is wanted. A lease ends exactly once, and its cell on the lease
board is wiped before anyone is told, so that no reader can mistake the blocks' next content for its own.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvxfer.errors import LeaseEndedError, LeaseError, LeaseUnknownError, shown
from kvxfer.protocol.ended import EndedLeases
from kvxfer.protocol.lease_board import CELL_NBYTES
from kvxfer.protocol.timers import Timers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.config import Settings
    from kvxfer.protocol.lease_board import LeaseBoard


class ContradictionError(LeaseError):
    """What is sealed or offered does not begin with what was sealed before, and may have been read since."""


class LeaseState(str, Enum):
    """Where a lease is; the last three are ends."""

    WANTED = "wanted"
    ANNOUNCED = "announced"
    OPEN = "open"
    ACTIVE = "active"
    SETTLED = "settled"
    EXPIRED = "expired"
    REVOKED = "revoked"


class Holder(NamedTuple):
    """One process of a consumer: its engine's name, its own epoch, and which of how many ranks it is."""

    name: str
    epoch: str
    rank: int = 0
    world: int = 1


@dataclass(eq=False)
class Lease:
    """One lease of the producer. Only `LeaseTable` changes it.

    A lease belongs to one consumer, whose ranks each read what they need of it: it is settled when all of them have
    settled.

    Attributes:
        blocks: per cache group the ids as little-endian uint32; before the offer, of what was sealed.
        first_tokens: per cache group the token with which the first block begins.
        cell: address of its cell on the lease board, while it has one; ``check`` what stands there, and nowhere else ever.
        announced: the engine made it known; else only consumers have named its token.
        last_at: when it ends, however often it is renewed.
        holders: by rank, the processes of the consumer that have asked for it.
        settled: ranks that are done with it.
        read: some rank read it.
        spared: it was given time because this process had stood still, and nobody has asked for it since.
    """

    token: str = field(repr=False)
    request: str
    deadline: float
    state: LeaseState = LeaseState.ANNOUNCED
    blocks: list[bytes] = field(default_factory=list)
    first_tokens: list[int] = field(default_factory=list)
    cell: int | None = None
    check: bytes = field(default=b"", repr=False)
    announced: bool = False
    offered: bool = False
    last_at: float = float("inf")
    holders: dict[int, Holder] = field(default_factory=dict)
    settled: set[int] = field(default_factory=set)
    read: bool = False
    spared: bool = False

    @property
    def complete(self) -> bool:
        """All of its blocks are readable."""
        return self.state in (LeaseState.OPEN, LeaseState.ACTIVE)

    @property
    def readable(self) -> bool:
        """Some of its blocks are."""
        return self.complete or bool(self.blocks)

    def waiting(self) -> list[Holder]:
        """Those that have not settled it."""
        return [holder for rank, holder in self.holders.items() if rank not in self.settled]

    def admits(self, holder: Holder) -> bool:
        """It is free, or this process's, or that of another rank of the consumer that has it."""
        for known in self.holders.values():
            return (known.name, known.world) == (holder.name, holder.world) and self.holders.get(
                holder.rank, holder
            ) == holder
        return True


class LeaseTable:
    """All leases of one producer.

    Times are ``now`` of the caller's monotonic clock. Leases that end are returned by the call that ends them, and
    remembered for a while so that repeats are answered alike.
    """

    def __init__(self, settings: Settings, board: LeaseBoard) -> None:
        self._settings = settings
        self._board = board
        self._live: dict[str, Lease] = {}
        self._ended: EndedLeases[Lease] = EndedLeases(settings.remembered_leases)
        self._timers = Timers()
        self._wanted: OrderedDict[str, None] = OrderedDict()
        """Tokens of leases in that state, the one that was asked for last at the end."""

    def __len__(self) -> int:
        return len(self._live)

    @property
    def cells(self) -> int:
        """Cells of the lease board in use."""
        return self._board.cells_in_use

    @property
    def timers(self) -> int:
        """Deadlines that are kept."""
        return len(self._timers)

    def announce(self, token: str, request: str, now: float) -> None:
        """Make a token known before its blocks are. Known already: nothing changes."""
        lease = self._live.get(token)
        if lease is not None and lease.state is LeaseState.WANTED:
            del self._wanted[token]
            lease.state, lease.request, lease.deadline = LeaseState.ANNOUNCED, request, now + self._settings.announce_s
            lease.announced = True
            self._timers.set(token, lease.deadline)
        elif lease is None and token not in self._ended:
            self._add(Lease(token, request, now + self._settings.announce_s, announced=True))

    def want(self, token: str, now: float) -> None:
        """A consumer came first: keep a place for it until the token is announced.

        There are ``max_leases`` places. When all are taken, the one that was asked for longest ago goes: a consumer that still
        waits for its own asks again each ``retry_s``, and has a place again.
        """
        if token in self._wanted:
            self._wanted.move_to_end(token)
        if token in self._live or token in self._ended:
            return
        while len(self._wanted) >= self._settings.max_leases:
            oldest, _ = self._wanted.popitem(last=False)
            del self._live[oldest]
            self._timers.cancel(oldest)
        self._wanted[token] = None
        self._add(Lease(token, "", now + self._settings.rendezvous_timeout_s, LeaseState.WANTED))

    def publish_part(self, token: str, blocks: Sequence[bytes], first_tokens: Sequence[int] = ()) -> Lease:
        """These blocks of an announced lease are complete and will not change; more follow, and `publish` has all.

        Args:
            blocks, first_tokens: see `Lease`; those sealed before among them.

        Raises:
            LeaseUnknownError: never announced.
            LeaseEndedError: it ended before.
            ContradictionError: these do not begin with those that were sealed before. Nothing changes; the lease has to be revoked.
            LeaseError: no cell is free; or it was offered before. Nothing changes.
        """
        lease = self._find(token)
        if lease.state is LeaseState.WANTED:
            raise LeaseUnknownError(f"no lease {shown(token)} was announced here")
        if lease.offered:
            raise LeaseError(f"the blocks of lease {shown(token)} were offered before")
        self._make_readable(lease, blocks, first_tokens)
        return lease

    def publish(self, token: str, blocks: Sequence[bytes], now: float, first_tokens: Sequence[int] = ()) -> Lease:
        """The blocks are complete and will not change: the lease's time runs from now.

        Args:
            blocks, first_tokens: see `Lease`.

        Raises:
            LeaseUnknownError: never announced.
            LeaseEndedError: it ended before; the caller may reuse the blocks.
            ContradictionError: as of `publish`.
            LeaseError: no cell is free, and the lease is ended; or it was offered before (`offered`), and stands.
        """
        lease = self._live.get(token) or self._ended.get(token)
        if lease is None or lease.state is LeaseState.WANTED:
            if lease is None:
                self._ended.add(Lease(token, "", now, LeaseState.REVOKED, offered=True))
            else:
                lease.offered = True
                self._end(lease, LeaseState.REVOKED)
            raise LeaseUnknownError(f"no lease {shown(token)} was announced here")
        before, lease.offered = lease.offered, True
        self._find(token)
        if before:
            raise LeaseError(f"the blocks of lease {shown(token)} were offered before")
        try:
            self._make_readable(lease, blocks, first_tokens)
        except ContradictionError:
            raise
        except LeaseError:
            self._end(lease, LeaseState.REVOKED)
            raise
        lease.state = LeaseState.OPEN
        lease.last_at = now + self._settings.max_lease_s
        lease.deadline, lease.spared = min(now + self._settings.lease_s, lease.last_at), False
        self._timers.set(token, lease.deadline)
        return lease

    def offered(self, token: str) -> bool:
        """`publish` was called for it: its end has been told or will be."""
        lease = self._live.get(token) or self._ended.get(token)
        return lease is not None and lease.offered

    def open(self, token: str, holder: Holder, now: float) -> Lease:
        """A consumer asks for the blocks. Idempotent for the same one; the answer is the lease's state.

        Raises:
            LeaseUnknownError, LeaseEndedError: there is nothing to open, or this rank has settled it.
            LeaseError: another consumer has it.
        """
        lease = self._find(token)
        if not lease.admits(holder):
            raise LeaseError(f"lease {shown(token)} was opened by another consumer")
        if holder.rank in lease.settled:
            raise LeaseEndedError(f"rank {holder.rank} has settled lease {shown(token)}")
        lease.holders[holder.rank] = holder
        if lease.state is LeaseState.OPEN:
            lease.state = LeaseState.ACTIVE
        if lease.state is LeaseState.ACTIVE:
            self._extend(lease, now)
        return lease

    def get(self, token: str) -> Lease | None:
        """The lease, if it lives."""
        return self._live.get(token)

    def held(self, token: str, holder: Holder) -> Lease | None:
        """The lease, if this process may read its blocks now."""
        lease = self._live.get(token)
        stands = lease is not None and lease.readable and holder in lease.waiting()
        return lease if stands else None

    def why_not_held(self, token: str, holder: Holder) -> LeaseError:
        """Why this process may not read the blocks of a lease now."""
        try:
            lease = self._find(token)
        except LeaseError as error:
            return error
        if lease.holders.get(holder.rank) == holder and holder.rank in lease.settled:
            return LeaseEndedError(f"rank {holder.rank} has settled lease {shown(token)}")
        return LeaseUnknownError(f"no lease {shown(token)} is held by rank {holder.rank} of {holder.name!r}")

    def renew(self, tokens: Sequence[str], holder: Holder, now: float) -> list[str]:
        """Extend what this holder still waits for; returns the tokens of leases that do not stand."""
        ended = []
        for token in tokens:
            lease = self._live.get(token)
            if lease is None or holder not in lease.waiting():
                ended.append(token)
            elif lease.state is LeaseState.ACTIVE:
                self._extend(lease, now)
        return ended

    def settle(self, token: str, holder: Holder, *, read: bool) -> tuple[bool, Lease | None]:
        """A rank of the consumer is done with the blocks; when all are, the lease has ended.

        Returns:
            whether the lease stood until now, and the lease if this call ended it.
        """
        lease = self._live.get(token)
        if lease is None:
            before = self._ended.get(token)
            if before is None:
                # A consumer that came first and has left before it was known here: nobody will come for these blocks.
                self._ended.add_named(Lease(token, "", 0.0, LeaseState.SETTLED), holder.name)
            # A rank that had settled hears the same again, also if others let it expire.
            stood = before is not None and holder.rank in before.settled and before.holders[holder.rank] == holder
            return stood, None
        if not lease.admits(holder):
            return False, None
        lease.holders[holder.rank] = holder
        lease.settled.add(holder.rank)
        lease.read = lease.read or read
        if len(lease.settled) < holder.world:
            return True, None
        self._end(lease, LeaseState.SETTLED)
        return True, lease

    def revoke(self, token: str) -> Lease | None:
        """End a lease early, e.g. because its request was aborted. None if it had ended or was never known."""
        lease = self._live.get(token)
        if lease is not None:
            self._end(lease, LeaseState.REVOKED)
        return lease

    def give_up(self, token: str) -> Lease | None:
        """End a lease whose blocks did not become complete after its engine had offered them. None if it had ended before."""
        lease = self._live.get(token)
        if lease is not None:
            lease.offered = True
            self._end(lease, LeaseState.EXPIRED)
        return lease

    def expire(self, now: float) -> list[Lease]:
        """End every lease whose time has passed; those that were renewed for as long as a lease may last are REVOKED."""
        expired = []
        for token in self._timers.due(now):
            lease = self._live[token]
            if lease.deadline <= now:
                self._end(lease, LeaseState.REVOKED if lease.last_at <= now else LeaseState.EXPIRED)
                expired.append(lease)
            else:
                self._timers.set(token, lease.deadline)  # it was renewed since
        return expired

    def spare(self, until: float) -> None:
        """This process stood still: what consumers said meanwhile is still to be read, so that no lease ends before ``until``.

        Once for each lease until somebody asks for it again: a machine that is late all the time keeps no lease for ever.
        """
        for lease in self._live.values():
            if not lease.spared and lease.deadline < until:
                lease.spared = True
                lease.deadline = until

    def settled(self, token: str) -> Lease | None:
        """The lease, if it is remembered as one that its consumer has settled."""
        lease = self._ended.get(token)
        return lease if lease is not None and lease.state is LeaseState.SETTLED else None

    def request(self, token: str) -> str:
        """The request a live or remembered lease is for; empty if unknown."""
        lease = self._live.get(token) or self._ended.get(token)
        return lease.request if lease is not None else ""

    def next_deadline(self) -> float | None:
        """When `expire` has something to look at next; may be early, never late."""
        return self._timers.next_at()

    def close(self) -> list[Lease]:
        """End everything that lives."""
        live = list(self._live.values())
        for lease in live:
            self._end(lease, LeaseState.REVOKED)
        return live

    def _add(self, lease: Lease) -> None:
        self._live[lease.token] = lease
        self._timers.set(lease.token, lease.deadline)

    def _make_readable(self, lease: Lease, blocks: Sequence[bytes], first_tokens: Sequence[int]) -> None:
        """Its cell is on the board from the first blocks on. Raises ContradictionError; LeaseError: no cell is free."""
        _check_continued(lease, blocks, first_tokens)
        if lease.cell is None:
            check = secrets.token_bytes(CELL_NBYTES)
            lease.cell, lease.check = self._board.post(check), check
        lease.blocks, lease.first_tokens = list(blocks), list(first_tokens)

    def _find(self, token: str) -> Lease:
        lease = self._live.get(token)
        if lease is not None:
            return lease
        before = self._ended.get(token)
        if before is not None:
            raise LeaseEndedError(f"lease {shown(token)} has ended ({before.state.value})")
        raise LeaseUnknownError(f"no lease {shown(token)} here")

    def _extend(self, lease: Lease, now: float) -> None:
        # The timer stays where it is; expire() sets it again when it comes up too early.
        lease.deadline = max(lease.deadline, min(now + self._settings.lease_s, lease.last_at))
        lease.spared = False

    def _end(self, lease: Lease, state: LeaseState) -> None:
        if lease.cell is not None:
            self._board.wipe(lease.cell)
            lease.cell = None
        self._wanted.pop(lease.token, None)
        lease.state, lease.blocks = state, []
        del self._live[lease.token]
        self._timers.cancel(lease.token)
        if lease.announced or lease.offered:
            self._ended.add(lease)
        else:
            self._ended.add_named(lease, next((holder.name for holder in lease.holders.values()), ""))


def _check_continued(lease: Lease, blocks: Sequence[bytes], first_tokens: Sequence[int]) -> None:
    """Each table begins with what was sealed of it before. Raises ContradictionError."""
    for group, (before, after) in enumerate(zip(lease.blocks, blocks, strict=False)):
        if not before:
            continue
        what = f"lease {shown(lease.token)} of {lease.request!r}, group {group}"
        first_before, first_after = (firsts[group] if firsts else 0 for firsts in (lease.first_tokens, first_tokens))
        if first_before != first_after:
            raise ContradictionError(
                f"{what}: it began with token {first_before} when it was sealed, and now {first_after}"
            )
        if not after.startswith(before):
            old, new = np.frombuffer(before, "<u4"), np.frombuffer(after, "<u4")[: len(before) // 4]
            if len(new) < len(old):
                raise ContradictionError(f"{what}: {len(old)} blocks were sealed, and now there are {len(new)}")
            at = int(np.flatnonzero(old != new)[0])
            raise ContradictionError(f"{what}: entry {at} was block {old[at]} when it was sealed, and now {new[at]}")
