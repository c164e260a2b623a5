# SPDX-License-Identifier: Apache-2.0
"""One rank of an engine in a process of its own, with its cache on a device, and an oracle of its content."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np

from kvxfer import Endpoint, LeaseRef
from kvxfer.buffers.cache import KVCache
from kvxfer.config import Settings
from kvxfer.layout.axes import Interval
from kvxfer.testing.devices import on_device
from tests.devices.known import DEVICES
from tests.process.child import Engine, EngineProcess

LAYERS, HEADS, HEAD_DIM, TOKENS = 3, 4, 8, 90
"""Extents of the model, and of its one request."""


class Shape(NamedTuple):
    """One rank's cache: its device, its memory order and its share of the heads."""

    device: str
    order: str
    block_tokens: int
    rank: int = 0
    world: int = 1

    @property
    def heads(self) -> int:
        return HEADS // self.world

    @property
    def request_blocks(self) -> int:
        return -(-TOKENS // self.block_tokens)

    @property
    def blocks(self) -> int:
        return 3 * self.request_blocks

    def before(self, seed: int) -> np.ndarray:
        """The first content of a rank's cache, ``[layer, block, head, token, content]``: noise, of any kind."""
        rng = np.random.default_rng((seed, self.rank))
        shape = (LAYERS, self.blocks, self.heads, self.block_tokens, 2 * HEAD_DIM)
        return rng.integers(0, 1 << 16, shape, dtype=np.uint16)


class DeviceEngine(Engine):
    """The object in the child process. Its methods are called over the pipe."""

    def __init__(self, seed: int, shape: Shape, options: dict[str, Any]) -> None:
        self.seed, self.shape, self.options = seed, shape, options
        self.device = DEVICES[shape.device]
        self.reads, self.events = [], []
        self.endpoint = self._start("tcp://127.0.0.1:0")

    def _start(self, bind: str) -> Endpoint:
        shape = self.shape
        cache, arrays = KVCache.allocate(
            shape.order,
            layers=LAYERS,
            blocks=shape.blocks,
            heads=shape.heads,
            block_tokens=shape.block_tokens,
            head_dim=HEAD_DIM,
            dtype="uint16",
        )
        arrays["kv"][...] = shape.before(self.seed)
        self.strides = arrays["kv"].strides
        mine = Interval(shape.rank * shape.heads, (shape.rank + 1) * shape.heads, HEADS)
        group = msgspec.structs.replace(cache.spec.groups[0], heads=mine)
        spec = msgspec.structs.replace(cache.spec, groups=(group,), rank=shape.rank, world=shape.world)
        self.cache = on_device(KVCache(spec, cache.buffers), list(arrays.values()), self.device)
        # A small arena, so that there are several chunks.
        settings = Settings(staging_nbytes=1 << 16, lease_s=60.0)
        name = f"engine-{self.seed}"
        return Endpoint(self.cache, "nixl", bind=bind, name=name, settings=settings)

    def announce(self, ref: str) -> None:
        self.endpoint.announce(LeaseRef.from_json(ref))

    def publish_part(self, ref: str, blocks: list[int]) -> None:
        self.endpoint.publish(LeaseRef.from_json(ref), blocks, complete=False)

    def publish(self, ref: str, blocks: list[int]) -> None:
        self.endpoint.publish(LeaseRef.from_json(ref), blocks)

    def read_request(self, ref: str, into: list[int], timeout_s: float) -> int:
        self.reads.append(self.endpoint.read(LeaseRef.from_json(ref), into, tokens=(0, TOKENS), timeout_s=timeout_s))
        return len(self.reads) - 1

    def content(self) -> np.ndarray:
        """All of the cache, ``[layer, block, head, token, content]``, fetched by the oracle."""
        (buffer,) = self.cache.buffers
        shape = self.shape.before(self.seed).shape
        return np.ndarray(shape, np.uint16, self.device.bytes_of(buffer), 0, self.strides).copy()


class Side:
    """All ranks of one engine, for a test."""

    def __init__(self, seed: int, device: str, order: str, block_tokens: int, world: int) -> None:
        self.seed = seed
        self.shapes = [Shape(device, order, block_tokens, rank, world) for rank in range(world)]
        self.ranks = [EngineProcess(seed, shape, DeviceEngine) for shape in self.shapes]

    def table(self, seed: int) -> list[int]:
        """Random blocks for the request, the same on all ranks."""
        shape = self.shapes[0]
        return np.random.default_rng(seed).permutation(shape.blocks)[: shape.request_blocks].tolist()

    def ref(self) -> str:
        """A lease for all ranks."""
        return LeaseRef.mint(
            producer=f"engine-{self.seed}", addresses=[rank.address() for rank in self.ranks]
        ).to_json()

    def each(self, order: str, *args: Any) -> list[Any]:
        """Call a method of all ranks, and wait for their answers."""
        for rank in self.ranks:
            rank.ask(order, *args)
        return [rank.answer() for rank in self.ranks]

    def request_in(self, contents: list[np.ndarray], table: list[int]) -> np.ndarray:
        """The request's tokens, ``[layer, token, head, content]`` of the model, from the content of the ranks."""
        parts = [
            content[:, table].transpose(0, 1, 3, 2, 4).reshape(LAYERS, -1, shape.heads, 2 * HEAD_DIM)
            for shape, content in zip(self.shapes, contents, strict=True)
        ]
        return np.concatenate(parts, axis=2)[:, :TOKENS]

    def with_request(self, contents: list[np.ndarray], table: list[int], request: np.ndarray) -> list[np.ndarray]:
        """The expected content of the ranks when they have the request and nothing else has changed."""
        found = []
        for shape, before in zip(self.shapes, contents, strict=True):
            content = before.copy()
            mine = request[:, :, shape.rank * shape.heads : (shape.rank + 1) * shape.heads]
            for token in range(TOKENS):
                block, inside = table[token // shape.block_tokens], token % shape.block_tokens
                content[:, block, :, inside] = mine[:, token]
            found.append(content)
        return found

    def end(self) -> None:
        for rank in self.ranks:
            rank.close()


class Sides:
    """Engines that tests share, because starting one takes seconds; those of one pair of layouts at a time."""

    def __init__(self) -> None:
        self._sides: dict[tuple[Any, ...], Side] = {}
        self._layouts: object = None

    def get(self, layouts: object, *args: Any) -> Side:
        if layouts != self._layouts:
            self.end()
        self._layouts = layouts
        if args not in self._sides:
            self._sides[args] = Side(*args)
        return self._sides[args]

    def end(self) -> None:
        for side in self._sides.values():
            side.end()
        self._sides.clear()
