# SPDX-License-Identifier: Apache-2.0
"""Mooncake's transfer engine as a kvxfer transfer agent; docs/mooncake.md says what it costs and where NIXL is the better choice."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from kvxfer.agents.base import TransferAgent
from kvxfer.agents.capabilities import Capabilities, Op, Reach
from kvxfer.errors import PeerConflictError, PeerInfoError, RegistrationError
from kvxfer.memory.spans import Descriptors, Memory, MemoryKind
from kvxfer_mooncake import _module
from kvxfer_mooncake._engine import MooncakeEngine, engine_for_contacts, moves_by_tcp
from kvxfer_mooncake._options import MooncakeOptions
from kvxfer_mooncake._window import FirstContact, PieceQueue, SendWindow

if TYPE_CHECKING:
    from kvxfer.agents.description import AgentPeer
    from kvxfer.agents.ports import Port

_log = logging.getLogger("kvxfer.mooncake")

WINDOW = 128
"""Pieces of one peer that are with the engine: more are no faster, and 1,024 is where Mooncake's own queue ends."""

PIECE_NBYTES = 1 << 20
"""One span of 64 MiB moves at 1.8 GB/s in pieces of 1 MiB, at 1.0 GB/s in pieces of 64 KiB (loopback)."""

_warned_of_ports = False


class MooncakeDescription(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """This adapter's part of an agent's description.

    Attributes:
        name: of the agent.
        session: address and port of its engine, which is all that Mooncake knows of a peer.
        ports: all ports on which the engine listens.
        incarnation: of the engine; another engine may get the same ports later.
    """

    name: str
    session: str
    ports: frozenset[int]
    incarnation: bytes

    def shares_a_port(self, other: MooncakeDescription) -> bool:
        """Whether Mooncake could take one for the other: they have had a port of one host, at different times."""
        return self.session.rpartition(":")[0] == other.session.rpartition(":")[0] and not self.ports.isdisjoint(
            other.ports
        )


class MooncakePeer:
    """A connected peer: what it told of itself, and what moves from and to it."""

    __slots__ = ("told", "window")

    def __init__(self, told: MooncakeDescription, window: SendWindow) -> None:
        self.told, self.window = told, window


class MooncakeAgent(TransferAgent):
    """Moves bytes with Mooncake's transfer engine, between processes and hosts, from and to DRAM.

    Args:
        name: see `TransferAgent`.
        host: address by which peers reach this machine; by default that of its route to others, 127.0.0.1 with
            ``loopback_only``. An address that other machines reach takes precedence over ``loopback_only``.
        window: most pieces of one peer that are with the engine at a time. What a frozen peer has of it stays with the engine
            for 8 s for each piece.
        piece_nbytes: longest span that is handed to the engine at a time.
        max_submit_nbytes: longest part of a transfer, see `Capabilities`.
        loopback_only: let no other machine connect to the engine's ports, where the kernel can do that (Linux 5.7).
            `Endpoint` passes False where its control address is reached from other machines.
        port_range: TCP ports that Mooncake may listen on, such as ``"20000-20099"``, one range for the whole process.

    Raises:
        ConfigError: an option is unknown or out of range, or Mooncake's environment has a setting that cannot be used.
        UnavailableError: Mooncake is not installed, or does not start here.
    """

    adapter: ClassVar[str] = "mooncake"
    capabilities: ClassVar[Capabilities] = Capabilities(
        ops=frozenset({Op.READ, Op.WRITE}),
        kinds=frozenset({MemoryKind.DRAM}),
        reach=Reach.NETWORK,
        quiet_on_abandon=False,
        remote_checked=True,
        detects_death=True,
        max_descriptors=1024,
        max_submit_nbytes=64 << 20,
    )

    @classmethod
    def why_unavailable(cls) -> str | None:
        """Reason why Mooncake cannot be imported here, as far as that can be told without the import; None if it can."""
        return _module.why_unavailable()

    def __init__(
        self,
        name: str,
        *,
        host: str | None = None,
        window: int = WINDOW,
        piece_nbytes: int = PIECE_NBYTES,
        max_submit_nbytes: int | None = 64 << 20,
        loopback_only: bool = True,
        port_range: str | None = None,
        **unknown: object,
    ) -> None:
        given = {
            "host": host,
            "window": window,
            "piece_nbytes": piece_nbytes,
            "max_submit_nbytes": max_submit_nbytes,
            "loopback_only": loopback_only,
            "port_range": port_range,
        }
        options = MooncakeOptions.of(given | unknown)
        self._host, self._confined = options.reach()
        super().__init__(name)
        self.module = _module.load(options.ports)
        """Mooncake, as it was imported."""
        self._opcodes = {Op.READ: self.module.engine.Read, Op.WRITE: self.module.engine.Write}
        self._contacts = engine_for_contacts(self.module)
        self._engines: list[MooncakeEngine] = [self._new_engine()]
        self.loopback_only = self._engines[0].loopback_only
        self.ports: tuple[Port, ...] = self._engines[0].ports
        """TCP ports on which its engine listens."""
        self._warn_of_open_ports()
        self._incarnation = os.urandom(8)
        self._size, self._piece_nbytes = options.window, options.piece_nbytes
        self._registered: list[Memory] = []
        self._windows: dict[MooncakeDescription, SendWindow] = {}
        self._by_tcp = moves_by_tcp()
        # What the class declares holds for the defaults only.
        vars(self)["capabilities"] = replace(type(self).capabilities, max_submit_nbytes=options.max_submit_nbytes)

    def explain(self, peer: AgentPeer) -> str:  # noqa: ARG002
        """Version of Mooncake, and the transport that it takes."""
        return f"mooncake {self.module.version}, {'TCP' if self._by_tcp else 'RDMA'}"

    def link_kind(self, peer: AgentPeer) -> str:  # noqa: ARG002
        """The transport that Mooncake takes, to all peers alike."""
        return "tcp" if self._by_tcp else "rdma"

    @property
    def outstanding(self) -> int:
        """Pieces of all peers that are with the engine."""
        return sum(window.outstanding for window in self._windows.values())

    # -- start ------------------------------------------------------------------------------------------------------

    def _new_engine(self) -> MooncakeEngine:
        return MooncakeEngine(self.module, self._host, loopback_only=self._confined)

    def _warn_of_open_ports(self) -> None:
        global _warned_of_ports  # noqa: PLW0603 - once in a process
        if self.loopback_only or _warned_of_ports:
            return
        _warned_of_ports = True
        _log.warning(
            "Mooncake listens on %s, where it asks for no key and no secret: a process that can connect there can read and write all "
            "memory that is registered. Let only the servers of this fleet connect (a firewall and the option port_range, or a network "
            "of their own); see docs/security.md",
            ", ".join(map(str, self.ports)),
        )

    # -- memory and peers -------------------------------------------------------------------------------------------

    def _register(self, memory: Memory) -> None:
        for engine in self._engines:
            _register(engine, memory)
        self._registered.append(memory)

    def _deregister(self, registration: object, memory: Memory) -> None:  # noqa: ARG002
        for engine in self._engines:
            status = engine.native.unregister_memory(memory.address)
            if status != 0:
                raise RegistrationError(f"Mooncake refuses to deregister {memory} (status {status})")
        self._registered.remove(memory)

    def _describe(self) -> bytes:
        ports = frozenset(port.number for port in self.ports)
        return msgspec.msgpack.encode(
            MooncakeDescription(self.name, self._engines[0].session, ports, self._incarnation)
        )

    def _connect(self, name: str, native: bytes) -> MooncakePeer:
        try:
            told = msgspec.msgpack.decode(native, type=MooncakeDescription)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise PeerInfoError(f"cannot read Mooncake's part of the description of {name!r}: {error}") from error
        if told.name != name:
            raise PeerInfoError(f"the description of {name!r} contains Mooncake's address of {told.name!r}")
        known: MooncakePeer | None = self._peers[name].native if name in self._peers else None
        if known is None:
            window = self._window_of(told)
            window.wanted = True
            return MooncakePeer(told, window)
        if known.told != told:
            raise PeerConflictError(
                f"another agent is known by the name {name!r}, at {known.told.session}: disconnect that one first"
            )
        return known

    def _window_of(self, told: MooncakeDescription) -> SendWindow:
        """The window of this incarnation of an engine.

        Mooncake knows an engine by its ports and forgets none: what it has learned of one that is gone, and its connections
        to it, it would use with another one on the same ports. Such a successor is therefore reached from another engine of
        ours.
        """
        window = self._windows.get(told)
        if window is None:
            taken = [window.engine for other, window in self._windows.items() if other.shares_a_port(told)]
            engine = next((engine for engine in self._engines if engine not in taken), None) or self._another_engine()
            window = self._windows[told] = SendWindow(engine, told.session, self._size, self._ask, quiet=self._by_tcp)
        return window

    def _another_engine(self) -> MooncakeEngine:
        self._end_idle_engines()
        engine = self._new_engine()
        for memory in self._registered:
            _register(engine, memory)
        self._engines.append(engine)
        return engine

    def _ask(self, session: str) -> FirstContact:
        return FirstContact(self._contacts, session)

    def _disconnect(self, peer: Any) -> None:
        # Mooncake forgets no peer: its sockets stay until the engine ends.
        peer.window.wanted = False
        self._end_idle_engines()

    def _end_idle_engines(self) -> None:
        """End the engines, other than the one that peers reach, on which no peer is connected and nothing moves."""
        busy = {id(self._engines[0])} | {
            id(window.engine) for window in self._windows.values() if window.wanted or window.outstanding
        }
        for engine in [engine for engine in self._engines if id(engine) not in busy]:
            engine.close()
            self._engines.remove(engine)
            self._windows = {told: window for told, window in self._windows.items() if window.engine is not engine}

    # -- transfers --------------------------------------------------------------------------------------------------

    def _submit(self, op: Op, peer: Any, spans: Descriptors, local: Memory, remote: Memory) -> Any:  # noqa: ARG002
        transfer = PieceQueue(self._opcodes[op], spans, self._piece_nbytes)
        peer.window.add(transfer)
        return peer.window, transfer

    def _progress(self) -> None:
        for window in self._windows.values():
            window.advance()

    def _poll(self, handle: Any) -> bool:
        _, transfer = handle
        if not transfer.ended:
            return False
        if transfer.error is not None:
            raise transfer.error
        return True

    def _abandon(self, handle: Any) -> bool:
        window, transfer = handle
        window.give_up(transfer)
        return transfer.ended and (transfer.error is None or transfer.error.quiet)

    def _close(self) -> None:
        self._windows.clear()
        for engine in self._engines:
            engine.close()


def _register(engine: MooncakeEngine, memory: Memory) -> None:
    status = engine.native.register_memory(memory.address, memory.nbytes)
    if status != 0:
        raise RegistrationError(f"Mooncake refuses to register {memory} (status {status})")
