# SPDX-License-Identifier: Apache-2.0
"""An engine of the simulator: it gives blocks of its cache to requests, takes them back, and overwrites them as soon as it may."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvxfer.config import MoveBy, Settings
from kvxfer.endpoint import Endpoint
from kvxfer.layout.axes import KVLayout
from kvxfer.planner.costs import Costs
from kvxfer.protocol.transfer import Done, Failed, LeaseExpired
from kvxfer.testing.sim.agent import VirtualAgent
from kvxfer.testing.sim.cache import CacheShape, RankMemory, noise
from kvxfer.testing.sim.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvxfer.protocol.lease import ConsumerRank
    from kvxfer.protocol.lease_ref import LeaseRef
    from kvxfer.protocol.transfer import Event, Transfer
    from kvxfer.testing.sim.request import SimulatedRequest
    from kvxfer.testing.sim.story import Story

    Array = np.ndarray[Any, Any]

SETTINGS: dict[str, float] = {
    "lease_s": 6.0,
    "announce_timeout_s": 20.0,
    "rendezvous_timeout_s": 5.0,
    "read_timeout_s": 10.0,
    "peer_timeout_s": 4.0,
    "unread_lease_s": 15.0,
    "idle_peer_s": 30.0,
    "quarantine_s": 0.5,
    "contact_timeout_s": 2.0,
    "max_leases": 64,
    "staging_nbytes": 1 << 15,
}
FEW_LEASES = 4
FEW_SPANS = 24
_MOST_SLOTS = 7
"""Slots in use with which the arena, which has eight, counts as full."""

PACKED = Costs(descriptor_s=1e-3, ask_s=1e-6, chunk_s=1e-6)
"""Costs by which packing pays at once, so that small caches take every route."""
DIRECT = Costs(descriptor_s=1e-9, ask_s=1.0, chunk_s=1.0, land_s=1.0)
"""Costs by which packing never pays."""

HOARD_S = 3.5
"""Longest time for which a consumer may keep more than its share of staging slots while others wait, on the world's clock."""
OVERDUE_S = 3.0
"""Longest time for which a read may go on after its deadline, while its process runs: ``quarantine_s``, the cost of polling,
and the time of an agent that cannot be made again at once."""

_RENEWAL_PAUSES = {"renewed": 8.0, "lost": 1.0}
"""Shortest time between two resets of an agent for silent peers, in units of ``contact_timeout_s``."""


@dataclass(eq=False)
class Serving:
    """A request at its producer: its blocks, and their content.

    Attributes:
        begun: by rank, number of tokens that are computed or being computed; ``there``: number that are computed.
        published: ranks that have published all blocks; ``told``: ranks that were told how the lease ended.
        over: the request was aborted.
    """

    request: SimulatedRequest
    ref: LeaseRef
    blocks: list[int]
    content: Array
    begun: dict[int, int] = field(default_factory=dict)
    there: dict[int, int] = field(default_factory=dict)
    published: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)
    over: bool = False


@dataclass(eq=False)
class Fetching:
    """A request at its consumer.

    Attributes:
        content: of the tokens to read, which begin at token ``first`` of the blocks.
        ended: ranks whose reads have ended.
    """

    request: SimulatedRequest
    blocks: list[int]
    content: Array
    first: int
    ended: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Overdue:
    """A read of one rank, and the time that it has gone on after its deadline."""

    fetching: Fetching
    seconds: float = 0.0


class Rank:
    """One rank of an engine: a process, its memory, an endpoint."""

    def __init__(self, engine: Engine, number: int, settings: Settings, costs: Costs) -> None:
        story = engine.story
        self.engine: Engine = engine
        self.number: int = number
        self.process: Process = Process(story.network, f"{engine.name}{number}", engine.lives)
        self.process.fatal = engine.crash
        self.memory: RankMemory = RankMemory(self.process, engine.shape, number)
        self.shadow: Array = self.memory.read(range(engine.shape.blocks))
        self.reads: dict[Transfer, Overdue] = {}
        self._hoards: dict[ConsumerRank, float] = {}
        self._began = self.process.now()

        def make_agent(name: str) -> VirtualAgent:
            self._agent = VirtualAgent(name, self.process, story.agents)
            return self._agent

        self.endpoint: Endpoint = Endpoint(
            self.memory.cache,
            make_agent,
            bind=self.process.address,
            name=f"{engine.name}.{engine.lives}",
            settings=settings,
            costs=costs,
            convert=True,
            environment=self.process,
        )

    def do(self, act: Callable[[], object], after_s: float = 0.0) -> None:
        """Run something in its process: as soon as it is not frozen, if it lives then."""

        def attempt() -> None:
            if self.process.frozen:
                self.process.world.after(0.1, attempt)
            elif self.process.alive and self.engine.alive:
                act()
                self.process.wake()

        self.process.world.after(after_s, attempt)

    def poll(self, passed_s: float) -> None:
        """Take the endpoint's events, as an engine does with each step, and check what must hold."""
        self.process.world.seen["arena full"] += self.endpoint.in_use()["slots"] >= _MOST_SLOTS
        faults = self.endpoint.metrics.value("kvxfer_internal_errors_total")
        if faults:
            self.engine.story.fail("fault survived", f"a fault was survived inside {self.process.name}")
        for event in self.endpoint.poll():
            self.engine.told(self, event)
        hoarders = self.endpoint._producer.over_share()  # noqa: SLF001 - white-box: no engine needs it
        self._hoards = {consumer: self._hoards.get(consumer, 0.0) + passed_s for consumer in hoarders}
        if max(self._hoards.values(), default=0.0) > HOARD_S:
            self.engine.story.fail("slots kept", f"consumers keep slots of {self.process.name} for which others wait")
        for outcome, pause in _RENEWAL_PAUSES.items():
            renewed = self.endpoint.metrics.value("kvxfer_contacts_total", outcome=outcome)
            ran_s, world = self.process.now() - self._began, self.process.world
            quick = 10 * world.profile.copy_s < SETTINGS["contact_timeout_s"]
            most = 1 + ran_s / (pause * SETTINGS["contact_timeout_s"]) if world.faults or not quick else 0
            if renewed > most:
                self.engine.story.fail(
                    "torn down too often",
                    f"{self.process.name} made its agent anew {renewed:g} times for connections that are {outcome}",
                )
        for transfer, read in self.reads.items():
            read.seconds += passed_s if self.process.now() > transfer.deadline else 0.0
            if read.seconds > OVERDUE_S:
                self.engine.story.fail("read without end", f"a read of {self.process.name} did not end: {transfer}")

    def check_quiet(self, blocks: Sequence[int]) -> None:
        """Check that free blocks were not written to."""
        held, tokens = self.memory.read(blocks), self.engine.shape.block_tokens
        expected = self._of(self.shadow, blocks)
        if held.tobytes() != expected.tobytes():
            wrong = sorted({blocks[i // tokens] for i in np.nonzero(held != expected)[1].tolist()})
            self.engine.story.fail(
                "free block written", f"blocks {wrong} of {self.process.name} were written to while they were free"
            )

    def gave(self, blocks: Sequence[int]) -> None:
        """Note the content of blocks that are free now."""
        tokens = self.engine.shape.block_tokens
        held = self.memory.read(blocks)
        for i, block in enumerate(blocks):
            self.shadow[:, block * tokens : (block + 1) * tokens] = held[:, i * tokens : (i + 1) * tokens]

    def left(self) -> dict[str, int]:
        """Count the rank's resources in use, by kind."""
        connections = self.process.network.channels[self.process.address].made
        return {
            **self.endpoint.in_use(),
            "requests fetched": len(self.reads),
            "connections": len(connections),
            "agents met": len(self._agent.met),
        }

    def _of(self, content: Array, blocks: Sequence[int]) -> Array:
        tokens = self.engine.shape.block_tokens
        return content[:, np.add.outer(np.asarray(blocks, dtype=np.intp) * tokens, np.arange(tokens)).ravel()]


class Engine:
    """A simulated engine: ranks with an endpoint each, and the blocks of its requests, which are the same on all ranks.

    Attributes:
        alive: it has neither crashed nor been closed.
        serving: requests by token.
    """

    def __init__(self, story: Story, name: str) -> None:
        self.story: Story = story
        self.name: str = name
        self.lives: int = 0
        self.begin()

    def begin(self) -> None:
        """Start a new engine; it knows nothing of the one before it, and may have another layout."""
        world = self.story.world
        self.lives += 1
        who = f"{self.name}.{self.lives}"
        chance = world.draw(f"engine {who}")
        self.shape: CacheShape = CacheShape(
            order=chance.choice(list(KVLayout)) if world.chooses(f"{who} has its own order", 0.8) else KVLayout.LBHNC,
            block_tokens=chance.choice([2, 8]) if world.chooses(f"{who} has its own block size", 0.4) else 4,
            world=2 if world.chooses(f"{who} has two ranks", 0.35) else 1,
            by_layer=world.chooses(f"{who} is split by layers", 0.3),
            apart=world.chooses(f"{who} has K and V apart", 0.5),
            dtype="float32" if world.chooses(f"{who} stores float32", 0.3) else "float16",
            hidden=world.chooses(f"{who} has no addresses", 0.2),
        )
        self.has_few_leases: bool = world.chooses(f"{who} has cells for few leases", 0.1)
        limits = {"max_leases": FEW_LEASES} if self.has_few_leases else {}
        if world.chooses(f"{who} remembers no lease that has ended", 0.3):
            limits["remembered_leases"] = 0
        if world.profile.written and world.chooses(f"{who} writes few spans at a time", 0.3):
            limits["max_write_spans"] = FEW_SPANS
        written = world.chooses(f"{who} has its blocks written by their producers", world.profile.written)
        by = MoveBy.WRITE if written else MoveBy.READ
        settings = Settings.resolve(environ={}, **(SETTINGS | limits), move_by=by)
        costs = PACKED if world.chooses(f"{who} finds packing cheap", 0.6) else DIRECT
        self.free: list[int] = list(range(self.shape.blocks))
        self.serving: dict[str, Serving] = {}
        self.ranks: list[Rank] = [Rank(self, number, settings, costs) for number in range(self.shape.world)]
        self.alive: bool = True
        if self.shape.world > 1:
            for rank in self.ranks:
                rank.endpoint.join(self.addresses)
        self.story.say(f"{who} begins: {self.shape}")

    @property
    def addresses(self) -> list[str]:
        """Addresses of all ranks."""
        return [rank.process.address for rank in self.ranks]

    # -- blocks

    def noise(self, tokens: int) -> Array:
        """Return content that no other block ever held."""
        return noise(self.story.noise, tokens)

    def take(self, tokens: int) -> list[int] | None:
        """Take blocks for a request; check that they have not changed since they were given back."""
        number = -(-tokens // self.shape.block_tokens)
        if len(self.free) < number:
            return None
        taken = [self.free.pop(self.story.chance.randrange(len(self.free))) for _ in range(number)]
        for rank in self.ranks:
            rank.check_quiet(taken)
        return taken

    def give(self, blocks: list[int]) -> None:
        """Take blocks back from a request, and overwrite them at once, as the next request would."""
        content = self.noise(len(blocks) * self.shape.block_tokens)
        for rank in self.ranks:
            rank.memory.write(blocks, content)
            rank.gave(blocks)
        self.free += blocks

    def poll(self, passed_s: float) -> None:
        """Poll all ranks whose process runs."""
        for rank in self.ranks:
            if self.alive and rank.process.alive and not rank.process.frozen:
                rank.poll(passed_s)

    def told(self, rank: Rank, event: Event) -> None:
        """Handle an event of an endpoint."""
        kind = type(event).__name__
        self.story.report.ends[kind] += 1
        if isinstance(event, (Done, Failed)):
            self._read_ended(rank, event)
            return
        self.story.say(f"{rank.process.name} is told {kind} {event.request}")
        serving = self.serving.get(event.token)
        if serving is None or rank.number not in serving.published - serving.told:
            self.story.fail("told in vain", f"{rank.process.name} was told {event}, which it does not wait for")
        if isinstance(event, LeaseExpired):
            serving.request.expired(rank.process.name)
        share = serving.content[rank.memory.share]
        held = rank.memory.read(serving.blocks)[:, : share.shape[1]]
        if serving.there.get(rank.number) == share.shape[1] and not np.array_equal(held, share):
            self.story.fail("leased block written", f"leased blocks of {rank.process.name} were written to")
        serving.told.add(rank.number)
        self.maybe_over(serving)

    def maybe_over(self, serving: Serving) -> None:
        """Take the blocks of a request back if every rank was told that the lease has ended."""
        every = serving.over or len(serving.published) == len(self.ranks)
        if every and serving.published == serving.told and self.serving.pop(serving.ref.token, None) is not None:
            self.give(serving.blocks)
            serving.request.over(serving)

    def _read_ended(self, rank: Rank, event: Done | Failed) -> None:
        story, who = self.story, rank.process.name
        read = rank.reads.pop(event.transfer, None)
        if read is None:
            story.fail("told in vain", f"{who} was told {event} twice")
        fetching = read.fetching
        request = event.transfer.ref.request
        if isinstance(event, Done):
            share = fetching.content[rank.memory.share]
            held = rank.memory.read(fetching.blocks)[:, fetching.first : fetching.first + share.shape[1]]
            if not np.array_equal(held, share):
                story.fail("wrong bytes", f"{who}: wrong bytes of {request} were delivered as good")
            story.report.nbytes += event.transfer.nbytes
            story.world.seen["partial bytes"] += event.transfer.partial_nbytes
            story.say(f"{who} is told Done {request}")
        else:
            story.report.ends[f"Failed {type(event.error).__name__}"] += 1
            story.say(f"{who} is told Failed {request}: {event.error}")
            fetching.request.failed(event.error, who)
        fetching.ended.add(rank.number)
        if len(fetching.ended) == len(self.ranks):
            self.give(fetching.blocks)

    # -- life

    def crash(self) -> None:
        """Kill its processes, one after the other; another engine begins in their place."""
        if not self.alive:
            return
        self.alive = False
        world, who = self.story.world, f"{self.name}.{self.lives}"
        self.story.say(f"{who} crashes")
        chance = world.draw(f"crash of {who}")
        last_s = 0.0
        for rank in self.ranks:
            world.after(last_s, rank.process.die)
            last_s += chance.uniform(0, 1.5)
        world.after(last_s + chance.uniform(0, 2), self.begin)

    def close(self) -> None:
        """Close it in good order; another engine begins a little later."""
        if not self.alive:
            return
        who = f"{self.name}.{self.lives}"
        self.story.say(f"{who} is closed")
        self.check_closed()
        self.story.world.after(self.story.world.draw(f"close of {who}").uniform(0, 2), self.begin)

    def check_closed(self) -> None:
        """Close the endpoints; check that everything under way has ended then."""
        self.alive = False
        for rank in self.ranks:
            if rank.process.frozen:
                rank.process.thaw()
            rank.endpoint.close()
            rank.poll(0.0)
            if rank.reads:
                self.story.fail(
                    "left behind", f"{rank.process.name} was closed and {len(rank.reads)} reads did not end"
                )
            rank.process.die()
        for serving in self.serving.values():
            if serving.published != serving.told:
                self.story.fail(
                    "left behind", f"{self.name} was closed and was not told how {serving.ref.request} ended"
                )

    @property
    def idle(self) -> bool:
        """Whether nothing is in use."""
        return self.alive and not self.serving and not any(any(rank.left().values()) for rank in self.ranks)

    def check_over(self) -> None:
        """Check that everything has ended, and that nothing is in use."""
        left = {f"{rank.process.name}'s {what}": n for rank in self.ranks for what, n in rank.left().items()}
        left |= {f"{self.name}'s requests served": len(self.serving)}
        left |= {f"{self.name}'s blocks in use": self.shape.blocks - len(self.free)}
        found = ", ".join(f"{number} of {what}" for what, number in left.items() if number)
        if found:
            self.story.fail("left behind", f"there are left {found}")
        for rank in self.ranks:
            rank.check_quiet(self.free)
