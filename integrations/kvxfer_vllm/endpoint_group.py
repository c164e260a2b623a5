# SPDX-License-Identifier: Apache-2.0
"""Several endpoints of one process as one: the ranks of this engine that live in this process.

vLLM has a worker process, and so a rank, for each GPU. A process that drives several devices, as on TPUs, has a rank for each
of them. A request is loaded when all ranks have read their part of it, and its blocks are free when the lease has ended at
all ranks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kvxfer.errors import KvxferError, UnavailableError
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
    """The part of `kvxfer.Endpoint` that the connector uses; tests have a scripted endpoint in its place."""

    @property
    def metrics(self) -> Metrics:
        """Counters since start."""

    @property
    def address(self) -> str:
        """Control address that peers connect to."""

    def announce(self, ref: LeaseRef) -> object:
        """Make a token known."""

    def publish(
        self, ref: LeaseRef, blocks: Tables, *, complete: bool = True, after: Sequence[Completion] = ()
    ) -> None:
        """Make blocks of an announced lease readable when ``after`` has completed."""

    def revoke(self, ref: LeaseRef) -> None:
        """End a lease early."""

    def acquire(self, ref: LeaseRef) -> None:
        """Acquire a lease and renew it."""

    def read(
        self, ref: LeaseRef, into: Tables, *, tokens: tuple[int, int | None], after: Sequence[Completion] = ()
    ) -> Transfer:
        """Begin to read a lease when ``after`` has completed."""

    def release(self, ref: LeaseRef) -> None:
        """Release a lease unread."""

    def poll(self, timeout_s: float = 0.0) -> Sequence[Event]:
        """Return what has happened; wait up to ``timeout_s`` for the first event."""

    def close(self) -> None:
        """End the threads and free the agent."""


@dataclass(eq=False)
class GroupTransfer:
    """Transfers of all ranks that read one lease.

    Attributes:
        ref: the lease.
        transfers: one for each rank that could begin, and its endpoint.
        error: of the first rank that failed; None while none has.
    """

    ref: LeaseRef
    transfers: dict[Transfer, EndpointLike] = field(default_factory=dict)
    error: KvxferError | None = None
    _ended: set[Transfer] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        """Time of the rank that took longest."""
        return max(transfer.seconds for transfer in self.transfers)

    @property
    def nbytes(self) -> int:
        """Bytes of all ranks."""
        return sum(transfer.nbytes for transfer in self.transfers)

    @property
    def descriptors(self) -> int:
        """Descriptors of all ranks."""
        return sum(transfer.descriptors for transfer in self.transfers)

    @property
    def begins(self) -> list[int]:
        """First token that was read, by group of the cache; the last one of those of the ranks."""
        return [max(tokens) for tokens in zip(*(transfer.begins for transfer in self.transfers), strict=True)]

    def end_one(self, event: Done | Failed) -> bool:
        """End the transfer of one rank; True if it was the last one. A failure also ends those that still wait."""
        self._ended.add(event.transfer)
        if isinstance(event, Failed):
            self.fail(event.error)
        return len(self._ended) == len(self.transfers)

    def fail(self, error: KvxferError) -> None:
        """Make the whole transfer fail, whatever its other ranks report.

        Ranks that still wait for their producer end at once. Bytes in flight must arrive before this transfer ends.
        """
        if self.error is None:
            self.error = error
            for transfer, endpoint in self.transfers.items():
                if transfer not in self._ended:
                    endpoint.release(self.ref)


@dataclass
class _PublishedLease:
    """A lease that several ranks have published: the number of ranks where it stands, and its ends at the others."""

    left: int
    ends: list[LeaseEvent] = field(default_factory=list)


class EndpointGroup:
    """One or more endpoints of one engine. All methods run on the engine's thread.

    Args:
        endpoints: of the ranks of this process. Closed by `close`. None while the caches have no memory; then `publish` of
            complete blocks and `read` raise UnavailableError.
    """

    def __init__(self, endpoints: Sequence[EndpointLike]) -> None:
        self.endpoints: Sequence[EndpointLike] = tuple(endpoints)
        self._reading: dict[Transfer, GroupTransfer] = {}
        self._published: dict[str, _PublishedLease] = {}
        self._ended: list[GroupTransfer | LeaseEvent] = []

    @property
    def metrics(self) -> list[Metrics]:
        """Metrics of each rank."""
        return [endpoint.metrics for endpoint in self.endpoints]

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

        Raises the error of the first rank; then no rank has published the complete blocks. If a later rank raises, the lease
        is revoked at the others.
        """
        if not complete:
            self._each(lambda endpoint: endpoint.publish(ref, blocks, complete=False, after=after))
            return
        self._refuse_without_endpoints()
        published: list[EndpointLike] = []
        for endpoint in self.endpoints:
            try:
                endpoint.publish(ref, blocks, after=after)
            except Exception:
                if not published:
                    raise
                logger.exception("A rank cannot publish the KV of %r, which is revoked at the others", ref.request)
                for other in published:
                    other.revoke(ref)
                break
            published.append(endpoint)
        self._published[ref.token] = _PublishedLease(len(published))

    def read(
        self, ref: LeaseRef, into: Tables, *, tokens: tuple[int, int | None], after: Sequence[Completion]
    ) -> GroupTransfer:
        """Begin to read a lease at each rank; `poll` returns the transfer when it has ended at all of them.

        Raises the error of the first rank; then no rank reads. If a later rank raises, the transfer fails when the others
        have ended.
        """
        self._refuse_without_endpoints()
        whole = GroupTransfer(ref)
        for endpoint in self.endpoints:
            try:
                transfer = endpoint.read(ref, into, tokens=tokens, after=after)
            except Exception as error:
                if not whole.transfers:
                    raise
                logger.exception("A rank cannot read the KV of %r", ref.request)
                whole.fail(error if isinstance(error, KvxferError) else KvxferError(str(error)))
                break
            whole.transfers[transfer] = endpoint
            self._reading[transfer] = whole
        return whole

    def poll(self, timeout_s: float = 0.0) -> list[GroupTransfer | LeaseEvent]:
        """Return what has ended at all ranks since the last call; wait up to ``timeout_s`` for something to happen at one.

        Of a lease's ends at the ranks the worst one is returned: expired, else revoked, else released. If an endpoint raises,
        this raises after all were asked, and the next call returns the events of the others.
        """
        error, happened = None, False
        for endpoint in self.endpoints:
            try:
                events = endpoint.poll(0.0 if happened else timeout_s / len(self.endpoints))
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

    def _refuse_without_endpoints(self) -> None:
        if not self.endpoints:
            raise UnavailableError("the caches have no memory while the engine sleeps")

    def _happened(self, event: Event) -> None:
        if isinstance(event, (Done, Failed)):
            whole = self._reading.pop(event.transfer, None)
            if whole is not None and whole.end_one(event):
                self._ended.append(whole)
            return
        published = self._published.get(event.token)
        if published is None:
            return
        published.ends.append(event)
        published.left -= 1
        if published.left == 0:
            del self._published[event.token]
            self._ended.append(max(published.ends, key=_badness))

    def _each(self, act: Callable[[EndpointLike], object]) -> None:
        """Act at every rank, also after one has raised; then raise the first error."""
        error = None
        for endpoint in self.endpoints:
            try:
                act(endpoint)
            except Exception as each:  # noqa: BLE001 - raised below
                error = error or each
        if error is not None:
            raise error


def _badness(event: LeaseEvent) -> int:
    """Rank of an end among those of the same lease at other ranks. A consumer that needs nothing of a rank releases unread."""
    if isinstance(event, LeaseReleased):
        return int(event.read)
    return 3 if isinstance(event, LeaseExpired) else 2
