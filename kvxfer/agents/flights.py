# SPDX-License-Identifier: Apache-2.0
"""Submitted transfers, called flights: handed to the engine part by part, ended by a deadline, kept in quarantine.

A flight that is given up while the engine still works on it may write to local memory later. Unless the adapter knows
better it is therefore quarantined: its memory stays in use until the engine reports an end, or until the agent is closed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from kvxfer.agents.capabilities import Op
from kvxfer.errors import DescriptorError, KvxferError, TransferFailedError, TransferTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.agents.capabilities import Capabilities
    from kvxfer.agents.description import AgentPeer
    from kvxfer.memory.spans import Descriptors, Memory, RegionTable


_NO_HANDLE = object()
"""No part is with the engine. Not None, because an adapter's handle may be None."""


class FlightState(str, Enum):
    """State of a flight. Every flight ends as DONE or FAILED; QUARANTINED becomes FAILED when its memory is quiet."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    QUARANTINED = "quarantined"


@dataclass(eq=False)
class Flight:
    """One submitted transfer.

    Attributes:
        nbytes, descriptors: what is handed to the engine in all, after merging.
        state: see `FlightState`. Changes only inside `TransferAgent.submit`, `poll`, `disconnect` and `close`.
        error: why it failed; None unless FAILED or QUARANTINED.
    """

    op: Op
    peer: AgentPeer
    deadline: float
    nbytes: int = 0
    descriptors: int = 0
    state: FlightState = FlightState.PENDING
    error: KvxferError | None = None
    landed: bool = False
    """Nothing of it is on its way any more, here or at the peer: what the engine was given is complete, or was stopped."""
    first_at: float = 0.0
    """Time at which its first part was complete; 0.0 before."""
    last_from: float = 0.0
    """Time at which its last part was handed to the engine, so all before it was complete; 0.0 before."""
    _reported: FlightState = FlightState.PENDING
    _parts: list[tuple[Descriptors, Memory, Memory]] = field(default_factory=list)
    _handle: Any = _NO_HANDLE
    _regions: frozenset[int] = frozenset()

    @property
    def finished(self) -> bool:
        """DONE or FAILED: local memory is quiet and the flight will not change again."""
        return self.state in (FlightState.DONE, FlightState.FAILED)

    @property
    def lost(self) -> bool:
        """QUARANTINED, and the engine says nothing more of it: what is on its way may land at any time."""
        return self.state is FlightState.QUARANTINED and self._handle is _NO_HANDLE

    def add_step(self, spans: Descriptors, regions: RegionTable, capabilities: Capabilities) -> None:
        """Check spans against the regions of both sides, merge neighbours, and split the list at the engine's limits.

        Args:
            spans: to move when all steps added before are complete.
            regions: of the agent that submits.
            capabilities: of that agent.

        Raises:
            DescriptorError: no spans, or one outside what both sides have registered.
        """
        if len(spans) == 0:
            raise DescriptorError("nothing to transfer")
        theirs = self.peer.regions
        local_index = regions.locate(spans.local, spans.nbytes, "local")
        remote_index = theirs.locate(spans.remote, spans.nbytes, f"{self.peer.name!r}'s")
        spans = spans.merged(local_index, remote_index)
        self.nbytes += spans.total_nbytes
        self.descriptors += len(spans)
        touched = local_index if len(local_index) == 1 else np.unique(local_index)
        self._regions |= {regions[int(i)].address for i in touched}
        local, remote = regions.one_device(local_index), theirs.one_device(remote_index)
        parts = spans.split(capabilities.max_descriptors, capabilities.max_submit_nbytes)
        self._parts += [(part, local, remote) for part in parts]


class PartMover(Protocol):
    """The methods of an adapter that carry out the parts of flights: see `TransferAgent`."""

    adapter: ClassVar[str]
    now: Callable[[], float]

    def _submit(self, op: Op, peer: object, spans: Descriptors, local: Memory, remote: Memory, /) -> object: ...
    def _poll(self, handle: object, /) -> bool: ...
    def _release(self, handle: object, /) -> None: ...
    def _abandon(self, handle: object, /) -> bool: ...


class Flights:
    """The flights of one agent that `poll` has not yet returned as ended.

    Args:
        mover: the agent.
    """

    def __init__(self, mover: PartMover) -> None:
        self._mover = mover
        self._all: list[Flight] = []

    def start(self, flight: Flight) -> None:
        """Hand the first part of a new flight to the engine.

        Raises:
            DescriptorError: it has no parts.
        """
        if not flight._parts:
            raise DescriptorError("nothing to transfer")
        flight._parts.reverse()
        self._all.append(flight)
        self.advance(flight)

    def poll(self) -> list[Flight]:
        """Advance all flights, give up those whose deadline has passed, and return those whose state has changed."""
        now = self._mover.now()
        for flight in self._all:
            if flight.state is FlightState.PENDING:
                self.advance(flight)
                if flight.state is FlightState.PENDING and not now < flight.deadline:
                    self._give_up(flight, TransferTimeoutError(f"no end after the deadline: {flight.nbytes} bytes"))
            elif flight.state is FlightState.QUARANTINED and flight._handle is not _NO_HANDLE:
                self._poll_quarantined(flight)
        changed = [f for f in self._all if f.state is not f._reported]
        for flight in changed:
            flight._reported = flight.state
        self._all = [f for f in self._all if not f.finished]
        return changed

    def give_up(self, peer: AgentPeer, error: KvxferError) -> None:
        """Give up all pending flights with a peer."""
        for flight in self._all:
            if flight.peer is peer and flight.state is FlightState.PENDING:
                self._give_up(flight, error)

    def give_up_one(self, flight: Flight, error: KvxferError) -> None:
        """Give up one flight, if it is pending."""
        if flight.state is FlightState.PENDING:
            self._give_up(flight, error)

    def drop(self, flight: Flight) -> None:
        """End a quarantined WRITE, which writes to no memory of this agent, whatever becomes of it."""
        if flight.op is Op.WRITE and flight.state is FlightState.QUARANTINED:
            flight.state, flight._handle = FlightState.FAILED, _NO_HANDLE

    def end_all(self, error: KvxferError) -> list[Flight]:
        """Fail all flights that have not ended, after the engine was torn down; return all that were not returned yet."""
        ended, self._all = self._all, []
        for flight in (f for f in ended if not f.finished):
            flight.error = flight.error or error
            flight.state, flight._handle, flight._parts = FlightState.FAILED, _NO_HANDLE, []
        return ended

    def touch(self, memory: Memory) -> bool:
        """Whether a flight that has not ended, quarantined ones included, reads or writes this registered region."""
        return any(memory.address in flight._regions for flight in self._all)

    @property
    def have_parts_to_submit(self) -> bool:
        """Whether the next `poll` would hand a part to the engine."""
        return any(f.state is FlightState.PENDING and f._handle is _NO_HANDLE for f in self._all)

    @property
    def quarantine_may_end(self) -> bool:
        """Whether a quarantined flight is still with the engine, so that `poll` may find that it has ended."""
        return any(f.state is FlightState.QUARANTINED and f._handle is not _NO_HANDLE for f in self._all)

    @property
    def quarantined(self) -> bool:
        """Whether a flight is quarantined."""
        return any(f.state is FlightState.QUARANTINED for f in self._all)

    def advance(self, flight: Flight) -> None:
        """Poll the part that is with the engine; if it is complete, hand over the next one, which may be complete at once.

        One part for each call: an engine that copies inside `_submit` would otherwise work through a long list whatever its
        deadline, while other flights wait.
        """
        mover, handed_over = self._mover, False
        try:
            while True:
                if flight._handle is not _NO_HANDLE:
                    if not mover._poll(flight._handle):
                        return
                    mover._release(flight._handle)
                    flight._handle = _NO_HANDLE
                    flight.first_at = flight.first_at or mover.now()
                if not flight._parts:
                    flight.state, flight.landed = FlightState.DONE, True
                    return
                if handed_over or not mover.now() < flight.deadline:
                    return
                handed_over = True
                part, local, remote = flight._parts.pop()
                if not flight._parts:
                    flight.last_from = mover.now()
                flight._handle = mover._submit(flight.op, flight.peer.native, part, local, remote)
        except KvxferError as error:
            self._fail(flight, error)
        except Exception as error:  # noqa: BLE001 - an adapter's bug must fail this transfer, not the thread
            failed = TransferFailedError(f"{mover.adapter} raised {type(error).__name__}: {error}")
            failed.__cause__ = error
            self._fail(flight, failed)

    def _fail(self, flight: Flight, error: KvxferError) -> None:
        if flight._handle is not _NO_HANDLE:
            self._mover._release(flight._handle)
        flight.error, flight._handle, flight._parts = error, _NO_HANDLE, []
        flight.state = FlightState.FAILED if error.quiet else FlightState.QUARANTINED

    def _give_up(self, flight: Flight, error: KvxferError) -> None:
        flight.error, flight._parts = error, []
        quiet = flight._handle is _NO_HANDLE or self._mover._abandon(flight._handle)
        flight.landed = quiet
        if quiet:
            flight._handle = _NO_HANDLE
        flight.state = FlightState.FAILED if quiet else FlightState.QUARANTINED

    def _poll_quarantined(self, flight: Flight) -> None:
        quiet = landed = True
        try:
            if not self._mover._poll(flight._handle):
                return
        except Exception as error:  # noqa: BLE001 - the flight failed before; only whether its memory is quiet counts now
            # There is nothing left to poll. Unless the error itself says that nothing is written any more, only closing the
            # agent ends this quarantine.
            quiet, landed = isinstance(error, KvxferError) and error.quiet, False
        self._mover._release(flight._handle)
        flight._handle, flight.landed = _NO_HANDLE, landed
        if quiet:
            flight.state = FlightState.FAILED
