# SPDX-License-Identifier: Apache-2.0
"""The reference agent: peers in the same process, bytes moved by memmove. For tests, trials and the conformance suite."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, ClassVar

from kvxfer.agents.base import TransferAgent
from kvxfer.agents.capabilities import Capabilities, LinkFacts, Op, Reach
from kvxfer.errors import PeerInfoError, PeerLostError, RegistrationError, TransferFailedError
from kvxfer.memory.spans import Descriptors, Memory, MemoryKind

if TYPE_CHECKING:
    from kvxfer.agents.description import AgentPeer

_lock = threading.Lock()
_agents: dict[str, InprocAgent] = {}


class InprocAgent(TransferAgent):
    """Moves bytes between agents of one process, in `submit`.

    Each transfer is complete when it was submitted, so none is ever in flight. The peer's registrations are checked at the
    moment of the copy, so a deregistered region is never touched.
    """

    adapter: ClassVar[str] = "inproc"
    capabilities: ClassVar[Capabilities] = Capabilities(
        ops=frozenset({Op.READ, Op.WRITE}),
        kinds=frozenset({MemoryKind.DRAM}),
        reach=Reach.PROCESS,
        quiet_on_abandon=True,
        remote_checked=True,
        detects_death=True,
    )

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._live: list[Memory] = []
        with _lock:
            if name in _agents:
                raise RegistrationError(f"an agent named {name!r} lives in this process already")
            _agents[name] = self

    def link_kind(self, peer: AgentPeer) -> str:  # noqa: ARG002
        """Kind of a copy within one process."""
        return "memory"

    def link_facts(self, peer: AgentPeer) -> LinkFacts:  # noqa: ARG002
        """Each copy looks whether the peer still has its memory registered."""
        return LinkFacts(cut_off_by_close=True)

    def _register(self, memory: Memory) -> None:
        with _lock:
            self._live.append(memory)

    def _deregister(self, registration: object, memory: Memory) -> None:  # noqa: ARG002
        with _lock:
            self._live.remove(memory)

    def _describe(self) -> bytes:
        return self.name.encode()

    def _connect(self, name: str, native: bytes) -> str:
        if native != name.encode():
            raise PeerInfoError(f"{name!r} is not described by {native!r}")
        return name

    def _disconnect(self, peer: object) -> None:
        pass

    def _submit(self, op: Op, peer: object, spans: Descriptors, local: Memory, remote: Memory) -> None:  # noqa: ARG002
        # The lock is held for the whole copy: a region cannot be deregistered half-way.
        with _lock:
            target = _agents.get(str(peer))
            if target is None:
                raise _GoneError(f"no agent {peer!r} in this process")
            here, there, nbytes = spans.local.tolist(), spans.remote.tolist(), spans.nbytes.tolist()
            for address, length in zip(there, nbytes, strict=True):
                if not any(m.address <= address and address + length <= m.end for m in target._live):  # noqa: SLF001 - of this class
                    raise _OutsideError(f"{address:#x}+{length} is not registered by {peer!r}")
            targets, sources = (here, there) if op is Op.READ else (there, here)
            for to, source, length in zip(targets, sources, nbytes, strict=True):
                ctypes.memmove(to, source, length)

    def _poll(self, handle: object) -> bool:  # noqa: ARG002
        return True

    def _abandon(self, handle: object) -> bool:  # noqa: ARG002
        return True

    def _close(self) -> None:
        with _lock:
            _agents.pop(self.name, None)
            self._live.clear()


class _OutsideError(TransferFailedError):
    """The peer has not registered the memory; no byte was moved."""

    quiet = True


class _GoneError(PeerLostError):
    """The peer does not exist; no byte was moved."""

    quiet = True
