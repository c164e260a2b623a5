# SPDX-License-Identifier: Apache-2.0
"""How bytes move: the contract between kvxfer and a transfer engine.

An adapter author implements the eight underscore methods of `TransferAgent`. Everything that each engine would
otherwise do badly is done once, here: every descriptor is checked against the registered regions of both sides,
adjacent ones are merged, long lists are split at the engine's limits, deadlines are kept, and memory into which an
abandoned transfer may still write stays in quarantine.

An agent knows addresses and lengths. It does not know layers, heads, blocks, requests or leases.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, final

import msgspec
import numpy as np

from kvxfer.errors import (
    ClosedError,
    DescriptorError,
    KvxferError,
    OwnPeerError,
    PeerInfoError,
    PeerUnknownError,
    RegistrationError,
    TransferFailedError,
    TransferTimeoutError,
    UnsupportedError,
)
from kvxfer.memory.spans import Descriptors, Memory, MemoryKind, RegionTable

if TYPE_CHECKING:
    from collections.abc import Callable


class Op(str, Enum):
    """Direction of a transfer, seen from the agent that submits it."""

    READ = "read"
    WRITE = "write"


class Reach(str, Enum):
    """How far away a peer may live."""

    PROCESS = "process"
    HOST = "host"
    NETWORK = "network"


@dataclass(frozen=True)
class Capabilities:
    """What an adapter promises. The core decides by these, never by an adapter's name; the suite tests each."""

    ops: frozenset[Op]
    kinds: frozenset[MemoryKind]
    reach: Reach
    quiet_on_abandon: bool
    """After giving up on a transfer in flight, nothing more is written to local memory."""
    remote_checked: bool
    """A transfer to memory that its owner has deregistered fails (on engines without it, it silently succeeds)."""
    detects_death: bool
    """A transfer to a peer process that has died fails by itself, well before any deadline."""
    submit_copies: bool
    """Submitting may block for the whole copy, so no thread that keeps time may own the agent."""
    max_descriptors: int | None = None
    """Longest list the engine takes in one call; longer ones are split."""
    max_submit_nbytes: int | None = None
    """Most bytes handed to the engine at once, so that one long copy does not starve the others."""


_NO_HANDLE = object()
"""Nothing is with the engine. Not None, for an adapter's handle may be None."""


class FlightState(str, Enum):
    """Where a submitted transfer is. Every flight ends in DONE or FAILED; QUARANTINED becomes FAILED when quiet."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"
    QUARANTINED = "quarantined"


class _AgentInfo(msgspec.Struct, frozen=True):
    adapter: str
    name: str
    regions: list[Memory]
    native: bytes


class _Named(msgspec.Struct, frozen=True):
    name: str


def described_name(info: bytes) -> str:
    """Name of the agent that a description is of.

    Raises:
        PeerInfoError: not a description.
    """
    try:
        return msgspec.msgpack.decode(info, type=_Named).name
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerInfoError(f"cannot read the description of a peer: {error}") from error


@dataclass(eq=False)
class AgentPeer:
    """Another agent, as this one knows it. Made by `TransferAgent.connect`; only that agent may use it."""

    name: str
    regions: RegionTable
    native: Any
    info: bytes
    connected: bool = True


@dataclass(eq=False)
class Registration:
    """Memory that an agent may read and write. The caller keeps the memory alive until `deregister`."""

    memory: Memory
    native: Any


@dataclass(eq=False)
class Flight:
    """One submitted transfer.

    Attributes:
        nbytes, descriptors: what there is to hand to the engine, after merging.
        state: see `FlightState`. Changes only inside `TransferAgent.submit`, `poll` and `close`.
        error: why it failed; None unless FAILED or QUARANTINED.
    """

    op: Op
    peer: AgentPeer
    deadline: float
    nbytes: int = 0
    descriptors: int = 0
    state: FlightState = FlightState.PENDING
    error: KvxferError | None = None
    _reported: FlightState = FlightState.PENDING
    _parts: list[tuple[Descriptors, Memory, Memory]] = field(default_factory=list)
    _handle: Any = _NO_HANDLE
    _regions: frozenset[int] = frozenset()

    @property
    def finished(self) -> bool:
        """DONE or FAILED: local memory is quiet and the flight will not change again."""
        return self.state in (FlightState.DONE, FlightState.FAILED)


class TransferAgent(ABC):
    """A transfer engine, as kvxfer sees it.

    Thread: all methods are called by the one thread that made the agent (three threads on one NIXL agent is a known
    race); another thread gets `UnsupportedError`. Errors of the engine become `kvxfer.errors`, cause chained.

    An adapter whose engine opens ports has a keyword argument ``loopback_only``, and the endpoint passes True where its own
    control address is reached from this machine only: then the engine must not listen on any other address. It sets the
    attribute of that name to what it does.

    Args:
        name: unique for this agent in the world and never reused (the endpoint appends a random part).
    """

    capabilities: ClassVar[Capabilities]
    adapter: ClassVar[str]
    """Short name of the adapter. Agents understand the description of a peer with the same one."""
    loopback_only: bool = False
    """Agents on other machines cannot reach this one, whatever their engine can do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.now: Callable[[], float] = time.monotonic
        """The clock of deadlines."""
        self._thread = threading.get_ident()
        self._closed = False
        self._registrations: list[Registration] = []
        self._table = RegionTable([])
        self._peers: dict[str, AgentPeer] = {}
        self._flights: list[Flight] = []

    @classmethod
    def why_unavailable(cls) -> str | None:
        """None if this adapter can run here, else one sentence that says what to install or set."""
        return None

    # -- what an adapter implements ---------------------------------------------------------------------------------

    @abstractmethod
    def _register(self, memory: Memory) -> object:
        """Make ``memory`` known to the engine; returns the engine's handle. Raises RegistrationError."""

    @abstractmethod
    def _deregister(self, registration: object, memory: Memory) -> None:
        """Forget what `_register` returned. Raises RegistrationError."""

    @abstractmethod
    def _describe(self) -> bytes:
        """The engine's own description of this agent, for `_connect` of a peer: opaque to everybody else."""

    @abstractmethod
    def _connect(self, name: str, native: bytes) -> object:
        """Meet the agent ``name``, described by its `_describe`; returns the engine's handle of it.

        Called again with newer ``native`` when the peer has registered more. Raises PeerInfoError, PeerConflictError.
        """

    @abstractmethod
    def _disconnect(self, peer: object) -> None:
        """Forget a peer, which may be dead. Raises nothing."""

    @abstractmethod
    def _submit(self, op: Op, peer: object, spans: Descriptors, local: Memory, remote: Memory) -> object:
        """Start moving ``spans``; returns the engine's handle.

        ``local`` and ``remote`` are registered regions of the kind and device in which all spans of that side lie.
        Each span lies inside one registered region on either side. Raises TransferError.
        """

    @abstractmethod
    def _poll(self, handle: object) -> bool:
        """True when the transfer is complete: a READ's bytes are in local memory, a WRITE's are applied remotely.

        Must not block. Raises TransferError; the handle is not polled again after that or after True. Called at least
        once for each submitted handle.
        """

    @abstractmethod
    def _close(self) -> None:
        """Tear the engine down. The only fence: afterwards nothing writes to this agent's memory. Raises nothing."""

    # -- what an adapter may override -------------------------------------------------------------------------------

    def _release(self, handle: object) -> None:  # noqa: B027
        """Free a finished handle. Raises nothing."""

    def _abandon(self, handle: object) -> bool:  # noqa: ARG002
        """Give up on a transfer in flight; True only if nothing will be written any more. Raises nothing."""
        return False

    def explain(self, peer: AgentPeer) -> str:  # noqa: ARG002
        """How bytes travel between this agent and ``peer``, in a few words for people. Not to be acted upon."""
        return self.adapter

    def _progress(self) -> None:  # noqa: B027
        """Drive an engine that moves only when asked. Called by each `poll`. Raises nothing."""

    # -- what the core calls ----------------------------------------------------------------------------------------

    @final
    def register(self, memory: Memory) -> Registration:
        """Let peers read and write ``memory``, which the caller keeps alive until `deregister` or `close`.

        Raises:
            RegistrationError: the engine refused, or it overlaps a registered region.
            UnsupportedError: memory of this kind was not declared.
        """
        self._check()
        if memory.kind not in self.capabilities.kinds:
            raise UnsupportedError(f"{self.adapter} does not register {memory.kind.value} memory")
        if memory.nbytes <= 0:
            raise RegistrationError("cannot register an empty region")
        for other in self._registrations:
            if memory.overlaps(other.memory):
                raise RegistrationError(f"{memory} overlaps {other.memory}, which is registered already")
        try:
            table = RegionTable([memory, *(r.memory for r in self._registrations)])
        except ValueError as error:
            raise RegistrationError(str(error)) from error
        registration = Registration(memory, self._register(memory))
        self._registrations.append(registration)
        self._table = table
        return registration

    @final
    def deregister(self, registration: Registration) -> None:
        """Withdraw a region.

        Raises:
            RegistrationError: unknown here, or a transfer (also one in quarantine) may still touch it.
        """
        self._check()
        if registration not in self._registrations:
            raise RegistrationError(f"{registration.memory} is not registered with {self.name}")
        if any(registration.memory.address in flight._regions for flight in self._flights):
            raise RegistrationError(f"a transfer may still touch {registration.memory}")
        self._deregister(registration.native, registration.memory)
        self._registrations.remove(registration)
        self._table = RegionTable([r.memory for r in self._registrations])

    @final
    def describe(self) -> bytes:
        """This agent for a peer's `connect`: name, registered regions, the engine's own blob. Carries no secrets."""
        self._check()
        memories = [r.memory for r in self._registrations]
        return msgspec.msgpack.encode(_AgentInfo(self.adapter, self.name, memories, self._describe()))

    @final
    def connect(self, info: bytes) -> AgentPeer:
        """Meet a peer. Idempotent; a newer description of the same peer replaces the older one.

        Raises:
            PeerInfoError: not a description, or of another adapter's agent.
            PeerConflictError: the engine knows another agent by this name, or it is our own.
            TransferFailedError: the engine raised something else.
        """
        self._check()
        try:
            decoded = msgspec.msgpack.decode(info, type=_AgentInfo)
            regions = RegionTable(decoded.regions)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise PeerInfoError(f"cannot read the description of a peer: {error}") from error
        if decoded.adapter != self.adapter:
            raise PeerInfoError(f"the peer moves bytes with {decoded.adapter!r}, this side with {self.adapter!r}")
        if decoded.name == self.name:
            raise OwnPeerError(f"{self.name!r} is this agent itself")
        known = self._peers.get(decoded.name)
        if known is not None and known.info == info:
            return known
        try:
            native = self._connect(decoded.name, decoded.native)
        except KvxferError:
            raise
        except Exception as error:  # an adapter's bug must fail this transfer by name
            raise TransferFailedError(f"{self.adapter} raised {type(error).__name__}: {error}") from error
        if known is None:
            known = AgentPeer(decoded.name, regions, native, info)
            self._peers[decoded.name] = known
        else:
            known.regions, known.native, known.info = regions, native, info
        return known

    @final
    def disconnect(self, peer: AgentPeer) -> None:
        """Forget a peer; its pending transfers fail with PeerUnknownError. Harmless for one that is dead or gone."""
        self._check()
        if self._peers.get(peer.name) is not peer:
            return
        peer.connected = False
        self._peers.pop(peer.name, None)
        for flight in self._flights:
            if flight.peer is peer and flight.state is FlightState.PENDING:
                self._give_up(flight, PeerUnknownError(f"{peer.name!r} was disconnected"))
        self._disconnect(peer.native)

    @final
    def submit(self, op: Op, peer: AgentPeer, *steps: Descriptors, deadline: float) -> Flight:
        """Start a transfer between local and the peer's memory.

        Args:
            op: READ copies remote to local.
            peer: from `connect` of this agent.
            steps: each begins when the one before is complete. Addresses in each owner's space; all of one step and side in
                memory of one kind and device.
            deadline: on `now`; a transfer still running then is given up and may be quarantined.

        Returns:
            a flight that `poll` will return when it ends. Local memory belongs to the engine until it is ``finished``.

        Raises:
            DescriptorError: empty, or outside what both sides registered. Nothing was started.
            PeerUnknownError: the peer was disconnected, or never was connected to this agent.
            UnsupportedError: the operation was not declared.
        """
        self._check()
        if op not in self.capabilities.ops:
            raise UnsupportedError(f"{self.adapter} does not {op.value}")
        if self._peers.get(peer.name) is not peer:
            raise PeerUnknownError(f"{peer.name!r} was disconnected, or is another agent's peer")
        flight = Flight(op, peer, deadline)
        for spans in steps:
            self._add_step(flight, spans)
        if not flight._parts:
            raise DescriptorError("nothing to transfer")
        flight._parts.reverse()
        self._flights.append(flight)
        self._advance(flight)
        return flight

    @final
    def poll(self) -> list[Flight]:
        """Drive the engine; returns the flights whose state changed to DONE, FAILED or QUARANTINED since last time.

        A quarantined flight is returned once more, as FAILED, when its memory has become quiet.
        """
        self._check()
        self._progress()
        now = self.now()
        for flight in self._flights:
            if flight.state is FlightState.PENDING:
                self._advance(flight)
                if flight.state is FlightState.PENDING and not now < flight.deadline:
                    self._give_up(flight, TransferTimeoutError(f"no end after the deadline: {flight.nbytes} bytes"))
            elif flight.state is FlightState.QUARANTINED and flight._handle is not _NO_HANDLE:
                self._watch_quarantined(flight)
        changed = [f for f in self._flights if f.state is not f._reported]
        for flight in changed:
            flight._reported = flight.state
        self._flights = [f for f in self._flights if not f.finished]
        return changed

    @property
    def eager(self) -> bool:
        """Some flight has a part that the next `poll` would hand to the engine: there is nothing to wait for."""
        return any(f.state is FlightState.PENDING and f._handle is _NO_HANDLE for f in self._flights)

    @property
    def watching(self) -> bool:
        """Some quarantined flight is still with the engine, so it may yet end by itself."""
        return any(f.state is FlightState.QUARANTINED and f._handle is not _NO_HANDLE for f in self._flights)

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._closed

    @property
    def quarantined(self) -> bool:
        """Some flight may still write to local memory; only `close` is certain to end that."""
        return any(f.state is FlightState.QUARANTINED for f in self._flights)

    @final
    def close(self) -> list[Flight]:
        """End everything; afterwards nothing that this agent started writes to memory. Idempotent.

        Returns:
            the flights that `poll` has not returned as ended: they are DONE or FAILED now.
        """
        self._check_thread()
        if self._closed:
            return []
        self._closed = True
        self._close()
        ended = self._flights
        for flight in (f for f in ended if not f.finished):
            flight.error = flight.error or ClosedError(f"agent {self.name!r} was closed")
            flight.state, flight._handle, flight._parts = FlightState.FAILED, _NO_HANDLE, []
        self._flights, self._registrations, self._peers = [], [], {}
        return ended

    # -- inside -----------------------------------------------------------------------------------------------------

    def _add_step(self, flight: Flight, spans: Descriptors) -> None:
        if len(spans) == 0:
            raise DescriptorError("nothing to transfer")
        peer, caps = flight.peer, self.capabilities
        local_index = self._table.locate(spans.local, spans.nbytes, "local")
        remote_index = peer.regions.locate(spans.remote, spans.nbytes, f"{peer.name!r}'s")
        spans = spans.merged(local_index, remote_index)
        flight.nbytes += spans.total_nbytes
        flight.descriptors += len(spans)
        touched = local_index if len(local_index) == 1 else np.unique(local_index)
        flight._regions |= {self._table[int(i)].address for i in touched}
        local, remote = self._table.one_device(local_index), peer.regions.one_device(remote_index)
        parts = spans.split(caps.max_descriptors, caps.max_submit_nbytes)
        flight._parts += [(part, local, remote) for part in parts]

    def _check(self) -> None:
        self._check_thread()
        if self._closed:
            raise ClosedError(f"agent {self.name!r} is closed")

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise UnsupportedError(f"agent {self.name!r} belongs to another thread")

    def _advance(self, flight: Flight) -> None:
        """Poll the part in flight, and hand the next one to the engine, which may end it at once.

        One part for each call: an engine that copies inside `_submit` would otherwise run through a long list whatever
        its deadline, while other flights wait.
        """
        handed_over = False
        try:
            while True:
                if flight._handle is not _NO_HANDLE:
                    if not self._poll(flight._handle):
                        return
                    self._release(flight._handle)
                    flight._handle = _NO_HANDLE
                if not flight._parts:
                    flight.state = FlightState.DONE
                    return
                if handed_over or not self.now() < flight.deadline:
                    return
                handed_over = True
                part, local, remote = flight._parts.pop()
                flight._handle = self._submit(flight.op, flight.peer.native, part, local, remote)
        except KvxferError as error:
            self._fail(flight, error)
        except Exception as error:  # noqa: BLE001 - an adapter's bug must fail this transfer, not the thread
            failed = TransferFailedError(f"{self.adapter} raised {type(error).__name__}: {error}")
            failed.__cause__ = error
            self._fail(flight, failed)

    def _fail(self, flight: Flight, error: KvxferError) -> None:
        if flight._handle is not _NO_HANDLE:
            self._release(flight._handle)
        flight.error, flight._handle, flight._parts = error, _NO_HANDLE, []
        flight.state = FlightState.FAILED if error.quiet else FlightState.QUARANTINED

    def _give_up(self, flight: Flight, error: KvxferError) -> None:
        flight.error, flight._parts = error, []
        quiet = flight._handle is _NO_HANDLE or self._abandon(flight._handle)
        if quiet:
            flight._handle = _NO_HANDLE
        flight.state = FlightState.FAILED if quiet else FlightState.QUARANTINED

    def _watch_quarantined(self, flight: Flight) -> None:
        try:
            if not self._poll(flight._handle):
                return
        except Exception:  # noqa: BLE001 - it failed already; what counts now is only whether it is quiet
            # The engine broke off: no proof of quiet, and nothing left to watch. close() is the fence.
            self._release(flight._handle)
            flight._handle = _NO_HANDLE
            return
        self._release(flight._handle)
        flight._handle = _NO_HANDLE
        flight.state = FlightState.FAILED
