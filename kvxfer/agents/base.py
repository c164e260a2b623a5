# SPDX-License-Identifier: Apache-2.0
"""The contract between kvxfer and a transfer engine.

The author of an adapter implements the eight abstract methods of `TransferAgent`. The base class does, once for all engines,
what an engine does not do or does in its own way: it checks every descriptor against the registered regions of both sides,
merges adjacent ones, splits lists at the engine's limits, keeps deadlines, and keeps memory to which a transfer that was
given up may still write out of use (`kvxfer.agents.flights`).

An agent knows addresses and lengths. It does not know layers, heads, blocks, requests or leases.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, final

import msgspec

from kvxfer.agents.capabilities import LinkFacts
from kvxfer.agents.description import AgentPeer, Description, read_description
from kvxfer.agents.flights import Flight, Flights
from kvxfer.agents.registrations import Registration, Registrations
from kvxfer.errors import (
    ClosedError,
    KvxferError,
    OwnPeerError,
    PeerInfoError,
    PeerUnknownError,
    RegistrationError,
    TransferFailedError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvxfer.agents.capabilities import Capabilities, Op
    from kvxfer.agents.finding import Finding
    from kvxfer.memory.spans import Descriptors, Memory


class TransferAgent(ABC):
    """A transfer engine, as kvxfer sees it.

    Thread: all methods are called by the one thread that made the agent (three threads on one NIXL agent are a known race);
    another thread gets `UnsupportedError`. Errors of the engine become `kvxfer.errors`, with the cause chained.

    An adapter whose engine opens ports has a keyword argument ``loopback_only``. The endpoint passes True where its own
    control address is reached from this machine only: then the engine must not listen on any other address. The adapter sets
    the attribute of that name to what its engine does.

    Args:
        name: unique for this agent in the world and never reused (the endpoint appends a random part).
    """

    capabilities: ClassVar[Capabilities]
    adapter: ClassVar[str]
    """Short name of the adapter. An agent understands the descriptions of agents of the same adapter."""
    loopback_only: bool = False
    """Agents on other machines cannot reach this one, whatever their engine can do."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.now: Callable[[], float] = time.monotonic
        """The clock of deadlines."""
        self._thread = threading.get_ident()
        self._closed = False
        self._registrations = Registrations()
        self._peers: dict[str, AgentPeer] = {}
        self._flights = Flights(self)

    @classmethod
    def why_unavailable(cls) -> str | None:
        """Sentence that says what to install or set for this adapter to run here; None if it can run."""
        return None

    @classmethod
    def examine(cls) -> Iterator[Finding]:
        """Findings about the engine on this machine, for ``kvxfer doctor``. It may take seconds. Raises KvxferError."""
        return iter(())

    # -- what an adapter implements ---------------------------------------------------------------------------------

    @abstractmethod
    def _register(self, memory: Memory) -> object:
        """Make ``memory`` known to the engine; return the engine's handle. Raises RegistrationError."""

    @abstractmethod
    def _deregister(self, registration: object, memory: Memory) -> None:
        """Forget what `_register` returned. Raises RegistrationError."""

    @abstractmethod
    def _describe(self) -> bytes:
        """The engine's own description of this agent, for `_connect` of a peer; opaque to the rest of kvxfer."""

    @abstractmethod
    def _connect(self, name: str, native: bytes) -> object:
        """Connect to the agent ``name``, described by its `_describe`; return the engine's handle of it.

        Called again with newer ``native`` when the peer has registered more. Raises PeerInfoError, PeerConflictError.
        """

    @abstractmethod
    def _disconnect(self, peer: object) -> None:
        """Forget a peer, which may be dead. Raises nothing."""

    @abstractmethod
    def _submit(self, op: Op, peer: object, spans: Descriptors, local: Memory, remote: Memory) -> object:
        """Start moving ``spans``; return the engine's handle. May block while it copies: the data thread keeps no time.

        ``local`` and ``remote`` are registered regions of the kind and device in which all spans of that side lie. Each span
        lies inside one registered region on either side. Raises TransferError.
        """

    @abstractmethod
    def _poll(self, handle: object) -> bool:
        """True when the transfer is complete: a READ's bytes are in local memory, a WRITE's are applied remotely.

        Must not block. Raises TransferError. Called at least once for each submitted handle, and not again after it has
        raised or returned True.
        """

    @abstractmethod
    def _close(self) -> None:
        """Tear the engine down: afterwards nothing writes to this agent's memory. Raises nothing.

        No other call promises that for a transfer in flight, unless the adapter declares ``quiet_on_abandon``.
        """

    # -- what an adapter may override -------------------------------------------------------------------------------

    def _release(self, handle: object) -> None:  # noqa: B027
        """Free a finished handle. Raises nothing."""

    def _abandon(self, handle: object) -> bool:  # noqa: ARG002
        """Give up on a transfer in flight; True only if nothing will be written any more, here or at the peer. Raises nothing."""
        return False

    def explain(self, peer: AgentPeer) -> str:  # noqa: ARG002
        """Transport between this agent and ``peer`` in a few words, for people only."""
        return self.adapter

    def link_kind(self, peer: AgentPeer) -> str:  # noqa: ARG002
        """Kind of the connection to ``peer`` in one word, such as memory, tcp or rdma, for logs and metrics."""
        return self.adapter

    def link_facts(self, peer: AgentPeer) -> LinkFacts:  # noqa: ARG002
        """Facts about the connection to ``peer`` that decide who moves the bytes (`kvxfer.runtime.direction`)."""
        return LinkFacts()

    def _progress(self) -> None:  # noqa: B027
        """Drive an engine that moves only when asked. Called by each `poll`. Raises nothing."""

    # -- what the core calls ----------------------------------------------------------------------------------------

    @final
    def register(self, memory: Memory) -> Registration:
        """Let peers read and write ``memory``, which the caller keeps alive until `deregister` or `close`.

        Raises:
            RegistrationError: the engine refused, or the memory is empty or overlaps a registered region.
            UnsupportedError: memory of this kind was not declared.
        """
        self._check()
        if memory.kind not in self.capabilities.kinds:
            raise UnsupportedError(f"{self.adapter} does not register {memory.kind.value} memory")
        return self._registrations.add(memory, self._register)

    @final
    def deregister(self, registration: Registration) -> None:
        """Revoke a region.

        Raises:
            RegistrationError: unknown here, or a transfer (also a quarantined one) may still touch it.
        """
        self._check()
        if registration not in self._registrations:
            raise RegistrationError(f"{registration.memory} is not registered with {self.name}")
        if self._flights.touch(registration.memory):
            raise RegistrationError(f"a transfer may still touch {registration.memory}")
        self._deregister(registration.native, registration.memory)
        self._registrations.remove(registration)

    @final
    def describe(self) -> bytes:
        """This agent's description for a peer's `connect`. Carries no secrets."""
        self._check()
        description = Description(self.adapter, self.name, self._registrations.memories, self._describe())
        return msgspec.msgpack.encode(description)

    @final
    def connect(self, info: bytes) -> AgentPeer:
        """Connect to a peer. Idempotent; a newer description of the same peer replaces the older one.

        Raises:
            PeerInfoError: not a description, or of another adapter's agent.
            PeerConflictError: the engine knows another agent by this name, or it is our own.
            TransferFailedError: the engine raised something else.
        """
        self._check()
        description, regions = read_description(info)
        name = description.name
        if description.adapter != self.adapter:
            raise PeerInfoError(f"the peer moves bytes with {description.adapter!r}, this side with {self.adapter!r}")
        if name == self.name:
            raise OwnPeerError(f"{self.name!r} is this agent itself")
        known = self._peers.get(name)
        if known is not None and known.info == info:
            return known
        try:
            native = self._connect(name, description.native)
        except KvxferError:
            raise
        except Exception as error:  # an adapter's bug must fail this transfer by name
            raise TransferFailedError(f"{self.adapter} raised {type(error).__name__}: {error}") from error
        if known is None:
            known = AgentPeer(name, regions, native, info)
            self._peers[name] = known
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
        self._flights.give_up(peer, PeerUnknownError(f"{peer.name!r} was disconnected"))
        self._disconnect(peer.native)

    @final
    def submit(self, op: Op, peer: AgentPeer, *steps: Descriptors, deadline: float) -> Flight:
        """Start a transfer between local and the peer's memory.

        Args:
            op: READ copies remote to local.
            peer: from `connect` of this agent.
            steps: each begins when the one before is complete. Addresses in each owner's space; all of one step and side in
                memory of one kind and device.
            deadline: on `now`; a transfer that is still running then is given up and may be quarantined.

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
            flight.add_step(spans, self._registrations.table, self.capabilities)
        self._flights.start(flight)
        return flight

    @final
    def give_up(self, flight: Flight, error: KvxferError) -> None:
        """Give up a flight as if its deadline had passed: parts that the engine does not have yet are dropped. `poll` tells its end."""
        self._check()
        self._flights.give_up_one(flight, error)

    @final
    def drop(self, flight: Flight) -> None:
        """End a quarantined WRITE, which `poll` then returns. Memory that it reads is in use only as far as the engine sees to that."""
        self._check()
        self._flights.drop(flight)

    @final
    def poll(self) -> list[Flight]:
        """Drive the engine; return the flights whose state changed to DONE, FAILED or QUARANTINED since the last call.

        A quarantined flight is returned once more, as FAILED, when its memory has become quiet.
        """
        self._check()
        self._progress()
        return self._flights.poll()

    @property
    def has_parts_to_submit(self) -> bool:
        """The next `poll` would hand a part of a flight to the engine: poll without a pause."""
        return self._flights.have_parts_to_submit

    @property
    def quarantine_may_end(self) -> bool:
        """A quarantined flight is still with the engine, so that `poll` may find that it has ended."""
        return self._flights.quarantine_may_end

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._closed

    @property
    def quarantined(self) -> bool:
        """A flight may still write to local memory; only `close` is certain to end that."""
        return self._flights.quarantined

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
        self._registrations.clear()
        self._peers = {}
        return self._flights.end_all(ClosedError(f"agent {self.name!r} was closed"))

    def _check(self) -> None:
        self._check_thread()
        if self._closed:
            raise ClosedError(f"agent {self.name!r} is closed")

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise UnsupportedError(f"agent {self.name!r} belongs to another thread")
