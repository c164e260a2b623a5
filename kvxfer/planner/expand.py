# SPDX-License-Identifier: Apache-2.0
"""Strided copies of a plan expanded for the blocks of a request with NumPy: into descriptors, or into copies for a device.

Where neighbouring blocks continue a run of bytes, a run of blocks is one descriptor, however long.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvxfer.layout.checks import MAX_REGIONS
from kvxfer.memory.copies import Copy
from kvxfer.memory.spans import Descriptors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvxfer.memory.copies import StridedLoop
    from kvxfer.planner.block_pairs import BlockPairs
    from kvxfer.planner.intersect import CopyShape, StridedCopy

    IntArray = npt.NDArray[np.int64]
    PairArray = npt.NDArray[np.uint32]

_NO_STEP = 1 << 62

_Along = tuple["IntArray", "IntArray", "IntArray"]
"""For each block, or run of blocks: offset at the source, offset at the target, and length (one element if all are equal)."""

AllocationPair = tuple[int, int]
"""An allocation of the source and one of the target."""


@dataclass(frozen=True, eq=False)
class CopyBatch:
    """Strided copies of one shape, expanded together.

    What does not depend on block ids is expanded once, on first use. Its size follows from the strides, which may be a peer's,
    and is known before (`size`).

    Attributes:
        shape: of all of them.
        strided_copies: ordered by pair of allocations, then by source address.
        outer, inner: the loops outside and inside a block.
    """

    shape: CopyShape
    strided_copies: tuple[StridedCopy, ...]
    outer: tuple[StridedLoop, ...]
    inner: tuple[StridedLoop, ...]

    def runs(self, pairs: BlockPairs) -> int:
        """Number of descriptors for these blocks, before runs of other batches are merged with them."""
        return self._of_block * (len(pairs.run_source) if self.shape.joins_blocks else len(pairs))

    def nbytes(self, pairs: BlockPairs) -> int:
        """Bytes read from the source for these blocks."""
        return self._of_block * len(pairs) * self.shape.nbytes

    @cached_property
    def size(self) -> int:
        """Number of addresses and offsets that it keeps once it is expanded."""
        return len(self.strided_copies) * math.prod(loop.count for loop in self.outer) + math.prod(
            loop.count for loop in self.inner
        )

    @cached_property
    def _of_block(self) -> int:
        """Number of runs of one block."""
        return len(self.strided_copies) * math.prod(loop.count for loop in self.shape.loops)

    @property
    def sources(self) -> IntArray:
        """Source address in block 0 for each step of the outer loops of each strided copy."""
        return self._outside[0]

    @property
    def targets(self) -> IntArray:
        """Target addresses, like `sources`."""
        return self._outside[1]

    @property
    def inner_sources(self) -> IntArray:
        """Source offset in a block for each step of the inner loops."""
        return self._inside[0]

    @property
    def inner_targets(self) -> IntArray:
        """Target offsets, like `inner_sources`."""
        return self._inside[1]

    @cached_property
    def _outside(self) -> tuple[IntArray, IntArray]:
        return _looped(
            [each.source for each in self.strided_copies], [each.target for each in self.strided_copies], self.outer
        )

    @cached_property
    def _inside(self) -> tuple[IntArray, IntArray]:
        return _looped([0], [0], self.inner)

    @cached_property
    def allocations_of(self) -> PairArray:
        """Number of the pair of allocations of each of ``sources``."""
        pairs = np.array([a * MAX_REGIONS + b for _, _, a, b, _ in self.strided_copies], dtype=np.uint32)
        return np.repeat(pairs, len(self.sources) // len(pairs))

    def expand(self, along: _Along) -> _RunColumns:
        """All runs: outer loops, then blocks, then inner loops. ``along`` is what `along_blocks` returned."""
        from_blocks, to_blocks, lengths = along
        shape = len(self.sources), len(from_blocks), len(self.inner_sources)
        # One allocation for three columns: three of this size would be unmapped and faulted in again each time.
        columns = np.empty((3, *shape), dtype=np.int64)
        sides = (self.sources, from_blocks, self.inner_sources), (self.targets, to_blocks, self.inner_targets)
        for column, (outside, along_side, inside) in zip(columns, sides, strict=False):
            if len(inside) == 1:
                np.add(outside[:, None], along_side, out=column[..., 0])
            else:
                np.add((outside[:, None] + along_side)[..., None], inside, out=column)
        columns[2] = lengths[:, None]
        return _RunColumns(*columns.reshape(3, -1))

    def allocations_of_runs(self, runs: _RunColumns) -> PairArray:
        """Number of the pair of allocations of each run of `expand`; one element if all have the same."""
        if self.allocations_of[0] == self.allocations_of[-1]:
            return self.allocations_of[:1]
        return np.repeat(self.allocations_of, len(runs.source) // len(self.sources))

    def apart(self, along: _Along) -> bool:
        """Whether the runs of `expand` ascend at the source and no two of them can be merged, so that they are descriptors as is.

        The distance from a run to the next is a step of one axis, so it is enough to look at each axis.
        """
        from_blocks, to_blocks, lengths = along
        from_inside, to_inside = self.inner_sources, self.inner_targets
        longest, inside = int(np.maximum.reduce(lengths)), int(from_inside[-1] - from_inside[0])
        if len(from_blocks) == 1 and min(self._least_inside, self._least_outside - inside) > longest:
            return True  # the common case: one run of blocks
        from_outside, to_outside = self._steps_outside
        from_last, to_last = from_inside[-1] - from_inside[0], to_inside[-1] - to_inside[0]
        if len(from_inside) > 1 and not _apart(_steps(from_inside), _steps(to_inside), lengths[:1]):
            return False
        if len(from_blocks) > 1 and not _apart(
            _steps(from_blocks) - from_last, _steps(to_blocks) - to_last, lengths[: len(from_blocks) - 1]
        ):
            return False
        from_last, to_last = from_last + from_blocks[-1] - from_blocks[0], to_last + to_blocks[-1] - to_blocks[0]
        return not len(from_outside) or _apart(from_outside - from_last, to_outside - to_last, lengths[-1:])

    @cached_property
    def _least_inside(self) -> int:
        """Smallest step between neighbours of ``inner_sources``."""
        return _least(_steps(self.inner_sources))

    @cached_property
    def _least_outside(self) -> int:
        """Smallest step between neighbours of ``sources`` in one pair of allocations."""
        return _least(self._steps_outside[0])

    @cached_property
    def _steps_outside(self) -> tuple[IntArray, IntArray]:
        """Steps between neighbours of ``sources``, and of ``targets``, in one pair of allocations."""
        one_pair = self.allocations_of[1:] == self.allocations_of[:-1]
        return _steps(self.sources)[one_pair], _steps(self.targets)[one_pair]

    def along_blocks(self, pairs: BlockPairs) -> _Along:
        """Offsets of the blocks, or of runs of blocks where these continue a run of bytes; and the lengths of the runs."""
        shape = self.shape
        if shape.joins_blocks:
            return (
                pairs.run_source * shape.source_block,
                pairs.run_target * shape.target_block,
                pairs.run_blocks * shape.nbytes,
            )
        lengths = np.array([shape.nbytes], dtype=np.int64)
        return pairs.source * shape.source_block, pairs.target * shape.target_block, lengths

    def copies(self, pairs: BlockPairs) -> Iterator[tuple[AllocationPair, Copy]]:
        """One `Copy` for each pair of allocations."""
        shape = self.shape
        blocks = pairs.offsets(shape.source_block, shape.target_block)
        for allocations, sources, targets in self._by_allocations:
            yield allocations, Copy(sources, targets, *blocks, self.inner, shape.nbytes, shape.cast)

    @cached_property
    def _by_allocations(self) -> list[tuple[AllocationPair, IntArray, IntArray]]:
        """Sources and targets of each pair of allocations."""
        pairs = sorted({(each.source_buffer, each.target_buffer) for each in self.strided_copies})
        if len(pairs) == 1:
            return [(pairs[0], self.sources, self.targets)]
        mine = [
            (allocations, self.allocations_of == allocations[0] * MAX_REGIONS + allocations[1]) for allocations in pairs
        ]
        return [(allocations, self.sources[each], self.targets[each]) for allocations, each in mine]


def _steps(places: IntArray) -> IntArray:
    steps: IntArray = places[1:] - places[:-1]
    return steps


def _least(steps: IntArray) -> int:
    return int(steps.min(initial=_NO_STEP))


def _apart(source_steps: IntArray, target_steps: IntArray, nbytes: IntArray) -> bool:
    """Whether sources ascend, and no run of ``nbytes`` is followed by one that continues it on both sides."""
    return bool((source_steps > 0).all()) and not ((source_steps == nbytes) & (target_steps == nbytes)).any()


def batches_of(strided_copies: Iterable[StridedCopy]) -> list[CopyBatch]:
    """Strided copies gathered by shape, so that NumPy expands those of one shape at once."""
    shapes: dict[CopyShape, list[StridedCopy]] = defaultdict(list)
    for each in strided_copies:
        shapes[each.shape].append(each)
    batches = []
    for shape, same in shapes.items():
        same.sort(key=lambda x: (x.source_buffer, x.target_buffer, x.source))
        outer = tuple(loop for loop in shape.loops if loop.source_stride >= shape.source_block)
        inner = tuple(loop for loop in shape.loops if loop.source_stride < shape.source_block)
        batches.append(CopyBatch(shape, tuple(same), outer, inner))
    return batches


def _looped(sources: list[int], targets: list[int], loops: Iterable[StridedLoop]) -> tuple[IntArray, IntArray]:
    source, target = np.array(sources, dtype=np.int64), np.array(targets, dtype=np.int64)
    for loop in loops:
        steps = np.arange(loop.count, dtype=np.int64)
        source = np.add.outer(source, steps * loop.source_stride).reshape(-1)
        target = np.add.outer(target, steps * loop.target_stride).reshape(-1)
    return source, target


# -- descriptors --------------------------------------------------------------------------------------------------------

_NOTHING = np.empty(0, dtype=np.uint64)


class _RunColumns(NamedTuple):
    """Runs in three columns."""

    source: IntArray
    target: IntArray
    nbytes: IntArray

    def descriptors(self, *, apart: bool = False) -> Descriptors:
        """Descriptors of these runs; ``apart`` as in `Descriptors`."""
        columns = self.target.view(np.uint64), self.source.view(np.uint64), self.nbytes.view(np.uint64)
        return Descriptors(*columns, apart=apart)


def descriptors(bound: Sequence[tuple[CopyBatch, BlockPairs]]) -> Descriptors:
    """All runs of batches for their blocks, merged. The local side is the target, the remote side the source.

    Runs are ordered by pair of allocations, then by source address.
    """
    bound = [(batch, pairs) for batch, pairs in bound if len(pairs)]
    if not bound:
        return Descriptors(_NOTHING, _NOTHING, _NOTHING)
    along = [batch.along_blocks(pairs) for batch, pairs in bound]
    parts = [batch.expand(each) for (batch, _), each in zip(bound, along, strict=True)]
    if len(bound) == 1 and (len(parts[0].source) == 1 or bound[0][0].apart(along[0])):
        return parts[0].descriptors(apart=True)
    allocations = _allocations_of_all(
        [batch.allocations_of_runs(part) for (batch, _), part in zip(bound, parts, strict=True)], parts
    )
    runs = _RunColumns(*(np.concatenate(column) for column in zip(*parts, strict=True))) if len(parts) > 1 else parts[0]
    repeated = any(pairs.source_table.repeats for _, pairs in bound)
    if repeated or not _ascend(runs.source, allocations):
        # Runs that are adjacent on both sides have the same target - source. Unless source bytes repeat, sorting by source will do.
        keys = (runs.source, runs.target - runs.source) if repeated else (runs.source,)
        one_pair = len(allocations) == 1
        order = np.lexsort(keys if one_pair else (*keys, allocations))
        allocations = allocations if one_pair else allocations[order]
        runs = _RunColumns(*(column[order] for column in runs))
    return runs.descriptors().merged(allocations)


def _allocations_of_all(pairs: Sequence[PairArray], parts: Sequence[_RunColumns]) -> PairArray:
    """Numbers of the pairs of allocations of all runs, batch after batch; one element if all have the same."""
    if len(pairs) == 1 or all(len(allocations) == 1 and allocations[0] == pairs[0][0] for allocations in pairs):
        return pairs[0]
    return np.concatenate(
        [np.broadcast_to(allocations, part.source.shape) for allocations, part in zip(pairs, parts, strict=True)]
    )


def _ascend(source: IntArray, allocations: PairArray) -> bool:
    """Whether runs are ordered by pair of allocations, then by source address."""
    ascends = source[1:] > source[:-1]
    if len(allocations) > 1:
        ascends |= allocations[1:] > allocations[:-1]
        ascends &= allocations[1:] >= allocations[:-1]
    return bool(ascends.all())
