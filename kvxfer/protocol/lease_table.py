# SPDX-License-Identifier: Apache-2.0
"""The leases of a producer: who may read which blocks, until when. Pure: no I/O, no clock of its own.

::

    WANTED --announce--> ANNOUNCED --offer--> OPEN --open--> ACTIVE --release--> SETTLED
       |                  |  (seal)            |               |
       +------------------+-- withdraw --------+-- revoke -----+--------------> REVOKED
       +-- rendezvous_timeout_s -------+-- announce_timeout_s ------+-- lease_s ----+--------------> EXPIRED

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
    """What is sealed or end_awaited does not begin with what was sealed before, and may have been read since."""


class LeaseState(str, Enum):
    """Where a lease is; the last three are ends."""

    EXPECTED = "expected"
    ANNOUNCED = "announced"
    READY = "ready"
    IN_USE = "in use"
    RELEASED = "released"
    EXPIRED = "expired"
    REVOKED = "revoked"


class ConsumerRank(NamedTuple):
    """One process of a consumer: its engine's name, its own epoch, and which of how many ranks it is."""

    name: str
    epoch: str
    rank: int = 0
    world: int = 1


@dataclass(eq=False)
class Lease:
    """One lease of the producer. Only `LeaseTable` changes it.

    A lease belongs to one consumer, whose ranks each read what they need of it: it is released when all of them have
    released.

    Attributes:
        blocks: per cache group the ids as little-endian uint32; before the offer, of what was sealed.
        first_tokens: per cache group the token with which the first block begins.
        cell: address of its cell on the lease board, while it has one; ``check`` what stands there, and nowhere else ever.
        announced: the engine made it known; else only consumers have named its token.
        last_at: when it ends, however often it is renewed.
        consumers: by rank, the processes of the consumer that have asked for it.
        released: ranks that are done with it.
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
    end_awaited: bool = False
    last_at: float = float("inf")
    consumers: dict[int, ConsumerRank] = field(default_factory=dict)
    released: set[int] = field(default_factory=set)
    read: bool = False
    spared: bool = False

    @property
    def complete(self) -> bool:
        """All of its blocks are readable."""
        return self.state in (LeaseState.READY, LeaseState.IN_USE)

    @property
    def readable(self) -> bool:
        """Some of its blocks are."""
        return self.complete or bool(self.blocks)

    def waiting(self) -> list[ConsumerRank]:
        """Those that have not released it."""
        return [consumer for rank, consumer in self.consumers.items() if rank not in self.released]

    def admits(self, consumer: ConsumerRank) -> bool:
        """It is free, or this process's, or that of another rank of the consumer that has it."""
        for known in self.consumers.values():
            return (known.name, known.world) == (consumer.name, consumer.world) and self.consumers.get(
                consumer.rank, consumer
            ) == consumer
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
        self._expected: OrderedDict[str, None] = OrderedDict()
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
        if lease is not None and lease.state is LeaseState.EXPECTED:
            del self._expected[token]
            lease.state, lease.request, lease.deadline = (
                LeaseState.ANNOUNCED,
                request,
                now + self._settings.announce_timeout_s,
            )
            lease.announced = True
            self._timers.set(token, lease.deadline)
        elif lease is None and token not in self._ended:
            self._add(Lease(token, request, now + self._settings.announce_timeout_s, announced=True))

    def expect(self, token: str, now: float) -> None:
        """A consumer came first: keep a place for it until the token is announced.

        There are ``max_leases`` places. When all are taken, the one that was asked for longest ago goes: a consumer that still
        waits for its own asks again each ``retry_interval_s``, and has a place again.
        """
        if token in self._expected:
            self._expected.move_to_end(token)
        if token in self._live or token in self._ended:
            return
        while len(self._expected) >= self._settings.max_leases:
            oldest, _ = self._expected.popitem(last=False)
            del self._live[oldest]
            self._timers.cancel(oldest)
        self._expected[token] = None
        self._add(Lease(token, "", now + self._settings.rendezvous_timeout_s, LeaseState.EXPECTED))

    def publish(
        self,
        token: str,
        blocks: Sequence[bytes],
        now: float,
        first_tokens: Sequence[int] = (),
        *,
        complete: bool = True,
    ) -> Lease:
        """Make blocks of an announced lease readable. They must not change until the lease ends.

        Args:
            blocks, first_tokens: see `Lease`; with those that were published before.
            complete: these are all blocks of the request, and the lease's time runs from now.

        Raises:
            LeaseUnknownError: the lease was never announced.
            LeaseEndedError: the lease ended before; the caller may reuse the blocks.
            ContradictionError: the blocks do not begin with those published before. Nothing changes; the lease has to be revoked.
            LeaseError: no cell is free, which ends the lease if ``complete``; or the complete blocks were published before,
                and nothing changes.
        """
        lease = self._live.get(token) or self._ended.get(token)
        if lease is None or lease.state is LeaseState.EXPECTED:
            if not complete:
                pass
            elif lease is None:
                self._ended.add(Lease(token, "", now, LeaseState.REVOKED, end_awaited=True))
            else:
                lease.end_awaited = True
                self._end(lease, LeaseState.REVOKED)
            raise LeaseUnknownError(f"no lease {shown(token)} was announced here")
        before, lease.end_awaited = lease.end_awaited, lease.end_awaited or complete
        self._find(token)
        if before:
            raise LeaseError(f"the blocks of lease {shown(token)} were published before")
        try:
            self._make_readable(lease, blocks, first_tokens)
        except ContradictionError:
            raise
        except LeaseError:
            if complete:
                self._end(lease, LeaseState.REVOKED)
            raise
        if complete:
            lease.state = LeaseState.READY
            lease.last_at = now + self._settings.max_lease_s
            lease.deadline, lease.spared = min(now + self._settings.lease_s, lease.last_at), False
            self._timers.set(token, lease.deadline)
        return lease

    def end_awaited(self, token: str) -> bool:
        """`publish` was called for it: its end has been told or will be."""
        lease = self._live.get(token) or self._ended.get(token)
        return lease is not None and lease.end_awaited

    def open(self, token: str, consumer: ConsumerRank, now: float) -> Lease:
        """A consumer asks for the blocks. Idempotent for the same one; the answer is the lease's state.

        Raises:
            LeaseUnknownError, LeaseEndedError: there is nothing to open, or this rank has released it.
            LeaseError: another consumer has it.
        """
        lease = self._find(token)
        if not lease.admits(consumer):
            raise LeaseError(f"lease {shown(token)} was opened by another consumer")
        if consumer.rank in lease.released:
            raise LeaseEndedError(f"rank {consumer.rank} has released lease {shown(token)}")
        lease.consumers[consumer.rank] = consumer
        if lease.state is LeaseState.READY:
            lease.state = LeaseState.IN_USE
        if lease.state is LeaseState.IN_USE:
            self._extend(lease, now)
        return lease

    def get(self, token: str) -> Lease | None:
        """The lease, if it lives."""
        return self._live.get(token)

    def held(self, token: str, consumer: ConsumerRank) -> Lease | None:
        """The lease, if this process may read its blocks now."""
        lease = self._live.get(token)
        stands = lease is not None and lease.readable and consumer in lease.waiting()
        return lease if stands else None

    def why_not_held(self, token: str, consumer: ConsumerRank) -> LeaseError:
        """Why this process may not read the blocks of a lease now."""
        try:
            lease = self._find(token)
        except LeaseError as error:
            return error
        if lease.consumers.get(consumer.rank) == consumer and consumer.rank in lease.released:
            return LeaseEndedError(f"rank {consumer.rank} has released lease {shown(token)}")
        return LeaseUnknownError(f"no lease {shown(token)} is held by rank {consumer.rank} of {consumer.name!r}")

    def renew(self, tokens: Sequence[str], consumer: ConsumerRank, now: float) -> list[str]:
        """Extend what this consumer still waits for; returns the tokens of leases that do not stand."""
        ended = []
        for token in tokens:
            lease = self._live.get(token)
            if lease is None or consumer not in lease.waiting():
                ended.append(token)
            elif lease.state is LeaseState.IN_USE:
                self._extend(lease, now)
        return ended

    def release(self, token: str, consumer: ConsumerRank, *, read: bool) -> tuple[bool, Lease | None]:
        """A rank of the consumer is done with the blocks; when all are, the lease has ended.

        Returns:
            whether the lease stood until now, and the lease if this call ended it.
        """
        lease = self._live.get(token)
        if lease is None:
            before = self._ended.get(token)
            if before is None:
                # A consumer that came first and has left before it was known here: nobody will come for these blocks.
                self._ended.add_named(Lease(token, "", 0.0, LeaseState.RELEASED), consumer.name)
            # A rank that had released hears the same again, also if others let it expire.
            stood = (
                before is not None and consumer.rank in before.released and before.consumers[consumer.rank] == consumer
            )
            return stood, None
        if not lease.admits(consumer):
            return False, None
        lease.consumers[consumer.rank] = consumer
        lease.released.add(consumer.rank)
        lease.read = lease.read or read
        if len(lease.released) < consumer.world:
            return True, None
        self._end(lease, LeaseState.RELEASED)
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
            lease.end_awaited = True
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

    def released(self, token: str) -> Lease | None:
        """The lease, if it is remembered as one that its consumer has released."""
        lease = self._ended.get(token)
        return lease if lease is not None and lease.state is LeaseState.RELEASED else None

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
        self._expected.pop(lease.token, None)
        lease.state, lease.blocks = state, []
        del self._live[lease.token]
        self._timers.cancel(lease.token)
        if lease.announced or lease.end_awaited:
            self._ended.add(lease)
        else:
            self._ended.add_named(lease, next((consumer.name for consumer in lease.consumers.values()), ""))


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
