# SPDX-License-Identifier: Apache-2.0
"""One run: requests, disturbances, and the checks of what must hold."""

from __future__ import annotations

import itertools
import logging
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from kvxfer.testing.sim.engine import Engine
from kvxfer.testing.sim.network import Network
from kvxfer.testing.sim.request import SimulatedRequest
from kvxfer.testing.sim.world import Profile, World

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from kvxfer.testing.sim.agent import VirtualAgent
    from kvxfer.testing.sim.process import Process

PROFILES: dict[str, Profile] = {
    "calm": Profile(),
    "lossy": Profile(lost=0.2, repeated=0.1, delay_s=0.3, cuts=3, reconnects=3),
    "slow": Profile(delay_s=1.0, copy_s=1.0, copy_late=0.05, device_s=0.5, drift=0.2, freezes=1),
    "stuck": Profile(
        delay_s=0.02,
        copy_lost=0.02,
        copy_late=0.06,
        copy_broken=0.03,
        copy_refused=0.02,
        unguarded=0.5,
        unmade=0.3,
        device_failed=0.02,
        cuts=1,
    ),
    "crashy": Profile(delay_s=0.02, copy_s=0.1, copy_broken=0.05, coupled=0.3, crashes=3, closes=2, freezes=3),
    "clocks": Profile(delay_s=0.1, copy_s=0.3, copy_late=0.02, freezes=4, drift=0.1, jumps=8),
    "silent": Profile(delay_s=0.02, copy_s=0.1, first_lost=0.2, silences=5),
    "all": Profile(
        lost=0.1,
        repeated=0.05,
        delay_s=0.4,
        copy_s=0.5,
        copy_lost=0.02,
        copy_late=0.03,
        copy_broken=0.03,
        copy_refused=0.01,
        unguarded=0.5,
        coupled=0.1,
        unmade=0.2,
        device_failed=0.01,
        device_s=0.2,
        crashes=1,
        closes=1,
        freezes=2,
        cuts=2,
        reconnects=2,
        drift=0.1,
        jumps=2,
    ),
}
PROFILES |= {
    f"{name}-written": replace(PROFILES[name], written=share)
    for name, share in (
        ("calm", 1.0),
        ("lossy", 1.0),
        ("stuck", 1.0),
        ("crashy", 0.7),
        ("clocks", 1.0),
        ("silent", 0.7),
        ("all", 0.7),
    )
}
"""With most engines' blocks written by their producers."""
PROFILES["late-written"] = Profile(
    late=0.2, repeated=0.05, delay_s=0.02, copy_s=0.4, copy_lost=0.02, copy_late=0.06, written=1.0
)

REQUESTS = 30
BUSY_S = 40.0
"""Seconds in which things go wrong."""
PROBES_S = (20.0, 50.0)
"""Seconds afterwards between which each engine has to serve each other one. A read may fail once,
where a message about another one's agent was lost, and has to succeed when it is tried again."""
LANDING_S, QUIET_S = 60.0, 180.0
"""Seconds afterwards in which abandoned copies may still land, and within which everything has to end."""
_STEP_S, _QUIET_STEP_S = 0.05, 0.25
_LAST_LINES = 40


class SimulationError(AssertionError):
    """Violation of an invariant. The message has the seed, the violation, and the events before it.

    Attributes:
        at: seconds since the beginning.
        finding: kind of the violation, in two or three words.
        what: the violation in one sentence.
        happened: names of the optional events that happened; see `World.happened`.
        trace: all events in order, with times.
    """

    def __init__(self, seed: int, at: float, finding: str, what: str, world: World) -> None:
        self.seed: int = seed
        self.at: float = at
        self.finding: str = finding
        self.what: str = what
        self.happened: list[str] = list(world.happened)
        self.trace: list[str] = list(world.trace)
        super().__init__("\n".join([f"seed {seed}, {at:.3f} s: {finding}: {what}", *self.trace[-_LAST_LINES:]]))


@dataclass
class SimulationReport:
    """Figures of one run.

    Attributes:
        requests: how many were begun.
        nbytes: bytes delivered, each of which was right.
        ends: transfers and leases by how they ended.
        faults: what went wrong, by kind.
        seen: messages, conversions and other things that occurred, by kind.
        happened: names of the optional events that happened; see `World.happened`.
        digest: equal for two runs with the same events.
    """

    seed: int
    requests: int = 0
    nbytes: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    happened: Sequence[str] = ()
    digest: int = 0


class _Listener(logging.Handler):
    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        where = traceback.extract_tb(error.__traceback__)[-1] if error is not None else None
        place = f" ({type(error).__name__}: {error}, {where.name}:{where.lineno})" if where else ""
        self._say(f"log: {record.getMessage()}{place}")


class Story:
    """One run. Use `run`."""

    def __init__(
        self,
        seed: int,
        profile: Profile,
        only: AbstractSet[str] | None = None,
        until: float = float("inf"),
    ) -> None:
        self.report: SimulationReport = SimulationReport(seed)
        self._until = until
        self.world: World = World(seed, profile, only)
        self.network: Network = Network(self.world)
        self.chance: random.Random = self.world.draw("story")
        self.noise: np.random.Generator = np.random.default_rng(seed)
        self.agents: dict[str, VirtualAgent] = {}
        self.engines: list[Engine] = []

    def say(self, text: str) -> None:
        """Add a line to the trace."""
        self.world.say(text)

    def fail(self, finding: str, what: str) -> NoReturn:
        """Raise SimulationError."""
        raise SimulationError(self.report.seed, self.world.now, finding, what, self.world)

    def tell(self) -> SimulationReport:
        """Run it from the first request to the end of everything."""
        with self._listening():
            try:
                self._tell()
            except SimulationError:
                raise
            except Exception as error:
                last = "".join(traceback.format_tb(error.__traceback__)[-3:])
                what = f"{error}\n{last}"
                raise SimulationError(
                    self.report.seed, self.world.now, f"{type(error).__name__} raised", what, self.world
                ) from error
        world = self.world
        self.report.faults, self.report.seen, self.report.digest = world.faults, world.seen, world.digest
        self.report.happened = list(world.happened)
        return self.report

    def _tell(self) -> None:
        world = self.world
        for name in ("a", "b", "c"):
            self.engines.append(Engine(self, name))
        bursts = [self.chance.uniform(0, BUSY_S * 0.9) for _ in range(2)]
        for number in range(REQUESTS):
            name = f"r{number + 1}"
            chance = world.draw(f"{name} begins")
            at = chance.choice(bursts) if chance.random() < 0.3 else chance.uniform(0, BUSY_S * 0.9)
            if world.chooses(name, 1.0):
                world.after(at, SimulatedRequest(self, name).begin)
        self._plan_disturbances()
        self._steps()
        world.run(min(BUSY_S, self._until))
        if world.now < self._until:
            self._come_to_an_end()

    def _come_to_an_end(self) -> None:
        world = self.world
        world.calm = True
        self.network.cut.clear()
        self.network.silent.clear()
        self.say("nothing goes wrong any more")
        for pair in itertools.permutations(self.engines, 2):
            name = f"probe from {pair[0].name} to {pair[1].name}"
            if world.chooses(name, 1.0):
                world.after(world.draw(name).uniform(*PROBES_S), SimulatedRequest(self, name, pair, tries=2).begin)
        over = BUSY_S + QUIET_S
        world.run(min(BUSY_S + LANDING_S, self._until))
        while world.now < min(over, self._until) and not all(engine.idle for engine in self.engines):
            world.run(min(world.now + 5.0, over))
        if world.now < self._until:
            for engine in self.engines:
                engine.check_over()
            for engine in self.engines:
                engine.check_closed()

    def _steps(self) -> None:
        world = self.world
        step_s = _QUIET_STEP_S if world.calm else _STEP_S
        for engine in self.engines:
            engine.poll(step_s)
            if engine.alive and int(world.now / 1.0) != int((world.now + step_s) / 1.0):
                for rank in engine.ranks:
                    rank.check_quiet(engine.free)
        world.after(step_s, self._steps)

    # -- disturbances

    def _plan_disturbances(self) -> None:
        profile = self.world.profile
        for kind, number in (
            ("crash", profile.crashes),
            ("close", profile.closes),
            ("freeze", profile.freezes),
            ("cut", profile.cuts),
            ("reconnect", profile.reconnects),
            ("silence", profile.silences),
            ("clock jump", profile.jumps),
        ):
            for i in range(number):
                chance = self.world.draw(f"{kind} {i + 1}")
                at = chance.uniform(1, BUSY_S)
                self.world.after(at, partial(self._disturb, kind, i + 1, chance))

    def _disturb(self, kind: str, number: int, chance: random.Random) -> None:
        engine, other = chance.sample(self.engines, 2)
        rank = chance.choice(engine.ranks)
        one_way, seconds = chance.random() < 0.4, chance.uniform(0.1, 18)
        between = f"{engine.name} and {other.name}"

        def strikes(what: str) -> bool:
            return self.world.strikes(kind, f"{number}, {what}", 1.0)

        if kind == "reconnect" and strikes(between):
            self.say(f"connections of {between} are made anew")
            self.network.reconnect(engine.name, other.name)
        elif kind == "cut" and strikes(f"{engine.name} to {other.name}" if one_way else between):
            ways = [(engine.name, other.name), (other.name, engine.name)]
            self._cut(set(ways[:1] if one_way else ways), seconds)
        elif kind == "silence" and strikes(between):
            self._silence((engine.name, other.name), seconds)
        elif kind == "crash" and engine.alive and strikes(engine.name):
            engine.crash()
        elif kind == "close" and engine.alive and strikes(engine.name):
            engine.close()
        elif kind == "freeze" and engine.alive and not rank.process.frozen and strikes(rank.process.label):
            self._freeze(rank.process, seconds, clock_stands=one_way)
        elif kind == "clock jump" and engine.alive and strikes(rank.process.label):
            self.say(f"the clock of {rank.process.name} jumps by {seconds:.1f} s")
            rank.process.jump(seconds)

    def _freeze(self, process: Process, seconds: float, *, clock_stands: bool) -> None:
        self.say(f"{process.name} is frozen for {seconds:.1f} s{', and its clock' if clock_stands else ''}")
        process.freeze(clock_stands=clock_stands)
        self.world.after(seconds, process.thaw)

    def _cut(self, ways: set[tuple[str, str]], seconds: float) -> None:
        self.say(f"cut for {seconds:.1f} s: {', '.join(f'{a} to {b}' for a, b in sorted(ways))}")
        self.network.cut |= ways

        def heal() -> None:
            self.network.cut -= ways

        self.world.after(seconds, heal)

    def _silence(self, way: tuple[str, str], seconds: float) -> None:
        self.say(f"the fabric of {way[0]} and {way[1]} is silent for {seconds:.1f} s")
        self.network.silent.add(way)
        self.network.silenced.add(way)
        self.world.after(seconds, lambda: self.network.silent.discard(way))

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Put errors that endpoints log into the trace only."""
        logger, listener = logging.getLogger("kvxfer"), _Listener(self.say)
        before, propagates = logger.level, logger.propagate
        logger.addHandler(listener)
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(listener)
            logger.setLevel(before)
            logger.propagate = propagates


def run(
    seed: int,
    profile: Profile | None = None,
    *,
    only: AbstractSet[str] | None = None,
    until: float = float("inf"),
) -> SimulationReport:
    """Run one simulation from beginning to end.

    Args:
        seed: of all chance.
        profile: what goes wrong; everything by default.
        only: names of what may happen (`World.happened`): the same run without the rest.
        until: stop there, in seconds since the beginning, without the checks at the end.

    Raises:
        SimulationError: an invariant was violated.
    """
    return Story(seed, profile if profile is not None else PROFILES["all"], only, until).tell()
