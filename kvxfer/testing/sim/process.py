# SPDX-License-Identifier: Apache-2.0
"""A process of the simulator: the `Environment` of one endpoint, with a clock of its own; it can freeze and die."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvxfer.protocol.versions import SPOKEN, ProtocolVersions
from kvxfer.testing.sim.network import VirtualChannel

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.runtime.environment import Loop
    from kvxfer.testing.sim.network import Network
    from kvxfer.testing.sim.world import World

_MOST_TURNS = 100_000
"""Most turns of one loop in one moment: more means that it spins."""


class SpinsError(RuntimeError):
    """A loop is due again and again, without end."""


class Process:
    """A simulated process. Its loops get no turns while it is frozen, and none after it has died.

    Args:
        network: its network.
        label: of its place, ``a0`` for the first rank of engine ``a``; a process that replaces it has the same one.
        life: number of processes at that place so far, with this one.

    Attributes:
        fatal: called when another process or the machine kills it.
        deaths: functions to call when it dies.
    """

    def __init__(self, network: Network, label: str, life: int) -> None:
        self.network: Network = network
        self.world: World = network.world
        world = self.world
        self.label: str = label
        self.name: str = f"{label}.{life}"
        self.address: str = network.address(label)
        self.alive: bool = True
        self.frozen: bool = False
        self.fatal: Callable[[], object] = self.die
        self.deaths: list[Callable[[], object]] = []
        chance = world.draw(f"clock of {self.name}")
        drifts = world.profile.drift and world.chooses(f"the clock of {self.name} drifts", 1.0)
        self._pace = 1.0 + (chance.uniform(-1, 1) * world.profile.drift if drifts else 0.0)
        # Clocks are independent: a time of one process means nothing in another.
        self._shown = chance.uniform(1e3, 1e6)
        self._since = world.now
        self._stands = False
        self._slice_s = 10 ** chance.uniform(-2.5, -1.3)
        # A fleet in the middle of an update: some processes are of this version, others of the one before or the one after.
        others = (
            ProtocolVersions(SPOKEN.lowest, SPOKEN.highest - 1),
            ProtocolVersions(SPOKEN.highest, SPOKEN.highest + 1),
        )
        other = world.draw("versions").choice(others)
        self.spoken: ProtocolVersions = world.draw(f"version of {self.name}").choice((SPOKEN, other))
        self._loops: list[Loop] = []
        self._turning: Loop | None = None
        self._busy_until: dict[Loop, float] = {}
        self._scheduled: float | None = None

    # -- its clock

    def now(self) -> float:
        """See `Environment`."""
        return self._shown if self._stands else self._shown + (self.world.now - self._since) * self._pace

    def jump(self, seconds: float) -> None:
        """Move the clock forward at once."""
        self._shown, self._since = self.now() + seconds, self.world.now
        self.wake()

    # -- its loops

    def channel(self, bind: str, **_: Any) -> VirtualChannel:  # noqa: ARG002
        """See `Environment`."""
        return VirtualChannel(self)

    def run(self, name: str, loop: Loop) -> Process:  # noqa: ARG002
        """See `Environment`."""
        loop.begin()
        self._loops.append(loop)
        self.wake()
        return self

    def join(self, timeout_s: float | None = None) -> None:  # noqa: ARG002
        """See `Running`: a loop that was told to end does so now."""
        for loop in list(self._loops):
            for _ in range(_MOST_TURNS):
                if loop.over or loop.due_s() != 0.0:
                    break
                loop.turn(0.0)
            if loop.over and loop in self._loops:
                self._loops.remove(loop)
                loop.end()

    def join_at_exit(self) -> None:
        """See `Running`: the loops of this process have no threads that could run while the interpreter ends."""

    def block(self, seconds: float) -> None:
        """Keep the loop whose turn it is busy for so long; the others go on."""
        if self._turning is not None:
            begin = max(self._busy_until.get(self._turning, 0.0), self.world.now)
            self._busy_until[self._turning] = begin + seconds

    def wake(self, seconds: float = 0.0) -> None:
        """Give the loops their turns after so many seconds, or earlier if turns are due earlier."""
        at = self.world.now + seconds
        if self.alive and (self._scheduled is None or at < self._scheduled):
            self._scheduled = at
            self.world.after(seconds, lambda: self._turns(at))

    # -- its life

    def freeze(self, *, clock_stands: bool) -> None:
        """Stop the process; its memory can still be read. ``clock_stands``: its clock stops too, as on a suspended machine."""
        self._shown, self._since, self._stands = self.now(), self.world.now, clock_stands
        self.frozen = True

    def thaw(self) -> None:
        """End of `freeze`."""
        self._shown, self._since, self._stands = self.now(), self.world.now, False
        self.frozen = False
        self.wake()

    def die(self) -> None:
        """End it without a message to its peers."""
        if self.alive:
            self.alive = False
            self._loops.clear()
            for told in self.deaths:
                told()

    def _turns(self, at: float) -> None:
        if at != self._scheduled:
            return
        self._scheduled = None
        if not self.alive or self.frozen:
            return
        for _ in range(_MOST_TURNS):
            for loop in list(self._loops):
                if self._busy_s(loop) <= 0.0:
                    self._turning = loop
                    loop.turn(0.0)
                    self._turning = None
            dues = [busy_s if (busy_s := self._busy_s(loop)) > 0.0 else loop.due_s() for loop in self._loops]
            if 0.0 not in dues:
                break
        else:
            raise SpinsError(f"a loop of {self.name} spins")
        waits = [due_s for due_s in dues if due_s is not None]
        if waits:
            # A busy system wakes a sleeping process late, and a process with a message at once.
            self.wake(max(min(waits) / self._pace, self._slice_s) + 1e-6)

    def _busy_s(self, loop: Loop) -> float:
        return self._busy_until.get(loop, 0.0) - self.world.now
