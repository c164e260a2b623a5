# SPDX-License-Identifier: Apache-2.0
"""What happens in one run: engines that lease, read, seal, abort, crash and come back; and what must hold whatever happens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import numpy as np

from kvxfer.cache import KVCache
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.layout import KVLayout
from kvxfer.lease import LeaseRef
from kvxfer.route import Costs
from kvxfer.testing.sim.agent import VirtualAgent
from kvxfer.testing.sim.world import Process, Profile, World
from kvxfer.transfer import Done, Failed

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvxfer.transfer import Transfer

PROFILES: dict[str, Profile] = {
    "calm": Profile(),
    "lossy": Profile(lost=0.2, repeated=0.1, delay_s=0.3, cuts=2),
    "slow": Profile(delay_s=1.0, copy_s=1.0, copy_late=0.05, drift=0.2),
    "stuck": Profile(delay_s=0.02, copy_lost=0.02, copy_late=0.08, copy_broken=0.03),
    "crashy": Profile(crashes=3, freezes=3, copy_broken=0.05, delay_s=0.02),
    "all": Profile(0.1, 0.05, 0.4, 0.5, 0.02, 0.03, 0.03, 2, 2, 1, 0.1),
}

SETTINGS = Settings(
    lease_s=6.0,
    announce_s=20.0,
    match_s=5.0,
    read_timeout_s=10.0,
    peer_timeout_s=4.0,
    hold_s=15.0,
    idle_peer_s=30.0,
    quarantine_s=0.5,
    contact_s=2.0,
    max_leases=64,
    staging_nbytes=1 << 15,
)
COSTS = Costs(descriptor_s=1e-3, ask_s=1e-6, chunk_s=1e-6)
"""By which packing pays at once, so that small caches take every route."""

BLOCKS, LAYERS, HEADS, TOKENS, DIM = 24, 2, 2, 4, 8
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


@dataclass(eq=False)
class _Serving:
    """A request at its producer: blocks, and what they hold."""

    ref: LeaseRef
    blocks: list[int]
    content: np.ndarray[Any, Any]
    written: int = 0
    offered: bool = False


class _Kernel:
    """A device that writes blocks: what it was told to comes to be there when it ends."""

    def __init__(self) -> None:
        self.done = False

    def wait(self, timeout_s: float | None = None) -> bool:  # noqa: ARG002
        return self.done


@dataclass(eq=False)
class _Fetching:
    """A request at its consumer."""

    transfer: Transfer
    blocks: list[int]
    content: np.ndarray[Any, Any]
    deadline: float


class _Engine:
    """One process that uses an endpoint: a cache whose blocks it gives to requests and takes back, and rewrites when it may."""

    def __init__(self, story: Story, name: str) -> None:
        self.story, self.name = story, name
        self.address = f"tcp://{name}:1"
        self.lives = 0
        self.serving: dict[str, _Serving] = {}
        self.fetching: dict[Any, _Fetching] = {}
        self.begin()

    def begin(self) -> None:
        """Come to life, as a process that knows nothing of the one before."""
        story, random = self.story, self.story.world.random
        self.lives += 1
        self.process = Process(story.world, f"{self.name}.{self.lives}", self.address)
        order = random.choice(list(KVLayout))
        self.cache, arrays = KVCache.allocate(
            order,
            layers=LAYERS,
            blocks=BLOCKS,
            heads=HEADS,
            block_tokens=TOKENS,
            head_dim=DIM,
            apart=random.random() < 0.5,
        )
        self.arrays = list(arrays.values())
        self.free = list(range(BLOCKS))
        self.shadow = {block: self.held([block]) for block in self.free}
        self.serving.clear()
        self.fetching.clear()
        self.aborted: set[str] = set()
        self.endpoint = Endpoint(
            self.cache,
            lambda name: VirtualAgent(name, self.process, story.agents),
            bind=self.address,
            name=f"{self.name}.{self.lives}",
            settings=SETTINGS,
            costs=COSTS,
            host=self.process,
        )
        story.say(f"{self.process.name} begins, {order.value}")

    # -- blocks: [layer, block, head, token, K then V], whatever they look like

    def held(self, blocks: list[int]) -> np.ndarray[Any, Any]:
        """What these blocks hold."""
        return np.concatenate([array[:, blocks] for array in self.arrays], axis=-1)

    def write(self, blocks: list[int], content: np.ndarray[Any, Any]) -> None:
        """Let them hold that."""
        at = 0
        for array in self.arrays:
            array[:, blocks] = content[..., at : at + array.shape[-1]]
            at += array.shape[-1]

    def noise(self, blocks: list[int]) -> np.ndarray[Any, Any]:
        """Fill them with what no other block ever held."""
        shape = (LAYERS, len(blocks), HEADS, TOKENS, 2 * DIM)
        content = self.story.noise.integers(0, 1 << 16, shape).astype(np.uint16)
        self.write(blocks, content)
        return content

    def take(self, number: int) -> list[int] | None:
        """Blocks for a request. They must hold what they held when they were given back."""
        if len(self.free) < number:
            return None
        taken = [self.free.pop(self.story.world.random.randrange(len(self.free))) for _ in range(number)]
        for block in taken:
            self.check_quiet(block)
        return taken

    def give(self, blocks: list[int]) -> None:
        """They are nobody's; the engine writes to them at once, as it would for the next request."""
        self.noise(blocks)
        self.free += blocks
        self.shadow.update({block: self.held([block]) for block in blocks})

    def check_quiet(self, block: int) -> None:
        """Nobody has written to a block that was free."""
        if not np.array_equal(self.held([block]), self.shadow[block]):
            self.story.fail(f"block {block} of {self.process.name} was written to while it was free")

    def poll(self) -> None:
        """Take what the endpoint has to say, as an engine does with each step."""
        if not self.process.alive or self.process.frozen:
            return
        for event in self.endpoint.poll():
            self.story.report.ends[type(event).__name__] += 1
            if isinstance(event, (Done, Failed)):
                self._read_ended(event)
            else:
                serving = self.serving.pop(event.token, None)
                if serving is None or not serving.offered:
                    self.story.fail(f"{self.process.name} was told {event}, which it does not wait for")
                self.give(serving.blocks)

    def _read_ended(self, event: Done | Failed) -> None:
        fetching = self.fetching.pop(event.transfer, None)
        if fetching is None:
            self.story.fail(f"{self.process.name} was told {event} twice")
        if isinstance(event, Done):
            if not np.array_equal(self.held(fetching.blocks), fetching.content):
                self.story.fail(f"{self.process.name}: wrong bytes were delivered as good")
            self.story.report.nbytes += event.transfer.nbytes
        else:
            self.story.report.ends[f"Failed {type(event.error).__name__}"] += 1
        self.give(fetching.blocks)

    # -- life

    def crash(self) -> None:
        """The process dies; another one begins at the same address."""
        self.story.say(f"{self.process.name} crashes")
        self.process.die()
        self.begin()

    def freeze(self, seconds: float) -> None:
        """No turns for a while; its memory can be read all the same."""
        process = self.process
        self.story.say(f"{process.name} is frozen for {seconds:.1f} s")
        process.freeze(frozen=True)
        self.story.world.after(seconds, lambda: process.freeze(frozen=False))

    def check_over(self) -> None:
        """Everything has come to its end, and nothing is left."""
        endpoint, name = self.endpoint, self.process.name
        left = {**endpoint.in_use(), "requests served": len(self.serving), "requests fetched": len(self.fetching)}
        for what, number in left.items():
            if number:
                self.story.fail(f"{name} is left with {number} {what}")
        for block in self.free:
            self.check_quiet(block)
        if len(self.free) != BLOCKS:
            self.story.fail(f"{name} is left with {BLOCKS - len(self.free)} blocks in use")
        faults = endpoint.metrics.value("kvxfer_internal_errors_total")
        if faults:
            self.story.fail(f"{faults} faults were survived inside {name}")


class Story:
    """One run. Use `run`."""

    def __init__(self, seed: int, profile: Profile) -> None:
        self.report: Report = Report(seed)
        self.world: World = World(seed, profile)
        self.noise: np.random.Generator = np.random.default_rng(seed)
        self.agents: dict[str, VirtualAgent] = {}
        self.engines: list[_Engine] = [_Engine(self, name) for name in ("a", "b", "c")]

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
        serving = _Serving(ref, blocks, source.noise(blocks))
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

    def _live(self, engine: _Engine, process: Process) -> bool:
        return engine.process is process and process.alive and not process.frozen

    def _later(self, engine: _Engine, process: Process, act: Callable[[], object]) -> None:
        """Within two seconds, if the process lives then."""

        def if_it_lives() -> None:
            if self._live(engine, process):
                act()

        self.world.after(self.world.random.uniform(0, 2), if_it_lives)

    def _announce(self, engine: _Engine, process: Process, serving: _Serving) -> None:
        if self._live(engine, process):
            engine.endpoint.announce(serving.ref)
        elif engine.process is process:
            self.world.after(0.1, lambda: self._announce(engine, process, serving))

    def _seal(self, engine: _Engine, process: Process, serving: _Serving, share: float) -> None:
        if self._live(engine, process) and not serving.offered:
            number = int(len(serving.blocks) * share)
            after = self._prefill(engine, process, serving, number)
            engine.endpoint.seal(serving.ref, serving.blocks[:number], after=after)

    def _prefill(self, engine: _Engine, process: Process, serving: _Serving, number: int) -> list[_Kernel]:
        """The first blocks get what they are to hold: now, or when a device that was told so has done it."""
        new = range(serving.written, number)
        serving.written = max(serving.written, number)
        kernel = _Kernel()

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

    def _offer(self, engine: _Engine, process: Process, serving: _Serving) -> None:
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

    def _read(self, engine: _Engine, serving: _Serving, *, hold: bool) -> None:
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
        engine.fetching[transfer] = _Fetching(transfer, blocks, serving.content[:, skip:], ends)
        if random.random() < 0.15:
            self._later(engine, process, lambda: engine.endpoint.drop(serving.ref))


def run(seed: int, profile: Profile | None = None) -> Report:
    """One run from beginning to end. Raises SimulationError."""
    return Story(seed, profile if profile is not None else PROFILES["all"]).tell()
