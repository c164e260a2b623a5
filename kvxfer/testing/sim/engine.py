# SPDX-License-Identifier: Apache-2.0
"""An engine of the simulator: a cache whose blocks it gives to requests, takes back, and rewrites as soon as it may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvxfer.cache import KVCache
from kvxfer.config import Settings
from kvxfer.endpoint import Endpoint
from kvxfer.layout import KVLayout
from kvxfer.route import Costs
from kvxfer.testing.sim.agent import VirtualAgent
from kvxfer.testing.sim.world import Process
from kvxfer.transfer import Done, Failed

if TYPE_CHECKING:
    from kvxfer.lease import LeaseRef
    from kvxfer.testing.sim.story import Story
    from kvxfer.transfer import Transfer

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


@dataclass(eq=False)
class Serving:
    """A request at its producer: blocks, and what they hold."""

    ref: LeaseRef
    blocks: list[int]
    content: np.ndarray[Any, Any]
    written: int = 0
    offered: bool = False


class Kernel:
    """A device that writes blocks: what it was told to comes to be there when it ends."""

    def __init__(self) -> None:
        self.done: bool = False

    def wait(self, timeout_s: float | None = None) -> bool:  # noqa: ARG002
        """See `kvxfer.buffer.Completion`."""
        return self.done


@dataclass(eq=False)
class Fetching:
    """A request at its consumer."""

    transfer: Transfer
    blocks: list[int]
    content: np.ndarray[Any, Any]
    deadline: float


class Engine:
    """One process that uses an endpoint: a cache whose blocks it gives to requests and takes back, and rewrites when it may."""

    def __init__(self, story: Story, name: str) -> None:
        self.story: Story = story
        self.name: str = name
        self.address: str = f"tcp://{name}:1"
        self.lives: int = 0
        self.serving: dict[str, Serving] = {}
        self.fetching: dict[Any, Fetching] = {}
        self.begin()

    def begin(self) -> None:
        """Come to life, as a process that knows nothing of the one before."""
        story, random = self.story, self.story.world.random
        self.lives += 1
        self.process: Process = Process(story.world, f"{self.name}.{self.lives}", self.address)
        order = random.choice(list(KVLayout))
        cache, arrays = KVCache.allocate(
            order,
            layers=LAYERS,
            blocks=BLOCKS,
            heads=HEADS,
            block_tokens=TOKENS,
            head_dim=DIM,
            apart=random.random() < 0.5,
        )
        self.cache: KVCache = cache
        self.arrays: list[np.ndarray[Any, Any]] = list(arrays.values())
        self.free: list[int] = list(range(BLOCKS))
        self.shadow: dict[int, np.ndarray[Any, Any]] = {block: self.held([block]) for block in self.free}
        self.serving.clear()
        self.fetching.clear()
        self.aborted: set[str] = set()
        self.endpoint: Endpoint = Endpoint(
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
