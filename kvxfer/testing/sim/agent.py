# SPDX-License-Identifier: Apache-2.0
"""A transfer agent of the simulator: copies real memory, a piece at a time, when the world says so."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from kvxfer.agent import Capabilities, Op, Reach, TransferAgent
from kvxfer.errors import PeerInfoError, PeerLostError, TransferFailedError
from kvxfer.memory import Descriptors, Memory, MemoryKind

if TYPE_CHECKING:
    from kvxfer.testing.sim.world import Process

_AFTERWARDS_S = 0.3
_PIECES = 4
"""Into which a copy is cut, so that it can be torn: lost, broken or overtaken half way."""


class _Copy:
    __slots__ = ("done", "error", "left")

    def __init__(self) -> None:
        self.done = False
        self.error: Exception | None = None
        self.left = 0


class VirtualAgent(TransferAgent):
    """Like an engine on RDMA: the owner of what is read has no part in it, and nothing but the end of an agent stops it.

    Args:
        name: see `TransferAgent`.
        process: that it lives in.
        agents: all that there are, by name.
    """

    adapter: ClassVar[str] = "virtual"
    capabilities: ClassVar[Capabilities] = Capabilities(
        ops=frozenset({Op.READ}),
        kinds=frozenset({MemoryKind.DRAM}),
        reach=Reach.NETWORK,
        quiet_on_abandon=False,
        remote_checked=False,
        detects_death=True,
        submit_copies=False,
    )

    def __init__(self, name: str, process: Process, agents: dict[str, VirtualAgent]) -> None:
        super().__init__(name)
        self.process = process
        self._agents = agents
        self._open = True
        agents[name] = self

    @property
    def reachable(self) -> bool:
        """Its memory can be read: also while its process is frozen."""
        return self._open and self.process.alive

    def _register(self, memory: Memory) -> object:
        return memory

    def _deregister(self, registration: object, memory: Memory) -> None:
        pass

    def _describe(self) -> bytes:
        return self.name.encode()

    def _connect(self, name: str, native: bytes) -> str:
        if native != name.encode():
            raise PeerInfoError(f"{name!r} is not described by {native!r}")
        return name

    def _disconnect(self, peer: object) -> None:
        pass

    def _submit(self, op: Op, peer: object, spans: Descriptors, local: Memory, remote: Memory) -> _Copy:  # noqa: ARG002
        world, copy = self.process.world, _Copy()
        profile = world.profile
        lost = world.chance("copy lost", profile.copy_lost)
        late = not lost and world.chance("copy late", profile.copy_late)
        broken = not lost and not late and world.chance("copy broken", profile.copy_broken)
        runs = list(zip(spans.local.tolist(), spans.remote.tolist(), spans.nbytes.tolist(), strict=True))
        pieces = [runs[i::_PIECES] for i in range(min(_PIECES, len(runs)))]
        world.random.shuffle(pieces)
        longest_s = 40.0 if late else profile.copy_s
        times = sorted(world.random.uniform(1e-5, longest_s) for _ in pieces)
        stop_at = world.random.randrange(len(pieces)) if lost or broken else len(pieces)
        copy.left = len(pieces)
        for number, (at, piece) in enumerate(zip(times, pieces, strict=True)):
            if number < stop_at or broken:
                # What an engine says has failed may land all the same, for a while.
                world.after(at if number < stop_at else at + _AFTERWARDS_S, partial(self._move, copy, str(peer), piece))
        if broken:
            world.after(times[stop_at], lambda: self._break(copy, TransferFailedError("broken off by the simulator")))
        return copy

    def _move(self, copy: _Copy, peer: str, piece: list[tuple[int, int, int]]) -> None:
        if not self.reachable:
            return
        owner = self._agents.get(peer)
        if owner is None or not owner.reachable:
            self._break(copy, PeerLostError(f"{peer!r} is gone"))
            return
        for here, there, nbytes in piece:
            ctypes.memmove(here, there, nbytes)
        copy.left -= 1
        if not copy.left:
            copy.done = True
            self.process.wake()

    def _break(self, copy: _Copy, error: Exception) -> None:
        copy.error = copy.error or error
        self.process.wake()

    def _poll(self, handle: object) -> bool:
        copy: _Copy = handle  # type: ignore[assignment]
        if copy.error is not None:
            raise copy.error
        return copy.done

    def _close(self) -> None:
        self._open = False
        self._agents.pop(self.name, None)
