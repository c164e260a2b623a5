# SPDX-License-Identifier: Apache-2.0
"""The leases of one producer: which consumer may read which blocks, until when. Pure: no I/O, no clock of its own.

`kvxfer.protocol.lease` has the states and what leads from one to the next. A lease ends exactly once, and its cell on the
lease board is wiped before its end is told to the engine or a consumer, so that no consumer can mistake the blocks' next content for its own.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import TYPE_CHECKING

from kvxfer.errors import LeaseEndedError, LeaseError, LeaseUnknownError, shown
from kvxfer.protocol.ended_leases import EndedLeases
from kvxfer.protocol.lease import LEASE_TRANSITIONS, Lease, LeaseEvent, LeaseState
from kvxfer.protocol.lease_board import CELL_NBYTES
from kvxfer.protocol.timers import Timers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvxfer.config import Settings
    from kvxfer.protocol.lease import ConsumerRank
    from kvxfer.protocol.lease_board import LeaseBoard


class LeaseTable:
    """All leases of one producer.

    Times are ``now`` of the caller's monotonic clock. Leases that end are returned by the call that ends them, and
    remembered for a while so that repeats are answered alike. A call for which the state of a lease has no transition changes
    nothing; `publish` and `acquire` then raise the error of that state, and the others return nothing.
    """

    def __init__(self, settings: Settings, board: LeaseBoard) -> None:
        self._settings = settings
        self._board = board
        self._live: dict[str, Lease] = {}
        self._ended: EndedLeases[Lease] = EndedLeases(settings.remembered_leases)
        self._timers = Timers()
        self._expected: OrderedDict[str, None] = OrderedDict()
        """Tokens of EXPECTED leases, the one that was asked for last at the end."""

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

    @property
    def remembered(self) -> int:
        """Leases that have ended and are remembered."""
        return len(self._ended)

    # -- the engine -------------------------------------------------------------------------------------------------

    def announce(self, token: str, request: str, now: float) -> None:
        """Make a token known before its blocks are complete. Known already: nothing changes."""
        lease = self._known(token) or Lease(token, "", 0.0, LeaseState.UNKNOWN)
        if self._step(lease, LeaseEvent.ANNOUNCE):
            lease.request, lease.announced = request, True
            self._set_deadline(lease, now + self._settings.announce_timeout_s)

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
            LeaseUnknownError: the lease was never announced. It ends, if ``complete``.
            LeaseEndedError: the lease ended before; the caller may reuse the blocks.
            ContradictionError: the blocks do not begin with those published before. Nothing changes; the lease has to be revoked.
            LeaseError: no cell is free, which ends the lease if ``complete``; or all blocks were published before, and nothing
                changes.
        """
        event = LeaseEvent.PUBLISH if complete else LeaseEvent.PUBLISH_PARTIAL
        lease = self._known(token) or Lease(token, "", now, LeaseState.UNKNOWN)
        refusal, published_before = _refusal(lease), lease.end_awaited
        lease.end_awaited = lease.end_awaited or complete
        target = LEASE_TRANSITIONS.after(lease.state, event)
        if target is None:
            raise refusal
        if target is LeaseState.REVOKED:
            self._step(lease, event)
            raise refusal
        if published_before:
            raise LeaseError(f"the blocks of lease {shown(token)} were published before")
        lease.check_continued(blocks, first_tokens)
        self._make_readable(lease, blocks, first_tokens, complete=complete)
        self._step(lease, event)
        if complete:
            lease.last_at = now + self._settings.max_lease_s
            lease.pause_allowed = False
            self._set_deadline(lease, min(now + self._settings.lease_s, lease.last_at))
        return lease

    def end_awaited(self, token: str) -> bool:
        """The engine has published all blocks of this lease, so that its end was told to the engine or will be."""
        lease = self._known(token)
        return lease is not None and lease.end_awaited

    def revoke(self, token: str) -> Lease | None:
        """End a lease early, e.g. because its request was aborted. None if it had ended or was never known."""
        lease = self._live.get(token)
        return lease if lease is not None and self._step(lease, LeaseEvent.REVOKE) else None

    def give_up(self, token: str) -> Lease | None:
        """End a lease whose blocks the devices did not complete in time. None if it had ended before."""
        lease = self._live.get(token)
        if lease is None:
            return None
        lease.end_awaited = True
        return lease if self._step(lease, LeaseEvent.EXPIRE) else None

    # -- consumers --------------------------------------------------------------------------------------------------

    def expect(self, token: str, now: float) -> None:
        """Keep a place for a lease that a consumer asks for before it is announced. Known already: nothing changes.

        There are ``max_leases`` places. When all are taken, the one that was asked for longest ago goes: a consumer that still
        waits for its own asks again each ``retry_interval_s``, and has a place again.
        """
        if token in self._expected:
            self._expected.move_to_end(token)
        if token in self._live or token in self._ended:
            return
        while len(self._expected) >= self._settings.max_leases:
            self._step(self._live[next(iter(self._expected))], LeaseEvent.DISPLACE)
        lease = Lease(token, "", 0.0, LeaseState.UNKNOWN)
        self._step(lease, LeaseEvent.EXPECT)
        self._set_deadline(lease, now + self._settings.rendezvous_timeout_s)

    def acquire(self, token: str, consumer: ConsumerRank, now: float) -> Lease:
        """Note that a consumer asks for the blocks. Idempotent for the same consumer.

        Raises:
            LeaseUnknownError, LeaseEndedError: there is nothing to acquire, or this rank has released it.
            LeaseError: another consumer has it.
        """
        lease = self._find(token)
        if not lease.admits(consumer):
            raise LeaseError(f"lease {shown(token)} was acquired by another consumer")
        if consumer.rank in lease.released:
            raise LeaseEndedError(f"rank {consumer.rank} has released lease {shown(token)}")
        lease.consumers[consumer.rank] = consumer
        self._step(lease, LeaseEvent.ACQUIRE)
        if lease.state is LeaseState.IN_USE:
            self._extend(lease, now)
        return lease

    def renew(self, tokens: Sequence[str], consumer: ConsumerRank, now: float) -> list[str]:
        """Extend leases that this consumer still waits for; returns the tokens of those that have ended for it."""
        ended = []
        for token in tokens:
            lease = self._live.get(token)
            if lease is None or consumer not in lease.waiting():
                ended.append(token)
            elif self._step(lease, LeaseEvent.RENEW):
                self._extend(lease, now)
        return ended

    def release(self, token: str, consumer: ConsumerRank, *, read: bool) -> tuple[bool, Lease | None]:
        """Note that a rank of the consumer is done with the blocks; when all ranks are, the lease ends.

        Returns:
            whether the lease had not ended otherwise before, and the lease if this call ended it.
        """
        lease = self._live.get(token)
        if lease is None:
            before = self._ended.get(token)
            if before is None:
                # A consumer that came first has left before the announcement: no consumer will come for these blocks.
                before = Lease(token, "", 0.0, LeaseState.UNKNOWN, consumers={consumer.rank: consumer})
                self._step(before, LeaseEvent.RELEASE)
                return False, None
            # A rank that had released hears the same again, even if others let the lease expire.
            return consumer.rank in before.released and before.consumers[consumer.rank] == consumer, None
        if not lease.admits(consumer):
            return False, None
        lease.consumers[consumer.rank] = consumer
        lease.released.add(consumer.rank)
        lease.read = lease.read or read
        if len(lease.released) < consumer.world:
            return True, None
        self._step(lease, LeaseEvent.RELEASE)
        return True, lease

    # -- the clock --------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Lease]:
        """End every lease whose time has passed. Leases that lasted as long as any may are REVOKED, and others EXPIRED."""
        expired = []
        for token in self._timers.due(now):
            lease = self._live[token]
            if lease.deadline <= now:
                too_long = lease.last_at <= now
                self._step(lease, LeaseEvent.LAST_LONGER_THAN_ALLOWED if too_long else LeaseEvent.EXPIRE)
                expired.append(lease)
            else:
                self._timers.set(token, lease.deadline)  # it was renewed since
        return expired

    def allow_for_pause(self, until: float) -> None:
        """Let no lease end before ``until``: this process was paused, and what consumers said meanwhile is still to be read.

        Once for each lease until a consumer asks for it again, so that a machine that is late all the time keeps no lease for ever.
        """
        for lease in self._live.values():
            if not lease.pause_allowed and lease.deadline < until:
                lease.pause_allowed = True
                lease.deadline = until

    def next_deadline(self) -> float | None:
        """Time at which `expire` has something to do next, or earlier; None if never."""
        return self._timers.next_at()

    def close(self) -> list[Lease]:
        """Revoke everything that lives."""
        live = list(self._live.values())
        for lease in live:
            self._step(lease, LeaseEvent.REVOKE)
        return live

    # -- what is known ----------------------------------------------------------------------------------------------

    def get(self, token: str) -> Lease | None:
        """The lease, if it lives."""
        return self._live.get(token)

    def readable_by(self, token: str, consumer: ConsumerRank) -> Lease | None:
        """The lease, if this process may read its blocks now."""
        lease = self._live.get(token)
        readable = lease is not None and lease.readable and consumer in lease.waiting()
        return lease if readable else None

    def why_not_readable(self, token: str, consumer: ConsumerRank) -> LeaseError:
        """Reason why this process may not read the blocks of a lease now."""
        try:
            lease = self._find(token)
        except LeaseError as error:
            return error
        if lease.consumers.get(consumer.rank) == consumer and consumer.rank in lease.released:
            return LeaseEndedError(f"rank {consumer.rank} has released lease {shown(token)}")
        return LeaseUnknownError(f"lease {shown(token)} is not held by rank {consumer.rank} of {consumer.name!r}")

    def released(self, token: str) -> Lease | None:
        """The lease, if it is remembered as one that its consumer has released."""
        lease = self._ended.get(token)
        return lease if lease is not None and lease.state is LeaseState.RELEASED else None

    def request(self, token: str) -> str:
        """The request that a live or remembered lease is for; empty if unknown."""
        lease = self._known(token)
        return lease.request if lease is not None else ""

    # -- inside -----------------------------------------------------------------------------------------------------

    def _known(self, token: str) -> Lease | None:
        """The lease, if it lives or is remembered."""
        return self._live.get(token) or self._ended.get(token)

    def _step(self, lease: Lease, event: LeaseEvent) -> bool:
        """Change the state of a lease as the table says; False, and nothing changes, if it has no transition for this."""
        target = LEASE_TRANSITIONS.after(lease.state, event)
        if target is None:
            return False
        if lease.state is LeaseState.EXPECTED and target is not LeaseState.EXPECTED:
            del self._expected[lease.token]
        elif target is LeaseState.EXPECTED:
            self._expected.setdefault(lease.token)
        lease.state = target
        if target is LeaseState.UNKNOWN or target in LEASE_TRANSITIONS.ends:
            self._forget(lease)
        else:
            self._live[lease.token] = lease
        return True

    def _forget(self, lease: Lease) -> None:
        if lease.cell is not None:
            self._board.wipe(lease.cell)
            lease.cell = None
        lease.blocks = []
        self._live.pop(lease.token, None)
        self._timers.cancel(lease.token)
        if lease.announced or lease.end_awaited:
            self._ended.add(lease)
        elif lease.state is not LeaseState.UNKNOWN:
            self._ended.add_named(lease, next((consumer.name for consumer in lease.consumers.values()), ""))

    def _make_readable(
        self, lease: Lease, blocks: Sequence[bytes], first_tokens: Sequence[int], *, complete: bool
    ) -> None:
        """Note the blocks. The lease's cell is on the board from the first ones on. Raises LeaseError: no cell is free."""
        if lease.cell is None:
            check = secrets.token_bytes(CELL_NBYTES)
            try:
                lease.cell, lease.check = self._board.post(check), check
            except LeaseError:
                if complete:
                    self._step(lease, LeaseEvent.NO_CELL)
                raise
        lease.blocks, lease.first_tokens = list(blocks), list(first_tokens)

    def _find(self, token: str) -> Lease:
        lease = self._live.get(token)
        if lease is None:
            raise _refusal(self._ended.get(token) or Lease(token, "", 0.0, LeaseState.UNKNOWN))
        return lease

    def _set_deadline(self, lease: Lease, deadline: float) -> None:
        lease.deadline = deadline
        self._timers.set(lease.token, deadline)

    def _extend(self, lease: Lease, now: float) -> None:
        # The timer stays where it is; expire() sets it again when it comes up too early.
        lease.deadline = max(lease.deadline, min(now + self._settings.lease_s, lease.last_at))
        lease.pause_allowed = False


def _refusal(lease: Lease) -> LeaseError:
    """Error of a call for which the state of a lease has no transition."""
    if lease.state in LEASE_TRANSITIONS.ends:
        return LeaseEndedError(f"lease {shown(lease.token)} has ended ({lease.state.value})")
    if lease.state in (LeaseState.UNKNOWN, LeaseState.EXPECTED):
        return LeaseUnknownError(f"lease {shown(lease.token)} was not announced here")
    return LeaseError(f"the blocks of lease {shown(lease.token)} were published before")
