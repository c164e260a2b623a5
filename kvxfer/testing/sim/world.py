# SPDX-License-Identifier: Apache-2.0
"""The world: one clock, one source of chance, a network, and processes that get their turns from it."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvxfer import wire
from kvxfer.control import Inbound
from kvxfer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.host import Loop

_MOST_TURNS = 100_000
"""Of one loop in one moment: more means that it spins."""


@dataclass(frozen=True)
class Profile:
    """How much goes wrong. Probabilities of single things, and seconds.

    Attributes:
        lost, repeated: messages.
        delay_s: longest way of a message; each takes its own time, so that they overtake each other.
        copy_s: longest time of a copy.
        copy_lost: copies that never end; ``copy_late``: that end long after they were given up; ``copy_broken``: that break
            off half way.
        crashes, freezes, cuts: of processes, and of the way between two, in a run.
        drift: by how much clocks run too fast or too slow, as a share.
    """

    lost: float = 0.0
    repeated: float = 0.0
    delay_s: float = 0.002
    copy_s: float = 0.005
    copy_lost: float = 0.0
    copy_late: float = 0.0
    copy_broken: float = 0.0
    crashes: int = 0
    freezes: int = 0
    cuts: int = 0
    drift: float = 0.0


class World:
    """Time and chance.

    Attributes:
        now: seconds since the beginning.
        faults: what went wrong so far, by kind.
        calm: nothing goes wrong any more.
        digest: of all that happened, and when.
        trace: what happened last, for people.
    """

    def __init__(self, seed: int, profile: Profile) -> None:
        self.random: random.Random = random.Random(seed)  # noqa: S311 - the same chance in every run is the point
        self.profile = profile
        self.now: float = 0.0
        self.calm: bool = False
        self.digest: int = 0
        self.faults: Counter[str] = Counter()
        self.trace: deque[str] = deque(maxlen=60)
        self.channels: dict[str, VirtualChannel] = {}
        self.cut: set[frozenset[str]] = set()
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()

    def say(self, text: str) -> None:
        """Note something for the trace."""
        self.trace.append(f"{self.now:10.4f}  {text}")

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Do something later."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), act))

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until:
            at, number, act = heapq.heappop(self._events)
            self.now = max(self.now, at)
            self.digest = hash((self.digest, at, number))
            act()
        self.now = until

    def chance(self, kind: str, probability: float) -> bool:
        """Whether this goes wrong now."""
        if self.calm or self.random.random() >= probability:
            return False
        self.faults[kind] += 1
        return True

    def carry(self, source: str, target: str, data: bytes, deliver: Callable[[bytes], object]) -> None:
        """A message on its way from one address to another."""
        profile = self.profile
        self.digest = hash((self.digest, len(data)))
        if frozenset((source, target)) in self.cut:
            self.faults["message cut off"] += 1
            return
        if self.chance("message lost", profile.lost):
            return
        for _ in range(2 if self.chance("message repeated", profile.repeated) else 1):
            self.after(self.random.uniform(1e-5, profile.delay_s), lambda: deliver(data))


class Process:
    """One process: the `Host` of its endpoint. Frozen it gets no turns, dead it never gets any again."""

    def __init__(self, world: World, name: str, address: str) -> None:
        self.world = world
        self.name = name
        self.address = address
        self.alive: bool = True
        self.frozen: bool = False
        self._pace = 1.0 + world.random.uniform(-1, 1) * world.profile.drift
        self._loops: list[Loop] = []
        self._scheduled: float | None = None

    def now(self) -> float:
        """See `Host`."""
        return 1000.0 + self.world.now * self._pace

    def channel(self, bind: str, **_: Any) -> VirtualChannel:  # noqa: ARG002
        """See `Host`."""
        return VirtualChannel(self)

    def run(self, name: str, loop: Loop) -> Process:  # noqa: ARG002
        """See `Host`."""
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

    def wake(self, seconds: float = 0.0) -> None:
        """Give the loops their turns that much later, or earlier if that is due."""
        at = self.world.now + seconds
        if self.alive and (self._scheduled is None or at < self._scheduled):
            self._scheduled = at
            self.world.after(seconds, lambda: self._turns(at))

    def freeze(self, *, frozen: bool) -> None:
        """Stop it, or let it go on."""
        self.frozen = frozen
        if not frozen:
            self.wake()

    def die(self) -> None:
        """Without a word to anybody."""
        self.alive = False
        self._loops.clear()

    def _turns(self, at: float) -> None:
        if at != self._scheduled:
            return
        self._scheduled = None
        if not self.alive or self.frozen:
            return
        for _ in range(_MOST_TURNS):
            ready = [loop for loop in self._loops if loop.due_s() == 0.0]
            for loop in ready or self._loops:
                loop.turn(0.0)
            if not ready and all(loop.due_s() != 0.0 for loop in self._loops):
                break
        else:
            raise RuntimeError(f"a loop of {self.name} spins")
        waits = [due_s for loop in self._loops if (due_s := loop.due_s()) is not None]
        if waits:
            self.wake(min(waits) / self._pace + 1e-6)


class VirtualChannel:
    """`kvxfer.control.Channel` through the world's network. What goes over it is what would go over TCP: bytes."""

    def __init__(self, process: Process) -> None:
        self.address: str = process.address
        self.process = process
        self._inbox: deque[Inbound] = deque()
        self.callers: dict[bytes, VirtualChannel] = {}
        self.made: dict[str, bytes] = {}
        """Its connections by the address that they lead to, each under a name of its own."""
        self._numbers = itertools.count()
        process.world.channels[self.address] = self

    def wake(self) -> None:
        """See `Channel`."""
        self.process.wake()

    def send(self, address: str, message: wire.Message) -> None:
        """See `Channel`."""
        if not address.startswith("tcp://"):
            raise ConfigError(f"cannot connect to {address!r}")
        data, world = wire.encode(message), self.process.world

        def deliver(data: bytes) -> None:
            target = world.channels.get(address)
            if target is not None and target.process.alive:
                connection = self.made.setdefault(address, f"{self.process.name}#{next(self._numbers)}".encode())
                target.callers[connection] = self
                target.take(connection, data)

        world.carry(self.address, address, data, deliver)

    def reply(self, connection: bytes, message: wire.Message) -> None:
        """See `Channel`."""
        caller = self.callers.get(connection)
        if caller is not None:
            data, world = wire.encode(message), self.process.world

            def deliver(data: bytes) -> None:
                if caller.process.alive and caller.made.get(self.address) == connection:
                    caller.take(self.address, data)

            world.carry(self.address, caller.address, data, deliver)

    def hangup(self, address: str) -> None:
        """See `Channel`."""
        self.made.pop(address, None)

    def receive(self, timeout_s: float | None) -> list[Inbound]:  # noqa: ARG002
        """See `Channel`."""
        arrived, self._inbox = list(self._inbox), deque()
        return arrived

    def close(self) -> None:
        """See `Channel`."""
        if self.process.world.channels.get(self.address) is self:
            del self.process.world.channels[self.address]

    def take(self, source: bytes | str, data: bytes) -> None:
        """A message has arrived."""
        self._inbox.append(Inbound(source, wire.decode(data)))
        self.process.wake()
