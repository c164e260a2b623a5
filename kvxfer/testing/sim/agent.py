# SPDX-License-Identifier: Apache-2.0
"""The transfer agent of the simulator: it copies real memory, piece by piece, at times that the world draws.

It fails as real engines were seen to fail: a copy that was given up goes on, one that failed may land all the same,
deregistered memory is read without an error, a producer dies with its consumer, an agent cannot be made again at the first
try. Only the end of an agent stops the copies into its memory; what it has written to others may still be on its way then.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from kvxfer.agents.base import TransferAgent
from kvxfer.agents.capabilities import Capabilities, LinkFacts, Op, Reach
from kvxfer.errors import PeerInfoError, PeerLostError, TransferFailedError, UnavailableError
from kvxfer.memory.spans import Descriptors, Memory, MemoryKind
from kvxfer.testing.sim.network import FIRST_COPIES

if TYPE_CHECKING:
    from kvxfer.agents.description import AgentPeer
    from kvxfer.testing.sim.process import Process

_AFTERWARDS_S = 0.3
_LATE_S = 40.0
_PIECES = 4
"""Pieces of a copy, so that it can be torn: lost, broken or overtaken half way."""
_AGAIN_S = 0.2
_AT_ONCE_S = 0.1
"""Longest time for which a copy keeps the thread that asked for it."""


class _Copy:
    __slots__ = ("done", "error", "left", "op", "owner", "what")

    def __init__(self, what: str, op: Op, owner: str) -> None:
        self.what = what
        self.op = op
        self.owner = owner
        self.done = False
        self.error: Exception | None = None
        self.left = 0


class VirtualAgent(TransferAgent):
    """Agent that copies as RDMA does, or as a processor does if `at_once`: the producer takes no part in a copy.

    Args:
        name: see `TransferAgent`.
        process: its process.
        agents: all agents of the run so far, by name.

    Raises:
        UnavailableError: it cannot be made at this moment.

    Attributes:
        at_once: it copies within `submit`.
        met: names of the agents to which it is connected.
        is_open: it was not closed, and its process lives.
    """

    adapter: ClassVar[str] = "virtual"
    capabilities: ClassVar[Capabilities] = Capabilities(
        ops=frozenset({Op.READ, Op.WRITE}),
        kinds=frozenset({MemoryKind.DRAM}),
        reach=Reach.NETWORK,
        quiet_on_abandon=False,
        remote_checked=False,
        detects_death=False,
        max_descriptors=24,
    )

    def __init__(self, name: str, process: Process, agents: dict[str, VirtualAgent]) -> None:
        super().__init__(name)
        world = process.world
        which = world.number(f"agent of {process.name}")
        if not which.endswith("#1") and world.strikes("agent not made", which, world.profile.unmade):
            raise UnavailableError(f"{which} cannot be made: so the simulator says")
        self.process: Process = process
        self.at_once: bool = world.chooses(f"{process.name} copies at once", 0.3)
        self.met: set[str] = set()
        self._asked: Counter[str] = Counter()
        self._agents = agents
        self.is_open: bool = True
        self._under_way: dict[_Copy, None] = {}
        agents[name] = self
        process.deaths.append(self._ended)

    def _register(self, memory: Memory) -> object:
        return memory

    def _deregister(self, registration: object, memory: Memory) -> None:
        pass

    def _describe(self) -> bytes:
        return self.name.encode()

    def _connect(self, name: str, native: bytes) -> str:
        if native != name.encode():
            raise PeerInfoError(f"{name!r} is not described by {native!r}")
        self.met.add(name)
        return name

    def _disconnect(self, peer: object) -> None:
        self.met.discard(str(peer))

    def link_facts(self, peer: AgentPeer) -> LinkFacts:  # noqa: ARG002
        """See `TransferAgent`: nothing is written into the memory of an agent that is closed."""
        return LinkFacts(fate_shared=True, cut_off_by_close=True)

    def _submit(self, op: Op, peer: object, spans: Descriptors, local: Memory, remote: Memory) -> _Copy:  # noqa: ARG002
        world, profile, owner = self.process.world, self.process.world.profile, self._agents[str(peer)]
        how = "copies from" if op is Op.READ else "writes to"
        copy = _Copy(world.number(f"{self.process.label} {how} {owner.process.label}"), op, str(peer))
        chance = world.draw(copy.what)
        if world.strikes("copy refused", copy.what, profile.copy_refused, chance):
            world.say(f"{copy.what}: refused")
            raise TransferFailedError("refused by the simulator")
        lost = world.strikes("copy lost", copy.what, profile.copy_lost, chance)
        lost = self._loses_first(owner.process) or lost
        late = not lost and world.strikes("copy late", copy.what, profile.copy_late, chance)
        broken = not lost and not late and world.strikes("copy broken", copy.what, profile.copy_broken, chance)
        fate = "lost half way" if lost else "late" if late else "broken off" if broken else ""
        runs = list(zip(spans.local.tolist(), spans.remote.tolist(), spans.nbytes.tolist(), strict=True))
        world.say(f"{copy.what}: {spans.total_nbytes} bytes in {len(runs)} runs{fate and f', {fate}'}")
        pieces = [runs[i::_PIECES] for i in range(min(_PIECES, len(runs)))]
        chance.shuffle(pieces)
        longest_s = _LATE_S if late else profile.copy_s
        times = sorted(world.delay_s(chance, longest_s) if not late else chance.uniform(0, _LATE_S) for _ in pieces)
        stop_at = chance.randrange(len(pieces)) if lost or broken else len(pieces)
        copy.left = len(pieces)
        self._under_way[copy] = None
        if self.at_once and not fate:
            self.process.block(world.delay_s(chance, min(profile.copy_s, _AT_ONCE_S)))
        for number, (at, piece) in enumerate(zip(times, pieces, strict=True)):
            if not fate and self.at_once:
                self._move(copy, piece)
            elif number < stop_at or broken:
                # Bytes of a copy that is said to have failed may land for a while.
                world.after(at if number < stop_at else at + _AFTERWARDS_S, partial(self._move, copy, piece))
        if broken:
            world.after(times[stop_at], lambda: self._break(copy, TransferFailedError("broken off by the simulator")))
        return copy

    def _loses_first(self, owner: Process) -> bool:
        """Whether this copy from another process, the first one, which also connects to it, or the second one, is lost."""
        number = self._asked[owner.name]
        self._asked[owner.name] += 1
        if number >= len(FIRST_COPIES):
            return False
        pair, kind, world = (self.process.name, owner.name), FIRST_COPIES[number], self.process.world
        lost = self.process.network.lost_first[kind]
        if pair in lost or not world.strikes(kind, " from ".join(pair), world.profile.first_lost):
            return False
        lost.add(pair)
        return True

    def _move(self, copy: _Copy, piece: list[tuple[int, int, int]]) -> None:
        owner, world = self._agents[copy.owner], self.process.world
        if copy.op is Op.WRITE:
            self._write(copy, piece, owner)
            return
        if not self.is_open or not self.process.alive:
            return
        if self.process.network.stalled(self.process.label, owner.process.label):
            world.after(_AGAIN_S, partial(self._move, copy, piece))
        elif not owner.process.alive:
            if not world.strikes("death not noticed", copy.what, world.profile.copy_lost):
                self._break(copy, PeerLostError(f"{copy.owner!r} is gone"))
        elif not owner.is_open and not world.strikes("withdrawn memory read", copy.what, world.profile.unguarded):
            self._break(copy, PeerLostError(f"{copy.owner!r} has deregistered its memory"))
        else:
            for here, there, nbytes in piece:
                ctypes.memmove(here, there, nbytes)
            self._moved(copy)

    def _write(self, copy: _Copy, piece: list[tuple[int, int, int]], target: VirtualAgent) -> None:
        """Move a piece of a WRITE. The end of this agent does not call back what is on its way, the end of the target's agent does."""
        if not target.process.alive or not target.is_open:
            self._break(copy, PeerLostError(f"{copy.owner!r} is gone"))
        elif self.process.network.stalled(self.process.label, target.process.label):
            self.process.world.after(_AGAIN_S, partial(self._move, copy, piece))
        else:
            for here, there, nbytes in piece:
                ctypes.memmove(there, here, nbytes)
            self._moved(copy)

    def _moved(self, copy: _Copy) -> None:
        copy.left -= 1
        if not copy.left:
            copy.done = True
            self._under_way.pop(copy, None)
            self.process.wake()

    def _break(self, copy: _Copy, error: Exception) -> None:
        if copy.error is None and self.is_open and self.process.alive:
            self.process.world.say(f"{copy.what}: {error}")
            copy.error = error
            self.process.wake()

    def _poll(self, handle: object) -> bool:
        copy: _Copy = handle  # type: ignore[assignment]
        if copy.error is not None:
            self._under_way.pop(copy, None)
            raise copy.error
        return copy.done

    def _close(self) -> None:
        self._ended()

    def _ended(self) -> None:
        """End the agent, closed or dead with its process: over some transports the producers of its copies die with it."""
        if not self.is_open:
            return
        self.is_open = False
        world = self.process.world
        for copy in self._under_way:
            owner = self._agents[copy.owner].process
            if (
                copy.op is Op.READ
                and owner.alive
                and world.strikes("owner dies with its reader", copy.what, world.profile.coupled)
            ):
                world.after(1e-3, owner.fatal)
        self._under_way.clear()
