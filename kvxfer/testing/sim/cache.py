# SPDX-License-Identifier: Apache-2.0
"""A rank's cache in the simulator: memory in any order, read and written by logical axes, behind a device that may be late."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np

from kvxfer.buffers.base import DeviceBuffer
from kvxfer.buffers.cache import KVCache
from kvxfer.errors import TransferFailedError
from kvxfer.layout.axes import KVLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvxfer.buffers.base import Completion
    from kvxfer.layout.spec import CacheSpec
    from kvxfer.memory.copies import Copy
    from kvxfer.memory.spans import Memory
    from kvxfer.testing.sim.process import Process

    Bytes = npt.NDArray[np.uint8]
    Array = npt.NDArray[Any]

LAYERS, HEADS, DIM = 2, 2, 16
"""Sizes of the model that all engines of a run serve."""
CAPACITY = 160
"""Tokens that an engine has room for."""


@dataclass(frozen=True)
class CacheShape:
    """Properties of a cache that all ranks of an engine share.

    Attributes:
        world: number of ranks.
        by_layer: a rank has some of the layers; else some of the heads.
        apart: K and V have an allocation each.
        hidden: the memory has no address.
    """

    order: KVLayout = KVLayout.LBHNC
    block_tokens: int = 4
    world: int = 1
    by_layer: bool = False
    apart: bool = False
    dtype: str = "float16"
    hidden: bool = False

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return CAPACITY // self.block_tokens

    def __str__(self) -> str:
        parts = [self.order.value, self.dtype, f"blocks of {self.block_tokens}", f"{self.world} ranks"]
        parts += ["split by layers"] if self.by_layer and self.world > 1 else []
        parts += ["K and V apart"] if self.apart else []
        parts += ["no addresses"] if self.hidden else []
        return ", ".join(parts)


class Work:
    """Work of a device, as a `Completion`: it ends late, or fails."""

    answers_at_once: ClassVar[bool] = True

    def __init__(self, process: Process, what: str, seconds: float, act: Callable[[], object]) -> None:
        self._process = process
        self._act: Callable[[], object] | None = act
        world = process.world
        self._error = (
            TransferFailedError(f"{what} failed: so the simulator says")
            if world.strikes("device failed", what, world.profile.device_failed)
            else None
        )
        if seconds:
            world.after(seconds, self._end)
        else:
            self._end()

    @property
    def done(self) -> bool:
        """See `Completion`."""
        return self._act is None

    def wait(self, timeout_s: float | None = None) -> bool:
        """See `Completion`. A caller that waits has the work done at once."""
        if timeout_s is None or timeout_s > 0:
            self._end()
        if self.done and self._error is not None:
            raise self._error
        return self.done

    def _end(self) -> None:
        act, self._act = self._act, None
        if act is not None and self._process.alive:
            if self._error is None:
                act()
            self._process.wake()


class VirtualBuffer(DeviceBuffer):
    """Host memory behind a device whose copies may end later, and whose memory may have no address.

    Args:
        memory: the memory itself.
        process: that uses it.
        hidden: the memory has no address.
    """

    def __init__(self, memory: DeviceBuffer, process: Process, *, hidden: bool) -> None:
        self._memory = memory
        self._process = process
        self._hidden = hidden
        self._is_late = process.world.chooses(f"the device of {process.name} takes its time", 0.5)

    @property
    def memory(self) -> Memory | None:
        """See `DeviceBuffer`."""
        return None if self._hidden else self._memory.memory

    @property
    def nbytes(self) -> int:
        """See `DeviceBuffer`."""
        return self._memory.nbytes

    @property
    def device(self) -> str:
        """See `DeviceBuffer`."""
        return "virtual"

    def can_cast(self, source: str, target: str) -> bool:
        """Whether host memory can cast so."""
        return self._memory.can_cast(source, target)

    def _pack(self, copies: Sequence[Copy], out: Bytes) -> Completion:
        return self._work("packs", lambda: self._memory.pack(copies, out), copies)

    def _unpack(self, copies: Sequence[Copy], packed: Bytes) -> Completion:
        return self._work("unpacks", lambda: self._memory.unpack(copies, packed), copies)

    def _work(self, verb: str, act: Callable[[], object], copies: Sequence[Copy]) -> Work:
        world = self._process.world
        what = world.number(f"{self._process.label} {verb}")
        world.seen[verb] += 1
        world.seen["converts"] += any(copy.cast is not None for copy in copies)
        chance = world.draw(what)
        seconds = world.delay_s(chance, world.profile.device_s) if self._is_late else 0.0
        world.say(f"{what}, for {seconds:.4f} s")
        return Work(self._process, what, seconds, act)


class RankMemory:
    """One rank's cache, with its content as ``[layer, token, head, K then V]``.

    Args:
        process: of the rank.
        shape: of the engine.
        rank: number of the rank.

    Attributes:
        cache: as an endpoint takes it.
        share: index of the rank's layers and heads in content of the whole model.
    """

    def __init__(self, process: Process, shape: CacheShape, rank: int) -> None:
        self._tokens = shape.block_tokens
        each = LAYERS // shape.world if shape.by_layer else HEADS // shape.world
        mine, everything = slice(rank * each, (rank + 1) * each), slice(None)
        self.share: tuple[slice, slice, slice] = (
            (mine, everything, everything) if shape.by_layer else (everything, everything, mine)
        )
        first = rank * each if shape.by_layer else 0
        _, arrays = KVCache.allocate(
            shape.order,
            layers=each if shape.by_layer else LAYERS,
            blocks=shape.blocks,
            heads=HEADS if shape.by_layer else each,
            block_tokens=shape.block_tokens,
            head_dim=DIM,
            dtype=shape.dtype,
            apart=shape.apart,
        )
        self._arrays: list[Array] = list(arrays.values())
        layers = len(self._arrays[0])
        made = KVCache.from_layers(
            {f"layers.{first + i}": [array[i] for array in self._arrays] for i in range(layers)},
            heads_total=HEADS,
            head_start=0 if shape.by_layer else rank * each,
            layers_total=LAYERS,
            rank=rank,
            world=shape.world,
        )
        self.cache: KVCache = KVCache(
            _without_addresses(made) if shape.hidden else made.spec,
            [VirtualBuffer(buffer, process, hidden=shape.hidden) for buffer in made.buffers],
        )

    def read(self, blocks: Sequence[int]) -> Array:
        """Return the content of blocks: the rank's share of layers and heads."""
        held = np.concatenate([array[:, blocks] for array in self._arrays], axis=-1)
        layers, number, heads, tokens, content = held.shape
        by_token: Array = held.transpose(0, 1, 3, 2, 4).reshape(layers, number * tokens, heads, content)
        return by_token

    def write(self, blocks: Sequence[int], content: Array, first: int = 0) -> None:
        """Write content of all layers and heads into blocks, from their ``first`` token on."""
        mine, stop = content[self.share], first + content.shape[1]
        held = self.read(blocks)
        held[:, first:stop] = mine
        layers, _, heads, width = held.shape
        by_block = held.reshape(layers, len(blocks), self._tokens, heads, width).transpose(0, 1, 3, 2, 4)
        at = 0
        for array in self._arrays:
            array[:, blocks] = by_block[..., at : at + array.shape[-1]]
            at += array.shape[-1]


def _without_addresses(made: KVCache) -> CacheSpec:
    """Return a cache's spec with addresses that count from the beginning of each buffer."""
    bases = [buffer.memory.address for buffer in made.buffers if buffer.memory is not None]
    return msgspec.structs.replace(
        made.spec,
        groups=tuple(
            msgspec.structs.replace(
                group,
                regions=tuple(
                    msgspec.structs.replace(region, address=region.address - bases[region.buffer])
                    for region in group.regions
                ),
            )
            for group in made.spec.groups
        ),
    )


def noise(generator: np.random.Generator, tokens: int) -> Array:
    """Return content that no other block ever held, in numbers that survive every conversion of a run."""
    bits = generator.integers(0, 1 << 16, (LAYERS, tokens, HEADS, 2 * DIM)).astype(np.uint16)
    finite: Array = (bits & np.uint16(0xBFFF)).view(np.float16)
    return finite
