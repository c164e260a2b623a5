# SPDX-License-Identifier: Apache-2.0
"""What happens in one run: engines that lease, read, seal, abort, crash and come back; and what must hold whatever happens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import numpy as np

from kvxfer.lease import LeaseRef
from kvxfer.testing.sim.engine import TOKENS, Engine, Fetching, Kernel, Serving
from kvxfer.testing.sim.world import Process, Profile, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.testing.sim.agent import VirtualAgent

PROFILES: dict[str, Profile] = {
    "calm": Profile(),
    "lossy": Profile(lost=0.2, repeated=0.1, delay_s=0.3, cuts=2),
    "slow": Profile(delay_s=1.0, copy_s=1.0, copy_late=0.05, drift=0.2),
    "stuck": Profile(delay_s=0.02, copy_lost=0.02, copy_late=0.08, copy_broken=0.03),
    "crashy": Profile(crashes=3, freezes=3, copy_broken=0.05, delay_s=0.02),
    "all": Profile(0.1, 0.05, 0.4, 0.5, 0.02, 0.03, 0.03, 2, 2, 1, 0.1),
}

BUSY_S, QUIET_S = 40.0, 400.0
"""How long things go wrong, and how long afterwards everything may take to come to its end."""


class SimulationError(AssertionError):
    """Something that must hold did not: says the seed, what, and what happened before."""


@dataclass
class Report:
    """What one run was like.

    Attributes:
        ends: transfers and leases by how they ended.
        faults: what went wrong, by kind.
        digest: equal for two runs in which the same happened.
    """

    seed: int
    requests: int = 0
    nbytes: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    digest: int = 0


class Story:
    """One run. Use `run`."""

    def __init__(self, seed: int, profile: Profile) -> None:
        self.report: Report = Report(seed)
        self.world: World = World(seed, profile)
        self.noise: np.random.Generator = np.random.default_rng(seed)
        self.agents: dict[str, VirtualAgent] = {}
        self.engines: list[Engine] = [Engine(self, name) for name in ("a", "b", "c")]

    def say(self, text: str) -> None:
        """For the trace."""
        self.world.say(text)

    def fail(self, what: str) -> NoReturn:
        """Raises SimulationError."""
        story = "\n".join(self.world.trace)
        raise SimulationError(f"seed {self.report.seed}, {self.world.now:.3f} s: {what}\n{story}")

    def tell(self) -> Report:
        """All of it, from the first request to the last thing that comes to its end."""
        world, random = self.world, self.world.random
        for _ in range(30):
            world.after(random.uniform(0, BUSY_S * 0.9), self._request)
        for kind, number in (
            ("crash", world.profile.crashes),
            ("freeze", world.profile.freezes),
            ("cut", world.profile.cuts),
        ):
            for _ in range(number):
                world.after(random.uniform(1, BUSY_S), partial(self._disturb, kind))
        self._steps()
        world.run(BUSY_S)
        world.calm = True
        world.cut.clear()
        world.run(BUSY_S + QUIET_S)
        for engine in self.engines:
            engine.check_over()
            engine.endpoint.close()
            engine.poll()
        self.report.faults, self.report.digest = world.faults, world.digest
        return self.report

    def _steps(self) -> None:
        for engine in self.engines:
            engine.poll()
            for fetching in engine.fetching.values():
                if self.world.now > fetching.deadline and engine.process.alive and not engine.process.frozen:
                    self.fail(f"a read of {engine.process.name} did not end in time: {fetching.transfer}")
        self.world.after(0.05, self._steps)

    def _disturb(self, kind: str) -> None:
        random = self.world.random
        engine = random.choice(self.engines)
        self.world.faults[kind] += 1
        if kind == "crash":
            engine.crash()
        elif kind == "freeze":
            engine.freeze(random.uniform(0.1, 12))
        else:
            other = random.choice([each for each in self.engines if each is not engine])
            pair = frozenset((engine.address, other.address))
            self.say(f"{engine.name} and {other.name} do not hear each other")
            self.world.cut.add(pair)
            self.world.after(random.uniform(0.5, 8), lambda: self.world.cut.discard(pair))

    # -- requests

    def _request(self) -> None:
        random = self.world.random
        source, sink = random.sample(self.engines, 2)
        number = random.randint(1, 5)
        if source.process.frozen or (blocks := source.take(number)) is None:
            return
        self.report.requests += 1
        key = f"r{self.report.requests}"
        both = random.random() < 0.5
        mint: dict[str, Any] = {"owner": source.endpoint.name, "addresses": [source.address], "request": key}
        # A token made of the seed's chance: the same in every run.
        minted = msgspec.structs.replace(LeaseRef.mint(**mint), token=f"{random.getrandbits(128):032x}")
        ref = LeaseRef.shared(key, **mint) if both else minted
        serving = Serving(ref, blocks, source.noise(blocks))
        source.noise(blocks)  # until prefill has got there, they hold something else
        process = source.process
        begin = random.uniform(0, 3) if both else 0.0
        end = begin + random.uniform(0.1, 4)
        if both and random.random() < 0.1:
            source.give(blocks)  # the prefill request never comes; the decode request does
            self._later(sink, sink.process, lambda: self._read(sink, serving, hold=False))
            return
        self.world.after(begin, lambda: self._announce(source, process, serving))
        for share in sorted(random.random() for _ in range(random.randint(0, 3))):
            self.world.after(begin + share * (end - begin), partial(self._seal, source, process, serving, share))
        self.world.after(end, lambda: self._offer(source, process, serving))
        asked = random.uniform(0, 3) if both else end + random.expovariate(1.0)
        self.world.after(asked, lambda: self._read(sink, serving, hold=random.random() < 0.5))

    def _live(self, engine: Engine, process: Process) -> bool:
        return engine.process is process and process.alive and not process.frozen

    def _later(self, engine: Engine, process: Process, act: Callable[[], object]) -> None:
        """Within two seconds, if the process lives then."""

        def if_it_lives() -> None:
            if self._live(engine, process):
                act()

        self.world.after(self.world.random.uniform(0, 2), if_it_lives)

    def _announce(self, engine: Engine, process: Process, serving: Serving) -> None:
        if self._live(engine, process):
            engine.endpoint.announce(serving.ref)
        elif engine.process is process:
            self.world.after(0.1, lambda: self._announce(engine, process, serving))

    def _seal(self, engine: Engine, process: Process, serving: Serving, share: float) -> None:
        if self._live(engine, process) and not serving.offered:
            number = int(len(serving.blocks) * share)
            after = self._prefill(engine, process, serving, number)
            engine.endpoint.seal(serving.ref, serving.blocks[:number], after=after)

    def _prefill(self, engine: Engine, process: Process, serving: Serving, number: int) -> list[Kernel]:
        """The first blocks get what they are to hold: now, or when a device that was told so has done it."""
        new = range(serving.written, number)
        serving.written = max(serving.written, number)
        kernel = Kernel()

        def write() -> None:
            if engine.process is process and serving.ref.token not in engine.aborted:
                engine.write([serving.blocks[i] for i in new], serving.content[:, list(new)])
            kernel.done = True
            process.wake()

        if self.world.random.random() < 0.5:
            write()
            return []
        self.world.after(self.world.random.uniform(0, 0.5), write)
        return [kernel]

    def _offer(self, engine: Engine, process: Process, serving: Serving) -> None:
        if not self._live(engine, process):
            if engine.process is process:  # frozen: it goes on where it was
                self.world.after(0.1, lambda: self._offer(engine, process, serving))
            return
        if self.world.random.random() < 0.1:
            self.say(f"{process.name} aborts {serving.ref.request}")
            engine.aborted.add(serving.ref.token)
            engine.endpoint.revoke(serving.ref)
            engine.give(serving.blocks)
            return
        self.say(f"{process.name} offers {serving.ref.request}: {len(serving.blocks)} blocks")
        serving.offered = True
        engine.serving[serving.ref.token] = serving
        after = self._prefill(engine, process, serving, len(serving.blocks))
        engine.endpoint.offer(serving.ref, serving.blocks, after=after)
        if self.world.random.random() < 0.1:
            self._later(engine, process, lambda: engine.endpoint.revoke(serving.ref))

    def _read(self, engine: Engine, serving: Serving, *, hold: bool) -> None:
        process, random = engine.process, self.world.random
        if process.frozen:
            return
        if hold:
            engine.endpoint.hold(serving.ref)
            self._later(engine, process, lambda: self._read(engine, serving, hold=False))
            return
        skip = random.randrange(len(serving.blocks)) if random.random() < 0.3 else 0
        blocks = engine.take(len(serving.blocks) - skip)
        if blocks is None:
            engine.endpoint.drop(serving.ref)
            return
        tokens = (skip * TOKENS, None) if skip else None
        transfer = engine.endpoint.read(serving.ref, blocks, tokens=tokens)
        process.wake()
        self.say(f"{process.name} reads {serving.ref.request}")
        # A read has its own deadline; what was given up may take as long again to become quiet.
        ends = self.world.now + (transfer.deadline - process.now()) * 1.5 + 60
        engine.fetching[transfer] = Fetching(transfer, blocks, serving.content[:, skip:], ends)
        if random.random() < 0.15:
            self._later(engine, process, lambda: engine.endpoint.drop(serving.ref))


def run(seed: int, profile: Profile | None = None) -> Report:
    """One run from beginning to end. Raises SimulationError."""
    return Story(seed, profile if profile is not None else PROFILES["all"]).tell()
