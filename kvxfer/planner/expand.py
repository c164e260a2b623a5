# SPDX-License-Identifier: Apache-2.0
"""Block tables turned into copies and descriptors: the strided copies of a plan, expanded with NumPy.

Two tables of different block sizes are walked together in *alignments*: stretches of tokens that lie in one block on either
side. Alignments that begin at the same token of their blocks are one class, and a class is all that a strided copy needs to know.
Blocks of equal size are the case of one class; a partial block at either end of an interval is one more.

Ids are compressed into runs in which both sides ascend by one; where neighbouring blocks continue a run of bytes, such a run
of blocks is one descriptor, however long. Nothing here loops over blocks in Python.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvxfer.layout.block_table import CheckedTable
from kvxfer.layout.spec import MAX_REGIONS
from kvxfer.memory.copies import Copy
from kvxfer.memory.spans import Descriptors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvxfer.memory.copies import StridedLoop
    from kvxfer.planner.intersect import CopyShape, StridedCopy

    IntArray = npt.NDArray[np.int64]
    PairArray = npt.NDArray[np.uint32]


_MOST_BLOCKS = 1 << 15
"""Remembered of one request, with 40 bytes each: half a million tokens in blocks of 16."""


# -- block tables -------------------------------------------------------------------------------------------------------


class BlockAlignment(NamedTuple):
    """Where a class of alignments begins in a block of either side, and how many tokens each has."""

    source_token: int
    target_token: int
    tokens: int


def kernel_blocks(table: CheckedTable, kernel_tokens: int, start: int, stop: int) -> CheckedTable:
    """A table in blocks of ``kernel_tokens``, of which each entry has a whole number.

    Where they are smaller than the entries, only those with tokens of ``[start, stop)`` are made: how many an entry becomes
    is up to the description of the cache, which may be a peer's.
    """
    ratio = table.tokens // kernel_tokens
    if ratio == 1:
        return table
    first, end = (start - table.first_token) // kernel_tokens, -(-(stop - table.first_token) // kernel_tokens)
    entry, inside = np.divmod(np.arange(first, end, dtype=np.int64), ratio)
    ids = table.ids[entry] * ratio + inside
    return CheckedTable(ids, table.first_token + first * kernel_tokens, kernel_tokens, table.bound * ratio)


def alignments(
    source: CheckedTable, target: CheckedTable, start: int, stop: int, *, cut_from: CheckedTable | None = None
) -> Iterator[tuple[BlockAlignment, BlockPairs]]:
    """The tokens ``[start, stop)``, which both tables cover, as few classes of alignments with the blocks of each.

    ``cut_from``: the table of which ``source`` is a part, in whatever blocks; by default ``source`` itself.
    """
    p, d = source.tokens, target.tokens
    whole = source if cut_from is None else cut_from
    from_start, to_start = start - source.first_token, start - target.first_token
    if p == d and not from_start % p and not to_start % d and not (stop - start) % p:
        number = (stop - start) // p
        first, to_first = from_start // p, to_start // p
        ids = source.ids[first : first + number], target.ids[to_first : to_first + number]
        yield BlockAlignment(0, 0, p), BlockPairs.of(*ids, whole)
        return
    cuts = [np.array([start, stop], dtype=np.int64)]
    for table in (source, target):
        first = table.first_token + (start - table.first_token) // table.tokens * table.tokens
        cuts.append(np.arange(first, stop, table.tokens, dtype=np.int64))
    bounds = np.unique(np.concatenate(cuts))
    bounds = bounds[bounds >= start]
    begins, tokens = bounds[:-1], np.diff(bounds)
    from_block, from_token = np.divmod(begins - source.first_token, p)
    to_block, to_token = np.divmod(begins - target.first_token, d)
    classes, of_class = np.unique(np.stack((from_token, to_token, tokens)), axis=1, return_inverse=True)
    for i, (a, b, length) in enumerate(classes.T.tolist()):
        mine = of_class.reshape(-1) == i
        pairs = BlockPairs.of(source.ids[from_block[mine]], target.ids[to_block[mine]], whole)
        yield BlockAlignment(a, b, length), pairs


class AlignmentCache:
    """Grains of the block tables of one request, remembered from chunk to chunk: those of other layers have the same."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[tuple[BlockAlignment, BlockPairs], ...]] = {}
        self._blocks = 0

    def alignments(
        self, source: CheckedTable, target: CheckedTable, kernels: tuple[int, int], start: int, stop: int
    ) -> Sequence[tuple[BlockAlignment, BlockPairs]]:
        """See `alignments`; ``kernels`` are tokens of a block of either side, which may be smaller than a table's."""
        key = source, target, kernels, start, stop
        known = self._known.get(key)
        if known is None:
            here, there = kernel_blocks(source, kernels[0], start, stop), kernel_blocks(target, kernels[1], start, stop)
            known = tuple(alignments(here, there, start, stop, cut_from=source))
            # Chunks are asked for by strangers: what is kept for them has an end.
            blocks = sum(len(pairs) for _, pairs in known)
            if self._blocks + blocks > _MOST_BLOCKS:
                self._known.clear()
                self._blocks = 0
            self._blocks += blocks
            self._known[key] = known
        return known


_ONE = np.ones(1, dtype=np.int64)
_NO_STEP = 1 << 62


@dataclass(frozen=True, eq=False)
class BlockPairs:
    """Pairs of block ids in the order of the source's, and as runs in which both sides ascend by one.

    ``source_table`` is the table of which these may be a part only, whose entries may be larger blocks.
    """

    source: IntArray
    target: IntArray
    run_source: IntArray
    run_target: IntArray
    run_blocks: IntArray
    source_table: CheckedTable
    _known: tuple[tuple[int, int], tuple[IntArray, IntArray]] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def offsets(self, source_block: int, target_block: int) -> tuple[IntArray, IntArray]:
        """Bytes from block 0 to each, where blocks are so many bytes apart. Remembered: most batches ask for the same."""
        known = self._known
        if known is None or known[0] != (source_block, target_block):
            known = (source_block, target_block), (self.source * source_block, self.target * target_block)
            vars(self)["_known"] = known
        return known[1]

    @classmethod
    def of(cls, source: IntArray, target: IntArray, source_table: CheckedTable) -> BlockPairs:
        """The i-th source block becomes the i-th target block; both are of equal length."""
        number = len(source)
        if number < 2:
            return cls(source, target, source, target, _ONE[:number], source_table)
        if _consecutive(source) and _consecutive(target):
            # One run: what fresh requests in an empty cache look like.
            return cls(source, target, source[:1], target[:1], np.array([number], dtype=np.int64), source_table)
        joins = _joins(source, target)
        if not (source[1:] > source[:-1]).all():
            # Pairs make a run only if target - source is the same: sorted by it first, repeated sources break no run.
            keys = (source, target - source) if source_table.repeats else (source,)
            order = np.lexsort(keys)
            source, target = source[order], target[order]
            joins = _joins(source, target)
        starts = np.concatenate(([0], np.flatnonzero(~joins) + 1))
        counts = np.concatenate((starts[1:], [number])) - starts
        return cls(source, target, source[starts], target[starts], counts, source_table)


def _consecutive(ids: IntArray) -> bool:
    """Each is the one before and one more."""
    first, last = int(ids[0]), int(ids[-1])
    return last - first == len(ids) - 1 and ids.tobytes() == np.arange(first, last + 1, dtype=np.int64).tobytes()


def _joins(source: IntArray, target: IntArray) -> npt.NDArray[np.bool_]:
    """Pair i + 1 is the next block on both sides."""
    ahead: npt.NDArray[np.bool_] = (source[1:] - source[:-1] == 1) & (target[1:] - target[:-1] == 1)
    return ahead


# -- strided copies ---------------------------------------------------------------------------------------------------------

_Along = tuple["IntArray", "IntArray", "IntArray"]
"""Where the runs of one segment begin, block by block, on either side; and their lengths, one if all are alike."""

AllocationPair = tuple[int, int]
"""A pair of allocations, of the source and of the target."""


@dataclass(frozen=True, eq=False)
class CopyBatch:
    """Segments of one shape, to be expanded together.

    All that does not depend on blocks is expanded once, when it is needed: how much that is depends on the strides, which may be
    a peer's, and is known before.

    Attributes:
        shape: what they have in common.
        strided_copies: those of one pair of allocations together, in the order of the source's memory.
        outer, inner: the loops outside and inside a block.
    """

    shape: CopyShape
    strided_copies: tuple[StridedCopy, ...]
    outer: tuple[StridedLoop, ...]
    inner: tuple[StridedLoop, ...]

    def runs(self, pairs: BlockPairs) -> int:
        """How many descriptors it makes of these blocks, before neighbours of other batches are joined to them."""
        return self._of_block * (len(pairs.run_source) if self.shape.joins_blocks else len(pairs))

    def nbytes(self, pairs: BlockPairs) -> int:
        """Bytes at the source."""
        return self._of_block * len(pairs) * self.shape.nbytes

    @cached_property
    def size(self) -> int:
        """Places that it remembers once it was expanded."""
        return len(self.strided_copies) * math.prod(loop.count for loop in self.outer) + math.prod(
            loop.count for loop in self.inner
        )

    @cached_property
    def _of_block(self) -> int:
        """Runs of one block."""
        return len(self.strided_copies) * math.prod(loop.count for loop in self.shape.loops)

    @property
    def sources(self) -> IntArray:
        """Address in block 0 of each run outside the block: starts of the strided_copies and their outer loops."""
        return self._outside[0]

    @property
    def targets(self) -> IntArray:
        """The same at the target."""
        return self._outside[1]

    @property
    def inner_sources(self) -> IntArray:
        """Offsets of the runs inside a block."""
        return self._inside[0]

    @property
    def inner_targets(self) -> IntArray:
        """The same at the target."""
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
        """The allocations in which each of ``sources`` and ``targets`` lies, as a number."""
        pairs = np.array([a * MAX_REGIONS + b for _, _, a, b, _ in self.strided_copies], dtype=np.uint32)
        return np.repeat(pairs, len(self.sources) // len(pairs))

    def expand(self, along: _Along) -> _RunColumns:
        """Each run, axes nested in the order of the source's memory; ``along`` is of `along_blocks`."""
        from_blocks, to_blocks, lengths = along
        shape = len(self.sources), len(from_blocks), len(self.inner_sources)
        # One allocation: three of this size go back to the operating system each time, and are faulted in anew.
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
        """Of each run that `expand` made; one element if it is the same for all."""
        if self.allocations_of[0] == self.allocations_of[-1]:
            return self.allocations_of[:1]
        return np.repeat(self.allocations_of, len(runs.source) // len(self.sources))

    def apart(self, along: _Along) -> bool:
        """`expand` makes runs in the order of the source's memory of which no two are neighbours: descriptors as they are.

        What lies between a run and the next depends on one axis, so that looking at each axis is enough.
        """
        from_blocks, to_blocks, lengths = along
        from_inside, to_inside = self.inner_sources, self.inner_targets
        longest, inside = int(np.maximum.reduce(lengths)), int(from_inside[-1] - from_inside[0])
        if len(from_blocks) == 1 and min(self._least_inside, self._least_outside - inside) > longest:
            return True  # as most are, who have one run of blocks
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
        """Least step from one of ``inner_sources`` to the next."""
        return _least(_steps(self.inner_sources))

    @cached_property
    def _least_outside(self) -> int:
        """Least step from one of ``sources`` to the next of its pair of allocations."""
        return _least(self._steps_outside[0])

    @cached_property
    def _steps_outside(self) -> tuple[IntArray, IntArray]:
        """From each of ``sources`` and ``targets`` to the next of its pair of allocations."""
        one_pair = self.allocations_of[1:] == self.allocations_of[:-1]
        return _steps(self.sources)[one_pair], _steps(self.targets)[one_pair]

    def along_blocks(self, pairs: BlockPairs) -> _Along:
        """Where the runs of one segment begin, block by block, on either side; and their lengths, one if all are alike."""
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
        """The same as strided copies, one for each pair of allocations."""
        shape = self.shape
        blocks = pairs.offsets(shape.source_block, shape.target_block)
        for allocations, sources, targets in self._by_allocations:
            yield allocations, Copy(sources, targets, *blocks, self.inner, shape.nbytes, shape.cast)

    @cached_property
    def _by_allocations(self) -> list[tuple[AllocationPair, IntArray, IntArray]]:
        """(allocations, sources, targets) of each."""
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
    """Each run begins after the one before in the source's memory, and does not continue it on both sides."""
    return bool((source_steps > 0).all()) and not ((source_steps == nbytes) & (target_steps == nbytes)).any()


def batches_of(strided_copies: Iterable[StridedCopy]) -> list[CopyBatch]:
    """Segments that differ only in where they begin, gathered so that NumPy expands them at once."""
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
    """Runs as columns."""

    source: IntArray
    target: IntArray
    nbytes: IntArray

    def descriptors(self, *, apart: bool = False) -> Descriptors:
        """The same bytes, as the transfer engine takes them."""
        columns = self.target.view(np.uint64), self.source.view(np.uint64), self.nbytes.view(np.uint64)
        return Descriptors(*columns, apart=apart)


def descriptors(bound: Sequence[tuple[CopyBatch, BlockPairs]]) -> Descriptors:
    """All runs of batches and their blocks, merged; local is the target, remote the source.

    Runs of one pair of allocations are in the order of the source's memory, and pairs are not mixed.
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
        # Runs can be adjacent only on one diagonal; where no source byte is read twice, the source's order will do.
        keys = (runs.source, runs.target - runs.source) if repeated else (runs.source,)
        one_pair = len(allocations) == 1
        order = np.lexsort(keys if one_pair else (*keys, allocations))
        allocations = allocations if one_pair else allocations[order]
        runs = _RunColumns(*(column[order] for column in runs))
    return runs.descriptors().merged(allocations)


def _allocations_of_all(pairs: Sequence[PairArray], parts: Sequence[_RunColumns]) -> PairArray:
    """Of the runs of several batches, one after the other; one element if it is the same for all."""
    if len(pairs) == 1 or all(len(allocations) == 1 and allocations[0] == pairs[0][0] for allocations in pairs):
        return pairs[0]
    return np.concatenate(
        [np.broadcast_to(allocations, part.source.shape) for allocations, part in zip(pairs, parts, strict=True)]
    )


def _ascend(source: IntArray, allocations: PairArray) -> bool:
    """Runs of one pair of allocations stand together, in the order of the source's memory."""
    ascends = source[1:] > source[:-1]
    if len(allocations) > 1:
        ascends |= allocations[1:] > allocations[:-1]
        ascends &= allocations[1:] >= allocations[:-1]
    return bool(ascends.all())
