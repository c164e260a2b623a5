# SPDX-License-Identifier: Apache-2.0
"""Block ids turned into descriptors: the loop nests of a plan, expanded with NumPy.

Ids are first compressed into runs in which both sides ascend by one; where neighbouring blocks continue a run of bytes,
such a run of blocks is one descriptor, however long. Nothing here loops over blocks in Python.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvxfer.errors import BlockError
from kvxfer.memory import Descriptors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from kvxfer.segment import Loop, Segment

    IntArray = npt.NDArray[np.int64]


def descriptors(nests: Sequence[Nest], pairs: Sequence[BlockPairs]) -> Descriptors:
    """All runs of ``nests`` for the pairs of blocks of each group, merged; local is the target, remote the source."""
    parts = [nest.expand(pairs[nest.group]) for nest in nests if len(pairs[nest.group])]
    if not parts:
        nothing = np.empty(0, dtype=np.uint64)
        return Descriptors(nothing, nothing, nothing)
    source, target, nbytes = (_joined(columns) for columns in zip(*(part[:3] for part in parts), strict=True))
    lanes = [part[3] for part in parts if part[3] is not None]
    lane = _joined(lanes) if lanes else None
    repeated = any(pair.repeats_source for pair in pairs)
    if repeated or not _ascends(source, lane):
        # Runs can be adjacent only on one diagonal; where no source byte is read twice, the source's order will do.
        keys = (source, target - source) if repeated else (source,)
        order = np.lexsort(keys if lane is None else (*keys, lane))
        source, target, nbytes = source[order], target[order], nbytes[order]
        lane = None if lane is None else lane[order]
    bound = Descriptors(target.view(np.uint64), source.view(np.uint64), nbytes.view(np.uint64))
    return bound.merged() if lane is None else bound.merged(lane)


def _joined(columns: Sequence[IntArray]) -> IntArray:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)


_ONE = np.ones(1, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class BlockPairs:
    """Pairs of block ids in the order of the source's, and as runs in which both sides ascend by one."""

    source: IntArray
    target: IntArray
    run_source: IntArray
    run_target: IntArray
    run_blocks: IntArray
    repeats_source: bool

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def of(cls, source: IntArray, target: IntArray) -> BlockPairs:
        """The i-th source block becomes the i-th target block. Raises BlockError: unequal number, repeated target."""
        number = len(source)
        if number != len(target):
            raise BlockError(f"{number} source blocks cannot become {len(target)} target blocks")
        if number == 1:
            return cls(source, target, source, target, _ONE, False)
        joins = _joins(source, target)
        if joins.all():
            # One run: what fresh requests in an empty cache look like.
            runs = min(number, 1)
            return cls(source, target, source[:runs], target[:runs], np.array([number][:runs], dtype=np.int64), False)
        if _repeats(target):
            raise BlockError("a target block is given twice")
        repeats = False
        if not (source[1:] > source[:-1]).all():
            repeats = _repeats(source)
            # Pairs make a run only if target - source is the same: sorted by it first, repeated sources break no run.
            order = np.lexsort((source, target - source)) if repeats else np.argsort(source, kind="stable")
            source, target = source[order], target[order]
            joins = _joins(source, target)
        starts = np.concatenate(([0], np.flatnonzero(~joins) + 1))
        counts = np.concatenate((starts[1:], [number])) - starts
        return cls(source, target, source[starts], target[starts], counts, repeats)


def _joins(source: IntArray, target: IntArray) -> npt.NDArray[np.bool_]:
    """Pair i + 1 is the next block on both sides."""
    ahead: npt.NDArray[np.bool_] = (source[1:] - source[:-1] == 1) & (target[1:] - target[:-1] == 1)
    return ahead


@dataclass(frozen=True, eq=False)
class Nest:
    """Segments of one shape, to be expanded together. All that does not depend on blocks is expanded once, here.

    Attributes:
        sources, targets: address in block 0 of each run outside the block: starts of the segments and their outer loops.
        inner_sources, inner_targets: offsets of the runs inside a block.
        lanes: pair of allocations of each of ``sources``, as a number; None if the plan has only one.
    """

    group: int
    shape: Segment
    lanes: IntArray | None
    sources: IntArray
    targets: IntArray
    inner_sources: IntArray
    inner_targets: IntArray

    def expand(self, pairs: BlockPairs) -> tuple[IntArray, IntArray, IntArray, IntArray | None]:
        """(source, target, nbytes, lane) of each run, axes nested in the order of the source's memory."""
        shape = self.shape
        joined = shape.joins_blocks
        from_blocks, to_blocks = (pairs.run_source, pairs.run_target) if joined else (pairs.source, pairs.target)
        source = self.sources[:, None] + from_blocks * shape.source_block
        target = self.targets[:, None] + to_blocks * shape.target_block
        inner = len(self.inner_sources)
        if inner > 1:
            source = source[:, :, None] + self.inner_sources
            target = target[:, :, None] + self.inner_targets
        nbytes = np.empty(source.shape, dtype=np.int64)
        nbytes[...] = pairs.run_blocks * shape.nbytes if joined else shape.nbytes
        lanes = None if self.lanes is None else np.repeat(self.lanes, len(from_blocks) * inner)
        return source.reshape(-1), target.reshape(-1), nbytes.reshape(-1), lanes


def nests_of(segments: Iterable[Segment]) -> Iterator[Nest]:
    """Segments that differ only in where they begin, gathered so that NumPy expands them at once."""
    segments = list(segments)
    lanes = sorted({(segment.source_buffer, segment.target_buffer) for segment in segments})
    number = {lane: i for i, lane in enumerate(lanes)}
    shapes: dict[Segment, list[Segment]] = defaultdict(list)
    for segment in segments:
        shapes[replace(segment, source=0, target=0, source_buffer=0, target_buffer=0)].append(segment)
    for shape, same in shapes.items():
        same.sort(key=lambda s: (number[s.source_buffer, s.target_buffer], s.source))
        outer = [loop for loop in shape.loops if loop.source_stride >= shape.source_block]
        inner = [loop for loop in shape.loops if loop.source_stride < shape.source_block]
        sources, targets = _looped([s.source for s in same], [s.target for s in same], outer)
        inner_sources, inner_targets = _looped([0], [0], inner)
        lane = np.array([number[s.source_buffer, s.target_buffer] for s in same], dtype=np.int64)
        yield Nest(
            group=shape.group,
            shape=shape,
            lanes=None if len(lanes) == 1 else np.repeat(lane, len(sources) // len(lane)),
            sources=sources,
            targets=targets,
            inner_sources=inner_sources,
            inner_targets=inner_targets,
        )


def _looped(sources: list[int], targets: list[int], loops: Iterable[Loop]) -> tuple[IntArray, IntArray]:
    source, target = np.array(sources, dtype=np.int64), np.array(targets, dtype=np.int64)
    for loop in loops:
        steps = np.arange(loop.count, dtype=np.int64)
        source = np.add.outer(source, steps * loop.source_stride).reshape(-1)
        target = np.add.outer(target, steps * loop.target_stride).reshape(-1)
    return source, target


def _ascends(source: IntArray, lane: IntArray | None) -> bool:
    ascends = source[1:] > source[:-1]
    if lane is not None:
        ascends = ascends & (lane[1:] == lane[:-1]) | (lane[1:] > lane[:-1])
    return bool(ascends.all())


def _repeats(ids: IntArray) -> bool:
    if (ids[1:] > ids[:-1]).all():
        return False
    ordered = np.sort(ids)
    return bool((ordered[1:] == ordered[:-1]).any())
