# SPDX-License-Identifier: Apache-2.0
"""Block tables turned into copies and descriptors: the loop nests of a plan, expanded with NumPy.

Two tables of different block sizes are walked together in *grains*: stretches of tokens that lie in one block on either
side. Grains that begin at the same token of their blocks are one class, and a class is all that a loop nest needs to know.
Blocks of equal size are the case of one class; a partial block at either end of an interval is one more.

Ids are compressed into runs in which both sides ascend by one; where neighbouring blocks continue a run of bytes, such a run
of blocks is one descriptor, however long. Nothing here loops over blocks in Python.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvxfer.blocks import repeats
from kvxfer.copies import Copy
from kvxfer.layout import MAX_REGIONS
from kvxfer.memory import Descriptors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvxfer.blocks import Table
    from kvxfer.copies import Loop
    from kvxfer.segment import Segment, Shape

    IntArray = npt.NDArray[np.int64]
    LaneArray = npt.NDArray[np.uint32]


# -- block tables -------------------------------------------------------------------------------------------------------


class Grain(NamedTuple):
    """Where a class of grains begins in a block of either side, and how many tokens each has."""

    source_token: int
    target_token: int
    tokens: int


def kernel_blocks(table: Table, kernel_tokens: int) -> Table:
    """The same table in blocks of ``kernel_tokens``, of which each entry has a whole number."""
    ratio = table.tokens // kernel_tokens
    if ratio == 1:
        return table
    ids = (table.ids[:, None] * ratio + np.arange(ratio, dtype=np.int64)).reshape(-1)
    return replace(table, ids=ids, tokens=kernel_tokens)


def grains(source: Table, target: Table, start: int, stop: int) -> Iterator[tuple[Grain, BlockPairs]]:
    """The tokens ``[start, stop)``, which both tables cover, as few classes of grains with the blocks of each."""
    p, d = source.tokens, target.tokens
    repeated = repeats(source.ids)
    from_start, to_start = start - source.first_token, start - target.first_token
    if p == d and not from_start % p and not to_start % d and not (stop - start) % p:
        number = (stop - start) // p
        ids = (table.ids[at // p : at // p + number] for table, at in ((source, from_start), (target, to_start)))
        yield Grain(0, 0, p), BlockPairs.of(*ids, repeated=repeated)
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
        pairs = BlockPairs.of(source.ids[from_block[mine]], target.ids[to_block[mine]], repeated=repeated)
        yield Grain(a, b, length), pairs


_ONE = np.ones(1, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class BlockPairs:
    """Pairs of block ids in the order of the source's, and as runs in which both sides ascend by one.

    ``repeats_source``: the source's table, of which these may be a part only, gives some block more than once.
    """

    source: IntArray
    target: IntArray
    run_source: IntArray
    run_target: IntArray
    run_blocks: IntArray
    repeats_source: bool

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def of(cls, source: IntArray, target: IntArray, *, repeated: bool) -> BlockPairs:
        """The i-th source block becomes the i-th target block; both are of equal length."""
        number = len(source)
        if number == 1:
            return cls(source, target, source, target, _ONE, repeated)
        joins = _joins(source, target)
        if joins.all():
            # One run: what fresh requests in an empty cache look like.
            runs = min(number, 1)
            blocks = np.array([number][:runs], dtype=np.int64)
            return cls(source, target, source[:runs], target[:runs], blocks, repeated)
        if not (source[1:] > source[:-1]).all():
            # Pairs make a run only if target - source is the same: sorted by it first, repeated sources break no run.
            order = np.lexsort((source, target - source)) if repeated else np.argsort(source, kind="stable")
            source, target = source[order], target[order]
            joins = _joins(source, target)
        starts = np.concatenate(([0], np.flatnonzero(~joins) + 1))
        counts = np.concatenate((starts[1:], [number])) - starts
        return cls(source, target, source[starts], target[starts], counts, repeated)


def _joins(source: IntArray, target: IntArray) -> npt.NDArray[np.bool_]:
    """Pair i + 1 is the next block on both sides."""
    ahead: npt.NDArray[np.bool_] = (source[1:] - source[:-1] == 1) & (target[1:] - target[:-1] == 1)
    return ahead


# -- loop nests ---------------------------------------------------------------------------------------------------------

Lane = tuple[int, int]
"""A pair of allocations, of the source and of the target."""


@dataclass(frozen=True, eq=False)
class Nest:
    """Segments of one shape, to be expanded together. All that does not depend on blocks is expanded once, here.

    Attributes:
        shape: what they have in common.
        sources, targets: address in block 0 of each run outside the block: starts of the segments and their outer loops.
            Those of one lane stand together, in the order of the source's memory.
        lanes: in which allocations each of them lies; ``lane_of`` the same as a number.
        inner: the loops inside a block.
        inner_sources, inner_targets: offsets of the runs inside a block.
    """

    shape: Shape
    sources: IntArray
    targets: IntArray
    lanes: tuple[Lane, ...]
    lane_of: LaneArray
    inner: tuple[Loop, ...]
    inner_sources: IntArray
    inner_targets: IntArray

    def runs(self, pairs: BlockPairs) -> int:
        """How many descriptors it makes of these blocks, before neighbours of other nests are joined to them."""
        blocks = len(pairs.run_source) if self.shape.joins_blocks else len(pairs)
        return len(self.sources) * len(self.inner_sources) * blocks

    def nbytes(self, pairs: BlockPairs) -> int:
        """Bytes at the source."""
        return len(self.sources) * len(self.inner_sources) * len(pairs) * self.shape.nbytes

    def expand(self, pairs: BlockPairs) -> _Runs:
        """Each run, axes nested in the order of the source's memory."""
        shape = self.shape
        joined = shape.joins_blocks
        from_blocks, to_blocks = (pairs.run_source, pairs.run_target) if joined else (pairs.source, pairs.target)
        source = self.sources[:, None] + from_blocks * shape.source_block
        target = self.targets[:, None] + to_blocks * shape.target_block
        if len(self.inner_sources) > 1:
            source = source[:, :, None] + self.inner_sources
            target = target[:, :, None] + self.inner_targets
        nbytes = np.empty(source.shape, dtype=np.int64)
        nbytes[...] = pairs.run_blocks * shape.nbytes if joined else shape.nbytes
        each = source.size // len(self.sources)
        lane = np.repeat(self.lane_of, each) if self.lane_of[0] != self.lane_of[-1] else self.lane_of[:1]
        return _Runs(source.reshape(-1), target.reshape(-1), nbytes.reshape(-1), lane)

    def copies(self, pairs: BlockPairs) -> Iterator[tuple[Lane, Copy]]:
        """The same as loop nests, one for each lane."""
        shape = self.shape
        blocks = pairs.source * shape.source_block, pairs.target * shape.target_block
        for lane in sorted(set(self.lanes)):
            mine = np.array([each == lane for each in self.lanes])
            yield lane, Copy(self.sources[mine], self.targets[mine], *blocks, self.inner, shape.nbytes, shape.cast)


def nests_of(segments: Iterable[Segment]) -> list[Nest]:
    """Segments that differ only in where they begin, gathered so that NumPy expands them at once."""
    shapes: dict[Shape, list[Segment]] = defaultdict(list)
    for segment in segments:
        shapes[segment.shape].append(segment)
    nests = []
    for shape, same in shapes.items():
        same.sort(key=lambda x: (x.source_buffer, x.target_buffer, x.source))
        outer = tuple(loop for loop in shape.loops if loop.source_stride >= shape.source_block)
        inner = tuple(loop for loop in shape.loops if loop.source_stride < shape.source_block)
        sources, targets = _looped([x.source for x in same], [x.target for x in same], outer)
        times = len(sources) // len(same)
        lanes = tuple((x.source_buffer, x.target_buffer) for x in same for _ in range(times))
        lane_of = np.array([a * MAX_REGIONS + b for a, b in lanes], dtype=np.uint32)
        nests.append(Nest(shape, sources, targets, lanes, lane_of, inner, *_looped([0], [0], inner)))
    return nests


def _looped(sources: list[int], targets: list[int], loops: Iterable[Loop]) -> tuple[IntArray, IntArray]:
    source, target = np.array(sources, dtype=np.int64), np.array(targets, dtype=np.int64)
    for loop in loops:
        steps = np.arange(loop.count, dtype=np.int64)
        source = np.add.outer(source, steps * loop.source_stride).reshape(-1)
        target = np.add.outer(target, steps * loop.target_stride).reshape(-1)
    return source, target


# -- descriptors --------------------------------------------------------------------------------------------------------

_NOTHING = np.empty(0, dtype=np.uint64)


class _Runs(NamedTuple):
    """Runs as columns; ``lane`` has one element if it is the same for all."""

    source: IntArray
    target: IntArray
    nbytes: IntArray
    lane: LaneArray

    def ascend(self) -> bool:
        """Runs of one lane stand together, in the order of the source's memory."""
        ascends = self.source[1:] > self.source[:-1]
        if len(self.lane) > 1:
            ascends |= self.lane[1:] > self.lane[:-1]
            ascends &= self.lane[1:] >= self.lane[:-1]
        return bool(ascends.all())


def descriptors(bound: Sequence[tuple[Nest, BlockPairs]]) -> Descriptors:
    """All runs of nests and their blocks, merged; local is the target, remote the source.

    Runs of one lane are in the order of the source's memory, and lanes are not mixed.
    """
    parts = [nest.expand(pairs) for nest, pairs in bound if len(pairs)]
    if not parts:
        return Descriptors(_NOTHING, _NOTHING, _NOTHING)
    runs = parts[0] if len(parts) == 1 else _joined(parts)
    repeated = any(pairs.repeats_source for _, pairs in bound)
    if repeated or not runs.ascend():
        # Runs can be adjacent only on one diagonal; where no source byte is read twice, the source's order will do.
        keys = (runs.source, runs.target - runs.source) if repeated else (runs.source,)
        one_lane = len(runs.lane) == 1
        order = np.lexsort(keys if one_lane else (*keys, runs.lane))
        lane = runs.lane if one_lane else runs.lane[order]
        runs = _Runs(runs.source[order], runs.target[order], runs.nbytes[order], lane)
    columns = (column.view(np.uint64) for column in (runs.target, runs.source, runs.nbytes))
    return Descriptors(*columns).merged(runs.lane)


def _joined(parts: Sequence[_Runs]) -> _Runs:
    lanes = [part.lane for part in parts]
    if any(len(lane) > 1 or lane[0] != lanes[0][0] for lane in lanes):
        lanes = [np.broadcast_to(part.lane, part.source.shape) for part in parts]
    else:
        lanes = lanes[:1]
    source, target, nbytes = (np.concatenate(column) for column in zip(*(part[:3] for part in parts), strict=True))
    return _Runs(source, target, nbytes, np.concatenate(lanes))
