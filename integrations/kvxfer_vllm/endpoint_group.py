# SPDX-License-Identifier: Apache-2.0
"""The ranks of this engine that live in one process, as one: each is asked, and what has ended has ended at all of them.

vLLM has a worker process for each GPU, and so one rank in each. A process that drives several devices, as on TPUs, has a rank
for each of them. A request is loaded when all ranks have their part of it, and its blocks are free when no rank's are read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kvxfer.errors import KvxferError
from kvxfer.protocol.transfer import Done, Failed, LeaseExpired, LeaseReleased, LeaseRevoked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from kvxfer.buffers.base import Completion
    from kvxfer.layout.block_table import BlockTable
    from kvxfer.metrics import Metrics
    from kvxfer.protocol.lease_ref import LeaseRef
    from kvxfer.protocol.transfer import Event, Transfer

    Tables: TypeAlias = Sequence[Sequence[int]] | Sequence[BlockTable]
    LeaseEvent: TypeAlias = LeaseReleased | LeaseExpired | LeaseRevoked

logger = logging.getLogger(f"vllm.{__name__}")


class EndpointLike(Protocol):
    """What this package uses of :class:`kvxfer.Endpoint`; tests put a recorder in its place."""

    @property
    def metrics(self) -> Metrics:
        """Counters since start."""

    def announce(self, ref: LeaseRef) -> object:
        """Make a token known."""

    def publish(
        self, ref: LeaseRef, blocks: Tables, *, complete: bool = True, after: Sequence[Completion] = ()
    ) -> None:
        """Make blocks of an announced lease readable, once the device has come that far."""

    def revoke(self, ref: LeaseRef) -> None:
        """End a lease early."""

    def acquire(self, ref: LeaseRef) -> None:
        """Open a lease and renew it."""

    def read(
        self, ref: LeaseRef, into: Tables, *, tokens: tuple[int, int | None], after: Sequence[Completion] = ()
    ) -> Transfer:
        """Start reading a lease, once the device has done with the blocks."""

    def release(self, ref: LeaseRef) -> None:
        """Give a lease back unread."""

    def poll(self, timeout_s: float = 0.0) -> Sequence[Event]:
        """What happened; waits for the first event."""

    def close(self) -> None:
        """End threads and free the agent."""


@dataclass(eq=False)
class GroupTransfer:
    """One lease as all ranks read it.

    Attributes:
        ref: the lease.
        transfers: one of each rank that could begin.
        error: of the first rank that failed; None while none has.
    """

    ref: LeaseRef
    transfers: dict[Transfer, EndpointLike] = field(default_factory=dict)
    error: KvxferError | None = None
    _ended: set[Transfer] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        """Of the rank that took longest."""
        return max(transfer.seconds for transfer in self.transfers)

    @property
    def nbytes(self) -> int:
        """Of all ranks."""
        return sum(transfer.nbytes for transfer in self.transfers)

    @property
    def descriptors(self) -> int:
        """Of all ranks."""
        return sum(transfer.descriptors for transfer in self.transfers)

    def ended(self, event: Done | Failed) -> bool:
        """One rank's transfer ended; True if it was the last. The others need not go on after one that failed."""
        self._ended.add(event.transfer)
        if isinstance(event, Failed):
            self.fail(event.error)
        return len(self._ended) == len(self.transfers)

    def fail(self, error: KvxferError) -> None:
        """It has failed, whatever the ranks that have not ended say: of these those end that still wait for their producer.

        Bytes that are on their way have to arrive before the reading ends.
        """
        if self.error is None:
            self.error = error
            for transfer, endpoint in self.transfers.items():
                if transfer not in self._ended:
                    endpoint.release(self.ref)


@dataclass
class _PublishedLease:
    """One lease as all ranks have offered it: how many have not ended theirs, and the ends of the others."""

    left: int
    ends: list[LeaseEvent] = field(default_factory=list)


class EndpointGroup:
    """One or more endpoints of one engine. Everything runs on the engine's thread.

    Args:
        endpoints: of the ranks of this process. Closed by `close`.
    """

    def __init__(self, endpoints: Sequence[EndpointLike]) -> None:
        self._endpoints = list(endpoints)
        self._readings: dict[Transfer, GroupTransfer] = {}
        self._offered: dict[str, _PublishedLease] = {}
        self._ended: list[GroupTransfer | LeaseEvent] = []

    @property
    def metrics(self) -> list[Metrics]:
        """Of each rank."""
        return [endpoint.metrics for endpoint in self._endpoints]

    def announce(self, ref: LeaseRef) -> None:
        """See `EndpointLike.announce`."""
        self._each(lambda endpoint: endpoint.announce(ref))

    def revoke(self, ref: LeaseRef) -> None:
        """See `EndpointLike.revoke`."""
        self._each(lambda endpoint: endpoint.revoke(ref))

    def acquire(self, ref: LeaseRef) -> None:
        """See `EndpointLike.acquire`."""
        self._each(lambda endpoint: endpoint.acquire(ref))

    def release(self, ref: LeaseRef) -> None:
        """See `EndpointLike.release`."""
        self._each(lambda endpoint: endpoint.release(ref))

    def publish(
        self, ref: LeaseRef, blocks: Tables, *, complete: bool = True, after: Sequence[Completion] = ()
    ) -> None:
        """See `EndpointLike.publish`. A complete lease ends once for all ranks.

        Raises what the first rank raised; then no rank has published the complete blocks. If a later one raises, the lease is
        revoked.
        """
        if not complete:
            self._each(lambda endpoint: endpoint.publish(ref, blocks, complete=False, after=after))
            return
        took: list[EndpointLike] = []
        for endpoint in self._endpoints:
            try:
                endpoint.publish(ref, blocks, after=after)
            except Exception:
                if not took:
                    raise
                logger.exception("A rank cannot publish the KV of %r, which is revoked at the others", ref.request)
                for other in took:
                    other.revoke(ref)
                break
            took.append(endpoint)
        self._offered[ref.token] = _PublishedLease(len(took))

    def read(
        self, ref: LeaseRef, into: Tables, *, tokens: tuple[int, int | None], after: Sequence[Completion]
    ) -> GroupTransfer:
        """Start reading a lease at each rank; ends as `poll` says.

        Raises what the first rank raised; then no rank reads. If a later one raises, the reading fails when the others end.
        """
        reading = GroupTransfer(ref)
        for endpoint in self._endpoints:
            try:
                transfer = endpoint.read(ref, into, tokens=tokens, after=after)
            except Exception as error:
                if not reading.transfers:
                    raise
                logger.exception("A rank cannot read the KV of %r", ref.request)
                reading.fail(error if isinstance(error, KvxferError) else KvxferError(str(error)))
                break
            reading.transfers[transfer] = endpoint
            self._readings[transfer] = reading
        return reading

    def poll(self, timeout_s: float = 0.0) -> list[GroupTransfer | LeaseEvent]:
        """What ended at all ranks since the last call; waits up to ``timeout_s`` for something to happen at one.

        Of a lease's ends the worst one is told: expired, else revoked, else settled. An endpoint that raises is raised when
        all were asked; what the others told comes with the next call.
        """
        error, happened = None, False
        for endpoint in self._endpoints:
            try:
                events = endpoint.poll(0.0 if happened else timeout_s / len(self._endpoints))
            except Exception as each:  # noqa: BLE001 - raised below
                error = error or each
                continue
            happened = happened or bool(events)
            for event in events:
                self._happened(event)
        if error is not None:
            raise error
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Close every endpoint."""
        self._each(lambda endpoint: endpoint.close())

    def _happened(self, event: Event) -> None:
        if isinstance(event, (Done, Failed)):
            reading = self._readings.pop(event.transfer, None)
            if reading is not None and reading.ended(event):
                self._ended.append(reading)
            return
        offered = self._offered.get(event.token)
        if offered is None:
            return
        offered.ends.append(event)
        offered.left -= 1
        if offered.left == 0:
            del self._offered[event.token]
            self._ended.append(max(offered.ends, key=_badness))

    def _each(self, act: Callable[[EndpointLike], object]) -> None:
        """Do it at every rank, also if one raises; then raise what the first one raised."""
        error = None
        for endpoint in self._endpoints:
            try:
                act(endpoint)
            except Exception as each:  # noqa: BLE001 - raised below
                error = error or each
        if error is not None:
            raise error


def _badness(event: LeaseEvent) -> int:
    """Of an end, among those of the same lease at other ranks. A rank that needed nothing settles unread."""
    if isinstance(event, LeaseReleased):
        return int(event.read)
    return 3 if isinstance(event, LeaseExpired) else 2
